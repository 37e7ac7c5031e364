"""The teacher of a task (`taught_by`, `teacher`: see lab/tasks/distill.py): another run's model, or pretrained weights.

It is read once and becomes an argument of the compiled step, beside the state: without gradient, without optimizer
state, and in no checkpoint. teacher.json in the run folder says which one it was.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lab.errors import UserError
from lab.experiment import Experiment
from lab.parallel.processes import ALONE, Processes
from lab.train.check import explained
from lab.train.description import finished
from lab.train.fitted import FILE as FITTED
from lab.train.json_files import read_json, write_json
from lab.train.restore import open_run, run_and_step, same_tokenizer
from lab.train.shapes import abstract_state, batch_spec, taught_of
from lab.train.step import cast, eval_variables, make_loss, prepare
from lab.weights.location import is_location, locate
from lab.weights.read import STATE, find

FILE = "teacher.json"


@dataclass(frozen=True)
class Teacher:
    """A teacher as it was read."""

    model: Any
    variables: Mapping[str, Any]
    """Float32 NumPy arrays; averaged parameters if its optimizer averaged."""
    about: Mapping[str, Any]
    """The content of teacher.json."""
    run: Path | None = None
    """Its run folder; None for pretrained weights."""
    classes: tuple[str, ...] = ()
    """The names of the classes in its data, if known."""


def with_teacher(experiment: Experiment) -> Experiment:
    """The experiment whose task has read its teacher, in the compute type; any other experiment as it is.

    Raises:
      UserError: there is no such teacher, its run is not finished, or it does not fit the task or the data.
    """
    task = experiment.task
    if not hasattr(task, "taught_by") or taught_of(experiment) is not None:
        return experiment
    found = read_teacher(task.teacher)
    params = cast(found.variables["params"], experiment.precision)
    taught = replace(experiment, task=task.taught_by(found.model, {**found.variables, "params": params}))
    state, batch = abstract_state(taught), batch_spec(taught)
    with explained(f"The teacher {task.teacher} cannot be applied to this data's records"):
        jax.eval_shape(lambda state, batch: make_loss(taught, getattr(state, "base", None))(
            state.params, state.model_state, prepare(taught, batch, True, 0), 0, 0), state, batch)
    return taught


def read_teacher(place: str | None) -> Teacher:
    """The teacher at a run folder, checkpoint or location. Reads each once, until its files change. Raises UserError:
    see `with_teacher`."""
    if not place:
        raise UserError("The task needs a teacher, a finished run or pretrained weights: --task.teacher RUN.")
    if is_location(place):
        return _of_weights(place, locate(place).stat().st_mtime_ns)
    folder, step = run_and_step(place)
    if not (folder / "experiment.json").exists():
        raise UserError(f"The teacher {place} is not there. ./launch.sh EXPERIMENT --run-dir {folder} trains it (which "
                        f"one, the experiment's file says); or name another run or weights with --task.teacher.")
    if step is None and finished(folder) is None:
        raise UserError(f"The run of the teacher {place} is not finished: type its command again, or name one of its "
                        f"checkpoints, {place}/checkpoints/STEP.")
    return _of_run(folder, step, max(path.stat().st_mtime_ns for path in folder.glob("*.json")))


@functools.lru_cache(2)
def _of_run(folder: Path, step: int | None, changed: int) -> Teacher:
    """The teacher of a checkpoint; `changed`: when its run folder changed last."""
    experiment, program, state = open_run(folder, step)
    exact = replace(experiment, precision="float32")
    whole = jax.jit(functools.partial(eval_variables, exact), out_shardings=program.everywhere)(state)
    variables = jax.device_get(whole)
    about = {"from": str(folder), "step": int(state.step), "fingerprint": experiment.fingerprint(),
             "digest": _digest(variables)}
    fitted = read_json(folder / FITTED, {"saved": dict})["saved"] if (folder / FITTED).exists() else {}
    return Teacher(experiment.model, variables, about, folder, tuple(fitted.get("classes", ())))


@functools.lru_cache(2)
def _of_weights(place: str, changed: int) -> Teacher:
    """The teacher at a location; `changed`: when its files changed last."""
    found = find(place)
    arrays = unflatten_dict(found.arrays(), sep="/")
    state = {STATE: arrays.pop(STATE)} if STATE in arrays else {}
    variables = {"params": arrays, **state}
    report = found.report()
    about = {"from": place, "revision": report["revision"], "files": report["files"], "digest": _digest(variables)}
    return Teacher(found.model, variables, about)


def check_teacher(experiment: Experiment, data: Any, folder: Path, processes: Processes = ALONE) -> None:
    """Checks the teacher of a run against the run's data and against the teacher that the run began with; notes it in
    the run folder.

    Raises:
      UserError: another teacher than before, another tokenizer, or other classes.
    """
    if taught_of(experiment) is None:
        return
    found, path = read_teacher(experiment.task.teacher), folder / FILE
    processes.check_same({"the teacher's digest": found.about["digest"]}, "Give every machine the same teacher.")
    kept = processes.share(read_json(path) if processes.first and path.exists() else None)
    if kept is not None and kept.get("digest") != found.about["digest"]:
        raise UserError(f"The teacher {experiment.task.teacher} is not the one with which the run in {folder} began "
                        f"(digest {kept.get('digest')} in {FILE}, {found.about['digest']} now). Bring it back, or "
                        f"start afresh with --run-dir.")
    if found.run is not None:
        same_tokenizer(found.run, data)
    ours = tuple(getattr(data, "classes", ()))
    if found.classes and ours and found.classes != ours:
        raise UserError(f"The teacher {experiment.task.teacher} knows the classes {_shown(found.classes)}, and the "
                        f"data has {_shown(ours)}: they must be the same, in the same order.")
    if kept is None and processes.first:
        write_json(path, found.about)


def _shown(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:5]) + (f" and {len(classes) - 5} more" if len(classes) > 5 else "")


def _digest(variables: Any) -> str:
    """sha256 over names, shapes and bytes of all arrays."""
    found = hashlib.sha256()
    for path, x in sorted(flatten_dict(variables, sep="/").items()):
        found.update(f"{path} {x.shape} {x.dtype}".encode())
        found.update(np.ascontiguousarray(x).data)
    return found.hexdigest()
