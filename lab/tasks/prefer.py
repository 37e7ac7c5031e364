"""Learning from preferences: direct preference optimisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array

from lab.errors import UserError
from lab.tasks.base import Loss, Task, apply
from lab.tasks.chunks import check_chunk, check_head, row_sums
from lab.tasks.cross_entropy import cross_entropy


@dataclass(frozen=True)
class Prefer(Task):
    """Direct preference optimisation, DPO (Rafailov et al. 2023, eq. 7): a language model learns to prefer one of two
    answers y to a prompt x, without a reward model and without leaving its reference too far.

    The reward of an answer is beta (log p(y | x) - log p_ref(y | x)), with the sums of the log-probabilities of its
    tokens. The loss of a pair is -log sigmoid(margin), the margin being the reward of the chosen answer less that of
    the rejected one. The reference is the model as the run begins (with adapters, their base): see
    `lab.train.reference`.

    Metrics, each a mean over pairs: loss (plain, in nats), objective (the optimised loss, with smoothing), accuracy
    (share of pairs with a margin above 0), margin, chosen_reward, rejected_reward, and kl_on_chosen, log p - log p_ref
    of the chosen answers in nats. The last would estimate KL(p || p_ref) if the answers were the model's own samples.
    They are not, so it may be negative; it shows which way and how far the model has moved on them.
    """

    fields: ClassVar[tuple[str, ...]] = ("pair",)
    curves: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "margin", "kl_on_chosen")
    reference: ClassVar[dict[str, str]] = {"reference": "log_probs"}

    beta: float = 0.1
    """How much the model is kept near its reference: a larger beta reaches the same margin with smaller changes."""
    label_smoothing: float = 0.0
    """Probability that a pair is labelled the wrong way round ("conservative DPO"):
    -(1-e) log sigmoid(margin) - e log sigmoid(-margin)."""
    chunk: int | None = field(default=None, metadata={"fingerprint": False})  # does not change the result
    """Compute the logits of this many positions per answer at a time (None: all), and again for the gradient."""

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        if isinstance(self.beta, int | float) and not 0 < self.beta < float("inf"):
            raise UserError(f"--task.beta must be above 0, not {self.beta}.")
        if isinstance(self.label_smoothing, int | float) and not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--task.label-smoothing must be in [0, 0.5), not {self.label_smoothing}: from 0.5 on the "
                            f"rejected answers would be preferred.")
        check_chunk(self.chunk)

    def init(self, model: nn.Module, key: Array, batch: Mapping[str, Array]) -> dict[str, Any]:
        """Variables for `batch`, which has "pair" int (B, 2, L+1).

        Raises:
          UserError: `chunk` is set, but the model cannot return hidden states without the head.
        """
        check_head(model, self.chunk)
        return model.init(key, batch["pair"][:1, 0, :-1], train=False)

    def loss(self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array],
             rngs: Mapping[str, Array], train: bool) -> Loss:
        """`batch`: "pair" int (B, 2, L+1), chosen and rejected; "learn" (B, 2, L), 1 where a target is of the answer;
        "reference" (B, 2), log-probabilities of both answers under the reference; "weight" (B,), 1 real, 0 padding."""
        log_probs_B2, model_state = self.log_probs(model, variables, batch, rngs, train)
        return *self.score(log_probs_B2, batch["reference"], batch["weight"]), model_state

    def score(self, log_probs_B2: Array, reference_B2: Array, weight_B: Array) -> tuple[Array, Array, dict[str, Any]]:
        """(sum of losses, sum of weights, metrics) of the log-probabilities of chosen and rejected answers."""
        ratios_B2, weight_B = log_probs_B2 - reference_B2, weight_B.astype(jnp.float32)
        rewards_B2 = self.beta * ratios_B2
        margin_B = rewards_B2[:, 0] - rewards_B2[:, 1]
        loss_B, wrong_B = jax.nn.softplus(-margin_B), jax.nn.softplus(margin_B)
        means = {"loss": loss_B, "accuracy": margin_B > 0, "margin": margin_B, "chosen_reward": rewards_B2[:, 0],
                 "rejected_reward": rewards_B2[:, 1], "kl_on_chosen": ratios_B2[:, 0]}
        e = self.label_smoothing
        if not isinstance(e, int | float) or e:  # or traced
            means["objective"] = (1 - e) * loss_B + e * wrong_B
        metrics = {name: ((x_B * weight_B).sum(), weight_B.sum()) for name, x_B in means.items()}
        return *metrics.get("objective", metrics["loss"]), metrics

    def log_probs(self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array],
                  rngs: Mapping[str, Array], train: bool) -> tuple[Array, dict[str, Any]]:
        """(log-probabilities of both answers, float32 (B, 2), in nats; mutable collections)."""
        tokens = rearrange(batch["pair"], "B two L -> (B two) L")
        given = tokens[:, 1:], rearrange(batch["learn"], "B two L -> (B two) L")
        if self.chunk is None:
            logits, model_state = apply(model, variables, tokens[:, :-1], rngs=rngs, train=train)
            found = _log_prob(logits, *given)
        else:
            (hidden, kernel), model_state = apply(model, variables, tokens[:, :-1], rngs=rngs, train=train, head=False)
            found = row_sums(lambda hidden, kernel, *given: _log_prob(model.logits(hidden, kernel), *given),
                             self.chunk, hidden, kernel, *given)
        return rearrange(found, "(B two) -> B two", two=2), model_state

    def predict(self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]) -> dict[str, Array]:
        """"log_probs" float32 (B, 2) of the chosen and the rejected answer."""
        return {"log_probs": self.log_probs(model, variables, batch, {}, False)[0]}

    def columns(self, predictions: Mapping[str, np.ndarray], data: Any) -> dict[str, list[Any]]:
        """The log-probability of each answer, in nats."""
        return {f"{name}_log_prob": predictions["log_probs"][:, i].tolist()
                for i, name in enumerate(("chosen", "rejected"))}


def _log_prob(logits_BLV: Array, targets_BL: Array, learn_BL: Array) -> Array:
    """Log-probability of each row's targets that count, (B,)."""
    return -(cross_entropy(logits_BLV, targets_BL)[0] * learn_BL).sum(-1)
