"""One token for each row of a batch, each row with its own sampling settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lab.errors import UserError
from lab.models.generate import check_numbers

TOP = 20  # alternatives with their log-probabilities, at most


@dataclass(frozen=True)
class Settings:
    """How the tokens of one text are sampled."""

    temperature: float = 1.0
    """Divides the logits; 0: always the most likely token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this total probability."""
    top_k: int | None = None
    """Sample from the k most likely tokens; None: from all."""
    seed: int = 0
    """A token depends on the text before it, the seed and its position."""

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        check_numbers(1, self.temperature, self.top_k, self.top_p)
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"--seed {self.seed} is out of range.")


class Rows(NamedTuple):
    """`Settings` of B rows as arrays, so that new settings do not compile again."""

    temperature_B: Array
    top_p_B: Array
    top_k_B: Array
    """0: no limit."""
    seed_B: Array
    """uint32."""


def rows_of(settings: Sequence[Settings]) -> Rows:
    """The settings of several texts."""
    return Rows(np.array([s.temperature for s in settings], np.float32),
                np.array([s.top_p for s in settings], np.float32),
                np.array([s.top_k or 0 for s in settings], np.int32), np.array([s.seed for s in settings], np.uint32))


class Sampled(NamedTuple):
    """Tokens with natural logarithms of their probabilities, before temperature, top-k and top-p."""

    token_B: Array
    logp_B: Array
    top_BT: Array
    """The T most likely tokens, T = min(`TOP`, V)."""
    top_logp_BT: Array


def pick_rows(logits_BV: Array, rows: Rows, position_B: Array) -> Sampled:
    """Samples a token per row from float32 logits; `position_B`: the positions of the tokens before.

    Row by row the token of `lab.models.generate.pick` with these settings and the key that `Session` and `generate`
    give this position.
    """
    def sampled() -> Array:
        keys_B = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(rows.seed_B, position_B)
        return jax.vmap(jax.random.categorical)(keys_B, _truncated(logits_BV, rows)).astype(jnp.int32)

    best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    hot_B = rows.temperature_B > 0
    token_B = jnp.where(hot_B, jax.lax.cond(hot_B.any(), sampled, lambda: best_B), best_B)
    logp_BV = jax.nn.log_softmax(logits_BV)
    top_logp_BT, top_BT = jax.lax.top_k(logp_BV, min(TOP, logits_BV.shape[-1]))
    return Sampled(token_B, jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0], top_BT, top_logp_BT)


def _truncated(logits_BV: Array, rows: Rows) -> Array:
    """`lab.models.generate.truncated`, with settings per row: top-k and top-p need one sort."""
    scaled_BV = logits_BV / jnp.maximum(rows.temperature_B, 1e-6)[:, None]
    V = scaled_BV.shape[-1]

    def likely() -> Array:
        sorted_BV = jnp.sort(scaled_BV, axis=-1, descending=True)
        k_B = jnp.where(rows.top_k_B > 0, jnp.minimum(rows.top_k_B, V), V)
        kth_B1 = jnp.take_along_axis(sorted_BV, k_B[:, None] - 1, axis=-1)
        sorted_BV = jnp.where(sorted_BV < kth_B1, -jnp.inf, sorted_BV)
        probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        last_B1 = jnp.maximum(jnp.sum(before_BV < rows.top_p_B[:, None], axis=-1, keepdims=True) - 1, 0)
        nucleus_B1 = jnp.where(rows.top_p_B[:, None] < 1, jnp.take_along_axis(sorted_BV, last_B1, axis=-1), -jnp.inf)
        return jnp.where(scaled_BV < jnp.maximum(kth_B1, nucleus_B1), -jnp.inf, scaled_BV)

    # A branch: sorting 49,152 logits of a few rows takes a CPU as long as a small model.
    cut_B = (rows.temperature_B > 0) & ((rows.top_p_B < 1) | (rows.top_k_B > 0))
    return jax.lax.cond(cut_B.any(), likely, lambda: scaled_BV)
