"""Language modelling: next-token prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from lab.errors import UserError
from lab.tasks.base import EvalResult, Loss, Task, apply
from lab.tasks.chunks import check_chunk, check_head, over_chunks
from lab.tasks.cross_entropy import cross_entropy, token_weights
from lab.tasks.text_report import text_report


@dataclass(frozen=True)
class LanguageModel(Task):
    """Next-token prediction: cross-entropy in nats per token.

    Metrics: loss (plain cross-entropy, without smoothing and z-loss), accuracy, bits_per_byte (comparable across
    tokenizers), objective (the optimised loss, if smoothing or z-loss is on), and perplexity.
    """

    fields: ClassVar[tuple[str, ...]] = ("tokens",)

    label_smoothing: float = 0.0
    """Mix the target with the uniform distribution (Szegedy et al. 2016): (1-e) nll + e mean over tokens of nll."""
    z_loss: float = 0.0
    """Add z_loss * log(Z)^2, which keeps the softmax normaliser near 1 (PaLM, Chowdhery et al. 2022)."""
    chunk: int | None = field(default=None, metadata={"fingerprint": False})  # does not change the result
    """Compute the logits of this many positions per row at a time (None: all). Sums and gradients are the same. GPT
    small, 64 rows of 1,024 tokens: float32 logits take 12.3 GiB and their gradient 6.1. Compiled for an H200
    (2026-11-23), the step needs 36.9 GiB; 23.4 with chunks of 256, and 20.0 with chunks of 64. The kernel's gradient is
    read and written once per chunk: chunks of 64 move 3 % more bytes than chunks of 256."""
    samples: int = 4
    """Number of texts to write to samples/ when a run ends."""

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        if isinstance(self.label_smoothing, int | float) and not 0 <= self.label_smoothing < 1:
            raise UserError(f"--task.label-smoothing must be in [0, 1), not {self.label_smoothing}.")
        if isinstance(self.z_loss, int | float) and not 0 <= self.z_loss < float("inf"):
            raise UserError(f"--task.z-loss must be 0 or more, not {self.z_loss}.")
        check_chunk(self.chunk)
        if self.samples < 0:
            raise UserError(f"--task.samples must be 0 or more, not {self.samples}.")

    def init(self, model: nn.Module, key: Array, batch: Mapping[str, Array]) -> dict[str, Any]:
        """Variables for `batch`, which has "tokens" int (B, L+1).

        Raises:
          UserError: `chunk` is set, but the model cannot return hidden states without the head.
        """
        check_head(model, self.chunk)
        return model.init(key, batch["tokens"][:1, :-1], train=False)

    def loss(self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array],
             rngs: Mapping[str, Array], train: bool) -> Loss:
        """`batch`: "tokens" int (B, L+1), "bytes" int (B,) of the targets, "weight" (B,) 1 real and 0 padding;
        optionally "vocab" (B,), the tokenizer's number of ids, if the model's vocabulary is padded; "learn" (B, L), 1
        where a target counts; "positions" and "documents" (B, L): see `GPT`."""
        inputs_BL, targets_BL = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        weight_BL = token_weights(batch)
        given = {"rngs": rngs, "train": train} | {x: batch[x] for x in ("positions", "documents") if x in batch}
        numbers = None if self._plain() else (self.label_smoothing, self.z_loss, batch.get("vocab", [None])[0])
        if self.chunk is None:
            logits_BLV, model_state = apply(model, variables, inputs_BL, **given)
            objective, (nll, right) = token_sums(logits_BLV, (targets_BL, weight_BL), numbers)
        else:
            (x_BLD, kernel_DV), model_state = apply(model, variables, inputs_BL, **given, head=False)
            objective, (nll, right) = over_chunks(lambda x, kernel, *rest: token_sums(model.logits(x, kernel), *rest),
                                                  self.chunk, x_BLD, kernel_DV, (targets_BL, weight_BL), numbers)
        weight = weight_BL.sum()
        metrics = {"loss": (nll, weight), "accuracy": (right, weight),
                   "bits_per_byte": (nll / jnp.log(2.0), (batch["bytes"] * batch["weight"]).sum())}
        return objective, weight, metrics | ({"objective": (objective, weight)} if numbers else {}), model_state

    def _plain(self) -> bool:
        return all(isinstance(x, int | float) and x == 0 for x in (self.label_smoothing, self.z_loss))

    def summary(self, means: Mapping[str, float], counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Perplexity: exp of the mean cross-entropy."""
        return {"perplexity": float(np.exp(means["loss"]))}

    def artifacts(self, outcome: EvalResult) -> list[str]:
        """Writes sampled texts to samples/; returns lines to print, with gzip and xz for comparison."""
        return text_report(outcome, self.samples)


def token_sums(logits_BLV: Array, given: tuple[Array, Array], numbers: tuple[Any, ...] | None) -> tuple[Array, Any]:
    """(objective, (cross-entropy, correct predictions)). `given`: targets and weights; `numbers`: smoothing, z-loss and
    the tokenizer's number of ids (None: all). Ids that only pad the vocabulary get no smoothing mass. They stay in the
    softmax, where training soon drives their probability to 0 (untrained: log(50,304 / 50,257) = 0.0009 nats).
    """
    targets_BL, weight_BL = given
    nll_BL, log_z_BL, right_BL = cross_entropy(logits_BLV, targets_BL)
    nll = (nll_BL * weight_BL).sum()
    others = nll, (right_BL * weight_BL).sum()
    if numbers is None:
        return nll, others
    smoothing, z_loss, vocab = numbers
    if vocab is None:
        uniform_BL = log_z_BL - logits_BLV.mean(axis=-1)
    else:
        real_V = jnp.arange(logits_BLV.shape[-1]) < vocab
        uniform_BL = log_z_BL - jnp.where(real_V, logits_BLV, 0).sum(axis=-1) / real_V.sum()
    objective_BL = (1 - smoothing) * nll_BL + smoothing * uniform_BL
    return ((objective_BL + z_loss * jnp.square(log_z_BL)) * weight_BL).sum(), others
