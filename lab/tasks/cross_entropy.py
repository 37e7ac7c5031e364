"""Cross-entropy over a vocabulary in few passes over the logits, the largest array of a training step."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array


def token_weights(batch: Mapping[str, Array]) -> Array:
    """float32 (B, L) for "tokens" (B, L+1): the weight of each target, 0 for padding and where "learn" is 0."""
    shape = batch["tokens"][:, 1:].shape
    weight_BL = jnp.broadcast_to(batch["weight"][:, None], shape).astype(jnp.float32)
    return weight_BL * batch["learn"] if "learn" in batch else weight_BL


@jax.custom_jvp
def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array, Array]:
    """(cross-entropy in nats, log of the softmax normaliser, 1 if argmax == target else 0), each (...), of float32
    logits (..., V) and int targets (...) in [0, V). The argmax is the first of equal logits.

    The forward pass reads the logits twice (once on GPUs). The gradient, softmax - one-hot, reads them once more, in
    one kernel that also rounds.
    """
    return _computed(logits, targets)[0]


@cross_entropy.defjvp
@jax.named_scope("loss")
def _tangents(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[tuple, tuple]:
    (logits, targets), change = primals, tangents[0]
    (nll, log_z, right), shift, log_sum = _computed(logits, targets)
    # Subtract the row maximum first, to keep precision.
    softmax = jnp.exp((logits - shift[..., None]) - log_sum[..., None])
    one_hot = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    return (nll, log_z, right), (((softmax - one_hot) * change).sum(-1), (softmax * change).sum(-1),
                                 jnp.zeros_like(right))


@jax.named_scope("loss")  # profiles group its operations by this name
def _computed(logits: Array, targets: Array) -> tuple[tuple[Array, Array, Array], Array, Array]:
    """(the result of `cross_entropy`, finite maximum m, log sum exp(logits - m))"""
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    largest, shift, total, first = jax.lax.platform_dependent(logits, targets, cuda=_one_pass, default=_two_passes)
    log_sum = jnp.log(total)
    right = ((target == largest) & first).astype(logits.dtype)
    return (log_sum - (target - shift), shift + log_sum, right), shift, log_sum


Statistics = tuple[Array, Array, Array, Array]
"""(maximum, m = the maximum if finite else 0, sum exp(logits - m), whether no logit before the target's equals the
maximum), (...) each."""


def _two_passes(logits: Array, targets: Array) -> Statistics:
    largest = jax.lax.stop_gradient(logits.max(-1))
    # jnp.argmax would take as long on CPUs as everything else here.
    before = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) < targets[..., None]
    equals = jnp.where(before & (logits == largest[..., None]), 1.0, 0.0).sum(-1)
    shift = jnp.where(jnp.isfinite(largest), largest, 0.0)
    return largest, shift, jnp.exp(logits - shift[..., None]).sum(-1), equals == 0


def _one_pass(logits: Array, targets: Array) -> Statistics:
    """One reduction of (maximum, its first index, sum of exponentials), as in the online softmax of
    Milakov & Gimelshein (2018): a GPU takes as long to read the logits as for all arithmetic. CPUs run a scalar loop.
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
