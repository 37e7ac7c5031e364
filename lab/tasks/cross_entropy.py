"""Cross-entropy over a vocabulary in few passes over the logits, which are the largest array of an update."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_jvp
def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array, Array]:
    """Of float32 logits (..., V) and int targets (...) in [0, V): the cross-entropy in nats, the log of the softmax's
    normaliser, and whether the largest logit, the first of equals, is the target's (1 or 0), (...) each.

    The logits are read twice (on GPUs once), and once more for the gradient, softmax - one-hot, in one kernel that
    also rounds it.
    """
    return _computed(logits, targets)[0]


@cross_entropy.defjvp
@jax.named_scope("loss")
def _tangents(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[tuple, tuple]:
    (logits, targets), change = primals, tangents[0]
    (nll, log_z, right), shift, log_sum = _computed(logits, targets)
    # In this order: what all logits of a row have in common must not cost the small differences their digits.
    softmax = jnp.exp((logits - shift[..., None]) - log_sum[..., None])
    one_hot = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    return (nll, log_z, right), (((softmax - one_hot) * change).sum(-1), (softmax * change).sum(-1),
                                 jnp.zeros_like(right))


@jax.named_scope("loss")  # profiles tell its operations by this name
def _computed(logits: Array, targets: Array) -> tuple[tuple[Array, Array, Array], Array, Array]:
    """(what `cross_entropy` returns, the largest logit, the log of the sum of the exponentials beside it)"""
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    largest, shift, total, first = jax.lax.platform_dependent(logits, targets, cuda=_one_pass, default=_two_passes)
    log_sum = jnp.log(total)
    right = ((target == largest) & first).astype(logits.dtype)
    return (log_sum - (target - shift), shift + log_sum, right), shift, log_sum


Statistics = tuple[Array, Array, Array, Array]
"""(largest logit, the same where it is finite, sum of exponentials beside that, whether no logit before the target's
is as large), (...) each."""


def _two_passes(logits: Array, targets: Array) -> Statistics:
    largest = jax.lax.stop_gradient(logits.max(-1))
    # Not jnp.argmax: CPUs take as long over it as over all the rest.
    before = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) < targets[..., None]
    equals = jnp.where(before & (logits == largest[..., None]), 1.0, 0.0).sum(-1)
    shift = jnp.where(jnp.isfinite(largest), largest, 0.0)
    return largest, shift, jnp.exp(logits - shift[..., None]).sum(-1), equals == 0


def _one_pass(logits: Array, targets: Array) -> Statistics:
    """One reduction of (maximum, its first index, sum of exponentials), as Milakov & Gimelshein (2018) compute a
    softmax: a GPU takes as long over reading the logits as over all the arithmetic. CPUs run it as a plain loop.
    """
    def join(a: tuple[Array, Array, Array], b: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        (x, i, p), (y, j, q) = a, b
        largest, small = jax.lax.max(x, y), jax.lax.exp(-jax.lax.abs(x - y))
        total = jax.lax.select(x >= y, p + q * small, p * small + q)
        return largest, jax.lax.select((x > y) | ((x == y) & (i < j)), i, j), total

    lowest, never = jnp.finfo(logits.dtype).min, jnp.iinfo(targets.dtype).max
    index = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    largest, first, total = jax.lax.reduce(
        (logits, index, jnp.ones_like(logits)),
        (jnp.asarray(lowest, logits.dtype), jnp.asarray(never, targets.dtype), jnp.zeros((), logits.dtype)),
        join, (logits.ndim - 1,))
    return largest, largest, total, first == targets
