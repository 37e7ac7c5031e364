"""Checks that model, task and data fit together, before training."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lab.errors import UserError, authors_line, where
from lab.experiment import Experiment, check_model
from lab.optim.matrices import outputs
from lab.train import metrics
from lab.train.shapes import abstract_state, batch_spec
from lab.train.step import init_state, make_eval_step, make_loss, prepare

log = logging.getLogger(__name__)

LOOKS = 8  # records per split to read one by one, to check that their shapes agree
MANY = 10**8  # numbers per array to look through for NaN


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
    if experiment.private is not None:
        experiment.private.check(experiment, data, abstract_state(experiment))
    if experiment.evaluate.harness is not None:
        experiment.evaluate.harness.check(experiment.model, data)


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
    for name, array in arrays.items():
        _warn_of_gaps(what, name, array[: max(1, MANY * len(array) // max(array.size, 1))])
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
            if name not in arrays:
                _warn_of_gaps(what, name, x, i)


def _warn_of_gaps(what: str, name: str, array: Any, first: int = 0) -> None:
    """Logs a line if these records, numbered from `first`, have numbers that are not finite."""
    array = np.asarray(array)
    if array.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(1))
        if len(bad):
            log.warning("warning: %s: %r of record %d is not finite (NaN or infinity)%s; the loss will not be, either.",
                        what, name, first + bad[0], f", and of {len(bad) - 1} more" if len(bad) > 1 else "")


def check_metric(name: str, means: Mapping[str, float]) -> None:
    """Raises UserError if the metric of `Evaluate` is not among those computed."""
    if name not in means:
        raise UserError(f"--evaluate.metric {name} is not computed; there are {', '.join(means)}.")


def try_out(experiment: Experiment, data: Any) -> None:
    """Computes loss and metrics of a few records with the initial parameters.

    Raises:
      UserError: the loss is not finite, or the metric of `Evaluate` is not computed.
    """
    batch, held_out = (_few(experiment, records) for records in (data.train, data.validation))
    state = jax.jit(functools.partial(init_state, experiment))(batch)
    loss = jax.jit(lambda state, rows: make_loss(experiment, getattr(state, "base", None))(
        state.params, state.model_state, prepare(experiment, rows, True, 0), 0, 0)[0])(state, batch)
    if not np.isfinite(loss):
        raise UserError(f"{where(type(experiment.task).loss)}{type(experiment.task).__name__}.loss is {loss} for the "
                        f"first {len(batch['weight'])} records, with the initial parameters.")
    found = metrics.add(None, jax.jit(make_eval_step(experiment))(state, held_out))
    means, counts = metrics.means(found), metrics.counts(found)
    check_metric(experiment.evaluate.metric, means | experiment.task.summary(means, counts))


def _few(experiment: Experiment, records: Any) -> dict[str, np.ndarray]:
    """A batch of the first few records."""
    n = min(len(records), experiment.batch, LOOKS)
    numbered = {"weight": np.ones(n, np.float32), "index": np.arange(n, dtype=np.int32)}
    return {name: np.asarray(x) for name, x in records[np.arange(n)].items()} | numbered


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
    with explained(f"{here}{model} cannot be applied to this data's records ({_shown(spec)})"):
        found = outputs(experiment, spec)
    for output in found:
        if output is None:
            raise UserError(f"{where(type(experiment.model))}{model} returns None; it must return its output.")
        kinds = {str(x.dtype) for x in jax.tree.leaves(output)}
        if kinds and not any("float" in kind for kind in kinds):
            raise UserError(f"{where(type(experiment.model))}{model} returns {', '.join(sorted(kinds))}, which has no "
                            f"gradient; its output must be floating-point.")
    return found


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
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
