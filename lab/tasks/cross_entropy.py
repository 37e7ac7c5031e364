"""Cross-entropy over a vocabulary in few passes over the logits, which are the largest array of an update."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_jvp
def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array, Array]:
    """Of float32 logits (..., V) and whole-number targets (...): (cross-entropy in nats, log of the softmax's
    normaliser, whether the largest logit, the first of equals, is the target's), (...) each.

    The logits are read twice, and once more for the gradient, softmax - one-hot, in one kernel that also rounds it.
    """
    largest, target = logits.max(-1), jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # Not jnp.argmax: CPUs take as long over it as over all the rest, and GPUs read everything once more for it.
    before = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) < targets[..., None]
    equals = jnp.where(before & (logits == largest[..., None]), 1.0, 0.0).sum(-1)
    shift = jnp.where(jnp.isfinite(largest), largest, 0.0)
    log_z = shift + jnp.log(jnp.exp(logits - shift[..., None]).sum(-1))
    return log_z - target, log_z, ((target == largest) & (equals == 0)).astype(logits.dtype)


@cross_entropy.defjvp
def _tangents(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[tuple, tuple]:
    (logits, targets), change = primals, tangents[0]
    nll, log_z, right = cross_entropy(logits, targets)
    softmax = jnp.exp(logits - log_z[..., None])
    one_hot = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    return (nll, log_z, right), (((softmax - one_hot) * change).sum(-1), (softmax * change).sum(-1),
                                 jnp.zeros_like(right))
