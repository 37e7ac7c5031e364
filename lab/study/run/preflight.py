"""Checks before a study trains: builds and traces every arm and estimates its cost."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax.errors import FlaxError
from rich.table import Table

from lab.configuration.field_types import fields, is_part
from lab.configuration.values import flat, to_json
from lab.data.pipeline import eval_batches, reader
from lab.errors import UserError, nearest
from lab.experiment import Experiment
from lab.study.design.arms import BASE, Changes, Study
from lab.study.run.forks import WORTH, acts_from, check_fork
from lab.train.console import clock, human
from lab.train.cost import Cost, cost_of, size_of, step_flops
from lab.train.program import Program
from lab.train.shapes import batch_spec
from lab.train.step import State, make_eval_step
from lab.train.teacher import with_teacher

TIMED_FLOPS = 2e12  # on a CPU, a base with costlier steps is not timed, as that would take minutes


@dataclass(frozen=True)
class Arm:
    """A checked arm and its cost per step."""

    name: str
    changes: Changes
    experiment: Experiment
    """With seed 0."""
    parameters: int
    flops: int
    """FLOPs per step as traced, including the optimizer's matmuls and rematerialization."""
    memory: int
    """Bytes of state, gradients and (upper bound) saved activations, summed over all devices."""
    after: int = 0
    """Step of the base that it starts from; 0: it trains from scratch."""
    stated: bool = False
    """Whether the arm is a `Fork`, rather than starting at `after` only to save time."""

    def to_json(self) -> dict[str, Any]:
        """The arm's entry in study.json."""
        return {"name": self.name, "changes": {path: to_json(value) for path, value in self.changes.items()},
                "fingerprint": self.experiment.fingerprint(), "parameters": self.parameters,
                "flops_per_step": self.flops, "memory_bytes": self.memory, "forked_after": self.after,
                "fork": self.after if self.stated else 0}


def preflight(study: Study) -> list[Arm]:
    """The checked arms, the base first. Reads no data and runs nothing on a device.

    Raises:
      UserError: from `Study.experiments`; or an arm cannot be built, or lacks the study's metric.
    """
    arms, found = [], study.experiments()
    base = found[BASE][1]
    for name, (changes, experiment) in found.items():
        try:
            experiment = with_teacher(experiment)
            cost = cost_of(experiment)
            flops, produced = step_flops(experiment), metric_names(experiment, cost.state)
            if (stated := study.forked(name)) is not None:
                check_fork(base, experiment, stated)
        except UserError as e:
            raise UserError(f"Arm {name}: {e}") from e
        except (TypeError, ValueError, LookupError, AttributeError, FlaxError) as e:  # raised by model or task code
            reason = str(e).strip().partition("\n")[0]
            raise UserError(f"Arm {name} cannot be built: {type(e).__name__}: {reason}") from e
        benchmarks = experiment.evaluate.harness.metrics() if experiment.evaluate.harness else []
        for metric, known in ((study.metric, produced + benchmarks), (experiment.evaluate.metric, produced)):
            if metric not in known:
                raise UserError(f"Arm {name} does not produce the metric {metric!r}; there are {', '.join(known)}."
                                f"{nearest(metric, known)}")
        after = stated or (acts_from(base, experiment) if name != BASE else 0)
        after = after if stated or after >= WORTH * experiment.steps else 0
        arms.append(Arm(name, changes, experiment, cost.parameters, flops, _memory(cost), after, bool(stated)))
    return arms


def metric_names(experiment: Experiment, state: State) -> list[str]:
    """Names of all evaluation metrics, without computing them. `state`: abstract."""
    rows = experiment.batch // experiment.grad_accum_steps
    batch = {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in batch_spec(experiment).items()}
    shapes = jax.eval_shape(make_eval_step(experiment), state, batch)
    means = {name: 1.0 for name, x in shapes.items() if isinstance(x, tuple)}
    counts = {name: np.ones(x.shape, x.dtype) for name, x in shapes.items() if not isinstance(x, tuple)}
    with np.errstate(all="ignore"):  # the counts here are dummies
        return [*means, *experiment.task.summary(means, counts)]


def _memory(cost: Cost) -> int:
    return size_of(cost.state) + size_of(cost.state.params) + cost.activations


@dataclass(frozen=True)
class Timing:
    """Times measured on the base, scaled by FLOPs for other arms; all in seconds."""

    compile: float
    """Compilation."""
    update: float
    evaluation: float

    def cell(self, arm: Arm, base: Arm) -> float:
        """Seconds for one cell of an arm, without compilation."""
        experiment = arm.experiment
        evaluations = 2 + (experiment.steps - 1) // experiment.evaluate.every if experiment.evaluate.every else 2
        seconds = (experiment.steps - arm.after) * self.update + evaluations * self.evaluation
        return seconds * arm.flops / max(base.flops, 1)


def measure(base: Arm, data: Any, program: Program) -> Timing | None:
    """Times three steps and one evaluation of the base; None if that would take minutes."""
    experiment, calls = base.experiment, program.experiment.steps_per_call
    if jax.default_backend() == "cpu" and base.flops * calls > TIMED_FLOPS:
        return None
    read, state, update, seconds = reader(program), program.init(), program.train, []
    for call in range(4):
        batch, start = program.batch(read, call), time.perf_counter()
        state, values = update(state, batch)
        jax.block_until_ready(values)
        seconds.append((time.perf_counter() - start) / calls)

    def batches() -> Any:
        return eval_batches(data.validation, program.eval_batch, experiment.evaluate.records, program.eval_rows)

    start = time.perf_counter()
    program.evaluate(state, itertools.islice(batches(), 1))
    compiled = program.compile_seconds + time.perf_counter() - start
    start = time.perf_counter()
    program.evaluate(state, batches())
    return Timing(compiled, float(np.median(seconds[1:])), time.perf_counter() - start)


def guess(base: Arm, data: Any, update: float) -> Timing:
    """Timing from the seconds per step alone: an evaluation batch (forward pass) costs about a third of a step."""
    experiment = base.experiment
    records = min(len(data.validation), experiment.evaluate.records or len(data.validation))
    return Timing(0.0, update, update / 3 * math.ceil(records / experiment.batch))


def estimate(arms: list[Arm], left: Mapping[str, int], seconds: Mapping[str, float], timing: Timing | None) -> (
        float | None):
    """Seconds to run the remaining cells (`left`: arm -> count) sequentially. Uses the mean of the arm's finished cells
    (`seconds`), else `timing`; None if neither is known.
    """
    total = 0.0
    for arm in arms:
        if not left[arm.name]:
            continue
        if arm.name in seconds:
            total += left[arm.name] * seconds[arm.name]
        elif timing is None:
            return None
        else:
            total += timing.compile + left[arm.name] * timing.cell(arm, arms[0])
    return total


def table(study: Study, arms: list[Arm], left: Mapping[str, int]) -> Table:
    """Changes and cost of each arm."""
    base = flat(to_json(study.base))
    found = Table(title=f"{len(arms)} arms x {len(study.seeds)} seeds, compared by {study.split} {study.metric} "
                        f"({study.mode})", title_justify="left")
    found.add_column("arm", overflow="fold", ratio=1)
    found.add_column("changes of the base", overflow="fold", ratio=1)
    for column in ("parameters", "FLOPs", "memory", "steps", "to run"):
        found.add_column(column, justify="right", no_wrap=True)
    for arm in arms:
        changes = [f"{path.rpartition('.')[2]}: " + (f"{_shown(base[path])} -> " if path in base else "")
                   + _shown(value) for path, value in arm.changes.items()]
        changes += [f"(continues the base after step {arm.after})"] if arm.after else []
        found.add_row(arm.name, "\n".join(changes), human(arm.parameters), human(arm.flops), human(arm.memory) + "B",
                      human(arm.experiment.steps), str(left[arm.name]))
    found.caption = "FLOPs: per step; memory: peak; to run: cells"
    return found


def _shown(value: Any) -> str:
    """A value in short form: an object as its class and the fields that differ from their defaults."""
    if is_part(value):
        inner = ((f.name, getattr(value, f.name), f.default) for f in fields(value))
        text = f"{type(value).__name__}({', '.join(f'{k}={_shown(v)}' for k, v, default in inner if v != default)})"
        return text if len(text) <= 100 else text[:97] + "..."
    return str(value)


def describe_estimate(seconds: float | None, cells: int) -> str:
    """One line with the study's estimated duration."""
    if not cells:
        return "Every cell is already complete."
    if seconds is None:
        return f"{cells} cells to run; how long they will take is unknown until one has finished."
    return f"{cells} cells to run: about {clock(seconds)}, plus compilation."
