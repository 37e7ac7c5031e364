"""Finds the matrices among a model's parameters from its jaxpr, not from names or ranks.

A parameter is a *matrix* if it is an operand of a matmul or convolution in the abstractly traced model. Lookup tables
(embeddings, even if tied to the output layer), biases, scales and tokens are not matrices. A matrix is a *head* if its
product reaches an output of the model without passing through another matrix. Weight decay (all matrices) and Muon
(hidden matrices: all but heads) share this list.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from lab.models.members import Several

Spec = Mapping[str, jax.ShapeDtypeStruct]


class Matrix(NamedTuple):
    """A parameter that is an operand of a matmul or convolution. Each axis is in exactly one of the three tuples."""

    stack: tuple[int, ...]
    """Axes over independent matrices (scanned layers, experts)."""
    inputs: tuple[int, ...]
    """Contracted axes."""
    outputs: tuple[int, ...]
    """Axes kept in the product."""
    head: bool
    """Whether its product reaches the model's output through no other matrix."""


def matrices(experiment: Any, batch: Mapping[str, Any]) -> dict[str, Matrix]:
    """Path -> matrix for the experiment's model, for batches shaped like `batch` (before the data's transform). For a
    model of `Several` members: the matrices of one member.
    """
    spec = tuple((name, (1, *x.shape[1:]), np.dtype(x.dtype)) for name, x in sorted(batch.items()))
    parts = experiment.model, experiment.task, experiment.data
    try:
        hash(parts)
    except TypeError:  # a traced number or a list field
        return _matrices(*parts, spec)
    return _remembered(*parts, spec)


def outputs(experiment: Any, batch: Mapping[str, Any]) -> list[Any]:
    """Output shapes of the model for one record, one entry per model call that the task makes at initialisation."""
    batch = {name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in batch.items()}
    variables, calls = _initialised(experiment.model, experiment.task, experiment.data, batch)
    return [jax.eval_shape(call, variables["params"], {**variables, "params": {}}, arrays) for call, arrays in calls]


def _matrices(model: Any, task: Any, data: Any, spec: tuple) -> dict[str, Matrix]:
    prefix = ""
    if isinstance(model, Several):
        model, prefix = model.member, "member/"
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in spec}
    variables, calls = _initialised(model, task, data, batch)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/")
             for path, _ in jax.tree.leaves_with_path(variables["params"])]
    shapes = [x.shape for x in jax.tree.leaves(variables["params"])]
    flow = _Flow()
    heads: set[int] = set()
    for call, arrays in calls:
        traced = jax.make_jaxpr(call)(variables["params"], {**variables, "params": {}}, arrays)
        inputs = [_Value("param", {i: tuple((a,) for a in range(len(shape)))}) for i, shape in enumerate(shapes)]
        inputs += [_Value("data")] * (len(traced.jaxpr.invars) - len(inputs))
        for value in flow.through(traced, inputs):
            heads |= value.last
    return {prefix + paths[i]: _matrix(len(shapes[i]), axes, i in heads)
            for i, axes in sorted(flow.products.items()) if i not in flow.tables and _is_matrix(shapes[i], axes)}


_remembered = functools.lru_cache(maxsize=64)(_matrices)


def _initialised(model: Any, task: Any, data: Any, batch: Spec) -> tuple[Any, list[tuple[Callable, Any]]]:
    """Shapes of the model's variables, and the model calls by which the task creates them: (function, arguments)."""
    found: list[tuple[str, tuple, dict[str, Any]]] = []
    inside = False

    def record(call: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        nonlocal inside
        if inside or context.module.path or context.method_name == "setup":
            return call(*args, **kwargs)
        shape = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_array(x) else x)
        found.append((context.method_name, *shape((args, kwargs))))
        inside = True
        try:
            return call(*args, **kwargs)
        finally:
            inside = False

    def init(batch: Any) -> Any:
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(0), batch["index"])
        with nn.intercept_methods(record):
            return task.init(model, jax.random.key(0), data.transform({**batch, "key": keys}, False))

    variables = jax.eval_shape(init, dict(batch))
    return variables, [_call(model, *each) for each in found]


def _call(model: Any, method: str, args: tuple, kwargs: dict[str, Any]) -> tuple[Callable, Any]:
    leaves, structure = jax.tree.flatten((args, kwargs))
    where = [i for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)]

    def call(params: Any, others: Any, arrays: Sequence[Any]) -> Any:
        filled = list(leaves)
        for i, x in zip(where, arrays, strict=True):
            filled[i] = x
        args, kwargs = jax.tree.unflatten(structure, filled)
        return model.apply({**others, "params": params}, *args, **kwargs, method=method, mutable=True,
                           rngs={"params": jax.random.key(0)})[0]

    return call, [leaves[i] for i in where]


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _is_matrix(shape: tuple[int, ...], axes: Any) -> bool:
    return len(shape) >= 2 and (axes is None or bool(axes[0] and axes[1]))


def _matrix(ndim: int, axes: tuple[tuple[int, ...], tuple[int, ...]] | None, head: bool) -> Matrix:
    """`axes`: (inputs, outputs), or None if they could not be traced to the product: then the last axis is output."""
    inputs, outputs = axes or (tuple(range(ndim - 1)), (ndim - 1,))
    return Matrix(tuple(i for i in range(ndim) if i not in inputs + outputs), inputs, outputs, head)


# --------------------------------------------------------------------------------------------------------- data flow

Axes = tuple[tuple[int, ...], ...] | None
"""For each dimension of an array, the parameter axes in it; None: unknown."""


class _Value(NamedTuple):
    """The dataflow state of an array in a jaxpr."""

    kind: str
    """"data": computed from inputs; "param": from parameters only; "const": from neither."""
    leaves: dict[int, Axes] = {}
    """If "param": the parameters it is computed from, with their axes."""
    last: frozenset[int] = frozenset()
    """If "data": the last matrices on the paths to it."""


def _joined(values: Iterable[_Value], axes: Callable[[Axes], Axes] = lambda axes: axes) -> _Value:
    """The result of a non-product operation on `values`; `axes` maps a parameter's axes through the operation."""
    values = list(values)
    if any(v.kind == "data" for v in values):
        return _Value("data", last=frozenset().union(*(v.last for v in values)))
    leaves: dict[int, Axes] = {}
    for value in values:
        for leaf, own in value.leaves.items():
            leaves[leaf] = leaves.get(leaf) or (axes(own) if own is not None else None)
    return _Value("param" if leaves else "const", leaves)


class _Flow:
    """Follows parameters through a jaxpr; collects the matrices (with inputs and outputs) and the lookup tables."""

    def __init__(self) -> None:
        self.products: dict[int, tuple[tuple[int, ...], tuple[int, ...]] | None] = {}
        self.tables: set[int] = set()

    def through(self, program: Jaxpr | ClosedJaxpr, inputs: Sequence[_Value]) -> list[_Value]:
        """The values of the jaxpr's outputs."""
        jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
        known: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))

        def value(atom: Any) -> _Value:
            return _Value("const") if isinstance(atom, Literal) else known.get(atom, _Value("const"))

        for eqn in jaxpr.eqns:
            known.update(zip(eqn.outvars, self._results(eqn, [value(v) for v in eqn.invars]), strict=True))
        return [value(v) for v in jaxpr.outvars]

    def _results(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        name, parameters = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (left, right), (batch_left, batch_right) = parameters["dimension_numbers"]
            return [self._product(values, ((left, batch_left), (right, batch_right)))]
        if name == "conv_general_dilated":
            out, *rest = parameters["dimension_numbers"].rhs_spec
            ndim = len(eqn.invars[0].aval.shape)
            return [self._product(values, ((tuple(range(ndim - 1)), ()), (tuple(rest), ())))]
        if name == "gather" and values[0].kind == "param" and values[1].kind == "data":
            self.tables |= values[0].leaves.keys()
            return [_Value("data", last=values[1].last)]
        if name == "scan":
            body = parameters["jaxpr"]  # has one axis less of what is scanned over; JAX 0.12 has other parameters
            carried = sum(x.aval.ndim == y.ndim for x, y in zip(eqn.outvars, body.out_avals, strict=True))
            given = sum(x.aval.ndim == y.ndim for x, y in zip(eqn.invars, body.in_avals, strict=True))
            return self._scan(body, values, given - carried, carried)
        if name == "while":
            rest = values[parameters["cond_nconsts"]:]
            n = parameters["body_nconsts"]
            return self._scan(parameters["body_jaxpr"], rest, n, len(rest) - n)
        if name == "cond":
            results = [self.through(branch, values[1:]) for branch in parameters["branches"]]
            return [_joined([values[0]._replace(leaves={}), *each]) for each in zip(*results, strict=True)]
        inner = [p for p in parameters.values() if isinstance(p, Jaxpr | ClosedJaxpr)]
        inner = [p for p in inner if len((p.jaxpr if isinstance(p, ClosedJaxpr) else p).invars) == len(values)]
        if inner:
            return self.through(inner[0], values)
        return [_joined(values, functools.partial(_moved, eqn))] * len(eqn.outvars)

    def _product(self, values: list[_Value], sides: Sequence[tuple[Sequence[int], Sequence[int]]]) -> _Value:
        """`sides`: (contracted dimensions, batch dimensions) of each operand."""
        kinds = [v.kind for v in values]
        if kinds.count("param") != 1:
            return _joined(values, lambda axes: None)
        i = kinds.index("param")
        for leaf, axes in values[i].leaves.items():
            found = None
            if axes is not None:
                summed, numbered = sides[i]
                kept = [d for d in range(len(axes)) if d not in summed and d not in numbered]
                found = tuple(tuple(sorted(a for d in dims for a in axes[d])) for dims in (summed, kept))
            self.products[leaf] = self.products.get(leaf) or found
        return _Value("data", last=frozenset(values[i].leaves))

    def _scan(self, body: ClosedJaxpr, values: list[_Value], consts: int, carry: int) -> list[_Value]:
        fixed, state, rows = values[:consts], values[consts: consts + carry], values[consts + carry:]
        rows = [v._replace(leaves={k: axes and axes[1:] for k, axes in v.leaves.items()}) for v in rows]
        while True:  # iterate the carry to a fixed point
            results = self.through(body, [*fixed, *state, *rows])
            new = [_joined(pair) for pair in zip(state, results[:carry], strict=True)]
            if new == state:
                return [*state, *(v._replace(leaves=dict.fromkeys(v.leaves)) for v in results[carry:])]
            state = new


def _moved(eqn: Any, axes: Axes) -> Axes:
    """A parameter's axes after a non-product operation."""
    name, parameters, out = eqn.primitive.name, eqn.params, eqn.outvars[0].aval.shape
    if name == "transpose":
        return tuple(axes[d] for d in parameters["permutation"])
    if name == "broadcast_in_dim":
        places = dict(zip(parameters["broadcast_dimensions"], axes, strict=False))
        return tuple(places.get(d, ()) for d in range(len(out)))
    if name == "squeeze":
        return tuple(a for d, a in enumerate(axes) if d not in parameters["dimensions"])
    if name == "reshape":
        return _merged(axes, eqn.invars[0].aval.shape, out)
    return axes if len(axes) == len(out) else None


def _merged(axes: Axes, old: tuple[int, ...], new: tuple[int, ...]) -> Axes:
    """The axes after a reshape that merges neighbouring dimensions; None if it splits one."""
    found, i = [], 0
    for size in new:
        own, product = [], 1
        while product < size and i < len(old):
            own, product, i = [*own, *axes[i]], product * old[i], i + 1
        if product != size:
            return None
        found.append(tuple(own))
    return tuple(found)
