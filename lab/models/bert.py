"""BERT: a bidirectional Transformer encoder. The defaults are BERT base (Devlin et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lab.errors import UserError
from lab.models.dropout import dropout
from lab.models.layers import ACTIVATIONS, Dense, Embed, Transformer
from lab.models.linear import check_classes
from lab.models.precision import elementwise, project


class BERT(Transformer):
    """Encoder of token ids (B, L), with one of two heads on the same trunk, or none.

    `classes` None: masked-LM logits (B, L, V), as in the paper: dense, gelu, norm, transposed token embedding, bias.
    `classes` C: logits (B, C) of a pooled text (a Transformer text classifier). All logits are float32.
    The trunk's parameter paths do not depend on the head, so a classifier can start from a masked LM. The heads'
    parameters are named `mlm_*`, `pooler` and `classify`.

    The blocks are pre-norm by default; the original is post-norm (`norm_place`, with `mlp="gelu_exact"` and
    `norm_epsilon=1e-12`). Pre-norm trains stably from scratch at larger learning rates and needs little warmup (Xiong
    et al. 2020). It adds one norm after the last block. The original classifies by `pool="pooler"`, whose dense layer
    next-sentence prediction trains.

    For small budgets use rotary positions. With learned positions a masked LM first only learns token frequencies
    (Tiny Shakespeare as bytes, width 64, 2 blocks: loss 3.3 after 200 steps; rotary 2.2, and 1.9 after 500).
    """

    context: int = 512
    """The longest sequence, in tokens."""
    dropout: float = 0.1
    """Dropout rate on embeddings, attention probabilities, both residual branches and before the classifier."""
    vocab: int | None = None
    """Vocabulary size V, at least the tokenizer's, plus 1 for [MASK] (the last id) in masked LM; None: this minimum."""
    segments: int = 2
    """Number of segment embeddings (2 for sentence pairs); 0: none."""
    classes: int | None = None
    """Classes C of the classification head; None: the masked-LM head."""
    pool: Literal["first", "mean", "pooler"] = "first"
    """One vector of a text: its first real token, the mean of its real tokens, or a dense tanh layer on the first."""
    output: Literal["logits", "embedding", "hidden"] = "logits"
    """logits: of the head; embedding: (B, D), the pooled text scaled to length 1 (Reimers & Gurevych 2019); hidden:
    the last hidden states (B, L, D). All are float32."""
    mask_id: int | None = None
    """Id of [MASK]; None: the last of the vocabulary."""

    def validate(self) -> None:
        """Raises UserError if the fields contradict each other."""
        super().validate()
        least = {"vocab": 1 if self.classes else 3, "segments": 0, "classes": 1, "mask_id": 0}
        for name, value in ((name, getattr(self, name)) for name in least):
            if value is not None and value < least[name]:
                raise UserError(f"--model.{name.replace('_', '-')} must be at least {least[name]}, not {value}.")

    @property
    def reserved_ids(self) -> int:
        """Number of ids added to the tokenizer's: 1 for [MASK] in masked LM, unless `mask_id` says which it is."""
        return int(self.classes is None and self.output == "logits" and self.mask_id is None)

    def check(self, metadata: Mapping[str, int]) -> None:
        """Raises UserError if data with this metadata (vocab, length, classes) does not fit the model."""
        vocab, length = metadata.get("vocab", 0), metadata.get("length", 0)
        if vocab > (self.vocab or math.inf):
            raise UserError(f"The vocabulary is too small: the tokenizer has {vocab} tokens and the model "
                            f"{self.vocab}. Use --model.vocab {vocab + self.reserved_ids}.")
        if self.reserved_ids and vocab == self.vocab:
            raise UserError(f"There is no id left for [MASK], the last of the model's vocabulary: the tokenizer has "
                            f"{vocab} tokens. Use --model.vocab {vocab + 1}.")
        if length > self.context:
            raise UserError(f"--data.length {length} is longer than --model.context {self.context}.")
        if self.classes is not None and self.output == "logits":  # a masked LM ignores the classes
            check_classes(self.classes, metadata)

    @nn.compact
    def __call__(self, tokens_BL: Array, *, train: bool, mask: Array | None = None, segments: Array | None = None,
                 select: Array | None = None) -> Array:
        """`mask` (B, L): 1 where a token is real; padding does not change the result. `segments` (B, L), default 0.

        `select` int (B, M): compute masked-LM logits at these positions only, (B, M, V). In a small model the head is
        most of the compute, and training needs it at 15 % of the positions.

        Raises:
          UserError: `segments` given, but the model has no segment embedding.
        """
        if segments is not None and not self.segments:
            raise UserError("The data has segments and the model no embedding for them. Use --model.segments 2.")
        positions = jnp.atleast_2d(jnp.arange(tokens_BL.shape[1]))
        wte = Embed(self.vocab, self.width, name="wte")
        x_BLD = wte(tokens_BL)
        if self.position == "learned":
            x_BLD = elementwise(jnp.add, x_BLD, Embed(self.context, self.width, name="wpe")(positions))
        if self.segments:
            segments = jnp.zeros_like(positions) if segments is None else segments
            x_BLD = elementwise(jnp.add, x_BLD, Embed(self.segments, self.width, name="wse")(segments))
        x_BLD = self.normed("embedding_norm", x_BLD)
        x_BLD = dropout(self, x_BLD, self.dropout, train)
        x_BLD = self.stack(x_BLD, positions, mask, causal=False, train=train)
        if self.output == "hidden":
            return x_BLD.astype(jnp.float32)
        if self.output == "embedding":
            pooled_BD = self._pooled(x_BLD, mask)
            return pooled_BD / jnp.maximum(jnp.linalg.norm(pooled_BD, axis=-1, keepdims=True), 1e-12)
        if self.classes is not None:
            return self._classify(x_BLD, mask, train)
        if select is not None:
            x_BLD = jnp.take_along_axis(x_BLD, select[..., None], axis=1)
        return self._masked_lm(x_BLD, wte.embedding)

    def _masked_lm(self, x_BLD: Array, embedding_VD: Array) -> Array:
        activation = ACTIVATIONS.get(self.mlp, nn.gelu)
        h_BLD = elementwise(activation, Dense(self.width, bias=self.bias, stddev=0.02, name="mlm_dense")(x_BLD))
        h_BLD = self.normed("mlm_norm", h_BLD)
        bias_V = self.param("mlm_bias", nn.initializers.zeros, (self.vocab,))
        return project(h_BLD, embedding_VD.T.astype(h_BLD.dtype), bias_V, jnp.float32)

    def _pooled(self, x_BLD: Array, mask: Array | None) -> Array:
        """float32 (B, D). A text without a real token is pooled to zeros, so its result does not depend on padding."""
        mask_BL = jnp.ones(x_BLD.shape[:2]) if mask is None else mask.astype(jnp.float32)
        if self.pool == "mean":
            weight_BL = mask_BL / jnp.maximum(mask_BL.sum(axis=1, keepdims=True), 1)
        else:  # padding may stand on the left
            weight_BL = nn.one_hot(jnp.argmax(mask_BL, axis=1), mask_BL.shape[1]) * mask_BL
        pooled_BD = jnp.einsum("BL,BLD->BD", weight_BL, x_BLD.astype(jnp.float32))
        if self.pool == "pooler":
            dense = Dense(self.width, bias=True, stddev=0.02, name="pooler")
            pooled_BD = jnp.tanh(dense(pooled_BD.astype(x_BLD.dtype)).astype(jnp.float32))
        return pooled_BD

    def _classify(self, x_BLD: Array, mask: Array | None, train: bool) -> Array:
        """Class logits."""
        init = nn.initializers.normal(0.02)
        head = nn.Dense(self.classes, dtype=jnp.float32, kernel_init=init, name="classify")
        return head(dropout(self, self._pooled(x_BLD, mask), self.dropout, train))
