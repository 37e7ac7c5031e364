"""Schedules and optimizers: values with `.build(steps)`, thin over optax.

Every number (rates, betas, decays, clip, penalties, multipliers) may be a Python number or a traced JAX scalar, so that
a study can `vmap` over it: build the transformation inside the traced function. What the optimizer state holds is
decided by Python values alone (None, or a Python 0).

One update of every optimizer but the schedule-free one, for a parameter w with path p, loss gradient g:

    g <- g + l1 sign(w) + l2 w              (only where weight decay applies)
    g <- g min(1, clip / |g|)               (norm over all trained parameters)
    u <- direction(g)                       (Adam, Lion, ...)
    w <- w - lr(count) multiplier(p) (u + decay w)

Paths are the names joined by "/", such as `blocks/attention/query/kernel`.
"""

import math
import re
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lab.errors import UserError
from lab.schedules import Constant, Cosine, InverseSqrt, Linear, Schedule, WarmupStableDecay, require, require_regex

Params = Any  # a pytree of arrays: nested dicts as Flax makes them
_NO_MATRIX = "bias|scale|gain|gamma|embedding|pos_embedding|wte|wpe"  # norm scales, biases and embeddings
__all__ = ["Schedule", "Constant", "Linear", "Cosine", "InverseSqrt", "WarmupStableDecay", "Optimizer", "SGD", "Adam",
           "AdamW", "Lion", "Adafactor", "Muon", "ScheduleFreeAdamW"]


def _off(value: Any) -> bool:
    """True for None and a Python 0; never for a traced value, whose transformation must stay."""
    return value is None or (isinstance(value, Real) and value == 0)


def _map_paths(f: Callable[..., Any], tree: Params, *rest: Params) -> Any:
    """`jax.tree.map` whose function gets the leaf's path first."""
    keystr = jax.tree_util.keystr
    return jax.tree.map_with_path(lambda path, *leaf: f(keystr(path, simple=True, separator="/"), *leaf), tree, *rest)


class EmaState(NamedTuple):
    """State of the outermost transformation when `Optimizer.ema` is set."""

    count: jax.Array  # completed updates
    ema: Params  # float32
    inner: Any


def _with_ema(inner: optax.GradientTransformation, decay: Any, start: int) -> optax.GradientTransformation:
    """Average the parameters after each update, beginning with those after `start` updates (so there is nothing to
    debias). The decay of update start + t, t = 0, 1, ..., is min(decay, (1 + t) / (10 + t)), which soon forgets the
    start (TensorFlow's rule).
    """

    def init(params: Params) -> EmaState:
        copy = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
        return EmaState(jnp.zeros([], jnp.int32), copy, inner.init(params))

    def update(grads: Params, state: EmaState, params: Params) -> tuple[Params, EmaState]:
        updates, inner_state = inner.update(grads, state.inner, params)
        t = state.count - start
        d = jnp.minimum(decay, (1 + t) / (10 + t))
        ema = jax.tree.map(lambda e, p: jnp.where(t < 0, p.astype(e.dtype), e + (1 - d) * (p - e)), state.ema,
                           optax.apply_updates(params, updates))
        return updates, EmaState(state.count + 1, ema, inner_state)

    return optax.GradientTransformation(init, update)


@dataclass(frozen=True)
class Optimizer:
    """What all optimizers share. See the top of the file for the order of operations."""

    lr: Schedule | float
    """Learning rate: a schedule, or a number, which becomes `Constant(number)`."""
    _: KW_ONLY
    clip: float | None = None
    """Greatest global gradient norm; None for no clipping (Pascanu et al. 2013). Frozen parameters do not count."""
    decay: float = 0.0
    """Decoupled weight decay, multiplied by the learning rate (Loshchilov & Hutter 2019)."""
    l1: float = 0.0
    """Penalty l1 * sum |w|, added to the gradient (as l1 * sign(w)) before clipping. Masked as weight decay is."""
    l2: float = 0.0
    """Penalty l2 / 2 * sum w^2, added to the gradient (as l2 * w) before clipping. Masked as weight decay is."""
    ema: float | None = None
    """Decay of an exponential moving average of the parameters, used to evaluate and sample; None for none."""
    ema_from: int = 0
    """Completed updates before the average begins; until then it is the parameters themselves."""
    groups: tuple[tuple[str, float], ...] = ()
    """Learning-rate multipliers: (regex searched in the path, multiplier). First match wins; 0 freezes exactly."""
    no_decay: str = rf"(^|/)({_NO_MATRIX})(/|$)"
    """Regex of paths without weight decay or penalties, besides everything with fewer than 2 axes. By name, because
    `nn.scan` gives norm scales and biases a second axis. Empty: the number of axes alone decides."""

    def __post_init__(self) -> None:
        # One form, so that the flag of every experiment is `--optim.lr.peak` (tyro gives a bare number no flag at all).
        if not isinstance(self.lr, Schedule):
            object.__setattr__(self, "lr", Constant(self.lr))

    def direction(self) -> optax.GradientTransformation:
        """From the gradient to the step that the learning rate multiplies (pointing uphill), without weight decay."""
        raise NotImplementedError

    def wrap(self, step: optax.GradientTransformation, rate: optax.Schedule) -> optax.GradientTransformation:
        """Put something around direction, decay and rate."""
        return step

    def rate(self, steps: int) -> optax.Schedule:
        """Learning rate before multipliers, as a function of the number of completed updates."""
        return self.lr.build(steps)

    def decays(self, params: Params) -> Any:
        """Tree of bools: which parameters get weight decay and penalties."""

        def decays(path: str, p: Any) -> bool:
            return p.ndim >= 2 and (self.no_decay == "" or re.search(self.no_decay, path) is None)

        return _map_paths(decays, params)

    def group(self, path: str) -> Any:
        """Learning-rate multiplier of the first group that matches."""
        return next((multiplier for pattern, multiplier in self.groups if re.search(pattern, path)), 1.0)

    def multiplier(self, path: str, ndim: int) -> Any:
        """All that the learning rate of this parameter is multiplied by."""
        return self.group(path)

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optax transformation for a run of `steps` updates; `update` needs the parameters.

        `init` raises UserError where a rule fits no parameter (see `check`)."""

        def penalise(grads: Params, params: Params) -> Params:
            penalised = jax.tree.map(lambda g, w: g + self.l1 * jnp.sign(w) + self.l2 * w, grads, params)
            return jax.tree.map(lambda on, new, old: new if on else old, self.decays(grads), penalised, grads)

        def multiply(updates: Params, _: Params) -> Params:
            return _map_paths(lambda path, u: u * jnp.asarray(self.multiplier(path, u.ndim), u.dtype), updates)

        rate = self.rate(steps)
        step = [self.direction()]
        if not _off(self.decay):
            step += [optax.add_decayed_weights(self.decay, mask=self.decays)]
        step += [optax.scale_by_learning_rate(rate), optax.stateless(multiply)]
        tx = []
        if not (_off(self.l1) and _off(self.l2)):
            tx += [optax.stateless(penalise)]
        if self.clip is not None:
            tx += [optax.clip_by_global_norm(self.clip)]
        tx = optax.chain(*tx, self.wrap(optax.chain(*step), rate))
        if any(_off(multiplier) for _, multiplier in self.groups):  # frozen parameters get no state at all
            tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, self._labels)
        if self.ema is not None:
            tx = _with_ema(tx, self.ema, self.ema_from)

        def init(params: Params) -> Any:
            self.check(params)
            return tx.init(params)

        return optax.GradientTransformation(init, tx.update)

    def _labels(self, params: Params) -> Any:
        return _map_paths(lambda path, _: "frozen" if _off(self.group(path)) else "trained", params)

    def eval_params(self, opt_state: Any, params: Params) -> Params:
        """The parameters to evaluate and sample with: their moving average if `ema` is set, else themselves."""
        if self.ema is None:
            return params
        return jax.tree.map(lambda e, p: e.astype(p.dtype), _find(opt_state, EmaState).ema, params)

    def take_over(self, opt_state: Any, params: Params, count: jax.Array) -> Any:
        """The state, after `count` updates, of an optimizer that differs from this one in its average only, as ours."""
        averages = isinstance(opt_state, EmaState)
        if self.ema is not None and not averages:
            return EmaState(count, jax.tree.map(lambda p: jnp.array(p, jnp.float32), params), opt_state)
        return opt_state.inner if averages and self.ema is None else opt_state

    def check(self, params: Params) -> None:
        """UserError when a group's regex fits no parameter (or only those of earlier groups) or nothing is trained."""
        paths = jax.tree.leaves(_map_paths(lambda path, _: path, params))
        first = {next((i for i, (r, _) in enumerate(self.groups) if re.search(r, path)), None) for path in paths}
        for i, (pattern, _) in enumerate(self.groups):
            if i not in first:
                taken = " that an earlier group has not taken" if any(re.search(pattern, p) for p in paths) else ""
                shown = ", ".join(paths[:: max(len(paths) // 4, 1)][:5])
                raise UserError(f"optim.groups or init_from.freeze: {pattern!r} matches no parameter{taken}. Some "
                                f"paths: {shown}.")
        if "trained" not in jax.tree.leaves(self._labels(params)):
            raise UserError("optim.groups or init_from.freeze freezes every parameter: nothing would be trained.")

    def validate(self, steps: int) -> None:
        """UserError, in plain words, for a number out of range. Traced values are not looked at."""
        require("steps", steps, "at least 1 update", lambda v: v >= 1)
        self.lr.validate(steps)
        require("clip", self.clip, "above 0, or None for no clipping", lambda v: v > 0)
        for name in ("decay", "l1", "l2"):
            require(name, getattr(self, name), "0 or more", lambda v: v >= 0)
        require("ema", self.ema, "in (0, 1), or None for no average", lambda v: 0 < v < 1)
        require("ema_from", self.ema_from, "0 or more updates", lambda v: v >= 0)
        for pattern, multiplier in self.groups:
            require_regex("groups", pattern)
            require(f"groups ({pattern!r})", multiplier, "0 (frozen) or more", lambda v: v >= 0)
        require_regex("no_decay", self.no_decay)
        for name in ("b1", "b2", "momentum"):
            require(name, getattr(self, name, None), "in [0, 1)", lambda v: 0 <= v < 1)
        for name in ("eps", "rms", "threshold"):
            require(name, getattr(self, name, None), "above 0", lambda v: v > 0)


def _find(state: Any, kind: type) -> Any:
    """The one node of this type in an optimizer state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return next(node for node in nodes if isinstance(node, kind))


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
    decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""


@dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """Step sign(b1 m + (1 - b1) g), then m <- b2 m + (1 - b2) g (Chen et al. 2023, algorithm 2). Wants a learning rate
    3 to 10 times below AdamW's, and a weight decay as much above."""

    b1: float = 0.9
    """Weight of the momentum in the step."""
    b2: float = 0.99
    """Decay of the momentum."""
    decay: float = 0.3
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
    trains the rest: parameters with fewer than 2 axes, or whose path `adam` matches.

    A kernel's last axis is its outputs and the others its inputs (convolutions, attention output); where `split`
    matches, its first axis is its inputs and the others its outputs (query, key, value with an axis of heads)."""

    momentum: float = 0.95
    """Decay of Muon's momentum."""
    rms: float = 0.2
    """RMS of an update of a matrix, before the learning rate."""
    adam_lr: float = 1.0
    """Learning-rate multiplier of the parameters that AdamW trains."""
    adam: str = rf"(^|/)({_NO_MATRIX}|head|lm_head|logits|classifier)(/|$)"
    """Regex of paths that AdamW trains: embeddings, output heads, norms and biases."""
    stacked: str = r"(^|/)blocks/"
    """Regex of paths whose first axis is depth (`nn.scan`): each layer's matrix is orthogonalised on its own."""
    split: str = r"(^|/)(query|key|value|q|k|v|qkv|kv)/kernel$"
    """Regex of kernels whose first axis is the input and all others the output."""

    def axes(self, path: str, ndim: int) -> optax.contrib.MuonDimensionNumbers | None:
        """Input and output axes of a matrix; None for a parameter that AdamW trains."""
        first = 1 if re.search(self.stacked, path) else 0
        if ndim - first < 2 or re.search(self.adam, path):
            return None
        cut = first + 1 if re.search(self.split, path) else ndim - 1
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, cut)), tuple(range(cut, ndim)))

    def multiplier(self, path: str, ndim: int) -> Any:
        return self.group(path) * (self.adam_lr if self.axes(path, ndim) is None else 1.0)

    def direction(self) -> optax.GradientTransformation:
        def orthogonal(path: str, u: jax.Array) -> jax.Array:
            sides = self.axes(path, u.ndim)
            inputs, outputs = (math.prod(u.shape[a] for a in axes) for axes in sides)
            matrices = u.reshape(*u.shape[: sides[0][0]], inputs, outputs)
            return (orthogonalised(matrices) * (self.rms * math.sqrt(max(inputs, outputs)))).reshape(u.shape)

        def axes(tree: Params) -> Any:
            return _map_paths(lambda path, p: self.axes(path, p.ndim), tree)

        # Without iterations: the momentum of each matrix, divided by its norm.
        muon = optax.contrib.scale_by_muon(beta=self.momentum, ns_steps=0, weight_dimension_numbers=axes)
        muon = optax.chain(muon, optax.stateless(lambda u, _: _map_paths(orthogonal, u)))
        return optax.partition({"muon": muon, "adam": super().direction()}, self._kinds)

    def _kinds(self, params: Params) -> Any:
        return _map_paths(lambda path, p: "adam" if self.axes(path, p.ndim) is None else "muon", params)

    def check(self, params: Params) -> None:
        super().check(params)
        if "muon" not in jax.tree.leaves(self._kinds(params)):
            raise UserError("optim: Muon finds no hidden matrix in this model (see optim.adam). Use AdamW.")

    def validate(self, steps: int) -> None:
        super().validate(steps)
        require("adam_lr", self.adam_lr, "above 0 (freeze with optim.groups)", lambda v: v > 0)
        for name in ("adam", "stacked", "split"):
            require_regex(name, getattr(self, name))


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
        state = _find(opt_state, optax.contrib.ScheduleFreeState)

        def masked(node: Any) -> bool:  # a frozen parameter
            return isinstance(node, optax.MaskedNode)

        def mean(z: Any, y: jax.Array) -> jax.Array:
            return y if masked(z) else (y - (1 - state.b1) * z) / state.b1

        return jax.tree.map(mean, state.z, params, is_leaf=masked)

    def validate(self, steps: int) -> None:
        super().validate(steps)
        require("b1", self.b1, "in (0, 1)", lambda v: v > 0)
        if self.ema is not None:
            raise UserError("optim.ema must be None: schedule-free AdamW already averages its parameters.")
