"""Cross-entropy over a vocabulary in few passes over the logits, which are the largest array of an update."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_jvp
def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array, Array]:
    """Of float32 logits (..., V) and int targets (...) in [0, V): the cross-entropy in nats, the log of the softmax's
    normaliser, and whether the largest logit, the first of equals, is the target's (1 or 0), (...) each.

    The logits are read twice, and once more for the gradient, softmax - one-hot, in one kernel that also rounds it.
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
    largest = jax.lax.stop_gradient(logits.max(-1))
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # Not jnp.argmax: CPUs take as long over it as over all the rest, and GPUs read everything once more for it.
    before = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) < targets[..., None]
    equals = jnp.where(before & (logits == largest[..., None]), 1.0, 0.0).sum(-1)
    shift = jnp.where(jnp.isfinite(largest), largest, 0.0)
    log_sum = jnp.log(jnp.exp(logits - shift[..., None]).sum(-1))
    right = ((target == largest) & (equals == 0)).astype(logits.dtype)
    return (log_sum - (target - shift), shift + log_sum, right), shift, log_sum
