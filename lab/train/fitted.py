"""Values fitted to the data (JSON in the run folder), to predict and sample without the data."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lab.configuration.values import digest
from lab.data.statistics import Bins, statistics
from lab.errors import UserError
from lab.experiment import Experiment
from lab.files import replace_file
from lab.train.description import check_same
from lab.train.json_files import read_json, write_json

FILE, TOKENIZER = "fitted.json", "tokenizer.json"


def write_fitted(folder: Path, experiment: Experiment, data: Any) -> None:
    """Writes the values fitted to the data, and the tokenizer if any, to a run folder."""
    state = getattr(data, "tokenizer_state", None)
    if state:
        replace_file(folder / TOKENIZER, state)
    if hasattr(experiment.data, "restored"):
        spec = {name: [list(shape), np.dtype(kind).name]
                for name, (shape, kind) in experiment.data.record_spec().items()}
        value = {"data": data.fingerprint, "tokenizer": digest(state), "spec": spec, "saved": data.saved(),
                 "statistics": statistics(data)}
        write_json(folder / FILE, value | {"check": digest(value)})


def statistics_of(run: Path) -> dict[str, Bins]:
    """The statistics of a run's training data; none for a run from before there were any. Raises UserError."""
    return read_json(run / FILE, {"data": str}).get("statistics", {}) if (run / FILE).exists() else {}


def without_data(run: Path, experiment: Experiment) -> Experiment:
    """The experiment with its data replaced by the fitted values in the run folder, if the folder has them.

    Raises:
      UserError: the fitted values were changed.
    """
    if not (run / FILE).exists() or not hasattr(experiment.data, "restored"):
        return experiment
    kept = read_json(run / FILE, {"data": str, "spec": dict, "saved": dict, "check": str})
    tokenizer = _text(run / TOKENIZER)
    whole = digest({name: value for name, value in kept.items() if name != "check"}) == kept["check"]
    if not whole or kept.get("tokenizer") != digest(tokenizer):
        bad = run / (TOKENIZER if whole else FILE)
        raise UserError(f"{bad} is not as the run wrote it. Bring it back; or delete {run / FILE}, and the data is "
                        f"read again.")
    return replace(experiment, data=_reading_nothing(experiment.data, kept["spec"], kept["saved"], tokenizer or ""))


def _reading_nothing(data: Any, spec: dict[str, Any], saved: dict[str, Any], tokenizer: str) -> Any:
    """A copy, equal in JSON and comparisons, whose record-reading methods return values from `saved`."""
    shapes = {name: (tuple(shape), np.dtype(kind).type) for name, (shape, kind) in spec.items()}
    answers = {"validate": lambda: None, "metadata": lambda: saved["metadata"], "record_spec": lambda: shapes,
               "load": lambda: data.restored(saved, tokenizer)}
    found = copy.copy(data)
    for name, answer in answers.items():
        object.__setattr__(found, name, answer)  # set on this object only; its class is frozen
    return found


def data_of(run: Path, experiment: Experiment) -> Any:
    """The data of a run without records, from the fitted values; loads the records if the folder has no such values.

    Raises:
      UserError: the folder has another experiment or other data, or loading fails.
    """
    data = without_data(run, experiment).data.load()
    check_same(run, experiment, data.fingerprint)
    return data


def _text(path: Path) -> str | None:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        return ""
    except OSError as e:
        raise UserError(f"Cannot read {path}: {e.strerror}.") from None
