"""Shapes and dtypes of batches and of the state. Computes nothing."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import numpy as np

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


def one_record(spec: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """A batch of one zero record, for shape inference in `init`. `spec`: see `batch_spec`."""
    return {name: np.zeros((1, *s.shape[1:]), s.dtype) for name, s in spec.items()}


def abstract_state(experiment: Experiment) -> State:
    """Shapes and dtypes of the state; computes nothing."""
    return jax.eval_shape(functools.partial(init_state, experiment), batch_spec(experiment))
