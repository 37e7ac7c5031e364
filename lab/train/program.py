"""Compiles the pure functions of lab/train/step.py for a device mesh: sharded init, training step, evaluation."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lab.configuration.values import override, value_at
from lab.errors import UserError
from lab.experiment import Experiment
from lab.parallel.backend import EXACT, compiler_options
from lab.parallel.sharding import batch_sharding, constrained, make_mesh, process_rows, put, spread, state_shardings
from lab.train import metrics
from lab.train.gradients import by_compiler, in_fixed_order, pmapped
from lab.train.records_on_device import OnlyNumbered, fits
from lab.train.shapes import abstract_state, batch_spec, given_to, numbered, one_record
from lab.train.step import State, eval_variables, init_state, make_eval_step, make_predict_step, make_train_step


class Program:
    """An experiment compiled for a device mesh."""

    def __init__(self, experiment: Experiment, train: Any = None, devices: Sequence[Any] | None = None,
                 numbers: Sequence[str] = ()):
        """`train`: the training records, copied to the devices once if `data_on_device` and memory allow. `devices`:
        all by default; for `lower` they may be AOT topology devices. `numbers`: (dotted) fields that, like the seed,
        are arguments of the compiled functions; see `like`.

        Raises UserError if the devices do not divide the batch or the state.
        """
        self.experiment, self.numbers = experiment, tuple(numbers)
        self.spec = self.train_spec = batch_spec(experiment)
        self.mesh = make_mesh(experiment.mesh, devices)
        self.everywhere = NamedSharding(self.mesh, PartitionSpec())  # replicated
        self.stacked = experiment.steps_per_call > 1
        self.eval_batch = experiment.batch // experiment.grad_accum_steps  # one microbatch, which fits memory
        self.train_sharding = batch_sharding(self.mesh, experiment.batch, experiment.grad_accum_steps,
                                             stacked=self.stacked)
        self.eval_sharding = batch_sharding(self.mesh, self.eval_batch)
        self.abstract = self.placed(experiment)
        self.shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        self.options = compiler_options(self.mesh, experiment.deterministic)
        self._evaluate = self._with_numbers(make_eval_step)
        self._predict = self._with_numbers(make_predict_step)
        self._computing: dict[tuple, Callable[..., Any]] = {}
        self.resident = None
        if train is not None and fits(experiment, train):
            self.resident = jax.device_put(train.arrays, self.everywhere)
            self.train_spec = numbered(experiment.batch)
        self.train_records = train if self.resident is None else OnlyNumbered(len(train))

    def placed(self, experiment: Experiment) -> State:
        """The abstract state of an experiment, with its shardings on this mesh."""
        state = abstract_state(experiment)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state,
                            state_shardings(state, self.mesh, experiment.mesh.rules))

    @functools.cached_property
    def given(self) -> dict[str, jax.Array]:
        """The experiment's seed, `numbers` and teacher."""
        given = given_to(self.experiment, self.numbers)
        return jax.device_put(given, spread(given, self.mesh))

    @functools.cached_property
    def rows(self) -> slice:
        """Rows of a training batch that this process reads."""
        return process_rows(self.train_sharding, self.experiment.batch)

    @functools.cached_property
    def eval_rows(self) -> slice:
        """Rows of an evaluation batch that this process reads."""
        return process_rows(self.eval_sharding, self.eval_batch)

    def _with_numbers(self, make: Callable[[Experiment], Callable]) -> Callable:
        """Jits a step with the seed and `numbers` as arguments, so that other values hit the compilation cache."""
        def step(state: State, batch: Any, given: Mapping[str, jax.Array]) -> Any:
            with constrained(self.mesh):
                return make(override(self.experiment, given))(state, batch)

        return jax.jit(step, out_shardings=self.everywhere, compiler_options=self.options)

    @functools.cached_property
    def _init(self) -> Callable[..., State]:
        def init(batch: Any, given: Mapping[str, jax.Array], arrays: Any) -> State:
            return init_state(override(self.experiment, given), batch, arrays)

        return jax.jit(init, out_shardings=self.shardings, compiler_options=self.options)

    def init(self, arrays: dict[str, Any] | None = None) -> State:
        """The state before the first step, created sharded. `arrays`: see `init_state`."""
        return self._init(one_record(self.spec), self.given, arrays)

    def lower(self) -> jax.stages.Lowered:
        """Lowers `steps_per_call` training steps for these devices; the state is donated."""
        experiment, used = self.experiment, set()

        def update(state: State, batch: Any, given: Mapping[str, jax.Array], resident: Any) -> tuple[State, Any]:
            seeded = override(experiment, given)
            if experiment.parallel == "pmap":
                return pmapped(seeded, self.mesh)(state, batch)
            sums = (in_fixed_order(seeded, self.mesh) if experiment.exact else
                    by_compiler(seeded, self.mesh, self.shardings.params))
            train_step = make_train_step(seeded, sums)

            def step(state: State, batch: Any) -> tuple[State, Any]:
                rows = jax.tree.map(lambda x: x[batch["index"]], resident or {})
                rows = jax.lax.with_sharding_constraint(rows, rows_sharding)
                return train_step(state, {**batch, **rows})

            with constrained(self.mesh) if not experiment.exact else contextlib.nullcontext(set()) as axes:
                result = jax.lax.scan(step, state, batch) if self.stacked else step(state, batch)
            used.update(axes)
            return result

        rows_sharding = batch_sharding(self.mesh, experiment.batch, experiment.grad_accum_steps)
        given = given_to(experiment, self.numbers)
        placed = self.shardings, self.train_sharding, spread(given, self.mesh), self.everywhere
        jitted = jax.jit(update, donate_argnums=0, in_shardings=placed,
                         out_shardings=(self.shardings, self.everywhere))
        leading = (experiment.steps_per_call,) if self.stacked else ()
        batch = jax.tree.map(lambda s: jax.ShapeDtypeStruct((*leading, *s.shape), s.dtype), self.train_spec)
        given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
        lowered = jitted.lower(self.abstract, batch, given, self.resident)
        if self.mesh.shape["sequence"] > 1 and "sequence" not in used:
            raise UserError(f"--mesh.sequence {self.mesh.shape['sequence']} shards no activation of this model: it "
                            f"needs a Transformer whose length it divides.")
        return lowered

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled:
        """`lower`, compiled ahead of time: a batch of another shape raises an error instead of recompiling silently.
        The seed is an argument, so that another seed hits the compilation cache.
        """
        start = time.monotonic()
        found = self.lower().compile(self.options | (EXACT if self.experiment.exact else {}))
        self.compile_seconds = time.monotonic() - start
        return found

    @functools.cached_property
    def train(self) -> Callable[[State, Any], tuple[State, Any]]:
        """``(state, batch) -> (state, metrics)``, compiled; the state is donated.

        With `steps_per_call` > 1 the batch and the metrics have a leading axis of steps.
        """
        compiled = self.compiled
        return lambda state, batch: compiled(state, batch, self.given, self.resident)

    def like(self, experiment: Experiment) -> Program:
        """The program of an experiment that differs in its seed and `numbers` only. Shares the compiled functions and
        the data on the devices.
        """
        _ = self.compiled, self._init  # compute the cached properties first, so that the copy shares them
        other = copy.copy(self)
        other.experiment = override(self.experiment, {n: value_at(experiment, n) for n in ("seed", *self.numbers)})
        other.compile_seconds = 0.0
        for cached in ("given", "train"):  # these depend on the seed and `numbers`
            vars(other).pop(cached, None)
        return other

    def batch(self, read: Callable[[int], dict[str, np.ndarray]], call: int) -> dict[str, jax.Array]:
        """The batch of call number `call`, on the devices. ``read(call)`` returns this process's rows (see `reader` in
        lab/data/pipeline.py), with a leading axis of steps if `steps_per_call` > 1.
        """
        return put(read(call), self.train_sharding, self.experiment.batch)

    def _put(self, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return put(rows, self.eval_sharding, self.eval_batch)

    def evaluate(self, state: State, batches: Iterator[dict[str, np.ndarray]],
                 stop: Callable[[], bool] = lambda: False) -> tuple[dict[str, float], dict[str, np.ndarray]] | None:
        """(means over all batches plus the task's summary, counts); None if `stop` returned True between batches."""
        total = None
        for rows in batches:
            if stop():
                return None
            total = metrics.add(total, self._evaluate(state, self._put(rows), self.given))
        means, counts = metrics.means(total), metrics.counts(total)
        return means | self.experiment.task.summary(means, counts), counts

    def computing(self, f: Callable[..., Any], **static: Any) -> Callable[..., Any]:
        """``(state, arrays, given) -> f(model, evaluation variables, *arrays, **static)``, jitted for this mesh like
        evaluation: kernels that the compiler cannot partition run on each device's rows. Cached by (f, static).
        """
        def make(experiment: Experiment) -> Callable:
            return lambda state, arrays: f(experiment.model, eval_variables(experiment, state), *arrays, **static)

        key = (f, *sorted(static.items()))
        if key not in self._computing:
            self._computing[key] = self._with_numbers(make)
        return self._computing[key]

    def compute(self, state: State, f: Callable[..., Any], *arrays: Any, **static: Any) -> Any:
        """The result of `computing` as NumPy arrays in every process. All processes must make the same call."""
        arrays = jax.device_put(arrays, self.everywhere)
        return jax.device_get(self.computing(f, **static)(state, arrays, self.given))

    def predict(self, state: State, records: Any, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """`Task.predict` of all `records` in order, read from `batches`: name -> (number of records, ...)."""
        parts = [jax.device_get(self._predict(state, self._put(rows), self.given)) for rows in batches]
        return {name: np.concatenate([part[name] for part in parts])[: len(records)] for name in parts[0]}
