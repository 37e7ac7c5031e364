"""Shapes and dtypes of batches and of the state. Computes nothing."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lab.configuration.values import value_at
from lab.experiment import Experiment
from lab.train.step import State, init_state


def batch_spec(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of one global batch. Reads no data."""
    spec = {name: jax.ShapeDtypeStruct((experiment.batch, *shape), dtype)
            for name, (shape, dtype) in experiment.data.record_spec().items()}
    return spec | numbered(experiment.batch)


def numbered(batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the weights and indices of a batch."""
    return {"weight": jax.ShapeDtypeStruct((batch,), np.float32), "index": jax.ShapeDtypeStruct((batch,), np.int32)}


def given_to(experiment: Experiment, paths: Sequence[str] = ()) -> dict[str, Any]:
    """(Dotted) field -> value, for the fields of an experiment that are arguments of a compiled program: the seed, the
    numbers at `paths`, and what the task's teacher is (lab/train/teacher.py)."""
    numbers = {"seed": np.uint32(experiment.seed)} | {path: np.float32(value_at(experiment, path)) for path in paths}
    return numbers | ({} if (taught := taught_of(experiment)) is None else {"task.taught": taught})


def taught_of(experiment: Experiment) -> Any:
    """The teacher that a task has read: a pytree. None without one."""
    return getattr(experiment.task, "taught", None)


def one_record(spec: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """A batch of one zero record, for shape inference in `init`. `spec`: see `batch_spec`."""
    return {name: np.zeros((1, *s.shape[1:]), s.dtype) for name, s in spec.items()}


def abstract_state(experiment: Experiment) -> State:
    """Shapes and dtypes of the state; computes nothing."""
    return jax.eval_shape(functools.partial(init_state, experiment), batch_spec(experiment))
