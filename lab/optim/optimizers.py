"""The base class of all optimizers, a dataclass with `.build(steps)` around optax; Adam and AdamW.

Every number (rates, betas, decays, clip norm, penalties, multipliers) may be a Python number or a traced JAX scalar. To
`vmap` over one, build the transformation inside the traced function. Only Python values (None or a Python 0) change the
structure of the optimizer state.

One step of every optimizer except the schedule-free one, for a parameter w with path p and loss gradient g:

    g <- g + l1 sign(w) + l2 w              (matrices only, as weight decay)
    g <- g min(1, grad_clip_norm / |g|)     (norm over all trained parameters)
    u <- direction(g)                       (Adam, Lion, ...)
    w <- w - lr(count) multiplier(p) (u + weight_decay w)

Paths are names joined by "/", such as `blocks/attention/query/kernel`. Matrices, and which of them are hidden, are
found in the model's jaxpr (lab/optim/matrices.py), not by name.
"""

import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from numbers import Real
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lab.errors import UserError
from lab.optim.averages import EmaState, find, map_paths, with_ema
from lab.optim.matrices import Matrix
from lab.optim.schedules import Constant, Schedule, require, require_regex

Params = Any  # a pytree of arrays: nested dicts as Flax makes them
NONE: Mapping[str, Matrix] = MappingProxyType({})


def off(value: Any) -> bool:
    """True for None and a Python 0. False for a traced value, which keeps its transformation even if it is 0."""
    return value is None or (isinstance(value, Real) and value == 0)


@dataclass(frozen=True)
class Optimizer:
    """Base class of all optimizers. The top of the file has the order of operations."""

    lr: Schedule | float
    """Learning rate: a schedule, or a number, which becomes `Constant(number)`."""
    _: KW_ONLY
    grad_clip_norm: float | None = None
    """Maximum global gradient norm, over trained parameters; None: no clipping (Pascanu et al. 2013)."""
    weight_decay: float = 0.0
    """Decoupled weight decay, multiplied by the learning rate (Loshchilov & Hutter 2019)."""
    l1: float = 0.0
    """L1 penalty l1 * sum |w|: adds l1 * sign(w) to the gradient before clipping. Same mask as weight decay."""
    l2: float = 0.0
    """L2 penalty l2 / 2 * sum w^2: adds l2 * w to the gradient before clipping. Same mask as weight decay."""
    ema: float | None = None
    """Decay of an exponential moving average (EMA) of the parameters, for evaluation and sampling; None: no EMA."""
    ema_from: int = 0
    """Completed steps before the EMA begins; until then it equals the parameters."""
    lr_multipliers: tuple[tuple[str, float], ...] = ()
    """Learning-rate multipliers: (regex searched in the path, multiplier). First match wins; 0 freezes."""
    no_decay: str | None = None
    """Path regex of matrices without weight decay and penalties, which apply to matrices only."""

    def __post_init__(self) -> None:
        # Always a schedule, so that every experiment has the flag `--optim.lr.peak` (tyro gives a bare number none).
        if not isinstance(self.lr, Schedule):
            object.__setattr__(self, "lr", Constant(self.lr))

    def direction(self) -> optax.GradientTransformation:
        """Maps the gradient to the direction u (uphill, before weight decay and learning rate)."""
        raise NotImplementedError

    def directions(self, matrices: Mapping[str, Matrix]) -> optax.GradientTransformation:
        """`direction`, for optimizers that treat matrices differently."""
        return self.direction()

    def wrap(self, step: optax.GradientTransformation, rate: optax.Schedule) -> optax.GradientTransformation:
        """Hook to wrap the chain of direction, weight decay and learning rate."""
        return step

    def rate(self, steps: int) -> optax.Schedule:
        """Learning rate before multipliers, as a function of the completed steps."""
        return self.lr.build(steps)

    def decays(self, params: Params, matrices: Mapping[str, Matrix]) -> Any:
        """Tree of bools: which parameters get weight decay and penalties."""
        spared = [] if self.no_decay is None else [path for path in matrices if re.search(self.no_decay, path)]
        return map_paths(lambda path, _: path in matrices and path not in spared, params)

    def group(self, path: str) -> Any:
        """The multiplier of the first rule of `lr_multipliers` that matches, else 1."""
        return next((multiplier for pattern, multiplier in self.lr_multipliers if re.search(pattern, path)), 1.0)

    def multiplier(self, path: str, matrix: Matrix | None) -> Any:
        """The full learning-rate multiplier of this parameter."""
        return self.group(path)

    @property
    def needs_matrices(self) -> bool:
        """Whether `build` needs `matrices`."""
        return not (off(self.weight_decay) and off(self.l1) and off(self.l2))

    def build(self, steps: int, matrices: Mapping[str, Matrix] = NONE) -> optax.GradientTransformationExtraArgs:
        """The optax transformation for a run of `steps` steps: ``init(params, model_state)`` and ``update(grads, state,
        params, model_state=model_state)``. `model_state` holds the model's statistics after this step, which the EMA
        averages like the parameters. `matrices`: by path, see lab/optim/matrices.py.

        `init` raises UserError if a rule matches no parameter (see `check`)."""

        def penalise(grads: Params, params: Params) -> Params:
            penalised = jax.tree.map(lambda g, w: g + self.l1 * jnp.sign(w) + self.l2 * w, grads, params)
            return jax.tree.map(lambda on, new, old: new if on else old, self.decays(grads, matrices), penalised, grads)

        def multiply(updates: Params, _: Params) -> Params:
            return map_paths(lambda path, u: u * jnp.asarray(self.multiplier(path, matrices.get(path)), u.dtype),
                             updates)

        rate = self.rate(steps)
        chain = [self.directions(matrices)]
        if not off(self.weight_decay):
            chain += [optax.add_decayed_weights(self.weight_decay, mask=lambda params: self.decays(params, matrices))]
        chain += [optax.scale_by_learning_rate(rate), optax.stateless(multiply)]
        tx = []
        if not (off(self.l1) and off(self.l2)):
            tx += [optax.stateless(penalise)]
        if self.grad_clip_norm is not None:
            tx += [optax.clip_by_global_norm(self.grad_clip_norm)]
        tx = optax.chain(*tx, self.wrap(optax.chain(*chain), rate))
        if any(off(multiplier) for _, multiplier in self.lr_multipliers):  # no state for frozen parameters
            tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, self._labels)
        tx = with_ema(tx, self.ema, self.ema_from)

        def init(params: Params, model_state: Any = ()) -> Any:
            self.check(params, matrices, model_state)
            return tx.init(params, model_state)

        return optax.GradientTransformationExtraArgs(init, tx.update)

    def _labels(self, params: Params) -> Any:
        return map_paths(lambda path, _: "frozen" if self.frozen(path) else "trained", params)

    def freezing(self, rules: tuple[tuple[str, float], ...]) -> "Optimizer":
        """This optimizer with further multipliers, tried before its own."""
        return replace(self, lr_multipliers=rules + self.lr_multipliers)

    def frozen(self, path: str) -> bool:
        """Whether a parameter is frozen (multiplier 0)."""
        return off(self.group(path))

    def eval_params(self, opt_state: Any, params: Params) -> Params:
        """Parameters for evaluation and sampling: the EMA if `ema` is set, else `params`."""
        if self.ema is None:
            return params
        return jax.tree.map(lambda e, p: e.astype(p.dtype), find(opt_state, EmaState).ema, params)

    def eval_model_state(self, opt_state: Any, model_state: Any) -> Any:
        """The model's statistics that match `eval_params`."""
        if self.ema is None:
            return model_state
        return jax.tree.map(lambda e, x: e.astype(x.dtype), find(opt_state, EmaState).model_state, model_state)

    def take_over(self, opt_state: Any, params: Params, model_state: Any, count: jax.Array) -> Any:
        """Adds the EMA to the state of the same optimizer without one (or removes it), after `count` steps."""
        averages = isinstance(opt_state, EmaState)
        if self.ema is not None and not averages:
            return EmaState.begin(params, model_state, opt_state, count)
        return opt_state.inner if averages and self.ema is None else opt_state

    def check(self, params: Params, matrices: Mapping[str, Matrix], model_state: Any) -> None:
        """Raises UserError if a multiplier's rule is the first match of no parameter, or all parameters are frozen."""
        paths = jax.tree.leaves(map_paths(lambda path, _: path, params))
        first = {
            next((i for i, (r, _) in enumerate(self.lr_multipliers) if re.search(r, path)), None) for path in paths
        }
        for i, (pattern, _) in enumerate(self.lr_multipliers):
            if i not in first:
                taken = " that an earlier group has not taken" if any(re.search(pattern, p) for p in paths) else ""
                shown = ", ".join(paths[:: max(len(paths) // 4, 1)][:5])
                raise UserError(
                    f"optim.lr_multipliers or init_from.freeze: {pattern!r} matches no parameter{taken}. Some "
                    f"paths: {shown}."
                )
        if "trained" not in jax.tree.leaves(self._labels(params)):
            raise UserError(
                "optim.lr_multipliers or init_from.freeze freezes every parameter: nothing would be trained."
            )

    def validate(self, steps: int) -> None:
        """Raises UserError for a number out of range. Traced values are not checked."""
        require("steps", steps, "at least 1 step", lambda v: v >= 1)
        self.lr.validate(steps)
        require("grad_clip_norm", self.grad_clip_norm, "above 0, or None for no clipping", lambda v: v > 0)
        for name in ("weight_decay", "l1", "l2"):
            require(name, getattr(self, name), "0 or more", lambda v: v >= 0)
        require("ema", self.ema, "in (0, 1), or None for no average", lambda v: 0 < v < 1)
        require("ema_from", self.ema_from, "0 or more steps", lambda v: v >= 0)
        for pattern, multiplier in self.lr_multipliers:
            require_regex("lr_multipliers", pattern)
            require(f"lr_multipliers ({pattern!r})", multiplier, "0 (frozen) or more", lambda v: v >= 0)
        if self.no_decay is not None:
            require_regex("no_decay", self.no_decay)
        for name in ("b1", "b2", "momentum"):
            require(name, getattr(self, name, None), "in [0, 1)", lambda v: 0 <= v < 1)
        for name in ("eps", "rms", "threshold"):
            require(name, getattr(self, name, None), "above 0", lambda v: v > 0)


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam with bias correction, u = m / (sqrt(v) + eps) (Kingma & Ba 2015). `l2` is coupled weight decay."""

    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019) and the usual betas of language models."""

    b2: float = 0.95
    """Decay of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""
