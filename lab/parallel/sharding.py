"""Sharding: the mesh, path rules for the state and for activations, and the batch.

A mesh has four axes. `data` and `fsdp` both shard the rows of a batch; `fsdp` also shards the state, which is gathered
where it is used (fully sharded data parallelism, Rajbhandari et al. 2020). `tensor` shards attention heads, the hidden
width of MLPs and the vocabulary (Shoeybi et al. 2019). `sequence` shards the length of activations; keys and values are
gathered. The compiler inserts the collectives. Results equal those of one device up to summation order.
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
SMALL = 2**12  # without a rule, arrays with fewer elements are replicated

# (regex searched in the path of a state array, mesh axes of its last dimensions with "-" for none). First match wins.
# Rules name the last dimensions because scanned blocks are stacked along a leading one. A rule with more dimensions
# than the array is skipped (factored moments have another rank than their parameters). An array without a rule is
# sharded over fsdp along its largest divisible dimension; small arrays are replicated.
Rules = Sequence[tuple[str, str]]
RULES: Rules = (
    # Every Transformer (GPT, BERT, ViT, Seq2Seq). "attn" is also the end of "cross_attn", "wte" of "source_wte".
    (r"attn/(query|key|value)/kernel|ffn/(up|gate)/kernel", "fsdp, tensor"),
    (r"attn/out/kernel|ffn/down/kernel", "tensor, fsdp"),
    (r"wte/embedding", "tensor, fsdp"),
    (r"/head$", "fsdp, tensor"),
)
# The same for activations: rules for a module's output, by its path. Other dimensions, and those an axis does not
# divide, are left to the compiler. Without the rules, XLA picks matmul shardings that seem cheap but are slow.
ACTIVATIONS: Rules = (
    (r"attn/query$|ffn/(up|gate)$", "rows, sequence, tensor"),
    (r"attn/(key|value)$", "rows, -, tensor"),
    (r"(^|[/_])(wte|block_\d+|blocks|attn|ffn|attention_norm|cross_norm|mlp_norm|final_norm)$", "rows, sequence, -"),
    (r"^$", "rows, sequence, tensor"),
    (r"", "rows"),
)
# Modules run in a `shard_map` because the compiler cannot partition them; all arguments and results have these axes.
OWN: Rules = ((r"attn/own$", "rows, -, tensor, -"),)


def mesh_sizes(mesh: Any, devices: int) -> dict[str, int]:
    """Axis -> number of devices, with -1 replaced by the remaining devices. `mesh`: an experiment's `Mesh`.

    Raises:
      UserError: too few devices, or the other axes do not divide their number.
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
    """The mesh of these devices (all by default). Only the axis "data" spans TPU slices, because the network between
    slices is slower than within.

    Raises:
      UserError: see `mesh_sizes`; or the number of slices does not divide "data".
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
    """A pytree path as a string, such as `params/block_0/attn/query/kernel`."""
    return "/".join(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path)


def _axes(rule: tuple[str, str]) -> list[str | None]:
    names = [name.strip() for name in rule[1].split(",") if name.strip()]
    if unknown := set(names) - {*AXES, "rows", "-"}:
        raise UserError(f"The sharding rule {rule} names the axis {sorted(unknown)[0]!r}; a mesh has "
                        f"{', '.join(AXES)}.")
    return [None if name == "-" else name for name in names]


def state_shardings(state: Any, mesh: jax.sharding.Mesh | AbstractMesh, own: Rules = ()) -> Any:
    """A NamedSharding for every array of the (abstract) state. `own`: rules tried before `RULES`.

    Raises:
      UserError: an axis does not divide a dimension (names the path), is unknown, or shards no array; or a rule of
        `own` matches no array.
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


def spread(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shardings of arrays beside the state, by the default rule."""
    return jax.tree.map(lambda x: NamedSharding(mesh, _largest(x.shape, mesh.shape["fsdp"])), tree)


def _largest(shape: tuple[int, ...], devices: int) -> PartitionSpec:
    """Shards the largest divisible dimension over "fsdp"; replicates small arrays."""
    dividing = [(size, -i) for i, size in enumerate(shape) if size % devices == 0]
    if devices == 1 or not dividing or math.prod(shape) < SMALL:
        return PartitionSpec()
    return PartitionSpec(*[None] * -max(dividing)[1], "fsdp")


def describe_state(state: Any, shardings: Any) -> list[tuple[str, tuple[int, ...], str, int, int]]:
    """Rows (path, shape, axes, arrays, bytes per device) for the whole state.

    Similar arrays share a row: a parameter and its moments, and numbered blocks (number shown as `*`).
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
    """Bytes of these (abstract) arrays on each device."""
    return sum(row[-1] for row in describe_state(state, shardings))


@contextlib.contextmanager
def constrained(mesh: jax.sharding.Mesh, rules: Rules = ACTIVATIONS) -> Iterator[set[str]]:
    """Context that constrains the outputs of Flax modules traced in it by `rules`. Yields the set of axes used.

    Model code needs no sharding annotations, and is unaffected outside the context.
    """
    used: set[str] = set()

    def place(next_function: Any, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        alone = jax.sharding.get_abstract_mesh().manual_axes  # nonempty inside a shard_map
        if alone or context.method_name != "__call__":
            return next_function(*args, **kwargs)
        path = "/".join(context.module.path)
        if own := next((_axes(rule) for rule in OWN if re.search(rule[0], path)), None):
            spec = _together([x.shape for x in args], own, mesh)
            return jax.shard_map(next_function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(*args)
        take = functools.partial(jnp.take, axis=0) if isinstance(context.module, nn.Embed) else None
        if lookup := getattr(context.module, "embedding_lookup", take):
            # Gather the table first: otherwise XLA partitions the lookup, and then every device computes all of it.
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
    """The PartitionSpec entry for a dimension of length `size`; unconstrained if the axis does not divide it."""
    if axis is None:
        return None
    names = ROWS if axis == "rows" else (axis,)
    devices = math.prod(mesh.shape[name] for name in names)
    if size % devices:
        return PartitionSpec.UNCONSTRAINED
    return None if devices == 1 else ROWS if axis == "rows" else axis


def _together(shapes: Sequence[tuple[int, ...]], axes: Sequence[str | None], mesh: jax.sharding.Mesh) -> PartitionSpec:
    """One spec for all shapes. Drops an axis unless it divides that dimension in every shape (query and key heads)."""
    found = [{_dividing(size, axis, mesh) for size in sizes}
             for axis, sizes in zip(axes, zip(*shapes, strict=True), strict=True)]
    return PartitionSpec(*(None if PartitionSpec.UNCONSTRAINED in names else names.pop() for names in found))


def batch_sharding(mesh: jax.sharding.Mesh, batch: int, microbatches: int = 1, *,
                   stacked: bool = False) -> NamedSharding:
    """Shards rows over "data" and "fsdp"; with `stacked`, after a leading axis of steps.

    Raises:
      UserError: the devices do not divide a microbatch.
    """
    devices = math.prod(mesh.shape[axis] for axis in ROWS)
    if batch % (devices * microbatches):
        parts = f"{devices} devices" + (f" x {microbatches} microbatches" if microbatches > 1 else "")
        raise UserError(f"--batch {batch} is not divisible by {parts}. Use a multiple of {devices * microbatches}, or "
                        f"fewer devices with --mesh.data.")
    return NamedSharding(mesh, PartitionSpec(None, ROWS) if stacked else PartitionSpec(ROWS))


def process_rows(sharding: NamedSharding, batch: int) -> slice:
    """The rows of the global batch on this process's devices, which this process reads.

    Processes that differ only in "tensor" or "sequence" have the same rows.
    """
    stacked = len(sharding.spec) > 1
    places = sharding.addressable_devices_indices_map((1, batch) if stacked else (batch,)).values()
    ranges = [place[-1].indices(batch)[:2] for place in places]
    return slice(min(start for start, _ in ranges), max(stop for _, stop in ranges))


def put(rows: Mapping[str, np.ndarray], sharding: NamedSharding, batch: int) -> dict[str, jax.Array]:
    """Puts this process's rows (those of `process_rows`) on the devices, as global arrays of `batch` rows."""
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
