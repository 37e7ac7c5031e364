"""Schedules and optimizers: values with `.build(steps)`, thin over optax.

Every number (rates, betas, decays, clip, penalties, multipliers) may be a Python number or a traced JAX scalar, so that
a study can `vmap` over it: build the transformation inside the traced function. What the optimizer state holds is
decided by Python values alone (None, or a Python 0).

One update of every optimizer but the schedule-free one, for a parameter w with path p, loss gradient g:

    g <- g + l1 sign(w) + l2 w              (matrices only, as weight decay)
    g <- g min(1, grad_clip_norm / |g|)               (norm over all trained parameters)
    u <- direction(g)                       (Adam, Lion, ...)
    w <- w - lr(count) multiplier(p) (u + weight_decay w)

Paths are the names joined by "/", such as `blocks/attention/query/kernel`. What is a matrix, and a hidden one, is read
from the model's program (lab/optim/matrices.py), never from names.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from numbers import Real
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lab.errors import UserError
from lab.optim.averages import EmaState, find, map_paths, with_ema
from lab.optim.matrices import Matrix
from lab.optim.optax_source import source_of
from lab.optim.schedules import Constant, Schedule, require, require_regex

Params = Any  # a pytree of arrays: nested dicts as Flax makes them
NONE: Mapping[str, Matrix] = MappingProxyType({})


def _off(value: Any) -> bool:
    """True for None and a Python 0; never for a traced value, whose transformation must stay."""
    return value is None or (isinstance(value, Real) and value == 0)


@dataclass(frozen=True)
class Optimizer:
    """What all optimizers share. See the top of the file for the order of operations."""

    lr: Schedule | float
    """Learning rate: a schedule, or a number, which becomes `Constant(number)`."""
    _: KW_ONLY
    grad_clip_norm: float | None = None
    """Greatest global gradient norm; None for no clipping (Pascanu et al. 2013). Frozen parameters do not count."""
    weight_decay: float = 0.0
    """Decoupled weight decay, multiplied by the learning rate (Loshchilov & Hutter 2019)."""
    l1: float = 0.0
    """Penalty l1 * sum |w|, added to the gradient (as l1 * sign(w)) before clipping. Masked as weight decay is."""
    l2: float = 0.0
    """Penalty l2 / 2 * sum w^2, added to the gradient (as l2 * w) before clipping. Masked as weight decay is."""
    ema: float | None = None
    """Decay of an exponential moving average of the parameters, used to evaluate and sample; None for none."""
    ema_from: int = 0
    """Completed updates before the average begins; until then it is the parameters themselves."""
    lr_multipliers: tuple[tuple[str, float], ...] = ()
    """Learning-rate multipliers: (regex searched in the path, multiplier). First match wins; 0 freezes exactly."""
    no_decay: str | None = None
    """Regex of paths of matrices that get neither weight decay nor penalties. Nothing but matrices gets any."""

    def __post_init__(self) -> None:
        # One form, so that the flag of every experiment is `--optim.lr.peak` (tyro gives a bare number no flag at all).
        if not isinstance(self.lr, Schedule):
            object.__setattr__(self, "lr", Constant(self.lr))

    def direction(self) -> optax.GradientTransformation:
        """From the gradient to the step that the learning rate multiplies (pointing uphill), without weight decay."""
        raise NotImplementedError

    def directions(self, matrices: Mapping[str, Matrix]) -> optax.GradientTransformation:
        """`direction`, where matrices are treated otherwise than the rest."""
        return self.direction()

    def wrap(self, step: optax.GradientTransformation, rate: optax.Schedule) -> optax.GradientTransformation:
        """Put something around direction, decay and rate."""
        return step

    def rate(self, steps: int) -> optax.Schedule:
        """Learning rate before multipliers, as a function of the number of completed updates."""
        return self.lr.build(steps)

    def decays(self, params: Params, matrices: Mapping[str, Matrix]) -> Any:
        """Tree of bools: which parameters get weight decay and penalties."""
        spared = [] if self.no_decay is None else [path for path in matrices if re.search(self.no_decay, path)]
        return map_paths(lambda path, _: path in matrices and path not in spared, params)

    def group(self, path: str) -> Any:
        """Learning-rate multiplier of the first group that matches."""
        return next((multiplier for pattern, multiplier in self.lr_multipliers if re.search(pattern, path)), 1.0)

    def multiplier(self, path: str, matrix: Matrix | None) -> Any:
        """All that the learning rate of this parameter is multiplied by."""
        return self.group(path)

    @property
    def needs_matrices(self) -> bool:
        """Whether anything depends on which parameters are matrices."""
        return not (_off(self.weight_decay) and _off(self.l1) and _off(self.l2))

    def build(self, steps: int, matrices: Mapping[str, Matrix] = NONE) -> optax.GradientTransformationExtraArgs:
        """The optax transformation for a run of `steps` updates. ``init(params, model_state)``, ``update(grads, state,
        params, model_state=model_state)``, where `model_state` are the model's statistics after this update: an average
        of the parameters averages them, too. `matrices`: by path, see lab/optim/matrices.py.

        `init` raises UserError where a rule fits no parameter (see `check`)."""

        def penalise(grads: Params, params: Params) -> Params:
            penalised = jax.tree.map(lambda g, w: g + self.l1 * jnp.sign(w) + self.l2 * w, grads, params)
            return jax.tree.map(lambda on, new, old: new if on else old, self.decays(grads, matrices), penalised, grads)

        def multiply(updates: Params, _: Params) -> Params:
            return map_paths(lambda path, u: u * jnp.asarray(self.multiplier(path, matrices.get(path)), u.dtype),
                             updates)

        rate = self.rate(steps)
        step = [self.directions(matrices)]
        if not _off(self.weight_decay):
            step += [optax.add_decayed_weights(self.weight_decay, mask=lambda params: self.decays(params, matrices))]
        step += [optax.scale_by_learning_rate(rate), optax.stateless(multiply)]
        tx = []
        if not (_off(self.l1) and _off(self.l2)):
            tx += [optax.stateless(penalise)]
        if self.grad_clip_norm is not None:
            tx += [optax.clip_by_global_norm(self.grad_clip_norm)]
        tx = optax.chain(*tx, self.wrap(optax.chain(*step), rate))
        if any(_off(multiplier) for _, multiplier in self.lr_multipliers):  # frozen parameters get no state at all
            tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, self._labels)
        tx = with_ema(tx, self.ema, self.ema_from)

        def init(params: Params, model_state: Any = ()) -> Any:
            self.check(params, matrices, model_state)
            return tx.init(params, model_state)

        return optax.GradientTransformationExtraArgs(init, tx.update)

    def _labels(self, params: Params) -> Any:
        return map_paths(lambda path, _: "frozen" if self.frozen(path) else "trained", params)

    def frozen(self, path: str) -> bool:
        """Whether a parameter stays as it is."""
        return _off(self.group(path))

    def eval_params(self, opt_state: Any, params: Params) -> Params:
        """The parameters to evaluate and sample with: their moving average if `ema` is set, else themselves."""
        if self.ema is None:
            return params
        return jax.tree.map(lambda e, p: e.astype(p.dtype), find(opt_state, EmaState).ema, params)

    def eval_model_state(self, opt_state: Any, model_state: Any) -> Any:
        """The model's statistics that go with `eval_params`."""
        if self.ema is None:
            return model_state
        return jax.tree.map(lambda e, x: e.astype(x.dtype), find(opt_state, EmaState).model_state, model_state)

    def take_over(self, opt_state: Any, params: Params, model_state: Any, count: jax.Array) -> Any:
        """The state, after `count` updates, of an optimizer that differs from this one in its average only, as ours."""
        averages = isinstance(opt_state, EmaState)
        if self.ema is not None and not averages:
            return EmaState.begin(params, model_state, opt_state, count)
        return opt_state.inner if averages and self.ema is None else opt_state

    def check(self, params: Params, matrices: Mapping[str, Matrix], model_state: Any) -> None:
        """UserError when a group's regex fits no parameter (or only those of earlier groups) or nothing is trained."""
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
        """UserError, in plain words, for a number out of range. Traced values are not looked at."""
        require("steps", steps, "at least 1 update", lambda v: v >= 1)
        self.lr.validate(steps)
        require("grad_clip_norm", self.grad_clip_norm, "above 0, or None for no clipping", lambda v: v > 0)
        for name in ("weight_decay", "l1", "l2"):
            require(name, getattr(self, name), "0 or more", lambda v: v >= 0)
        require("ema", self.ema, "in (0, 1), or None for no average", lambda v: 0 < v < 1)
        require("ema_from", self.ema_from, "0 or more updates", lambda v: v >= 0)
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
class SGD(Optimizer):
    """Gradient descent. With momentum, m <- momentum m + g and the step is m (Polyak 1964), or g + momentum m with
    `nesterov` (Nesterov 1983; Sutskever et al. 2013). `l2` is the coupled weight decay of most textbooks."""

    momentum: float = 0.0
    """Decay of the accumulated gradient, in [0, 1); 0 for none."""
    nesterov: bool = False
    """Look ahead along the momentum."""

    def direction(self) -> optax.GradientTransformation:
        return optax.identity() if _off(self.momentum) else optax.trace(self.momentum, nesterov=self.nesterov)

    def validate(self, steps: int) -> None:
        super().validate(steps)
        if self.nesterov and _off(self.momentum):
            raise UserError("optim.nesterov needs optim.momentum above 0.")


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam with bias correction, step m / (sqrt(v) + eps) (Kingma & Ba 2015). `l2` is its coupled weight decay."""

    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019) and the betas usual for language models."""

    b2: float = 0.95
    """Decay of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""


@dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """Step sign(b1 m + (1 - b1) g), then m <- b2 m + (1 - b2) g (Chen et al. 2023, algorithm 2). Wants a learning rate
    3 to 10 times below AdamW's, and a weight decay as much above."""

    b1: float = 0.9
    """Weight of the momentum in the step."""
    b2: float = 0.99
    """Decay of the momentum."""
    weight_decay: float = 0.3
    """Decoupled weight decay, multiplied by the learning rate."""

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.b1, self.b2)


@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adam's second moment as an outer product of row and column means (Shazeer & Stern 2018), for little memory.

    Factors the two largest axes of a parameter when both reach `factored_from`. Clipping and relative step take the RMS
    of a whole array, which layers stacked by `nn.scan` share: scanned and unrolled models differ slightly."""

    exponent: float = 0.8
    """The second moment of update t decays by 1 - t^-exponent."""
    threshold: float = 1.0
    """Greatest RMS of a parameter's step."""
    relative: bool = True
    """Multiply the step by max(RMS of the parameter, 0.001): `lr` is then relative, near 0.01."""
    momentum: float = 0.0
    """Decay of a moving average of the steps, in [0, 1); 0 for none, which saves the memory."""
    factored_from: int = 128
    """Smallest axis length that is factored."""

    def direction(self) -> optax.GradientTransformation:
        factored = optax.scale_by_factored_rms(decay_rate=self.exponent, min_dim_size_to_factor=self.factored_from)
        parts = [factored, optax.clip_by_block_rms(self.threshold)]
        if self.relative:
            parts += [optax.scale_by_param_block_rms(1e-3)]
        if not _off(self.momentum):
            parts += [optax.ema(self.momentum, debias=False)]
        return optax.chain(*parts)

    def validate(self, steps: int) -> None:
        super().validate(steps)
        require("exponent", self.exponent, "in (0, 1]", lambda v: 0 < v <= 1)
        require("factored_from", self.factored_from, "at least 1", lambda v: v >= 1)


def orthogonalised(x: jax.Array) -> jax.Array:
    """Matrices (..., m, n) of Frobenius norm 1 with their singular values brought to about 1: 5 quintic Newton-Schulz
    iterations x <- a x + (b s + c s^2) x, s = x x^T, of Jordan et al. 2024. (Optax's, in the form that CPUs are fast
    at: 16 ms instead of 34 for the 24 matrices of a GPT of width 128 and depth 4 on 2 cores.)
    """
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.swapaxes(-1, -2)
    for _ in range(5):
        square = jnp.einsum("...ik,...jk->...ij", x, x)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * (square @ square)) @ x
    return x.swapaxes(-1, -2) if tall else x


@dataclass(frozen=True, kw_only=True)
class Muon(AdamW):
    """Hidden matrices step along their orthogonalised Nesterov momentum (Jordan et al. 2024: 5 quintic Newton-Schulz
    iterations) times rms sqrt(max(inputs, outputs)), which gives any shape a step of RMS about `rms`, as AdamW has (Liu
    et al. 2025, "Muon is scalable for LLM training"): one `lr` and `decay` serve both. AdamW with `b1`, `b2` and `eps`
    trains the rest: output layers, embeddings, biases, scales, and what `adam` matches.

    What is a hidden matrix, which of its axes are its inputs and which number matrices of their own (scanned layers)
    is read from the model's program."""

    momentum: float = 0.95
    """Decay of Muon's momentum."""
    rms: float = 0.2
    """RMS of an update of a matrix, before the learning rate."""
    adam_lr: float = 1.0
    """Learning-rate multiplier of the parameters that AdamW trains."""
    adam: str | None = None
    """Regex of paths of hidden matrices that AdamW trains, too."""

    needs_matrices = True

    def orthogonal(self, path: str, matrix: Matrix | None) -> bool:
        """Whether Muon trains this parameter."""
        return not (matrix is None or matrix.head) and (self.adam is None or re.search(self.adam, path) is None)

    def multiplier(self, path: str, matrix: Matrix | None) -> Any:
        return self.group(path) * (1.0 if self.orthogonal(path, matrix) else self.adam_lr)

    def directions(self, matrices: Mapping[str, Matrix]) -> optax.GradientTransformation:
        hidden = {path: m for path, m in matrices.items() if self.orthogonal(path, m)}

        def orthogonal(path: str, u: jax.Array) -> jax.Array:
            order = [axis for axes in hidden[path][:3] for axis in axes]
            shapes = [[u.shape[axis] for axis in axes] for axes in hidden[path][:3]]
            inputs, outputs = map(math.prod, shapes[1:])
            turned = u.transpose(order)
            found = orthogonalised(turned.reshape(*shapes[0], inputs, outputs))
            found = found * (self.rms * math.sqrt(max(inputs, outputs)))
            return found.reshape(turned.shape).transpose([order.index(axis) for axis in range(u.ndim)])

        def axes(tree: Params) -> Any:
            return map_paths(lambda path, _: optax.contrib.MuonDimensionNumbers(*hidden[path][1:3]), tree)

        # Without iterations: the momentum of each matrix, divided by its norm.
        muon = optax.contrib.scale_by_muon(beta=self.momentum, ns_steps=0, weight_dimension_numbers=axes)
        muon = optax.chain(muon, optax.stateless(lambda u, _: map_paths(orthogonal, u)))
        return optax.partition({"muon": muon, "adam": super().direction()},
                               lambda params: map_paths(lambda path, _: "muon" if path in hidden else "adam", params))

    def check(self, params: Params, matrices: Mapping[str, Matrix], model_state: Any) -> None:
        super().check(params, matrices, model_state)
        if not any(self.orthogonal(path, matrix) for path, matrix in matrices.items()):
            raise UserError("optim: Muon finds no hidden matrix in this model (its output layer is none). Use AdamW.")

    def validate(self, steps: int) -> None:
        super().validate(steps)
        require("adam_lr", self.adam_lr, "above 0 (freeze with optim.lr_multipliers)", lambda v: v > 0)
        if self.adam is not None:
            require_regex("adam", self.adam)


@dataclass(frozen=True)
class Optax(Optimizer):
    """Any optax transformation with its own learning rate: ``Optax(optax.adam(1e-3))``. Clipping, average, decay and
    learning-rate groups go on top; decay and the metric learning_rate know of `lr` alone, which multiplies its steps.
    """

    lr: Schedule | float = field(default=1.0, kw_only=True)
    """Factor of the transformation's steps."""
    transformation: optax.GradientTransformation | None = field(default=None, metadata={"json": False})
    """The optax transformation."""
    source: str = field(default="", kw_only=True)
    """What tells transformations apart: a digest of the code and the values that it is made of; found by itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transformation is not None:
            object.__setattr__(self, "source", source_of(self.transformation))

    def direction(self) -> optax.GradientTransformation:
        return optax.chain(self.transformation, optax.scale(-1.0))  # its steps point downhill, a direction uphill

    def validate(self, steps: int) -> None:
        super().validate(steps)
        if self.transformation is None and self.source:
            raise UserError("optim: this run was trained by an optax transformation, which its folder does not hold. "
                            "Give the file of its experiment.")
        if not (hasattr(self.transformation, "init") and hasattr(self.transformation, "update")):
            raise UserError(f"Optax(...) takes an optax transformation, such as optax.adam(1e-3), not "
                            f"{self.transformation!r:.60}.")


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeAdamW(AdamW):
    """AdamW whose iterates are averaged instead of its rate decayed (Defazio et al. 2024): z takes the AdamW steps
    (gradient and decay at y), x is the mean of z weighted by lr^2, and the parameters are y = b1 x + (1 - b1) z.

    Evaluate at x = `eval_params`. Use a `Constant` rate with warm-up."""

    b1: float = 0.9
    """Weight of the average in the parameters that are trained, in (0, 1): it takes the place of momentum."""
    b2: float = 0.999
    """Decay of the second moment."""

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_rms(self.b2, self.eps, eps_in_sqrt=False, bias_correction=True)

    def wrap(self, step: optax.GradientTransformation, rate: optax.Schedule) -> optax.GradientTransformation:
        # Optax's wrapper counts from 1, its schedules from 0: unshifted, the weights would be those of the next rate.
        return optax.contrib.schedule_free(step, lambda count: rate(count - 1), b1=self.b1)

    def eval_params(self, opt_state: Any, params: Params) -> Params:
        state = find(opt_state, optax.contrib.ScheduleFreeState)

        def masked(node: Any) -> bool:  # a frozen parameter
            return isinstance(node, optax.MaskedNode)

        def mean(z: Any, y: jax.Array) -> jax.Array:
            if masked(z):
                return y
            b1 = jnp.expand_dims(state.b1, range(state.b1.ndim, y.ndim))  # one for each member, where there are some
            return (y - (1 - b1) * z) / b1

        return jax.tree.map(mean, state.z, params, is_leaf=masked)

    def check(self, params: Params, matrices: Mapping[str, Matrix], model_state: Any) -> None:
        super().check(params, matrices, model_state)
        if jax.tree.leaves(model_state):
            raise UserError("optim: schedule-free AdamW evaluates averaged weights, whose batch statistics are not "
                            "those of the trained ones. Use AdamW with optim.ema, which averages both.")

    def validate(self, steps: int) -> None:
        super().validate(steps)
        require("b1", self.b1, "in (0, 1)", lambda v: v > 0)
        if self.ema is not None:
            raise UserError("optim.ema must be None: schedule-free AdamW already averages its parameters.")
