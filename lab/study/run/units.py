"""The units of a study: which cells are run by one program at a time, decided once and written to plan.json."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from lab.data.pipeline import reader
from lab.errors import UserError
from lab.experiment import Experiment, to_json
from lab.study.run import workers
from lab.study.run.cells import Cell
from lab.study.run.grouping import Group
from lab.study.run.preflight import TIMED_FLOPS, Arm
from lab.study.run.shared import Bench
from lab.study.run.stacked import common_dispatch
from lab.train.json_files import read_json, write_json

How = Literal["loop", "vmap", "cores"]
MOST_UPDATES = 10  # in one call
FEW_FLOPS = 1e9  # an update below takes milliseconds, of which starting it is a part
WORTH_SECONDS = 60.0
SECONDS_PER_CALL = 2.0  # when timed
CALLS = 4  # timed; the first one is not counted


@dataclass(frozen=True)
class Unit:
    """Cells that one process runs at a time, as one program."""

    name: str
    """Of its lease."""
    cells: tuple[str, ...]
    numbers: tuple[str, ...]
    """See `Group`."""
    group: int
    """Units of one group are served by one program."""


@dataclass(frozen=True)
class ExecutionPlan:
    """How a study is carried out: all its cells in the same way."""

    how: How
    """"loop": one cell after another, those of a group with one compiled program. "vmap": a group's cells at once.
    "cores": a cell on each core of a CPU."""
    updates: int
    """The most updates in one call."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What was measured: mode -> seconds per update of one cell."""
    units: tuple[Unit, ...] = ()
    workers: int = field(default_factory=lambda: max(len(workers.cores()), 1))
    """Processes, if "cores": as many as fit the memory."""

    @property
    def mode(self) -> str:
        """As cells and reports name it."""
        return mode_of(self.how, self.updates)

    def write(self, folder: Path) -> None:
        """Replaces plan.json."""
        write_json(folder / "plan.json", asdict(self))


def mode_of(how: How, updates: int) -> str:
    """A way to carry out a study, in words."""
    return f"{how}, up to {updates} updates a call" if updates > 1 else how


def read_plan(folder: Path) -> ExecutionPlan | None:
    """The plan of a study folder that has one. Raises UserError where it is damaged."""
    if not (folder / "plan.json").exists():
        return None
    found = read_json(folder / "plan.json")
    try:
        units = tuple(Unit(u["name"], tuple(u["cells"]), tuple(u["numbers"]), u["group"]) for u in found["units"])
        return ExecutionPlan(found["how"], found["updates"], found["seconds"], units, found["workers"])
    except (KeyError, TypeError) as e:
        raise UserError(f"{folder / 'plan.json'} is damaged (it lacks {e}). Delete the study folder {folder} to begin "
                        f"the study anew.") from None


def cannot(how: How, arms: Sequence[Arm]) -> str:
    """Why a study with these arms cannot be carried out like this; empty where it can."""
    if how == "vmap" and not all(can_be_stacked(arm.experiment) for arm in arms):
        return "cells with patience, exact sums, pmap or a mesh of their own cannot be one program."
    if how == "vmap" and any(arm.stated for arm in arms):
        return "arms that fork from the base run after it."
    if how == "cores" and (jax.default_backend() != "cpu" or len(workers.cores()) < 2):
        return "it takes a CPU with several cores, to which this system can bind a process."
    return ""


def can_be_stacked(experiment: Experiment) -> bool:
    """Whether cells of this experiment can be one program: it needs neither several devices for one cell nor to stop
    one cell before the others."""
    mesh = experiment.mesh
    return ((mesh.fsdp, mesh.tensor, mesh.sequence) == (1, 1, 1) and not mesh.rules and not experiment.exact
            and experiment.parallel == "jit" and experiment.evaluate.patience is None)


def choose(groups: Sequence[Group], arms: Mapping[str, Arm], seeds: Sequence[int], bench: Bench, file: Path | None,
           say: Callable[[str], None]) -> ExecutionPlan:
    """The fastest way to run the cells: three calls are timed of the largest group, one cell after another (an update
    or several in a call), at once, and on a core each. What takes less than WORTH_SECONDS is not worth the
    compilations. `file`: where the experiments are from.
    """
    largest = max(groups, key=lambda group: len(group.arms))
    cells = [replace(arms[name].experiment, seed=seed) for seed in seeds for name in largest.arms]
    first, total = arms[largest.arms[0]], len(arms) * len(seeds) * cells[0].steps
    own = max(first.experiment.steps_per_call, 1)
    if len(cells) == 1 or (jax.default_backend() == "cpu" and first.flops * own > TIMED_FLOPS):
        return ExecutionPlan("loop", own)
    say("Benchmarking execution modes ...")
    seconds = {mode_of("loop", own): time_alone(cells[0], largest.numbers, own, bench)}
    if total * min(seconds.values()) < WORTH_SECONDS:
        return ExecutionPlan("loop", own, seconds)
    updates = {mode_of("loop", own): own}
    if common_dispatch(cells[0], MOST_UPDATES) > own and first.experiment.parallel == "jit":
        several = mode_of("loop", MOST_UPDATES)
        seconds[several], updates[several] = time_alone(cells[0], largest.numbers, MOST_UPDATES, bench), MOST_UPDATES
    n = updates[min(seconds, key=seconds.__getitem__)]
    memory = bench.prepared(cells[0], largest.numbers, n).program.compiled.memory_analysis()
    if all(can_be_stacked(arm.experiment) for arm in arms.values()) and not any(arm.after for arm in arms.values()):
        most = max(2, round(SECONDS_PER_CALL / (min(seconds.values()) * n)))  # if it gained nothing
        together = cells[:min(most, chunk_size(len(cells), memory))]
        seconds[mode_of("vmap", n)] = _time_together(together, largest, n, bench)
    number = min(len(workers.cores()), chunk_size(len(cells), memory))
    if not cannot("cores", list(arms.values())) and jax.device_count() == 1 and number > 1:
        each = workers.seconds_per_update(file, to_json(cells[0]), largest.numbers, n, bench.stops, number)
        seconds |= {mode_of("cores", n): each} if each else {}
    found = min(seconds, key=seconds.__getitem__)
    for mode, each in seconds.items():
        say(f"  {1000 * each:.2f} ms/step of one cell: {mode}{' (chosen)' if mode == found else ''}")
    how: How = next(how for how in get_args(How) if found.startswith(how))
    return ExecutionPlan(how, updates.get(found, n), seconds, workers=number)


def time_alone(experiment: Experiment, numbers: Sequence[str], updates: int, bench: Bench) -> float:
    """Seconds per update."""
    program = bench.prepared(experiment, numbers, updates).program
    batches = [program.batch(reader(program), i) for i in range(CALLS)]
    return (
        _median(program.init(), lambda state, i: program.train(state, batches[i])[0])
        / program.experiment.steps_per_call
    )


def _time_together(experiments: Sequence[Experiment], group: Group, updates: int, bench: Bench) -> float:
    """Seconds per update and cell."""
    stacked = bench.stacked(experiments, group.numbers, updates)
    batches = [stacked.batch(i) for i in range(CALLS)]
    each = _median((stacked.init(), stacked.everyone()), lambda both, i: stacked.train(*both, batches[i])[:2])
    return each / stacked.experiment.steps_per_call / len(experiments)


def _median(state: Any, call: Callable[[Any, int], Any]) -> float:
    """Seconds of a call; the first is not counted."""
    seconds = []
    for i in range(CALLS):
        start = time.perf_counter()
        state = jax.block_until_ready(call(state, i))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def chunk_size(cells: int, memory: Any) -> int:
    """How many cells fit at once. `memory`: what the compiler says of the program of one (`memory_analysis`)."""
    devices = jax.local_devices()
    # Of one cell alone; its rows may have been divided among all devices. Twice the state: the best one, too.
    each = memory.temp_size_in_bytes * len(devices) + 2 * memory.argument_size_in_bytes
    stats = (devices[0].memory_stats() or {}) if jax.default_backend() != "cpu" else {}
    if "bytes_limit" in stats:
        room = 0.8 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) * len(devices)
    else:
        room = 0.5 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(cells, max(1, int(room / max(each, 1))))


def make_units(groups: Sequence[Group], cells: Sequence[Cell], how: How, size: Callable[[Group], int],
               first: int) -> list[Unit]:
    """Units of these cells. `size`: how many cells of a group fit at once; `first`: the number of the first unit."""
    found: list[Unit] = []
    for number, group in enumerate(groups):
        own = sorted((c for c in cells if c.arm in group.arms), key=lambda c: c.seed)  # those of a seed share batches
        if how != "vmap":
            found += [Unit(c.name, (c.name,), group.numbers, number) for c in own]
            continue
        most = size(group) if own else 1
        even = -(-len(own) // -(-len(own) // most)) if own else 1  # chunks of about one size
        devices = jax.local_device_count()
        even = max(even - even % devices, 1) if even > devices else even  # which the devices divide evenly
        for start in range(0, len(own), even):
            names = tuple(c.name for c in own[start: start + even])
            found.append(Unit(f"together-{first + len(found)}", names, group.numbers, number))
    return found
