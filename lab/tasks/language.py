"""Language modelling: next-token prediction, and what its text looks like beside gzip's."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lab.errors import UserError
from lab.tasks.base import Loss, Outcome, Task, apply

COMPRESSED = 4_000_000  # bytes of validation text that gzip and xz are tried on


@dataclass(frozen=True)
class LanguageModel(Task):
    """Next-token prediction: cross-entropy in nats a token.

    Metrics: loss (plain cross-entropy, whatever is optimised), accuracy, bits_per_byte (comparable across
    tokenizers), objective (what is optimised, where smoothing or z-loss make it differ), and perplexity.
    """

    label_smoothing: float = 0.0
    """Mix the target with the uniform distribution (Szegedy et al. 2016): (1-e) nll + e mean over tokens of nll."""
    z_loss: float = 0.0
    """Add z_loss * log(Z)^2, which keeps the softmax's normaliser near 1 (PaLM, Chowdhery et al. 2022)."""
    samples: int = 4
    """Texts to write to samples/ when a run ends."""

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        if isinstance(self.label_smoothing, int | float) and not 0 <= self.label_smoothing < 1:
            raise UserError(f"--task.label-smoothing must be in [0, 1), not {self.label_smoothing}.")
        if isinstance(self.z_loss, int | float) and not 0 <= self.z_loss < float("inf"):
            raise UserError(f"--task.z-loss must be 0 or more, not {self.z_loss}.")
        if self.samples < 0:
            raise UserError(f"--task.samples must be 0 or more, not {self.samples}.")

    def init(self, model: nn.Module, key: Array, batch: Mapping[str, Array]) -> dict[str, Any]:
        """Variables for `batch`, which has "tokens" int (B, L+1)."""
        return model.init(key, batch["tokens"][:1, :-1], train=False)

    def loss(self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array],
             rngs: Mapping[str, Array], train: bool) -> Loss:
        """`batch`: "tokens" int (B, L+1), "bytes" int (B,) of the targets, "weight" (B,) 1 real and 0 padding."""
        inputs_BL, targets_BL = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        weight_BL = jnp.broadcast_to(batch["weight"][:, None], targets_BL.shape).astype(jnp.float32)
        logits_BLV, extra = apply(model, variables, inputs_BL, rngs=rngs, train=train)
        log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
        nll_BL = log_z_BL - jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
        weight, nll = weight_BL.sum(), (nll_BL * weight_BL).sum()
        metrics = {"loss": (nll, weight),
                   "accuracy": (((jnp.argmax(logits_BLV, -1) == targets_BL) * weight_BL).sum(), weight),
                   "bits_per_byte": (nll / jnp.log(2.0), (batch["bytes"] * batch["weight"]).sum())}
        if self._plain():
            return nll, weight, metrics, extra
        uniform_BL = log_z_BL - logits_BLV.mean(axis=-1)
        objective_BL = (1 - self.label_smoothing) * nll_BL + self.label_smoothing * uniform_BL
        objective = ((objective_BL + self.z_loss * jnp.square(log_z_BL)) * weight_BL).sum()
        return objective, weight, metrics | {"objective": (objective, weight)}, extra

    def _plain(self) -> bool:
        return all(isinstance(x, int | float) and x == 0 for x in (self.label_smoothing, self.z_loss))

    def summary(self, means: Mapping[str, float], counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Perplexity: the exponential of the mean cross-entropy."""
        return {"perplexity": float(np.exp(means["loss"]))}

    def artifacts(self, outcome: Outcome) -> list[str]:
        """Writes sampled texts to samples/; returns lines for a person."""
        from lab.generate import sample_texts

        model, data, folder = outcome.model, outcome.data, outcome.folder
        spread = np.linspace(0, len(data.validation) - 1, min(self.samples, len(data.validation))).astype(int)
        prompts = [data.decode(row[: min(32, len(row) // 4)])
                   for row in data.validation[spread]["tokens"]]
        texts = sample_texts(model, outcome.variables["params"], data, prompts, seed=outcome.seed,
                             new_tokens=model.context, temperature=0.8, top_k=50)
        (folder / "samples").mkdir(exist_ok=True)
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            (folder / "samples" / f"{i}.txt").write_text(f"--- prompt\n{prompt}\n--- continuation\n{text}\n")
        shown = [prompt + text for prompt, text in zip(prompts, texts, strict=True)][:1]
        raw = data.validation_bytes(COMPRESSED)
        others = {"gzip -9": gzip.compress(raw, 9), "xz -9": lzma.compress(raw, preset=9)}
        beside = ", ".join(f"{name} {8 * len(packed) / len(raw):.3f}" for name, packed in others.items())
        return [f"Validation text in bits per byte: this model {outcome.means['bits_per_byte']:.3f}; {beside} "
                f"(of {len(raw) / 1e3:,.0f} kB)",
                *(f"Sample (more in {folder / 'samples'}):" for _ in shown),
                *(f"  | {line}" for text in shown for line in text.splitlines())]
