"""LoRA: trains low-rank changes of a frozen model's matrices (Hu et al. 2021).

A matrix W (inputs, outputs) becomes W + factor a b, with a (inputs, rank) and b (rank, outputs). They are parameters of
their own beside the matrix: `block_0/attn/query/kernel` has `block_0/attn/query/lora_kernel/a` and `.../b`. One of the
two begins at zero, so the model begins as its base to the last bit.

The sum is a pure function of the parameter tree (`merged`), for any model. It costs the gradient of W for the matrices
with adapters, which `dropout` avoids: then each layer adds its own product (`beside_layers`). README.md has the times.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from lab.errors import UserError
from lab.models.dropout import dropout, is_zero
from lab.optim.matrices import Matrix
from lab.pretrained import Adapt, Continue

ADAPTER = re.compile(r"(^|/)lora_[^/]+/[ab]$")  # paths of adapters
Matrices = Mapping[str, Matrix]


class AdaptedState(NamedTuple):
    """The state of a run with adapters: `State` of lab/train/step.py and the frozen base."""

    step: Array
    params: Any
    """What is trained: the adapters, and parameters that `LoRA.full` names."""
    model_state: Any
    opt_state: Any
    base: Any
    """The model's other parameters. In a checkpoint, their checksums: see `lab.train.checkpoint.stored`."""


@dataclass(frozen=True)
class LoRA(Adapt):
    """Trains adapters of low rank; everything else of the model is frozen, without gradient or optimizer state."""

    rank: int = 8
    """Rank r of the change of each matrix."""
    alpha: float = 16.0
    """The change is multiplied by alpha / rank."""
    targets: str = r"attn/(query|value)/kernel"
    """Path regex of the matrices and embeddings to adapt (searched in the path)."""
    dropout: float = 0.0
    """Dropout rate on the adapters' inputs, for dense layers only."""
    scale: Literal["lora", "rslora"] = "lora"
    """rslora: multiply by alpha / sqrt(rank), which keeps large ranks learning (Kalajdzievski 2023)."""
    full: tuple[str, ...] = ()
    """Path regexes of parameters trained in full, such as a new output layer."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """How the frozen parameters are stored; adapters are float32."""

    @property
    def factor(self) -> Any:
        """What a b is multiplied by."""
        return self.alpha / (self.rank if self.scale == "lora" else self.rank**0.5)

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        if self.rank < 1:
            raise UserError(f"--adapt.rank must be at least 1, not {self.rank}.")
        if isinstance(self.dropout, int | float) and not 0 <= self.dropout < 1:
            raise UserError(f"--adapt.dropout must be in [0, 1), not {self.dropout}.")
        for name, rule in (("targets", self.targets), *(("full", rule) for rule in self.full)):
            try:
                re.compile(rule)
            except re.error as e:
                raise UserError(f"--adapt.{name}: {rule!r} is not a regular expression ({e}).") from None

    def check(self, start: Any) -> None:
        """Raises UserError for an `init_from` that freezes parameters itself or continues a run's optimizer state."""
        if getattr(start, "freeze", ()):
            raise UserError("With adapt=LoRA(...) everything but the adapters is frozen: leave out init_from.freeze, "
                            "and name what else to train with --adapt.full.")
        if isinstance(start, Continue):
            raise UserError("adapt=LoRA(...) does not continue another run's optimizer state: "
                            "init_from=Pretrained(run) begins with its parameters.")

    def frozen(self, path: str) -> bool:
        """Whether the model's parameter at this path is in the base."""
        return not any(re.search(rule, path) for rule in self.full)

    def begin(self, state: Any, matrices: Matrices, key: Array) -> AdaptedState:
        """The adapted form of a new state. Every adapter's random numbers depend on `key` and its path only.

        The random factor is kaiming uniform for matrices (a), and normal(0, 1) for embeddings (b), as in PEFT.

        Raises:
          UserError: a rule that matches nothing, a target that is no matrix or embedding, or a rank above its size.
        """
        params = flatten_dict(state.params, sep="/")
        self._check(params, matrices)
        trained = {path: x for path, x in params.items() if not self.frozen(path)}
        for path in self._targets(params):
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            found = self._factors(params[path], matrices.get(path), own)
            trained |= {f"{beside(path)}/{name}": x for name, x in zip("ab", found, strict=True)}
        base = {path: x.astype(self.base_dtype) for path, x in params.items() if path not in trained}
        return AdaptedState(state.step, unflatten_dict(trained, sep="/"), state.model_state, state.opt_state,
                            unflatten_dict(base, sep="/"))

    def _targets(self, params: Mapping[str, Any]) -> list[str]:
        return [path for path in params if re.search(self.targets, path) and self.frozen(path)]

    def _check(self, params: Mapping[str, Array], matrices: Matrices) -> None:
        """Raises UserError: see `begin`."""
        for rule in self.full:
            if not any(re.search(rule, path) for path in params):
                raise UserError(f"--adapt.full: {rule!r} matches no parameter. Near: {_near(rule, params)}.")
        if not (targets := self._targets(params)):
            but = " but those of --adapt.full" * any(re.search(self.targets, path) for path in params)
            raise UserError(f"--adapt.targets: {self.targets!r} matches no parameter{but}. Near: "
                            f"{_near(self.targets, matrices)}.")
        for path in targets:
            x, matrix = params[path], matrices.get(path)
            order = matrix and (*matrix.stack, *matrix.inputs, *matrix.outputs)
            if order != tuple(sorted(order)) if matrix else not path.endswith("embedding"):
                raise UserError(f"--adapt.targets: {self.targets!r} matches {path} {x.shape}, which is neither a "
                                f"matrix nor an embedding. Name kernels and embeddings only.")
            rows, columns = _sides(x, matrix)
            if self.rank > min(rows, columns):
                raise UserError(f"--adapt.rank {self.rank} is above that of {path}, {rows} x {columns}: at most "
                                f"{min(rows, columns)}, or other --adapt.targets.")
            if not is_zero(self.dropout) and not (path.endswith("/kernel") and sum(map(len, matrix[1:3])) == 2):
                raise UserError(f"--adapt.dropout is for dense layers, and {path} {x.shape} is of none: leave it out, "
                                f"or name other --adapt.targets.")

    def _factors(self, x: Array, matrix: Matrix | None, key: Array) -> tuple[Array, Array]:
        """a (stack, inputs, rank) and b (stack, rank, outputs) for a parameter (stack, inputs, outputs)."""
        stack, outputs = _split(x, matrix)
        a, b = (*x.shape[:outputs], self.rank), (*x.shape[:stack], self.rank, *x.shape[outputs:])
        if matrix is None:
            return jnp.zeros(a), jax.random.normal(key, b)
        bound = _sides(x, matrix)[0] ** -0.5
        return jax.random.uniform(key, a, minval=-bound, maxval=bound), jnp.zeros(b)

    def merged(self, params: Any, base: Any) -> Any:
        """The model's parameters: the base, each target with its adapter added, and those trained in full. Sums are
        float32; what has no adapter keeps its type."""
        own, found = flatten_dict(params, sep="/"), flatten_dict(base, sep="/")
        for path, w in found.items():
            if (a := own.get(f"{beside(path)}/a")) is not None:
                found[path] = w.astype(jnp.float32) + self.factor * _product(a, own[f"{beside(path)}/b"], w.shape)
        return unflatten_dict(found | {path: x for path, x in own.items() if not ADAPTER.search(path)}, sep="/")

    def pairs(self, params: Any) -> dict[str, tuple[Array, Array]]:
        """Path of each adapted parameter -> its a and b."""
        own = flatten_dict(params, sep="/")
        return {re.sub(r"(^|/)lora_([^/]+)/a$", r"\1\2", path): (own[path], own[f"{path[:-1]}b"])
                for path in own if ADAPTER.search(path) and path.endswith("a")}

    def in_training(self, params: Any, base: Any) -> Any:
        """`merged`; with dropout the base and the adapters, which `beside_layers` adds in each layer."""
        return self.merged(params, base) if is_zero(self.dropout) else whole(params, base)

    @contextlib.contextmanager
    def beside_layers(self) -> Iterator[None]:
        """Context for tracing a model in training: each dense layer with an adapter beside its kernel adds
        factor dropout(x) a b to its output."""
        def added(call: Callable, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
            y, module = call(*args, **kwargs), context.module
            if context.method_name != "__call__" or not module.has_variable("params", "lora_kernel"):
                return y
            pair, x = module.get_variable("params", "lora_kernel"), dropout(module, args[0], self.dropout, True)
            return y + (self.factor * (x @ pair["a"] @ pair["b"])).astype(y.dtype)

        with contextlib.nullcontext() if is_zero(self.dropout) else nn.intercept_methods(added):
            yield

    def matrices(self, found: Matrices) -> dict[str, Matrix]:
        """The matrices among the trained parameters (for weight decay and Muon), from those of the model."""
        kept = {path: m for path, m in found.items() if not self.frozen(path)}
        for path, m in found.items():
            if re.search(self.targets, path) and self.frozen(path):
                n, outputs = len(m.stack), range(len(m.stack) + 1, len(m.stack) + 1 + len(m.outputs))
                kept[f"{beside(path)}/a"] = Matrix(m.stack, m.inputs, (n + len(m.inputs),), False)
                kept[f"{beside(path)}/b"] = Matrix(m.stack, (n,), tuple(outputs), False)
        return kept


def beside(path: str) -> str:
    """The place of a parameter's adapter."""
    room, _, name = path.rpartition("/")
    return f"{room}/lora_{name}" if room else f"lora_{name}"


def whole(params: Any, base: Any) -> Any:
    """Base and trained parameters in one tree."""
    return unflatten_dict(flatten_dict(base, sep="/") | flatten_dict(params, sep="/"), sep="/")


def every(state: Any) -> Any:
    """All parameters of a state: `params`, and the base of adapters."""
    return whole(state.params, state.base) if isinstance(state, AdaptedState) else state.params


def without_adapters(state: Any) -> Any:
    """A state whose `params` are all parameters of the model, without adapters; any other state as it is."""
    if not isinstance(state, AdaptedState):
        return state
    own = {path: x for path, x in flatten_dict(state.params, sep="/").items() if not ADAPTER.search(path)}
    return state._replace(params=whole(unflatten_dict(own, sep="/"), state.base))


def describe(state: AdaptedState) -> str:
    """How many parameters an (abstract) state trains and freezes, in a sentence."""
    own, base = flatten_dict(state.params, sep="/"), jax.tree.leaves(state.base)
    adapters = {path: x for path, x in own.items() if ADAPTER.search(path)}
    numbers = [sum(math.prod(x.shape) for x in xs) for xs in (adapters.values(), own.values(), base)]
    full = f", {numbers[1] - numbers[0]:,} more in full" if numbers[1] > numbers[0] else ""
    return (f"Adapters: {numbers[0]:,} parameters beside {len(adapters) // 2} matrices are trained{full}; "
            f"{numbers[2]:,} are frozen, {sum(math.prod(x.shape) * x.dtype.itemsize for x in base) / 1e6:,.1f} MB.")


def _split(x: Array, matrix: Matrix | None) -> tuple[int, int]:
    """Where a parameter's input axes begin and end. `matrix`: None for an embedding; its axes are those of one member
    where several are stacked (lab/models/members.py)."""
    inputs, outputs = (len(matrix.inputs), len(matrix.outputs)) if matrix else (1, 1)
    return x.ndim - inputs - outputs, x.ndim - outputs


def _sides(x: Array, matrix: Matrix | None) -> tuple[int, int]:
    """Rows and columns of one matrix."""
    stack, outputs = _split(x, matrix)
    return math.prod(x.shape[stack:outputs]), math.prod(x.shape[outputs:])


def _product(a: Array, b: Array, shape: tuple[int, ...]) -> Array:
    """a (stack, inputs, r) times b (stack, r, outputs), in the shape (stack, inputs, outputs)."""
    stack = a.ndim + b.ndim - 2 - len(shape)
    a, b = a.reshape(*shape[:stack], -1, a.shape[-1]), b.reshape(*shape[:stack], a.shape[-1], -1)
    return jnp.matmul(a, b, precision="highest").reshape(shape)


def _near(rule: str, paths: Iterable[str]) -> str:
    """The three paths nearest to a regular expression."""
    return ", ".join(difflib.get_close_matches(rule, paths, n=3, cutoff=0.0))
