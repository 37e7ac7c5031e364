"""Models of several independently trained members: their base class, their output, and per-member optimizers."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax
from jax import Array


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
