"""What a run learnt from its data, kept in its folder as JSON: enough to predict and sample where the data is gone."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lab.errors import UserError
from lab.experiment import Experiment, digest
from lab.files import replace_file
from lab.train.description import check_same
from lab.train.json_files import read_json, write_json

FILE, TOKENIZER = "fitted.json", "tokenizer.json"


def write_fitted(folder: Path, experiment: Experiment, data: Any) -> None:
    """Writes what was learnt from the data, and its tokenizer if it has one, into a run folder."""
    state = getattr(data, "tokenizer_state", None)
    if state:
        replace_file(folder / TOKENIZER, state)
    if hasattr(experiment.data, "restored"):
        spec = {name: [list(shape), np.dtype(kind).name]
                for name, (shape, kind) in experiment.data.record_spec().items()}
        value = {"data": data.fingerprint, "tokenizer": digest(state), "spec": spec, "saved": data.saved()}
        write_json(folder / FILE, value | {"check": digest(value)})


def without_data(run: Path, experiment: Experiment) -> Experiment:
    """The experiment of a run with its data as the run folder remembers it, where it does.

    Raises:
      UserError: what the folder remembers was changed.
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
    """The same value, in JSON and in comparisons, but whose methods that would read records answer from `saved`."""
    shapes = {name: (tuple(shape), np.dtype(kind).type) for name, (shape, kind) in spec.items()}
    answers = {"validate": lambda: None, "metadata": lambda: saved["metadata"], "record_spec": lambda: shapes,
               "load": lambda: data.restored(saved, tokenizer)}
    found = copy.copy(data)
    for name, answer in answers.items():
        object.__setattr__(found, name, answer)  # of this one object; the class is frozen
    return found


def data_of(run: Path, experiment: Experiment) -> Any:
    """The data of a run without its records; where its folder does not remember it, with them.

    Raises:
      UserError: the folder is of another experiment or other data; what `load` says of data that must be read.
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
