"""Fields of records that hold what a reference, the model as a run begins, predicts for them (`Task.reference`).

They are computed once, before the first step, and kept in the run folder. So a step needs no second model, and a
resumed run and `evaluate`, whose parameters are others by then, read the same numbers. Without the file they are
computed again, from where the run began.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lab.data.pipeline import Arrays
from lab.errors import UserError
from lab.experiment import Experiment
from lab.files import replace_file
from lab.parallel.processes import ALONE, Processes
from lab.train.evaluation import predict
from lab.train.program import Program
from lab.train.restore import initial_arrays
from lab.train.step import State

FILE = "reference.safetensors"
Found = dict[str, dict[str, Any]]
"""split -> field -> numbers, an array or (nested) list."""


def with_reference(experiment: Experiment, program: Program, data: Any, folder: Path, state: State | None = None,
                   processes: Processes = ALONE) -> Any:
    """A copy of a run's data with the reference fields of its task, from the run's folder or computed; the data itself
    for a task without such fields. `state`: that of the run's beginning, if it is at hand.

    Raises:
      UserError: the file is damaged, or the parameters that the run began with are missing.
    """
    fields = getattr(experiment.task, "reference", None)
    if not fields:
        return data
    splits = {split: records for split in ("train", "validation", "test")
              if (records := getattr(data, split)) is not None}
    for split, records in splits.items():
        if not isinstance(records, Arrays):
            raise UserError(f"{type(experiment.task).__name__} needs records in memory (lab.data.pipeline.Arrays), and "
                            f"the {split} split is a {type(records).__name__}.")
    found = processes.share(_read(folder, data.fingerprint) if processes.first else None)
    if found is None:
        state = state or program.init(initial_arrays(experiment.init_from, program.abstract, data)[0])
        found = {split: {name: predict(program, state, records)[predicted] for name, predicted in fields.items()}
                 for split, records in splits.items()}
    data = copy.copy(data)
    for split, records in splits.items():
        own = {name: np.asarray(x, records.arrays[name].dtype) for name, x in found[split].items()}
        setattr(data, split, Arrays(records.arrays | own))
    return data


def keep_reference(experiment: Experiment, data: Any, folder: Path) -> None:
    """Writes the reference fields of the data to the run's folder."""
    found = {f"{split}/{name}": np.ascontiguousarray(records.arrays[name]) for split in ("train", "validation", "test")
             if (records := getattr(data, split)) is not None for name in experiment.task.reference}
    replace_file(folder / FILE, save(found, {"data": data.fingerprint}))


def _read(folder: Path, fingerprint: str) -> Found | None:
    """What was written for data of this fingerprint, as plain lists; None if nothing was.

    Raises:
      UserError: the file is damaged.
    """
    path, found = folder / FILE, {}
    if not path.exists():
        return None
    try:
        with safe_open(path, "np") as file:
            if (file.metadata() or {}).get("data") != fingerprint:
                return None
            for key in file.keys():  # noqa: SIM118 (no mapping)
                split, _, name = key.partition("/")
                found.setdefault(split, {})[name] = file.get_tensor(key).tolist()
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} is damaged ({e}). Restore it, or delete it: it is computed again from where the run "
                        f"began.") from None
    return found
