"""Training records that stay on the devices (`Experiment.data_on_device`); batches are gathered there by index."""

from __future__ import annotations

import copy
from typing import Any

import jax
import numpy as np

from lab.errors import UserError
from lab.experiment import Experiment


class OnlyNumbered:
    """Records without fields, for data that is already on the devices: batches carry only weights and indices."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {}


def fits(experiment: Experiment, train: Any) -> bool:
    """Whether to keep the training records on the devices, by `data_on_device`. "auto": if they take less than a
    quarter of an accelerator's memory; never on a CPU, which shares the host's memory.

    Raises:
      UserError: "always" for records that are not held in memory.
    """
    arrays, resident = getattr(train, "arrays", None), experiment.data_on_device
    if arrays is None or experiment.parallel == "pmap":
        if resident == "always":
            raise UserError("--data-on-device always: these records are read piece by piece, not held in memory.")
        return False
    if resident != "auto":
        return resident == "always"
    memory = (jax.devices()[0].memory_stats() or {}) if jax.default_backend() != "cpu" else {}
    return sum(x.nbytes for x in arrays.values()) < memory.get("bytes_limit", 0) / 4


def exchanged(program: Any, train: Any) -> Any:
    """A copy of a `lab.train.program.Program` that reads other training records of the same shapes. Shares what is
    compiled."""
    other = copy.copy(program)
    if program.resident is None:
        other.train_records = train
    else:
        other.resident = jax.device_put(train.arrays, program.everywhere)
    vars(other).pop("train", None)  # the cached property holds the other records
    return other
