"""What a stack needs of its cells: predictions of the held-out folds and of the study's split, written to one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from lab.configuration.values import digest
from lab.data.dataset import part
from lab.errors import UserError
from lab.files import replace_file
from lab.study.design.arms import Stack, Study
from lab.study.report.stacking import FILE, of_cells
from lab.study.run.cells import Cell, read_cell
from lab.tasks.reports import read
from lab.tasks.supervised import Classify
from lab.train.checkpoint import Checkpoints
from lab.train.evaluation import predict
from lab.train.restore import fitting_program, with_base
from lab.train.run_folder import checkpoint_folder


def check_stack(study: Study) -> None:
    """Raises UserError for a stack of something else than classifiers, more folds than records, or early stopping,
    which would use the held-out fold."""
    if not isinstance(study.arms, Stack):
        return
    study.base.data.load()  # before each of the arms is traced, which may be many
    for name, (_, experiment) in study.experiments().items():
        if not isinstance(experiment.task, Classify):
            raise UserError(f"Arm {name}: a stack is of classifiers (Classify), not of "
                            f"{type(experiment.task).__name__}.")
        if experiment.evaluate.patience is not None:
            raise UserError(f"Arm {name}: with --evaluate.patience a run stops by its held-out fold, which the stack "
                            f"takes for unseen. Leave it out.")


def write_predictions(folder: Path, study: Study, cells: Sequence[Cell]) -> None:
    """Writes FILE to the folder of a stack, for the seeds whose cells are all done; see lab/study/report/stacking.py.

    Predictions are those of each run's last state. Does nothing if no seed is complete, or if the file already holds
    the predictions of these cells.
    """
    if not isinstance(study.arms, Stack):
        return
    done = {(c.arm, c.seed): c for c in cells if (read_cell(c.folder(folder)) or {}).get("status") == "done"}
    factors, seeds = study.design.factors, [
        seed for seed in study.seeds if all((arm, seed) in done for arm in study.experiments())]
    identity = digest(sorted(c.fingerprint for c in done.values() if c.seed in seeds))
    if not seeds or of_cells(folder) == identity:
        return
    data = study.base.data.load()  # whole: the base holds out no fold
    fold, asked = study.base.data.of(len(data.train)), getattr(data, study.split)
    order = np.argsort(fold, kind="stable")  # fold by fold
    found = {"folds": fold, "folds/targets": read(data.train, "targets")["targets"],
             "whole/targets": read(asked, "targets")["targets"]}
    for name, arm in {**factors["members"], **{name: name for name in factors["beside"]}}.items():
        program = fitting_program(done[arm, seeds[0]].experiment)  # folds and seeds have no part in predictions
        for seed in seeds:
            found[f"whole/{name}/{seed}"] = _predicted(folder, done[arm, seed], program, data, asked)
            if name in factors["members"]:
                parts = [_predicted(folder, done[f"{name}.fold-{i}", seed], program, data,
                                    part(data.train, np.flatnonzero(fold == i))) for i in range(factors["folds"])]
                found[f"folds/{name}/{seed}"] = np.concatenate(parts)[np.argsort(order)]
    replace_file(folder / FILE, save({key: np.ascontiguousarray(x) for key, x in found.items()}, {"cells": identity}))


def _predicted(folder: Path, cell: Cell, program: Any, data: Any, records: Any) -> np.ndarray:
    """The probabilities of the classes by a cell's last state, float32 (records, C)."""
    checkpoints = Checkpoints(checkpoint_folder(cell.folder(folder)))
    state = with_base(cell.experiment, program, checkpoints.restore(program.abstract), data)
    checkpoints.close()
    return predict(program, state, records)["probabilities"]
