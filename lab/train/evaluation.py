"""Evaluates a state on one split, as an `EvalResult` from which tasks write their reports."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lab.data.pipeline import eval_batches
from lab.errors import UserError
from lab.experiment import Experiment
from lab.tasks.base import EvalResult
from lab.train.program import Program
from lab.train.restore import leaves
from lab.train.step import Batch, State, make_eval_step


def make_eval_result(program: Program, state: State, data: Any, split: str, means: Mapping[str, float],
                 counts: Mapping[str, np.ndarray], folder: Path) -> EvalResult:
    """The `EvalResult` of `state` on `split`, from its means and counts."""
    records = getattr(data, split)
    experiment = program.experiment

    def predictions(others: Any = None) -> dict[str, np.ndarray]:
        return predict(program, state, records if others is None else others)

    compute = functools.partial(program.compute, state)
    return EvalResult(experiment.model, compute, data, records, split, means, counts,
                   predictions, int(jax.device_get(state.step)), experiment.seed, folder)


def predict(program: Program, state: State, records: Any) -> dict[str, np.ndarray]:
    """`Task.predict` of all records, in order."""
    return program.predict(state, records, eval_batches(records, program.eval_batch, rows=program.eval_rows))


def own_variables(model: Any, variables: Any) -> Any:
    """The variables, for `Program.compute`: averaged where the optimizer averages, in the compute type."""
    return variables


def evaluate(program: Program, state: State, data: Any, split: str, folder: Path,
             records: int | None = None, stop: Callable[[], bool] = lambda: False) -> EvalResult | None:
    """Evaluates `state` on a split, or on `records` evenly spaced records. None if `stop` returned True before the end.

    Raises:
      UserError: the data has no such split.
    """
    rows = getattr(data, split)
    if rows is None:
        raise UserError(f"This data has no {split} split.")
    found = program.evaluate(state, eval_batches(rows, program.eval_batch, records, program.eval_rows), stop)
    return found and make_eval_result(program, state, data, split, *found, folder)


def by_record(program: Program, state: State, data: Any, split: str,
              records: int | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Metric -> (sums, weights) of each record of a split, (records,) float64, on one device: each record is a batch of
    its own. Without tasks' counts, or a loss that depends on the batch (`Task.whole_batch`). `records`: of that many
    evenly spaced ones.

    Raises:
      UserError: the data has no such split.
    """
    rows = getattr(data, split)
    if rows is None:
        raise UserError(f"This data has no {split} split.")
    one = make_eval_step(program.experiment)

    @jax.jit
    def step(state: State, batch: Batch) -> Any:
        return jax.vmap(lambda record: one(state, jax.tree.map(lambda x: x[None], record)))(batch)

    state = jax.device_put(jax.device_get(state), jax.devices()[0])
    parts = [jax.device_get(step(state, batch)) for batch in eval_batches(rows, program.eval_batch, records)]
    count = min(records or len(rows), len(rows))
    return {name: tuple(np.concatenate([part[name][i] for part in parts])[:count].astype(np.float64) for i in (0, 1))
            for name, found in parts[0].items() if isinstance(found, tuple)
            and not (name == "loss" and getattr(program.experiment.task, "whole_batch", False))}


def frozen_paths(experiment: Experiment, params: Any) -> list[str]:
    """Paths of the parameters frozen by `init_from.freeze`."""
    rules = experiment.init_from.freeze
    return [path for path in leaves(params) if any(re.search(rule, path) for rule in rules)]
