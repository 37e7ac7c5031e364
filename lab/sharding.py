"""Where every array of a run lives: the mesh, one table of path rules for the whole state, and the batch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lab.errors import UserError

# (regular expression searched in the path of an array of the state, axes for its dimensions). The first match wins.
# The default is data parallelism: every device holds the whole state.
Rules = Sequence[tuple[str, tuple[str | None, ...]]]
RULES: Rules = ((r".*", ()),)


def make_mesh(data: int = -1) -> jax.sharding.Mesh:
    """A mesh of `data` devices (-1: all) along the axis "data".

    Raises:
      UserError: there are not that many devices.
    """
    devices = jax.devices()
    data = len(devices) if data == -1 else data
    if data > len(devices):
        raise UserError(f"--mesh.data {data} needs {data} devices; this machine has {len(devices)}.")
    return jax.make_mesh((data,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:data])


def path_of(path: Sequence[Any]) -> str:
    """`params/block_0/attn/query/kernel`: a pytree path as people and rules write it."""
    return "/".join(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path)


def state_shardings(state: Any, mesh: jax.sharding.Mesh, rules: Rules = RULES) -> Any:
    """A NamedSharding for every array of the (abstract) state, by the first rule whose expression is in its path.

    A rule with more axes than an array has dimensions does not fit it and is passed over (factored moments have
    another rank than their parameters); what no rule fits is replicated.

    Raises:
      UserError: an axis is not in the mesh, or does not divide a dimension; names the path.
    """
    def place(path: Sequence[Any], leaf: Any) -> NamedSharding:
        name = path_of(path)
        axes = next((axes for rule, axes in rules if re.search(rule, name) and len(axes) <= leaf.ndim), ())
        for dimension, axis in zip(leaf.shape, axes, strict=False):
            if axis is not None and axis not in mesh.shape:
                raise UserError(f"The sharding rule for {name} names the axis {axis!r}; the mesh has "
                                f"{mesh.axis_names}.")
            if axis is not None and dimension % mesh.shape[axis]:
                raise UserError(f"{name} {leaf.shape}: the axis {axis!r} of {mesh.shape[axis]} devices does not divide "
                                f"{dimension}.")
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map_with_path(place, state)


def batch_sharding(mesh: jax.sharding.Mesh, batch: int, microbatches: int = 1, *,
                   stacked: bool = False) -> NamedSharding:
    """Rows over the axis "data"; with `stacked`, behind a leading axis of updates.

    Raises:
      UserError: a microbatch cannot be divided among the devices.
    """
    devices = mesh.shape["data"]
    if batch % (devices * microbatches):
        parts = f"{devices} devices" + (f" x {microbatches} microbatches" if microbatches > 1 else "")
        raise UserError(f"--batch {batch} is not divisible by {parts}. Use a multiple of {devices * microbatches}, or "
                        f"fewer devices with --mesh.data.")
    return NamedSharding(mesh, PartitionSpec(None, "data") if stacked else PartitionSpec("data"))


def process_rows(batch: int, process: int | None = None, processes: int | None = None) -> slice:
    """The rows of the global batch that this (or the given) process reads: contiguous, and all together the batch.

    Raises:
      UserError: the batch cannot be divided among the processes.
    """
    process = jax.process_index() if process is None else process
    processes = jax.process_count() if processes is None else processes
    if batch % processes:
        raise UserError(f"The batch of {batch} is not divisible by {processes} processes. Use a multiple.")
    return slice(batch * process // processes, batch * (process + 1) // processes)


def put(rows: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's rows -> global arrays on the devices."""
    if jax.process_count() == 1:
        return jax.device_put(rows, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), rows)
