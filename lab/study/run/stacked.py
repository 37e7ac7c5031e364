"""Many cells in one program: the pure step under `vmap`, with cells sharded over devices."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lab.configuration.values import override
from lab.data.pipeline import train_batches
from lab.experiment import Experiment
from lab.parallel.backend import compiler_options
from lab.train import metrics
from lab.train.records_on_device import OnlyNumbered, fits
from lab.train.shapes import abstract_state, batch_spec, given_to, one_record
from lab.train.step import State, init_state, make_eval_step, make_train_step

FINITE = ("loss", "gradient_norm", "update_norm", "parameter_norm")
CELLS, EVERYWHERE, STEPS = PartitionSpec("cell"), PartitionSpec(), PartitionSpec(None, "cell")


class Stacked:
    """Experiments that differ only in seed and `numbers`. Every array has a leading axis of cells (C).

    Cells with the same seed share batches. A cell whose loss or gradient becomes NaN or infinite is frozen.
    """

    def __init__(self, experiments: Sequence[Experiment], numbers: Sequence[str], train: Any,
                 devices: Sequence[Any] | None = None):
        """`train`: the training records. Uses the largest number of `devices` (default: local) that divides C."""
        self.experiments, self.experiment, self.numbers = list(experiments), experiments[0], tuple(numbers)
        devices = list(devices or jax.local_devices())
        even = max(n for n in range(1, len(devices) + 1) if len(experiments) % n == 0)
        self.mesh = jax.make_mesh((even,), ("cell",), devices=devices[:even],
                                  axis_types=(jax.sharding.AxisType.Auto,))
        self.cells, self.everywhere = NamedSharding(self.mesh, CELLS), NamedSharding(self.mesh, EVERYWHERE)
        self.spec = batch_spec(self.experiment)
        self.eval_batch = self.experiment.batch // self.experiment.grad_accum_steps
        one = abstract_state(self.experiment)
        self.abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(experiments), *x.shape), x.dtype,
                                                                    sharding=self.cells), one)
        each = [given_to(experiment, self.numbers) for experiment in experiments]
        self.given = jax.device_put({name: np.stack([g[name] for g in each]) for name in each[0]}, self.cells)
        self.seeds = sorted({experiment.seed for experiment in experiments})
        place = np.array([self.seeds.index(experiment.seed) for experiment in experiments], np.int32)
        self._place = jax.device_put(place, self.cells)
        self.resident = None
        if fits(self.experiment, train):
            self.resident = jax.device_put(train.arrays, self.everywhere)
        self.records = train if self.resident is None else OnlyNumbered(len(train))

    def __len__(self) -> int:
        return len(self.experiments)

    def _divided(self, function: Callable, ins: Any, outs: Any, **options: Any) -> Callable:
        """Jits `function`, with cells sharded over devices."""
        spread = jax.shard_map(function, mesh=self.mesh, in_specs=ins, out_specs=outs, check_vma=False)
        return jax.jit(spread, compiler_options=compiler_options(self.mesh, self.experiment.deterministic), **options)

    def init(self, arrays: Mapping[str, Any] | None = None) -> State:
        """The initial states. `arrays`: see `init_state`; the same for all cells."""
        def init(given: Any, batch: Any, arrays: Any) -> State:
            return jax.vmap(lambda own: init_state(override(self.experiment, own), batch, arrays))(given)

        return self._divided(init, (CELLS, EVERYWHERE, EVERYWHERE), CELLS)(self.given, one_record(self.spec), arrays)

    def everyone(self) -> jax.Array:
        """All-True `alive` mask, bool (C,)."""
        return jax.device_put(np.ones(len(self), bool), self.cells)

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled:
        """(states, alive, given, place, batches, resident) -> (states, alive, metrics): `steps_per_call` steps.

        Batches have leading axes (steps_per_call, seeds), metrics (steps_per_call, C).
        """
        start = time.monotonic()

        def update(states: State, alive: jax.Array, given: Any, place: jax.Array, batches: Any, resident: Any) -> Any:
            def one(state: State, alive: jax.Array, own: Any, place: jax.Array, batches: Any) -> Any:
                batch = jax.tree.map(lambda x: x[place], batches)
                rows = jax.tree.map(lambda x: x[batch["index"]], resident or {})
                new, values = make_train_step(override(self.experiment, own))(state, {**batch, **rows})
                alive &= jnp.all(jnp.stack([jnp.isfinite(values[k][0] / values[k][1]) for k in FINITE]))
                return jax.tree.map(lambda a, b: jnp.where(alive, a, b), new, state), alive, values

            def step(carry: Any, batches: Any) -> Any:
                *carry, values = jax.vmap(one, in_axes=(0, 0, 0, 0, None))(*carry, given, place, batches)
                return tuple(carry), values

            if self.experiment.steps_per_call > 1:
                (states, alive), values = jax.lax.scan(step, (states, alive), batches)
            else:  # a scan of length 1 makes convolutions slower on a CPU
                (states, alive), values = step((states, alive), jax.tree.map(lambda x: x[0], batches))
                values = jax.tree.map(lambda x: x[None], values)
            return states, alive, values

        jitted = self._divided(update, (CELLS, CELLS, CELLS, CELLS, EVERYWHERE, EVERYWHERE), (CELLS, CELLS, STEPS),
                               donate_argnums=(0, 1))
        spec = {name: self.spec[name] for name in self.batch(0)}
        batches = {name: jax.ShapeDtypeStruct((self.experiment.steps_per_call, len(self.seeds), *s.shape), s.dtype,
                                              sharding=self.everywhere) for name, s in spec.items()}
        found = jitted.lower(self.abstract, self.everyone(), self.given, self._place, batches, self.resident).compile()
        self.compile_seconds = time.monotonic() - start
        return found

    def train(self, states: State, alive: jax.Array, batches: Any) -> tuple[State, jax.Array, Any]:
        """Runs `steps_per_call` steps: (states, alive, metrics). Donates states and `alive`."""
        return self.compiled(states, alive, self.given, self._place, batches, self.resident)

    def batch(self, call: int) -> dict[str, jax.Array]:
        """The batches of call number `call` for every seed, on the devices: leading axes (steps_per_call, seeds)."""
        n, size = self.experiment.steps_per_call, self.experiment.batch
        each = [train_batches(self.records, call, n, size, seed) for seed in self.seeds]
        stacks = {name: np.stack([batches[name] for batches in each], axis=1) for name in each[0]}
        return jax.device_put(stacks, self.everywhere)

    @functools.cached_property
    def _evaluate(self) -> Callable:
        def evaluate(states: State, given: Any, batch: Any) -> Any:
            return jax.vmap(lambda state, own: make_eval_step(override(self.experiment, own))(state, batch))(
                states, given)

        return self._divided(evaluate, (CELLS, CELLS, EVERYWHERE), CELLS)

    def evaluate(self, states: State, batches: Iterator[dict[str, np.ndarray]],
                 stop: Callable[[], bool] = lambda: False) -> list[dict[str, float]] | None:
        """Per-cell means over all batches, with the task's summary. None if `stop()` interrupts it."""
        total = None
        for rows in batches:
            if stop():
                return None
            total = metrics.add(total, self._evaluate(states, self.given, jax.device_put(rows, self.everywhere)))
        return [means | experiment.task.summary(means, metrics.counts(own))
                for experiment, own in zip(self.experiments, apart(jax.device_get(total), len(self)), strict=True)
                for means in [metrics.means(own)]]


def apart(stacked: Any, number: int) -> list[Any]:
    """Splits a tree along the leading axis of its arrays into one tree per cell."""
    return [jax.tree.map(lambda x: x[i], stacked) for i in range(number)]  # noqa: B023 (called at once)


def common_dispatch(experiment: Experiment, most: int, also: Sequence[int] = ()) -> int:
    """The largest number of steps per call, up to `most`, that divides the total steps, the evaluation and checkpoint
    intervals, and the steps in `also`."""
    settings = experiment.evaluate.every, experiment.checkpoint.every, experiment.checkpoint.permanent or 0
    return max(n for n in range(1, most + 1) if not any(x % n for x in (experiment.steps, *settings, *also)))
