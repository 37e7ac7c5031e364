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
    logprobs: bool = True
    """Whether log-probabilities are wanted."""

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
    logprobs_B: Array


def rows_of(settings: Sequence[Settings]) -> Rows:
    """The settings of several texts."""
    return Rows(np.array([s.temperature for s in settings], np.float32),
                np.array([s.top_p for s in settings], np.float32),
                np.array([s.top_k or 0 for s in settings], np.int32),
                np.array([s.seed for s in settings], np.uint32), np.array([s.logprobs for s in settings], bool))


class Sampled(NamedTuple):
    """Tokens with natural logarithms of their probabilities, before temperature, top-k and top-p; zeros if no row wants
    them."""

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
    B, T = len(token_B), min(TOP, logits_BV.shape[-1])

    def wanted() -> tuple[Array, Array, Array]:
        logp_BV = jax.nn.log_softmax(logits_BV)
        top_logp_BT, top_BT = jax.lax.top_k(logp_BV, T)
        return jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0], top_BT, top_logp_BT

    def unwanted() -> tuple[Array, Array, Array]:
        return jnp.zeros(B), jnp.zeros((B, T), jnp.int32), jnp.zeros((B, T))

    return Sampled(token_B, *jax.lax.cond(rows.logprobs_B.any(), wanted, unwanted))


def _truncated(logits_BV: Array, rows: Rows) -> Array:
    """`lab.models.generate.truncated`, with settings per row, and without its sort: sorting 49,152 logits of 16 rows
    takes a CPU 240 ms."""
    scaled_BV = logits_BV / jnp.maximum(rows.temperature_B, 1e-6)[:, None]
    B, V = scaled_BV.shape
    most_k_B = (rows.temperature_B > 0) & (rows.top_k_B > 0) & (rows.top_k_B < V)
    most_p_B = (rows.temperature_B > 0) & (rows.top_p_B < 1)

    def top_k() -> Array:
        least_B = _least(scaled_BV, jnp.ones((B, V)), jnp.where(most_k_B, rows.top_k_B, 0).astype(jnp.float32))
        return jnp.where(_ordered(scaled_BV) < least_B[:, None], -jnp.inf, scaled_BV)

    def top_p() -> Array:
        least_B = _least(possible_BV, jax.nn.softmax(possible_BV), jnp.where(most_p_B, rows.top_p_B, 0))
        return jnp.where(_ordered(possible_BV) < least_B[:, None], -jnp.inf, possible_BV)

    possible_BV = jax.lax.cond(most_k_B.any(), top_k, lambda: scaled_BV)
    return jax.lax.cond(most_p_B.any(), top_p, lambda: possible_BV)


def _ordered(x: Array) -> Array:
    """Unsigned integers in the order of float32 numbers."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _least(x_BV: Array, weights_BV: Array, wanted_B: Array) -> Array:
    """The largest number, as `_ordered`, with at least the wanted weight from it on; 0 for no weight. Bit by bit."""
    ordered_BV = _ordered(x_BV)

    def bit(i: Array, least_B: Array) -> Array:
        tried_B = least_B | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        weight_B = jnp.where(ordered_BV >= tried_B[:, None], weights_BV, 0).sum(-1)
        return jnp.where(weight_B >= wanted_B, tried_B, least_B)

    found_B = jax.lax.fori_loop(0, 32, bit, jnp.zeros(len(x_BV), jnp.uint32))
    return jnp.where(wanted_B > 0, found_B, 0)
