"""Dropout whose rate may be a traced number."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array


def is_zero(value: Any) -> bool:
    """True for a Python 0; False for a traced number, whose value must not change the program's structure."""
    return isinstance(value, int | float) and value == 0


def dropout(module: nn.Module, x: Array, rate: float | Array, train: bool) -> Array:
    """Inverted dropout. `nn.Dropout` branches on the rate, so it cannot take a traced rate (a study's axis)."""
    if not train or is_zero(rate):
        return x
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))
