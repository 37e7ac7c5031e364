"""Reopens a run folder: its experiment, the program for this machine's devices, and a state."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from lab.errors import UserError
from lab.experiment import Experiment, Mesh
from lab.parallel.sharding import path_of
from lab.train.checkpoint import Checkpoints
from lab.train.description import read_folder
from lab.train.fitted import without_data
from lab.train.metrics import best_row, marked_rows
from lab.train.program import Program
from lab.train.run_folder import checkpoint_folder
from lab.train.step import State


def leaves(tree: Any) -> dict[str, Any]:
    """path -> array of a tree."""
    return {path_of(path): x for path, x in jax.tree.leaves_with_path(tree)}


def open_run(run: Path, step: int | None = None, best: bool = False, experiment: Experiment | None = None,
             file: Path | None = None) -> tuple[Experiment, Program, State]:
    """The program of a run and the state of its checkpoint: the latest, the best, or that of `step`.

    `experiment`: the run's experiment, if the caller has it; by default it is rebuilt from the folder. `file`: the
    experiment's file, if the user named it.

    Raises:
      UserError: no run, no such checkpoint, or only damaged ones.
    """
    experiment = experiment or read_folder(run, file)
    opened = without_data(run, experiment)
    opened.validate()
    if best and step is not None:
        raise UserError("--best and --step exclude each other.")
    folder = checkpoint_folder(run)
    if not folder.exists():
        raise UserError(f"{run} has no checkpoint yet.")
    checkpoints = Checkpoints(folder)
    if best:
        step = _best_step(run, experiment, checkpoints)
    program = fitting_program(opened)
    state = checkpoints.restore(program.abstract, step)
    checkpoints.close()
    if state is None:
        raise UserError(f"{run} has no checkpoint yet.")
    return experiment, program, state


def fitting_program(experiment: Experiment) -> Program:
    """The program on the experiment's mesh; if that is of another number of devices, on those that divide the batch."""
    try:
        return Program(experiment)
    except UserError:
        devices = math.gcd(experiment.batch // experiment.grad_accum_steps, jax.device_count())
        return Program(replace(experiment, mesh=Mesh(devices)))


def _best_step(run: Path, experiment: Experiment, checkpoints: Checkpoints) -> int:
    """The step with the best validation metric. Raises UserError if there is none or the rows were changed."""
    path = run / "metrics.jsonl"
    rows = marked_rows(path, checkpoints.beside())  # rows after the last checkpoint have none
    rows = [row for row in rows if row["split"] == "validation" and row["step"]]
    step = best_row(rows, experiment.evaluate.metric, experiment.evaluate.mode)["step"]
    if step is None:
        raise UserError(f"{run} has no evaluation after a step yet, so no checkpoint is its best.")
    return step
