"""GPT: a pre-norm decoder-only Transformer. The defaults are GPT-2 small (Radford et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lab.errors import UserError
from lab.models.attention import within
from lab.models.dropout import dropout
from lab.models.layers import Embed, Transformer
from lab.models.precision import elementwise, project


class GPT(Transformer):
    """Decoder-only language model: token ids (B, L) -> float32 logits (B, L, V)."""

    vocab: int | None = None
    """Vocabulary size V, at least the tokenizer's; None: the tokenizer's."""
    tied: bool = True
    """The output projection is the transpose of the token embedding."""
    softcap: float | None = None
    """Squash logits into (-softcap, softcap) with a tanh (Gemma 2); None: no softcap."""

    def validate(self) -> None:
        """Raises UserError if the fields contradict each other."""
        super().validate()
        if self.vocab is not None and self.vocab < 1:
            raise UserError(f"--model.vocab must be at least 1, not {self.vocab}.")
        if self.softcap is not None and self.softcap <= 0:
            raise UserError(f"--model.softcap must be above 0, or None, not {self.softcap}.")

    def check(self, metadata: Mapping[str, int]) -> None:
        """Raises UserError if data with this metadata (vocab, length) does not fit the model."""
        if metadata.get("vocab", 0) > (self.vocab or math.inf):
            raise UserError(f"The vocabulary is too small: the tokenizer has {metadata['vocab']} tokens and the model "
                            f"{self.vocab}. Use --model.vocab {metadata['vocab']}.")
        if metadata.get("length", 0) > self.context:
            raise UserError(f"--data.length {metadata['length']} is longer than --model.context {self.context}.")

    @nn.compact
    def __call__(self, tokens_BL: Array, *, train: bool, mask: Array | None = None, positions: Array | None = None,
                 documents: Array | None = None, decode: bool = False, head: bool = True) -> Any:
        """`mask` (B, L): 1 where a token is real. `positions`: (L,) or (B, L), default 0..L-1. `documents` (B, L): a
        number per token; attention stays among tokens of the same one. Not with `decode`.

        With `decode` the keys and values are written to the "cache" collection (`context` rows) at `positions`, and
        each query attends to the cache up to its own position: one call with L > 1 prefills, calls with L = 1 decode.

        Without `head` it returns the arguments of `logits`: the last hidden states (B, L, D) and the kernel (D, V).
        """
        positions = jnp.atleast_2d(jnp.arange(tokens_BL.shape[1]) if positions is None else positions)
        wte = Embed(self.vocab, self.width, name="wte")
        x_BLD = wte(tokens_BL)
        if self.position == "learned":
            x_BLD = elementwise(jnp.add, x_BLD, Embed(self.context, self.width, name="wpe")(positions))
        x_BLD = dropout(self, x_BLD, self.dropout, train)
        x_BLD = self.stack(x_BLD, positions, within(documents, mask), causal=True, train=train, decode=decode)
        if self.tied:
            kernel_DV = wte.embedding.T.astype(x_BLD.dtype)
        else:
            kernel_DV = self.param("head", nn.initializers.normal(0.02), (self.width, self.vocab)).astype(x_BLD.dtype)
        return self.logits(x_BLD, kernel_DV) if head else (x_BLD, kernel_DV)

    def logits(self, x_BLD: Array, kernel_DV: Array) -> Array:
        """Float32 logits (B, L, V) of hidden states, which may be those of some positions only."""
        logits_BLV = project(x_BLD, kernel_DV, None, jnp.float32)
        return logits_BLV if self.softcap is None else self.softcap * jnp.tanh(logits_BLV / self.softcap)
