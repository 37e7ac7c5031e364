"""Models of several independently trained members: base class, output, optimizers, and the weights of a bootstrap."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

WEIGHT = "member_weight"
"""Field of a training batch, float32 (B, M): how often each member has each record in its bootstrap sample."""
SALT = 0x626F6F74  # so that no other use of the seed has these random numbers
# The distribution function of Poisson(1) at 0, 1, ...; at 11 it is 1 to the precision of float32.
POISSON = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(12)]).astype(np.float32)


class Several(nn.Module):
    """Base class of models that stack `members` copies of one model.

    Variables are stacked along a first axis of length `members`, under the member's path prefixed with "member/". The
    output is a `Members`. Code detects such models by this class and `Members`, never by array rank or name.
    """

    member: nn.Module
    """The model to repeat."""
    members: int = 5
    """Number of members M."""


class Members(NamedTuple):
    """The outputs of all members."""

    values: Array
    """(B, M, ...)"""


def per_member(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """`tx` per member: norms, factored moments and orthogonalised updates see one member's arrays only."""
    def update(grads: Any, state: Any, params: Any, **model_state: Any) -> tuple[Any, Any]:
        return jax.vmap(lambda g, s, p, e: tx.update(g, s, p, **e))(grads, state, params, model_state)

    return optax.GradientTransformationExtraArgs(jax.vmap(tx.init), update)


def bootstrap(model: nn.Module, seed: int | Array, index_B: Array) -> dict[str, Array]:
    """The field WEIGHT for records with these numbers; nothing for a model without a bootstrap.

    Poisson(1), the limit of the multinomial weights of a bootstrap sample for many records (Oza & Russell 2001, "Online
    bagging and boosting"). Each weight is a function of (seed, member, record), so it is the same in every epoch, batch
    and process, and on every device. A multinomial would need the number of records and tie their weights together.
    """
    if not getattr(model, "bootstrap", False):
        return {}
    key = jax.random.fold_in(jax.random.key(seed), SALT)

    def one(index: Array, member: Array) -> Array:
        uniform = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, member), index))
        return (uniform >= POISSON).sum().astype(jnp.float32)  # the inverse of the distribution function

    members_M = jnp.arange(model.members)
    return {WEIGHT: jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None))(index_B, members_M)}


def weighted(values_BMC: Array, batch: Mapping[str, Array]) -> Array:
    """Values of members (B, M, ...) times their WEIGHT in a batch, if it has that field."""
    return values_BMC * batch[WEIGHT][..., None] if WEIGHT in batch else values_BMC


def out_of_bag(logp_BMC: Array, weight_BM: Array) -> tuple[Array, Array]:
    """(log_p (B, C), any (B,)): the log of the mean probability over the members whose weight of the record is 0, or
    over all if there are none; and whether there are any."""
    out_BM = weight_BM == 0
    any_B = out_BM.any(1)
    out_BM = out_BM | ~any_B[:, None]
    total_BC = jax.nn.logsumexp(logp_BMC, axis=1, where=out_BM[..., None])
    return total_BC - jnp.log(out_BM.sum(1, keepdims=True)), any_B
