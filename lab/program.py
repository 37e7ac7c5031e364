"""The pure step, compiled once for these devices: the state born sharded, the update, and whole evaluations."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lab import metrics
from lab.experiment import Experiment
from lab.sharding import batch_sharding, make_mesh, process_rows, put, state_shardings
from lab.step import State, init_state, make_eval_step, make_train_step


def batch_spec(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of one global batch, without reading any data."""
    spec = {name: jax.ShapeDtypeStruct((experiment.batch, *shape), dtype)
            for name, (shape, dtype) in experiment.data.record_spec().items()}
    return spec | {"weight": jax.ShapeDtypeStruct((experiment.batch,), np.float32)}


def abstract_state(experiment: Experiment) -> State:
    """The shapes of the state, without computing it."""
    return jax.eval_shape(functools.partial(init_state, experiment), batch_spec(experiment))


class Program:
    """An experiment on this machine's devices."""

    def __init__(self, experiment: Experiment):
        """Raises UserError when the batch does not divide among the devices."""
        self.experiment = experiment
        self.spec = batch_spec(experiment)
        self.mesh = make_mesh(experiment.mesh.data)
        self.seed = jax.device_put(np.uint32(experiment.seed), NamedSharding(self.mesh, PartitionSpec()))
        self.stacked = experiment.dispatch > 1
        self.rows = process_rows(experiment.batch)
        self.eval_batch = experiment.batch // experiment.microbatches  # what memory was meant for
        self.eval_rows = process_rows(self.eval_batch)
        self.train_sharding = batch_sharding(self.mesh, experiment.batch, experiment.microbatches,
                                             stacked=self.stacked)
        self.eval_sharding = batch_sharding(self.mesh, self.eval_batch)
        state = abstract_state(experiment)
        self.shardings = state_shardings(state, self.mesh)
        self.abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                                     state, self.shardings)
        self._evaluate = jax.jit(make_eval_step(experiment))

    def init(self) -> State:
        """The state before the first update, created where it lives."""
        def init(batch: Any, seed: jax.Array) -> State:
            return init_state(replace(self.experiment, seed=seed), batch)

        one = jax.tree.map(lambda s: np.zeros((1, *s.shape[1:]), s.dtype), self.spec)
        return jax.jit(init, out_shardings=self.shardings)(one, self.seed)

    @functools.cached_property
    def train(self) -> Callable[[State, Any], tuple[State, Any]]:
        """``(state, batch) -> (state, metrics)``, compiled; the state is donated.

        A compiled program, not a jitted function: another shape is an error instead of a silent second compilation.
        With `dispatch` > 1 the batch and the metrics have a leading axis of updates. The seed is an argument of the
        compiled program, so that another seed finds it in the compilation cache.
        """
        def update(state: State, batch: Any, seed: jax.Array) -> tuple[State, Any]:
            step = make_train_step(replace(self.experiment, seed=seed))
            return jax.lax.scan(step, state, batch) if self.stacked else step(state, batch)

        jitted = jax.jit(update, donate_argnums=0, in_shardings=(self.shardings, self.train_sharding, None),
                         out_shardings=(self.shardings, None))
        leading = (self.experiment.dispatch,) if self.stacked else ()
        batch = jax.tree.map(lambda s: jax.ShapeDtypeStruct((*leading, *s.shape), s.dtype), self.spec)
        start = time.monotonic()
        self.compiled = jitted.lower(self.abstract, batch, self.seed).compile()
        self.compile_seconds = time.monotonic() - start
        return lambda state, batch: self.compiled(state, batch, self.seed)

    def batch(self, read: Callable[[int], dict[str, np.ndarray]], call: int) -> dict[str, jax.Array]:
        """The batch of dispatch number `call`, on the devices; ``read(step)``: this process's rows of one update."""
        n = self.experiment.dispatch
        if not self.stacked:
            return put(read(call), self.train_sharding)
        rows = [read(call * n + i) for i in range(n)]
        return put({name: np.stack([r[name] for r in rows]) for name in rows[0]}, self.train_sharding)

    def evaluate(self, state: State, batches: Iterator[dict[str, np.ndarray]],
                 stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Means over all batches, with the task's summary; None when `stop` said so in between."""
        total = None
        for rows in batches:
            if stop():
                return None
            total = metrics.add(total, self._evaluate(state, put(rows, self.eval_sharding)))
        means = metrics.means(total)
        return means | self.experiment.task.summary(means)
