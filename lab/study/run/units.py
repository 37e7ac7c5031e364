"""The units of a study (cells that run together as one program), decided once and written to plan.json."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from lab.configuration.values import to_json
from lab.data.pipeline import reader
from lab.errors import UserError
from lab.experiment import Experiment
from lab.study.run import workers
from lab.study.run.cells import Cell
from lab.study.run.grouping import Group
from lab.study.run.preflight import TIMED_FLOPS, Arm
from lab.study.run.shared import Bench
from lab.study.run.stacked import common_dispatch
from lab.train.json_files import read_json, write_json

How = Literal["loop", "vmap", "cores"]
MOST_STEPS = 10  # per call
FEW_FLOPS = 1e9  # cheaper steps take milliseconds, a part of which is call overhead
WORTH_SECONDS = 60.0
SECONDS_PER_CALL = 2.0  # target while timing
CALLS = 4  # timed calls, including a discarded first one


@dataclass(frozen=True)
class Unit:
    """Cells that one process runs together as one program."""

    name: str
    """Name of its lease."""
    cells: tuple[str, ...]
    numbers: tuple[str, ...]
    """See `Group`."""
    group: int
    """Index of its group; units of one group share a program."""


@dataclass(frozen=True)
class ExecutionPlan:
    """How a study is executed; all its cells use the same mode."""

    how: How
    """"loop": one cell after another, sharing one compiled program per group. "vmap": a group's cells at once.
    "cores": one cell per CPU core."""
    steps_per_call: int
    """Maximum steps per call."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Measured: mode -> seconds per step of one cell."""
    units: tuple[Unit, ...] = ()
    workers: int = field(default_factory=lambda: max(len(workers.cores()), 1))
    """Number of processes for "cores", limited by memory."""

    @property
    def mode(self) -> str:
        """Its name in cells and reports."""
        return mode_of(self.how, self.steps_per_call)

    def write(self, folder: Path) -> None:
        """Replaces plan.json."""
        write_json(folder / "plan.json", asdict(self))


def mode_of(how: How, steps_per_call: int) -> str:
    """The name of an execution mode."""
    return f"{how}, up to {steps_per_call} steps a call" if steps_per_call > 1 else how


def read_plan(folder: Path) -> ExecutionPlan | None:
    """The plan of a study folder; None if it has none. Raises UserError if it is damaged."""
    if not (folder / "plan.json").exists():
        return None
    found = read_json(folder / "plan.json")
    try:
        units = tuple(Unit(u["name"], tuple(u["cells"]), tuple(u["numbers"]), u["group"]) for u in found["units"])
        return ExecutionPlan(found["how"], found["steps_per_call"], found["seconds"], units, found["workers"])
    except (KeyError, TypeError) as e:
        raise UserError(f"{folder / 'plan.json'} is damaged (it lacks {e}). Delete the study folder {folder} to begin "
                        f"the study anew.") from None


def cannot(how: How, arms: Sequence[Arm]) -> str:
    """Why a study with these arms cannot use mode `how`; empty if it can."""
    if how == "vmap" and not all(can_be_stacked(arm.experiment) for arm in arms):
        return ("cells with patience, exact sums, pmap, adapters, privacy, a bootstrap, a reference, a teacher or a "
                "mesh of their own cannot be one program.")
    if how == "vmap" and any(arm.stated for arm in arms):
        return "arms that fork from the base run after it."
    if how == "cores" and (jax.default_backend() != "cpu" or len(workers.cores()) < 2):
        return "it takes a CPU with several cores, to which this system can bind a process."
    return ""


def can_be_stacked(experiment: Experiment) -> bool:
    """Whether cells of this experiment can run as one program: no cell needs several devices, stops early,
    trains adapters or has a teacher, of which each cell would have a copy, has batches or records of its own (privacy,
    a reference), or ends with an out-of-bag estimate."""
    mesh = experiment.mesh
    return ((mesh.fsdp, mesh.tensor, mesh.sequence) == (1, 1, 1) and not mesh.rules and not experiment.exact
            and experiment.parallel == "jit" and experiment.evaluate.patience is None and experiment.adapt is None
            and experiment.private is None and not getattr(experiment.model, "bootstrap", False)
            and not getattr(experiment.task, "reference", None) and not getattr(experiment.task, "teacher", None))


def choose(groups: Sequence[Group], arms: Mapping[str, Arm], seeds: Sequence[int], bench: Bench, file: Path | None,
           say: Callable[[str], None]) -> ExecutionPlan:
    """The fastest plan. Times three calls of the largest group in each mode: sequential cells (one or several steps per
    call), all cells at once, and one per core. If the study takes less than WORTH_SECONDS sequentially, skips the other
    modes, since their compilations would not pay off. `file`: the experiments' file.
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
    calls = {mode_of("loop", own): own}
    if common_dispatch(cells[0], MOST_STEPS) > own and first.experiment.parallel == "jit":
        several = mode_of("loop", MOST_STEPS)
        seconds[several], calls[several] = time_alone(cells[0], largest.numbers, MOST_STEPS, bench), MOST_STEPS
    n = calls[min(seconds, key=seconds.__getitem__)]
    memory = bench.prepared(cells[0], largest.numbers, n).program.compiled.memory_analysis()
    if all(can_be_stacked(arm.experiment) for arm in arms.values()) and not any(arm.after for arm in arms.values()):
        most = max(2, round(SECONDS_PER_CALL / (min(seconds.values()) * n)))  # assumes no speed-up
        together = cells[:min(most, chunk_size(len(cells), memory))]
        seconds[mode_of("vmap", n)] = _time_together(together, largest, n, bench)
    number = min(len(workers.cores()), chunk_size(len(cells), memory))
    if not cannot("cores", list(arms.values())) and jax.device_count() == 1 and number > 1:
        each = workers.seconds_per_step(file, to_json(cells[0]), largest.numbers, n, bench.stops, number)
        seconds |= {mode_of("cores", n): each} if each else {}
    found = min(seconds, key=seconds.__getitem__)
    for mode, each in seconds.items():
        say(f"  {1000 * each:.2f} ms/step of one cell: {mode}{' (chosen)' if mode == found else ''}")
    how: How = next(how for how in get_args(How) if found.startswith(how))
    return ExecutionPlan(how, calls.get(found, n), seconds, workers=number)


def time_alone(experiment: Experiment, numbers: Sequence[str], steps_per_call: int, bench: Bench) -> float:
    """Seconds per step."""
    program = bench.prepared(experiment, numbers, steps_per_call).program
    batches = [program.batch(reader(program), i) for i in range(CALLS)]
    return (
        _median(program.init(), lambda state, i: program.train(state, batches[i])[0])
        / program.experiment.steps_per_call
    )


def _time_together(experiments: Sequence[Experiment], group: Group, steps_per_call: int, bench: Bench) -> float:
    """Seconds per step and cell."""
    stacked = bench.stacked(experiments, group.numbers, steps_per_call)
    batches = [stacked.batch(i) for i in range(CALLS)]
    each = _median((stacked.init(), stacked.everyone()), lambda both, i: stacked.train(*both, batches[i])[:2])
    return each / stacked.experiment.steps_per_call / len(experiments)


def _median(state: Any, call: Callable[[Any, int], Any]) -> float:
    """Median seconds per call, without the first."""
    seconds = []
    for i in range(CALLS):
        start = time.perf_counter()
        state = jax.block_until_ready(call(state, i))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def chunk_size(cells: int, memory: Any) -> int:
    """How many cells fit in memory at once. `memory`: the `memory_analysis` of a one-cell program."""
    devices = jax.local_devices()
    # One cell's temporaries may be spread over all devices. The state counts twice because the best one is kept too.
    each = memory.temp_size_in_bytes * len(devices) + 2 * memory.argument_size_in_bytes
    stats = (devices[0].memory_stats() or {}) if jax.default_backend() != "cpu" else {}
    if "bytes_limit" in stats:
        room = 0.8 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) * len(devices)
    else:
        room = 0.5 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(cells, max(1, int(room / max(each, 1))))


def make_units(groups: Sequence[Group], cells: Sequence[Cell], how: How, size: Callable[[Group], int],
               first: int) -> list[Unit]:
    """Units for these cells. `size`: how many cells of a group fit at once; `first`: number of the first unit."""
    found: list[Unit] = []
    for number, group in enumerate(groups):
        own = sorted((c for c in cells if c.arm in group.arms), key=lambda c: c.seed)  # cells of a seed share batches
        if how != "vmap":
            found += [Unit(c.name, (c.name,), group.numbers, number) for c in own]
            continue
        most = size(group) if own else 1
        even = -(-len(own) // -(-len(own) // most)) if own else 1  # chunks of similar size
        devices = jax.local_device_count()
        even = max(even - even % devices, 1) if even > devices else even  # a multiple of the devices
        for start in range(0, len(own), even):
            names = tuple(c.name for c in own[start: start + even])
            found.append(Unit(f"together-{first + len(found)}", names, group.numbers, number))
    return found
