"""Checks that model, task and data fit together, before any computation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lab.errors import UserError, authors_line, where
from lab.experiment import Experiment, check_model
from lab.optim.matrices import outputs
from lab.train.shapes import batch_spec

LOOKS = 8  # records per split to read one by one, to check that their shapes agree


def load_data(experiment: Experiment) -> Any:
    """The experiment's data, loaded and checked: see `check_data`."""
    data = experiment.data.load()
    check_data(experiment, data)
    return data


def check_data(experiment: Experiment, data: Any) -> None:
    """Raises UserError if the loaded data is invalid, or model and task do not fit it."""
    here = f"{where(type(experiment.data).load)}{type(experiment.data).__name__}.load()"
    if missing := [name for name in ("train", "validation", "fingerprint", "metadata") if not hasattr(data, name)]:
        what = f"a {type(data).__name__} without {', '.join(missing)}" if data is not None else "None"
        raise UserError(f"{here} returns {what}; it must return a Dataset (lab.data.dataset).")
    spec = batch_spec(experiment)
    for split in ("train", "validation", "test"):
        if (records := getattr(data, split, None)) is not None:
            _check_records(f"{here}: the {split} split", records, spec)
    check_model(experiment.model, data.metadata)
    for output in model_outputs(experiment):
        try:
            experiment.task.check(output, data)
        except UserError as e:
            about_model = "output" in str(e)
            place = where(type(experiment.model) if about_model else type(experiment.data).load)
            raise UserError(f"{place}{e}") from None


def _check_records(what: str, records: Any, spec: Mapping[str, Any]) -> None:
    """Raises UserError for records that are not numeric arrays, or differ from `spec` in shape or dtype."""
    arrays = getattr(records, "arrays", {})
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray | jax.Array):
            raise UserError(f"{what}: {name!r} is a {type(array).__name__}; it must be a NumPy array.")
    if len(sizes := {name: len(array) for name, array in arrays.items()}) and len(set(sizes.values())) > 1:
        each = ", ".join(f"{size} {name}" for name, size in sizes.items())
        raise UserError(f"{what} has arrays of unequal lengths: {each}.")
    if not len(records):
        raise UserError(f"{what} has no record.")
    for i in np.unique(np.linspace(0, len(records) - 1, LOOKS).astype(int)):
        found = records[np.array([i])]
        if not isinstance(found, Mapping):
            raise UserError(f"{what}: records[indices] must be a dict of arrays, not a {type(found).__name__}.")
        for name, wanted in spec.items():
            if name in ("weight", "index"):
                continue
            x = found.get(name)
            if x is None:
                raise UserError(f"{what}: record {i} has no {name!r}; it has {', '.join(found) or 'nothing'}.")
            kind = getattr(x, "dtype", None)
            if kind is None or np.dtype(kind).kind not in "biuf" and "float" not in str(kind):
                raise UserError(f"{what}: {name!r} is {kind or type(x).__name__}; a model computes with real numbers "
                                f"only. (Rows of different lengths become \"object\": pad them.)")
            if x.shape != (1, *wanted.shape[1:]) or kind != wanted.dtype:
                raise UserError(f"{what}: {name!r} of record {i} is {kind} {x.shape[1:]}, and record_spec() says "
                                f"{wanted.dtype} {wanted.shape[1:]}.")


def model_outputs(experiment: Experiment) -> list[Any]:
    """Shapes of the model's outputs for one record.

    Raises:
      UserError: the task or the model cannot process these records.
    """
    spec = batch_spec(experiment)
    task, model = type(experiment.task).__name__, type(experiment.model).__name__
    wanted = getattr(experiment.task, "fields", ())
    if not any(name in spec for name in wanted) and wanted:
        raise UserError(f"{task} needs records with {' or '.join(wanted)}, and this data has "
                        f"{', '.join(name for name in spec if name not in ('weight', 'index'))}.")
    here = where(type(experiment.model))
    with _explained(f"{here}{model} cannot be applied to this data's records ({_shown(spec)})"):
        found = outputs(experiment, spec)
    for output in found:
        if output is None:
            raise UserError(f"{where(type(experiment.model))}{model} returns None; it must return its output.")
    return found


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns an exception of JAX or Flax into a UserError, unless the user's own code raised it."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # JAX and Flax raise many types for shape mismatches
        if authors_line(e):
            raise
        raise UserError(f"{what}: {type(e).__name__}: {str(e).splitlines()[0][:300]}") from e


def _shown(spec: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {x.dtype} {x.shape[1:]}" for name, x in spec.items() if name not in ("weight", "index"))
