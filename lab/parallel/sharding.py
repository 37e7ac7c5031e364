"""Where every array of a run lives: the mesh, one table of path rules for the whole state, the batch, the activations.

A mesh has four axes. `data` and `fsdp` both divide the rows of a batch; `fsdp` also divides the state, which is
gathered where it is used (fully sharded data parallelism, Rajbhandari et al. 2020). `tensor` divides attention heads,
the hidden width of MLPs and the vocabulary (Shoeybi et al. 2019). `sequence` divides the length of activations; keys
and values are gathered. The compiler inserts the communication; the results are those of one device up to the order of
sums.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from lab.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence")
ROWS = ("data", "fsdp")
SMALL = 2**12  # numbers in an array that is not worth dividing

# (regular expression searched in the path of an array of the state, axes of its last dimensions with "-" for none). The
# first match wins. The last dimensions, because scanned blocks stack their parameters along a first one; a rule for
# more dimensions than an array has does not fit it (factored moments have another rank than their parameters). What no
# rule fits has its largest dimension that can be divided along fsdp; what is small is on every device.
Rules = Sequence[tuple[str, str]]
RULES: Rules = (
    # Every Transformer (GPT, BERT, ViT).
    (r"attn/(query|key|value)/kernel|ffn/(up|gate)/kernel", "fsdp, tensor"),
    (r"attn/out/kernel|ffn/down/kernel", "tensor, fsdp"),
    (r"/wte/embedding", "tensor, fsdp"),
    (r"/head$", "fsdp, tensor"),
)
# The same for what a module returns, by the module's path; dimensions left out, or that an axis does not divide, are up
# to the compiler. They keep it from dividing a product in a way that looks cheap and is not.
ACTIVATIONS: Rules = (
    (r"attn/query$|ffn/(up|gate)$", "rows, sequence, tensor"),
    (r"attn/(key|value)$", "rows, -, tensor"),
    (r"(^|/)(wte|block_\d+|blocks|attn|ffn|attention_norm|mlp_norm|final_norm)$", "rows, sequence, -"),
    (r"^$", "rows, sequence, tensor"),
    (r"", "rows"),
)
# Modules that every device runs on its own part of arguments and results, because the compiler cannot divide them.
OWN: Rules = ((r"attn/own$", "rows, -, tensor, -"),)


def mesh_sizes(mesh: Any, devices: int) -> dict[str, int]:
    """Axis -> number of devices, with -1 replaced by what the other axes leave. `mesh`: an experiment's `Mesh`.

    Raises:
      UserError: there are not that many devices, or the others do not divide them.
    """
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    named = math.prod(size for size in sizes.values() if size != -1)
    asked = " ".join(f"--mesh.{axis} {size}" for axis, size in sizes.items() if size not in (1, -1))
    if named > devices:
        raise UserError(f"{asked} needs {named} devices; this machine has {devices}.")
    if -1 in sizes.values() and devices % named:
        raise UserError(f"{asked} does not divide the {devices} devices. Say how many to use: --mesh.data N.")
    return {axis: devices // named if size == -1 else size for axis, size in sizes.items()}


def make_mesh(mesh: Any, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of these devices (all by default). TPU slices are divided by the axis "data" only: the network between
    them is slower than within.

    Raises:
      UserError: `mesh_sizes` cannot be had of these devices, or "data" not of these slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(mesh, len(devices))
    shape, used = tuple(sizes.values()), list(devices[: math.prod(sizes.values())])
    slices = len({getattr(device, "slice_index", 0) for device in used})
    if slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4, devices=used)
    if shape[0] % slices:
        raise UserError(f"--mesh.data {shape[0]} is not divisible by the {slices} TPU slices, whose network is for "
                        f"data parallelism only.")
    from jax.experimental import mesh_utils

    within = (shape[0] // slices, *shape[1:])
    grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1, 1), devices=used)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 4)


def path_of(path: Sequence[Any]) -> str:
    """`params/block_0/attn/query/kernel`: a pytree path as people and rules write it."""
    return "/".join(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path)


def _axes(rule: tuple[str, str]) -> list[str | None]:
    names = [name.strip() for name in rule[1].split(",") if name.strip()]
    if unknown := set(names) - {*AXES, "rows", "-"}:
        raise UserError(f"The sharding rule {rule} names the axis {sorted(unknown)[0]!r}; a mesh has "
                        f"{', '.join(AXES)}.")
    return [None if name == "-" else name for name in names]


def state_shardings(state: Any, mesh: jax.sharding.Mesh | AbstractMesh, own: Rules = ()) -> Any:
    """A NamedSharding for every array of the (abstract) state. `own`: rules that come before `RULES`.

    Raises:
      UserError: an axis does not divide a dimension (names the path), is in no mesh, or divides nothing at all; or an
        own rule matches nothing.
    """
    unused = {rule[0] for rule in own}
    used: set[str | None] = {"data", "fsdp", "sequence"}

    def place(path: Sequence[Any], leaf: Any) -> NamedSharding:
        name = path_of(path)
        fitting = (rule for rule in (*own, *RULES) if re.search(rule[0], name) and len(_axes(rule)) <= leaf.ndim)
        rule = next(fitting, None)
        if rule is None:
            return NamedSharding(mesh, _largest(leaf.shape, mesh.shape["fsdp"]))
        unused.discard(rule[0])
        axes = [None] * (leaf.ndim - len(_axes(rule))) + _axes(rule)
        for dimension, axis in zip(leaf.shape, axes, strict=True):
            if axis and dimension % mesh.shape[axis]:
                good = -(-dimension // mesh.shape[axis]) * mesh.shape[axis]
                raise UserError(f"{name} {leaf.shape}: the axis {axis!r} of {mesh.shape[axis]} devices does not divide "
                                f"{dimension}. {good} would do; or give another rule: --mesh.rules '{name}' '-'.")
        axes = [axis if axis and mesh.shape[axis] > 1 else None for axis in axes]
        used.update(axes)
        return NamedSharding(mesh, PartitionSpec(*axes) if any(axes) else PartitionSpec())

    placed = jax.tree.map_with_path(place, state)
    if unused:
        raise UserError(f"The sharding rule --mesh.rules {sorted(unused)[0]!r} matches no array of the state. "
                        f"--dry-run lists them.")
    if idle := [axis for axis in AXES if mesh.shape[axis] > 1 and axis not in used]:
        raise UserError(f"--mesh.{idle[0]} {mesh.shape[idle[0]]}: no array of this model has a rule for that axis. "
                        f"Give one with --mesh.rules, or use --mesh.fsdp.")
    return placed


def _largest(shape: tuple[int, ...], devices: int) -> PartitionSpec:
    """The largest dimension that can be divided, along "fsdp"."""
    dividing = [(size, -i) for i, size in enumerate(shape) if size % devices == 0]
    if devices == 1 or not dividing or math.prod(shape) < SMALL:
        return PartitionSpec()
    return PartitionSpec(*[None] * -max(dividing)[1], "fsdp")


def describe_state(state: Any, shardings: Any) -> list[tuple[str, tuple[int, ...], str, int, int]]:
    """(path, shape, axes, arrays, bytes per device) of the whole state.

    One row for all arrays that are alike: a parameter with its moments, and numbered blocks, shown as a `*`.
    """
    paths = [path_of(path) for path, _ in jax.tree.leaves_with_path(state)]
    parameters = {path.removeprefix("params/") for path in paths if path.startswith("params/")}
    rows: dict[tuple, list[int]] = {}
    for path, leaf, sharding in zip(paths, jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        names = path.split("/")
        name = next((end for i in range(len(names)) if (end := "/".join(names[i:])) in parameters), path)
        spec = ", ".join("-" if axis is None else str(axis) for axis in sharding.spec) or "replicated"
        row = rows.setdefault((re.sub(r"(?<=[a-z]_)\d+(?=/)", "*", name), leaf.shape, spec), [0, 0])
        row[0] += 1
        row[1] += math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return [(*row, *sums) for row, sums in rows.items()]


def bytes_per_device(state: Any, shardings: Any) -> int:
    """Bytes that every device holds of these (abstract) arrays."""
    return sum(row[-1] for row in describe_state(state, shardings))


@contextlib.contextmanager
def constrained(mesh: jax.sharding.Mesh, rules: Rules = ACTIVATIONS) -> Iterator[set[str]]:
    """While a model is traced in it, what its modules return is placed by `rules`; gives the axes that were used.

    So no model knows of shardings, and nothing changes where it is applied outside.
    """
    used: set[str] = set()

    def place(next_function: Any, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        alone = jax.sharding.get_abstract_mesh().manual_axes  # in a shard_map: these are one device's rows
        if alone or context.method_name != "__call__":
            return next_function(*args, **kwargs)
        path = "/".join(context.module.path)
        if own := next((_axes(rule) for rule in OWN if re.search(rule[0], path)), None):
            spec = _together([x.shape for x in args], own, mesh)
            return jax.shard_map(next_function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(*args)
        take = functools.partial(jnp.take, axis=0) if isinstance(context.module, nn.Embed) else None
        if lookup := getattr(context.module, "embedding_lookup", take):
            # Gathered first: left to itself the compiler divides the lookup, and then every device computes all of it.
            table = jax.lax.with_sharding_constraint(context.module.embedding, NamedSharding(mesh, PartitionSpec()))
            out = lookup(table, *args)
        else:
            out = next_function(*args, **kwargs)
        if not isinstance(out, jax.Array) or not out.ndim:
            return out
        axes = next((_axes(rule) for rule in rules if re.search(rule[0], path) and len(_axes(rule)) <= out.ndim), [])
        spec = [_dividing(size, axis, mesh) for size, axis in zip(out.shape, axes, strict=False)]
        spec += [PartitionSpec.UNCONSTRAINED] * (out.ndim - len(spec))
        if not any(axis not in (None, PartitionSpec.UNCONSTRAINED) for axis in spec):
            return out
        used.update(axis for axis in spec if isinstance(axis, str))
        return jax.lax.with_sharding_constraint(out, NamedSharding(mesh, PartitionSpec(*spec)))

    with (jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
          nn.intercept_methods(place) if mesh.size > 1 else contextlib.nullcontext()):
        yield used


def _dividing(size: int, axis: str | None, mesh: jax.sharding.Mesh) -> Any:
    """What stands in a PartitionSpec for a dimension of that size."""
    if axis is None:
        return None
    names = ROWS if axis == "rows" else (axis,)
    devices = math.prod(mesh.shape[name] for name in names)
    if size % devices:
        return PartitionSpec.UNCONSTRAINED
    return None if devices == 1 else ROWS if axis == "rows" else axis


def _together(shapes: Sequence[tuple[int, ...]], axes: Sequence[str | None], mesh: jax.sharding.Mesh) -> PartitionSpec:
    """One spec for all shapes: an axis that does not divide all of them divides none (query and key heads)."""
    found = [{_dividing(size, axis, mesh) for size in sizes}
             for axis, sizes in zip(axes, zip(*shapes, strict=True), strict=True)]
    return PartitionSpec(*(None if PartitionSpec.UNCONSTRAINED in names else names.pop() for names in found))


def batch_sharding(mesh: jax.sharding.Mesh, batch: int, microbatches: int = 1, *,
                   stacked: bool = False) -> NamedSharding:
    """Rows over the axes "data" and "fsdp"; with `stacked`, behind a leading axis of updates.

    Raises:
      UserError: a microbatch cannot be divided among the devices.
    """
    devices = math.prod(mesh.shape[axis] for axis in ROWS)
    if batch % (devices * microbatches):
        parts = f"{devices} devices" + (f" x {microbatches} microbatches" if microbatches > 1 else "")
        raise UserError(f"--batch {batch} is not divisible by {parts}. Use a multiple of {devices * microbatches}, or "
                        f"fewer devices with --mesh.data.")
    return NamedSharding(mesh, PartitionSpec(None, ROWS) if stacked else PartitionSpec(ROWS))


def process_rows(sharding: NamedSharding, batch: int) -> slice:
    """The rows of the global batch that this process's devices hold, all that it has to read.

    Processes that differ in "tensor" or "sequence" only hold the same rows.
    """
    stacked = len(sharding.spec) > 1
    places = sharding.addressable_devices_indices_map((1, batch) if stacked else (batch,)).values()
    ranges = [place[-1].indices(batch)[:2] for place in places]
    return slice(min(start for start, _ in ranges), max(stop for _, stop in ranges))


def put(rows: Mapping[str, np.ndarray], sharding: NamedSharding, batch: int) -> dict[str, jax.Array]:
    """This process's rows (those of `process_rows`) -> global arrays on the devices, of `batch` rows."""
    if jax.process_count() == 1:
        return jax.device_put(dict(rows), sharding)
    axis, first = len(sharding.spec) - 1, process_rows(sharding, batch).start

    def place(x: np.ndarray) -> jax.Array:
        shape = (*x.shape[:axis], batch, *x.shape[axis + 1 :])

        def own(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[axis].indices(batch)
            return x[(*index[:axis], slice(start - first, stop - first))]

        return jax.make_array_from_callback(shape, sharding, own)

    return {name: place(x) for name, x in rows.items()}
