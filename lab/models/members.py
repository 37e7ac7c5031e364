"""Models of several members, each trained as if it were alone: what they return, and an optimizer for each member."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax
from jax import Array


class Several(nn.Module):
    """The base of models whose parameters, statistics and output belong to members, all of one kind.

    Variables are stacked along a first axis of length `members`, under the path of the member's own with "member/"
    before it. The output is a `Members`. Nothing else says that there are members: no rank, no name.
    """

    member: nn.Module
    """The model that is repeated."""
    members: int = 5
    """How many members M."""


class Members(NamedTuple):
    """The outputs of all members."""

    values: Array
    """(B, M, ...)"""


def per_member(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """`tx` for each member by itself: norms, factored moments and orthogonal steps see one member's arrays only."""
    def update(grads: Any, state: Any, params: Any, **model_state: Any) -> tuple[Any, Any]:
        return jax.vmap(lambda g, s, p, e: tx.update(g, s, p, **e))(grads, state, params, model_state)

    return optax.GradientTransformationExtraArgs(jax.vmap(tx.init), update)
