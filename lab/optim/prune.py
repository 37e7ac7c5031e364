"""Magnitude pruning: a wrapper of an optimizer that removes the smallest weights while it trains the others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from lab.errors import UserError
from lab.optim.matrices import Matrix
from lab.optim.optimizers import NONE, Optimizer, Params
from lab.optim.schedules import Schedule, require, require_regex


class PruneState(NamedTuple):
    """State of `Prune`."""

    count: Array  # completed steps
    masks: Any  # bool arrays of the pruned parameters: False where a weight is removed
    inner: Any


@dataclass(frozen=True)
class Prune:
    """Magnitude pruning with a schedule (Zhu & Gupta 2017) around any optimizer: Prune(AdamW(...), sparsity=0.9).

    Of each array that `include` names, the smallest weights are removed. After t steps their share is (eq. 1)
    sparsity (1 - (1 - (t - begin) / (end - begin))^3), 0 before `begin`. What is removed stays 0 in training and in
    evaluation (averages too), has no gradient, and does not come back. The masks are part of the optimizer's state.
    """

    optimizer: Optimizer
    """The optimizer of the weights that are left."""
    sparsity: float = 0.9
    """Share of the weights (channels) of each array that is removed in the end."""
    structure: Literal["unstructured", "channel"] = "unstructured"
    """What is removed: single weights; or whole output channels, by the L2 norm of their weights, with their bias. The
    channels of output layers (heads) are classes or ids, and stay."""
    begin: int = 0
    """Steps before the first removal."""
    end: int | None = None
    """Steps after which the whole share is removed; None: three quarters of the run, so that the rest recovers."""
    every: int = 10
    """Steps between removals, which sort the weights."""
    include: str = r"(^|/)kernel$"
    """Path regex of what is pruned (searched in the path): by default the kernels of dense layers and convolutions."""

    @property
    def lr(self) -> Schedule | float:
        """That of the optimizer inside, as the other properties and methods without a docstring."""
        return self.optimizer.lr

    @property
    def lr_multipliers(self) -> tuple[tuple[str, float], ...]:
        return self.optimizer.lr_multipliers

    @property
    def ema(self) -> float | None:
        return self.optimizer.ema

    @property
    def needs_matrices(self) -> bool:
        """Whether `build` needs `matrices`: to know which axes of a parameter are channels."""
        return self.structure == "channel" or self.optimizer.needs_matrices

    def freezing(self, rules: tuple[tuple[str, float], ...]) -> Prune:
        return replace(self, optimizer=self.optimizer.freezing(rules))

    def frozen(self, path: str) -> bool:
        return self.optimizer.frozen(path)

    def direction(self) -> optax.GradientTransformation:
        return self.optimizer.direction()

    def rate(self, steps: int) -> optax.Schedule:
        return self.optimizer.rate(steps)

    def validate(self, steps: int) -> None:
        """Raises UserError for a number out of range. Traced values are not checked."""
        require("sparsity", self.sparsity, "in [0, 1)", lambda v: 0 <= v < 1)
        require("begin", self.begin, "0 or more steps", lambda v: v >= 0)
        require("every", self.every, "at least 1 step", lambda v: v >= 1)
        require_regex("include", self.include)
        if (end := self.last(steps)) < self.begin:
            raise UserError(f"optim.end is {end} steps, before optim.begin, {self.begin}: the removal ends after it "
                            f"begins. Lower --optim.begin or raise --optim.end.")
        if end > steps:
            raise UserError(f"optim.end is {end} steps, more than the run's {steps}: the whole share would never be "
                            f"removed. Lower --optim.end or raise --steps.")
        self.optimizer.validate(steps)

    def last(self, steps: int) -> int:
        """`end` in a run of `steps` steps."""
        return max(3 * steps // 4, self.begin) if self.end is None else self.end

    def share(self, count: Array, steps: int) -> Array:
        """The share that is removed after `count` steps."""
        end, whole = self.last(steps), float(max(self.last(steps) - self.begin, 1))
        left = 1 - jnp.clip((count - self.begin) / whole, 0.0, 1.0)
        return jnp.where(count >= end, self.sparsity, self.sparsity * (1 - left**3))

    def build(self, steps: int, matrices: Mapping[str, Matrix] = NONE) -> optax.GradientTransformationExtraArgs:
        """See `Optimizer.build`. `init` raises UserError if `include` names nothing that can be pruned."""
        inner, end = self.optimizer.build(steps, matrices), self.last(steps)

        def init(params: Params, model_state: Any = ()) -> PruneState:
            own = flatten_dict(params, sep="/")
            masks = {path: jnp.ones(own[path].shape, bool) for path in self._pruned(own, matrices)}
            return PruneState(jnp.zeros([], jnp.int32), unflatten_dict(masks, sep="/"),
                              inner.init(params, model_state))

        def update(grads: Params, state: PruneState, params: Params, model_state: Any = ()) -> tuple[Params, Any]:
            live = masked(grads, state.masks)
            updates, inner_state = inner.update(live, state.inner, params, model_state=model_state)
            new, count = optax.apply_updates(params, updates), state.count + 1
            due = (count >= self.begin) & (count <= end) & (((count - self.begin) % self.every == 0) | (count == end))
            masks = jax.lax.cond(due, lambda: self._masks(new, state.masks, matrices, self.share(count, steps)),
                                 lambda: state.masks)
            # A weight that is removed now goes to w - w, exactly 0; one that was, stays there.
            return masked(updates, masks, jax.tree.map(jnp.negative, params)), PruneState(count, masks, inner_state)

        return optax.GradientTransformationExtraArgs(init, update)

    def _pruned(self, params: Mapping[str, Array], matrices: Mapping[str, Matrix]) -> list[str]:
        """Paths of the parameters that have a mask. Raises UserError if there is none."""
        named = [path for path in params if re.search(self.include, path) and not self.frozen(path)]
        if self.structure == "unstructured":
            found = named
        else:
            found = [path for path in named if path in matrices and not matrices[path].head]
            found += [bias for path in found if (bias := _bias(path, params, matrices))]
        if not found:
            but = " that is a hidden, trained matrix" if self.structure == "channel" else " that is trained"
            shown = ", ".join(list(params)[:: max(len(params) // 4, 1)][:5])
            raise UserError(f"optim.include: {self.include!r} matches no parameter{but}. Some paths: {shown}.")
        return found

    def _masks(self, params: Params, masks: Any, matrices: Mapping[str, Matrix], share: Array) -> Any:
        """The masks with this share removed."""
        own, before, found = flatten_dict(params, sep="/"), flatten_dict(masks, sep="/"), {}
        for path in before:
            if self.structure == "unstructured":
                found[path] = before[path] & largest(jnp.abs(own[path]), share, ())
            elif path in matrices:
                matrix = matrices[path]
                norms = jnp.sqrt(jnp.square(own[path]).sum(matrix.inputs, keepdims=True))
                found[path] = before[path] & largest(norms, share, matrix.stack)
                if bias := _bias(path, before, matrices):
                    found[bias] = jnp.squeeze(found[path].any(matrix.inputs, keepdims=True), matrix.inputs)
        return unflatten_dict(found, sep="/")

    def eval_params(self, opt_state: Any, params: Params) -> Params:
        """Parameters for evaluation and sampling: those of the optimizer inside, pruned."""
        return masked(self.optimizer.eval_params(opt_state.inner, params), opt_state.masks)

    def eval_model_state(self, opt_state: Any, model_state: Any) -> Any:
        return self.optimizer.eval_model_state(opt_state.inner, model_state)

    def take_over(self, opt_state: Any, params: Params, model_state: Any, count: Array) -> Any:
        if not isinstance(opt_state, PruneState):
            raise UserError("it cannot start from a state without masks: give the base Prune(..., sparsity=0.0).")
        return opt_state._replace(inner=self.optimizer.take_over(opt_state.inner, params, model_state, count))


def masked(tree: Any, masks: Any, other: Any = None) -> Any:
    """A tree like the parameters, with the values of the tree `other` (None: 0) where a mask is False."""
    own, found, others = (flatten_dict(x or {}, sep="/") for x in (tree, masks, other))
    return unflatten_dict({path: jnp.where(found[path], x, others.get(path, 0)) if path in found else x
                           for path, x in own.items()}, sep="/")


def largest(sizes: Array, share: Array, stack: tuple[int, ...]) -> Array:
    """True for the largest of some sizes, all but the rounded `share` of them (never all). Axes of `stack` are
    independent. Equal sizes at the border stay."""
    moved = jnp.moveaxis(sizes, stack, range(len(stack)))
    flat = moved.reshape(*moved.shape[:len(stack)], -1)
    n = flat.shape[-1]
    place = jnp.clip(jnp.round(share * n).astype(jnp.int32), 0, n - 1)
    border = jnp.take(jnp.sort(flat, axis=-1), place, axis=-1)[..., None]
    return jnp.moveaxis((flat >= border).reshape(moved.shape), range(len(stack)), stack)


def _bias(path: str, params: Mapping[str, Any], matrices: Mapping[str, Matrix]) -> str | None:
    """The bias of the output channels of a matrix: beside it, one number for each."""
    bias, matrix, shape = f"{path.rpartition('/')[0]}/bias", matrices[path], params[path].shape
    channels = tuple(size for axis, size in enumerate(shape) if axis not in matrix.inputs)
    return bias if bias in params and params[bias].shape == channels else None
