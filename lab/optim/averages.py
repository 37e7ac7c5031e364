"""EMA of the parameters and of the model's statistics, as an optax wrapper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def map_paths(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` with the leaf's path (names joined by "/") as first argument of `f`."""
    keystr = jax.tree_util.keystr
    return jax.tree.map_with_path(lambda path, *leaf: f(keystr(path, simple=True, separator="/"), *leaf), tree, *rest)


def find(state: Any, kind: type) -> Any:
    """The first node of this type in an optimizer state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return next(node for node in nodes if isinstance(node, kind))


class EmaState(NamedTuple):
    """State of `with_ema`."""

    count: jax.Array  # completed steps
    ema: Any  # float32
    model_state: Any  # EMA of the model's statistics, float32
    inner: Any

    @classmethod
    def begin(cls, params: Any, model_state: Any, inner: Any, count: jax.Array) -> EmaState:
        """The state after `count` steps, with the current values as the average."""
        ema, model_state = jax.tree.map(lambda x: jnp.array(x, jnp.float32), (params, model_state))
        return cls(count, ema, model_state, inner)


def with_ema(inner: optax.GradientTransformation, decay: Any, start: int) -> optax.GradientTransformationExtraArgs:
    """Averages the parameters and the model's statistics (`model_state`) after each step. The average starts at the
    values after `start` steps, so it needs no debiasing. The decay at step start + t, t = 0, 1, ..., is
    min(decay, (1 + t) / (10 + t)), as in TensorFlow, which quickly forgets the initial value. `decay` None: only
    `inner`.

    The statistics are averaged too, because BatchNorm statistics depend on the weights: those of the last step do not
    fit the averaged weights.
    """
    def init(params: Any, model_state: Any = ()) -> Any:
        state = inner.init(params)
        return state if decay is None else EmaState.begin(params, model_state, state, jnp.zeros([], jnp.int32))

    def update(grads: Any, state: Any, params: Any, model_state: Any = ()) -> tuple[Any, Any]:
        if decay is None:
            return inner.update(grads, state, params)
        updates, inner_state = inner.update(grads, state.inner, params)
        t = state.count - start
        d = jnp.minimum(decay, (1 + t) / (10 + t))
        ema, averaged = jax.tree.map(
            lambda e, x: jnp.where(t < 0, x.astype(e.dtype), e + (1 - d) * (x - e)),
            (state.ema, state.model_state),
            (optax.apply_updates(params, updates), model_state),
        )
        return updates, EmaState(state.count + 1, ema, averaged, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
