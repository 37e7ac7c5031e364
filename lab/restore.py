"""A run folder opened again: its experiment, the program for this machine's devices, and a state."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from lab.checkpoint import Checkpoints
from lab.errors import UserError
from lab.experiment import Experiment, Mesh
from lab.metrics import best_row, read_rows
from lab.program import Program
from lab.run_folder import read_folder
from lab.sharding import path_of
from lab.step import State


def leaves(tree: Any) -> dict[str, Any]:
    """path -> array, of a tree."""
    return {path_of(path): x for path, x in jax.tree.leaves_with_path(tree)}


def open_run(run: Path, step: int | None = None, best: bool = False) -> tuple[Experiment, Program, State]:
    """The program of a run and the state of its checkpoint: the latest, the best, or that of `step`.

    Raises:
      UserError: there is no run, no such checkpoint, or only damaged ones.
    """
    experiment = read_folder(run)
    experiment.validate()
    if best and step is not None:
        raise UserError("--best and --step exclude each other.")
    if best:
        rows = [r for r in read_rows(run / "metrics.jsonl") if r["split"] == "validation" and r["step"]]
        step = best_row(rows, experiment.evaluate.metric, experiment.evaluate.mode)["step"]
        if step is None:
            raise UserError(f"{run} has no evaluation after an update yet, so no checkpoint is its best.")
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{run} has no checkpoint yet.")
    try:
        program = Program(experiment)
    except UserError:  # a run may be looked at on another number of devices than it was trained on
        devices = math.gcd(experiment.batch // experiment.microbatches, jax.device_count())
        program = Program(replace(experiment, mesh=Mesh(devices)))
    checkpoints = Checkpoints(run / "checkpoints")
    state = checkpoints.restore(program.abstract, step)
    checkpoints.close()
    if state is None:
        raise UserError(f"{run} has no checkpoint yet.")
    return experiment, program, state
