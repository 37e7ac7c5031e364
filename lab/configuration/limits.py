"""Limits on the numbers of an experiment, so that array sizes and counters do not overflow."""

from __future__ import annotations

import math
from typing import Any

from lab.errors import UserError

MOST = 2**31 - 1  # steps, records and sizes are int32 in the compiled program
DEVICES = 2**20


def check_numbers(values: dict[str, Any]) -> None:
    """Checks every number in `values`: dotted field -> plain value, or list of plain values.

    Raises:
      UserError: an integer is too large, or a float is infinite or NaN; names the field.
    """
    for path, value in values.items():
        for number in value if isinstance(value, list) else [value]:
            flag = f"--{path.replace('_', '-')}"
            if isinstance(number, list | dict):
                check_numbers({path: number} if isinstance(number, list) else
                              {f"{path}.{name}": inner for name, inner in number.items()})
            elif isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{flag} is {number}: it must be a finite number.")
            elif isinstance(number, int) and abs(number) > MOST and path != "seed":  # the seed has its own limit
                raise UserError(f"{flag} {_shortly(number)} is too large: at most {MOST}.")


def check_devices(sizes: dict[str, int]) -> None:
    """Raises UserError if a mesh of these sizes (axis -> devices) has more than `DEVICES` devices."""
    if math.prod(max(size, 1) for size in sizes.values()) > DEVICES:
        shown = ", ".join(f"--mesh.{axis} {size}" for axis, size in sizes.items() if size > 1)
        raise UserError(f"{shown}: a mesh has at most {DEVICES} devices.")


def check_parallel(experiment: Any) -> None:
    """Raises UserError for an experiment whose ways to divide a step exclude each other."""
    exact, shards = experiment.exact, experiment.virtual_shards
    if experiment.parallel == "pmap" and (experiment.steps_per_call > 1 or experiment.data_on_device == "always"
                                          or exact):
        raise UserError("--parallel pmap is for plain steps: leave out --steps-per-call, --data-on-device and --exact.")
    if exact and experiment.grad_accum_steps > 1:
        raise UserError("--exact computes its virtual shards one after another already: leave out --grad-accum-steps.")
    if exact and experiment.batch % shards:
        raise UserError(f"--batch {experiment.batch} is not divisible by --virtual-shards {shards}.")
    if getattr(experiment.task, "whole_batch", False):
        _check_undivided(experiment)


def _check_undivided(experiment: Any) -> None:
    """`check_parallel` for a task whose loss compares all records of a batch."""
    divides = {f"--grad-accum-steps {experiment.grad_accum_steps}": experiment.grad_accum_steps > 1,
               "--parallel pmap": experiment.parallel == "pmap", "--exact": experiment.exact,
               "private training": experiment.private is not None}
    name = type(experiment.task).__name__
    if given := [flag for flag, set_ in divides.items() if set_]:
        raise UserError(f"{name} compares each record with all others of the batch, and {given[0]} computes parts of "
                        f"it alone: leave it out.")
    if experiment.batch < 2:
        raise UserError(f"{name} compares each record with the others of the batch: --batch must be at least 2.")


def _shortly(number: int) -> str:
    return str(number) if abs(number) < 10**20 else f"{str(number)[:12]}..."
