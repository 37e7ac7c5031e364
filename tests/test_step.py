"""The step: the same on any devices, microbatches and dispatch; what is random; norms; traced numbers; donation.

The toy ingredients at the top (points, a perceptron, a task) also serve the tests of sharding, loop and checkpoints:
they compile in a fraction of a second, and the kitchen must not know the difference.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.data.pipeline import eval_batches, train_batch
from lab.experiment import Checkpoint, Evaluate, Experiment, Mesh
from lab.models.dropout import dropout
from lab.optim import SGD, AdamW, Constant, ScheduleFreeAdamW
from lab.tasks.base import Task, apply
from lab.train.metrics import means
from lab.train.program import Program
from lab.train.step import State, cast, init_state, key_for, make_eval_step, make_train_step

# ------------------------------------------------------------------------------------------------ toy ingredients


class Table:
    """Records in memory."""

    def __init__(self, **columns: np.ndarray):
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["x"])

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {name: column[indices] for name, column in self.columns.items()}


@dataclass(frozen=True)
class Points:
    """Points in 6 dimensions, of 4 kinds; `records` to train on (no multiple of the batch), 13 to validate."""

    records: int = 44
    draw: int = 0

    unit = "points"
    units_per_record = 1

    def validate(self) -> None:
        """Nothing can be wrong."""

    def metadata(self) -> dict[str, int]:
        return {}

    def record_spec(self) -> dict[str, tuple[tuple[int, ...], type]]:
        return {"x": ((6,), np.float32), "y": ((), np.int32)}

    def transform(self, batch: dict[str, Any], train: bool) -> dict[str, Any]:
        return batch

    def load(self) -> SimpleNamespace:
        random = np.random.default_rng(self.draw)
        n = self.records + 13
        y = np.arange(n, dtype=np.int32) % 4
        x = (random.normal(size=(4, 6))[y] + 0.5 * random.normal(size=(n, 6))).astype(np.float32)
        train, validation = (Table(x=x[part], y=y[part]) for part in (slice(self.records), slice(self.records, n)))
        return SimpleNamespace(train=train, validation=validation, test=None,
                               fingerprint=f"points {self.records} {self.draw}",
                               metadata={}, unit=self.unit, units_per_record=1, summary={"records": self.records})


class Perceptron(nn.Module):
    """x (B, 6) -> logits (B, 4). With `counts`, a mutable collection counts the calls in training."""

    width: int = 8
    dropout: float = 0.0
    counts: bool = False

    def validate(self) -> None:
        """Nothing can be wrong."""

    def check(self, facts: Mapping[str, int]) -> None:
        """Fits any data."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        if self.counts:
            calls = self.variable("stats", "calls", lambda: jnp.zeros(()))
            calls.value += train
        init = nn.initializers.normal(0.5)
        h = nn.tanh(nn.Dense(self.width, kernel_init=init, name="hidden")(x))
        return nn.Dense(4, kernel_init=init, name="out")(dropout(self, h, self.dropout, train))


@dataclass(frozen=True)
class Kinds(Task):
    """Cross-entropy over the 4 kinds of points."""

    def init(self, model: nn.Module, key: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, Any]:
        return model.init(key, batch["x"][:1], train=False)

    def loss(self, model: nn.Module, variables: Any, batch: Mapping[str, jax.Array], rngs: Any,
             train: bool) -> tuple[jax.Array, jax.Array, dict, Any]:
        x = batch["x"].astype(jax.tree.leaves(variables["params"])[0].dtype)
        logits, model_state = apply(model, variables, x, rngs=rngs, train=train)
        nll = -jax.nn.log_softmax(logits.astype(jnp.float32))[jnp.arange(len(x)), batch["y"]]
        weight, total = batch["weight"].sum(), (nll * batch["weight"]).sum()
        right = ((logits.argmax(-1) == batch["y"]) * batch["weight"]).sum()
        return total, weight, {"loss": (total, weight), "accuracy": (right, weight)}, model_state

    def summary(self, found: Mapping[str, float], counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        return {"error": 1 - found["accuracy"]}


@pytest.fixture(scope="module", autouse=True)
def compiled_in_haste():
    """Half the compile time; what is compared here does not hang on LLVM's optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def toy(**changes: Any) -> Experiment:
    """12 updates of 8 points; evaluated and saved every 4."""
    return replace(Experiment(
        data=Points(), model=Perceptron(), task=Kinds(), optim=AdamW(lr=Constant(0.05)), steps=12, batch=8,
        evaluate=Evaluate(every=4), checkpoint=Checkpoint(every=4, keep=10), mesh=Mesh(data=1)), **changes)


def ragged(batch: Mapping[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
    """The same rows with uneven weights, some of them 0."""
    weight = np.random.default_rng(step).choice([0, 0, 0.25, 1, 3], len(batch["weight"])).astype(np.float32)
    weight[step % len(weight)] = 2  # never all 0
    return dict(batch) | {"weight": weight}


def reader(experiment: Experiment, uneven: bool = False) -> Callable[[int], dict[str, np.ndarray]]:
    """call -> the batch of that call of the update, read one update at a time."""
    read = functools.partial(train_batch, experiment.data.load().train, batch=experiment.batch, seed=experiment.seed)
    one, n = (lambda step: ragged(read(step), step)) if uneven else read, experiment.steps_per_call
    return one if n == 1 else lambda call: jax.tree.map(lambda *rows: np.stack(rows),
                                                        *(one(call * n + i) for i in range(n)))


def run(experiment: Experiment, updates: int = 4, *, uneven: bool = False) -> tuple[State, list[dict]]:
    """The state after some updates, and the metrics of every call, on the host."""
    program, read, history = Program(experiment), reader(experiment, uneven), []
    state = program.init()
    for call in range(updates // experiment.steps_per_call):
        state, values = program.train(state, program.batch(read, call))
        history.append(jax.device_get(values))
    return jax.device_get(state), history


def apart(a: Any, b: Any) -> float:
    """The largest difference between two trees of numbers."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)))) for x, y in leaves)


def norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(tree))))


# ---------------------------------------------------------------------------------- devices, microbatches, dispatch


@pytest.fixture(scope="module")
def plain() -> tuple[State, list[dict]]:
    """4 updates of the toy with uneven weights, on one device."""
    return run(toy(), uneven=True)


def test_one_and_eight_devices_agree(plain):
    state, history = run(toy(mesh=Mesh(data=8)), uneven=True)
    assert apart(state, plain[0]) < 1e-5
    assert apart(history, plain[1]) < 1e-4  # sums
    assert apart([means(m) for m in history], [means(m) for m in plain[1]]) < 1e-5
    # What this guards against: every device dividing by its own weight, and the mean of that.
    batch, evaluate = reader(toy(), uneven=True)(0), jax.jit(make_eval_step(toy()))
    start = init_state(toy(), batch)
    rows = [{k: v[i:i + 1] for k, v in batch.items()} for i in range(8) if batch["weight"][i]]
    mean_of_means = np.mean([means(evaluate(start, row))["loss"] for row in rows])
    assert abs(mean_of_means - means(plain[1][0])["loss"]) > 1e-3


def test_gpt_on_one_and_eight_devices(tiny):
    small = replace(tiny, model=tiny.model.clone(depth=1), optim=SGD(lr=Constant(0.5)))
    one, eight = (run(replace(small, mesh=Mesh(data=n)), updates=3) for n in (1, 8))
    assert apart(one[0].params, eight[0].params) < 1e-5
    assert apart([means(m)["loss"] for m in one[1]], [means(m)["loss"] for m in eight[1]]) < 1e-5
    losses = [means(m)["loss"] for m in one[1]]
    assert losses[2] < losses[0] - 0.1  # it did learn


def test_microbatches_are_exact_with_uneven_weights(plain):
    state, history = run(toy(grad_accum_steps=4, mesh=Mesh(data=2)), uneven=True)
    assert apart(state, plain[0]) < 1e-5
    assert apart([means(m) for m in history], [means(m) for m in plain[1]]) < 1e-5
    # Negative control: the mean of the gradients of the microbatches' means is another gradient.
    experiment, batch = toy(), reader(toy(), uneven=True)(0)
    start = init_state(experiment, batch)

    def mean_loss(params: Any, rows: Any) -> jax.Array:
        total, weight, _, _ = experiment.task.loss(experiment.model, {"params": params}, rows, {}, train=True)
        return total / jnp.where(weight > 0, weight, 1)

    parts = [{k: v[j::4] for k, v in batch.items()} for j in range(4)]
    gradient = jax.jit(jax.grad(mean_loss))
    wrong = norm(jax.tree.map(lambda *g: sum(g) / 4, *(gradient(start.params, rows) for rows in parts)))
    right = norm(gradient(start.params, batch))
    assert means(plain[1][0])["gradient_norm"] == pytest.approx(right, abs=1e-5)
    assert abs(wrong - right) > 1e-2


def test_mutable_collections_go_through_microbatches():
    for microbatches in (1, 4):
        state, _ = run(toy(model=Perceptron(counts=True), grad_accum_steps=microbatches), updates=2)
        assert state.model_state["stats"]["calls"] == 2 * microbatches


def test_dispatch_equals_single_updates(plain):
    experiment = toy(steps_per_call=4)
    state, (history,) = run(experiment, uneven=True)
    assert apart(state, plain[0]) < 1e-6
    single = jax.tree.map(lambda *x: np.stack(x), *plain[1])
    assert apart(history, single) < 1e-5
    # Negative control: the same batches in another order.
    program, read = Program(experiment), reader(experiment, uneven=True)
    swapped, _ = program.train(program.init(), program.batch(lambda call: {k: x[::-1] for k, x in read(0).items()}, 0))
    assert apart(jax.device_get(swapped).params, plain[0].params) > 1e-4


# ------------------------------------------------------------------------------------------------------ randomness


def test_key_for():
    assert jnp.array_equal(jax.random.key_data(key_for(3, "init")), jax.random.key_data(key_for(3, "init")))
    keys = [key_for(3, "init"), key_for(4, "init"), key_for(3, "dropout"), key_for(3, "init", 0), key_for(3, "init", 1),
            key_for(3, "init", 0, 1), key_for(3, "init", 1, 0)]
    assert len({tuple(jax.random.key_data(k).tolist()) for k in keys}) == len(keys)
    traced = jax.jit(lambda seed, step: key_for(seed, "dropout", step))(3, 7)
    assert jnp.array_equal(jax.random.key_data(traced), jax.random.key_data(key_for(3, "dropout", 7)))


def test_dropout_depends_on_seed_step_and_microbatch_only():
    experiment = toy(model=Perceptron(width=16, dropout=0.5))
    batch = reader(experiment)(0)
    start = init_state(experiment, batch)

    @functools.partial(jax.jit, static_argnums=0)
    def loss_of(grad_accum_steps: int, seed: int, step: int) -> jax.Array:
        update = make_train_step(replace(experiment, seed=seed, grad_accum_steps=grad_accum_steps))
        total, weight = update(start._replace(step=step), batch)[1]["loss"]
        return total / weight

    first = loss_of(1, 0, 0)
    assert loss_of(1, 0, 0) == first
    assert abs(loss_of(1, 1, 0) - first) > 1e-3
    assert abs(loss_of(1, 0, 1) - first) > 1e-3

    @jax.jit
    def by_hand(parts: jax.Array) -> jax.Array:
        total = 0.0
        for j in range(2):
            rows = {k: v[j::2] for k, v in batch.items()}
            rngs = {"dropout": key_for(0, "dropout", 0, parts[j])}
            total += experiment.task.loss(experiment.model, {"params": start.params}, rows, rngs, train=True)[0]
        return total / 8

    found = loss_of(2, 0, 0)
    assert abs(found - by_hand(jnp.array([0, 1]))) < 1e-5
    assert abs(found - by_hand(jnp.array([0, 0]))) > 1e-4  # one mask for both microbatches would be seen


def test_dropout_does_not_depend_on_the_devices(plain):
    one, eight = (run(toy(model=Perceptron(dropout=0.5), mesh=Mesh(data=n)), uneven=True)[0] for n in (1, 8))
    assert apart(one, eight) < 1e-5
    assert apart(one.params, plain[0].params) > 1e-2  # there was dropout


# ------------------------------------------------------------------------------------------------- metrics, types


def test_metrics_are_sums_and_weights(plain):
    for step, values in enumerate(plain[1]):
        assert all(isinstance(pair, tuple) and len(pair) == 2 for pair in values.values())
        assert values["loss"][1] == pytest.approx(reader(toy(), uneven=True)(step)["weight"].sum())
        assert {"loss", "accuracy", "gradient_norm", "update_norm", "parameter_norm", "learning_rate"} == set(values)
        assert means(values)["learning_rate"] == pytest.approx(0.05)


def test_norms_against_numpy():
    experiment = toy(optim=SGD(lr=Constant(0.25)))
    batch = reader(experiment, uneven=True)(0)
    start = init_state(experiment, batch)
    evaluate = jax.jit(make_eval_step(experiment))
    end, values = jax.jit(make_train_step(experiment))(start, batch)
    found = means(values)
    change = jax.tree.map(lambda new, old: np.asarray(new, np.float64) - np.asarray(old), end.params, start.params)
    assert found["update_norm"] == pytest.approx(norm(change), rel=1e-5)
    assert found["gradient_norm"] == pytest.approx(norm(change) / 0.25, rel=1e-5)
    assert found["parameter_norm"] == pytest.approx(norm(end.params), rel=1e-6)
    assert abs(found["parameter_norm"] - norm(start.params)) > 1e-3  # of the parameters after the update
    # The gradient itself, of one bias, by a central difference of the loss.
    shifted = [jax.tree.map(lambda x: x, start.params) for _ in range(2)]
    for params, shift in zip(shifted, (1e-2, -1e-2), strict=True):
        params["out"] = params["out"] | {"bias": params["out"]["bias"].at[2].add(shift)}
    up, down = (means(evaluate(start._replace(params=p), batch))["loss"] for p in shifted)
    assert (up - down) / 2e-2 == pytest.approx(-change["out"]["bias"][2] / 0.25, abs=1e-4)


def test_the_step_counts_updates(plain):
    assert plain[0].step == 4 and plain[0].step.dtype == np.int32


def test_cast():
    tree = {"w": jnp.ones(3), "n": jnp.arange(3), "b": jnp.ones(2, bool)}
    assert {k: v.dtype.name for k, v in cast(tree, "bfloat16").items()} == {"w": "bfloat16", "n": "int32", "b": "bool"}
    grads = jax.grad(lambda p: (cast(p, "bfloat16")["w"] ** 2).sum().astype(jnp.float32))({"w": jnp.ones(3)})
    assert grads["w"].dtype == jnp.float32 and jnp.allclose(grads["w"], 2)


def test_bfloat16_computes_short_and_keeps_long(plain):
    state, history = run(toy(precision="bfloat16"), uneven=True)
    assert {x.dtype.name for x in jax.tree.leaves((state.params, state.opt_state))} == {"float32", "int32"}
    losses, exact = ([means(m)["loss"] for m in h] for h in (history, plain[1]))
    assert losses == pytest.approx(exact, rel=0.05)
    assert apart(losses, exact) > 1e-5  # it really computed in another type


# ------------------------------------------------------------------------------------------------ traced numbers


def train(experiment: Experiment, updates: int = 3) -> tuple[Any, jax.Array]:
    """Pure training: (parameters, losses); any number of the experiment may be traced."""
    read = reader(toy())
    state = init_state(experiment, read(0))
    batches = jax.tree.map(lambda *x: jnp.stack(x), *(read(step) for step in range(updates)))
    state, values = jax.lax.scan(make_train_step(experiment), state, batches)
    return state.params, values["loss"][0] / values["loss"][1]


def test_a_traced_learning_rate_is_vmapped():
    rates = [0.01, 0.05, 0.2]

    def at(rate: Any) -> Any:
        return train(replace(toy(), optim=AdamW(lr=Constant(rate))))

    together = jax.jit(jax.vmap(at))(jnp.array(rates))
    assert apart(jax.tree.map(lambda x: x[1], together), jax.jit(lambda: at(0.05))()) < 1e-6
    assert apart(*(jax.tree.map(lambda x, i=i: x[i], together[0]) for i in (0, 1))) > 1e-3


def test_a_traced_seed_is_vmapped():
    def at(seed: Any) -> Any:
        return train(replace(toy(model=Perceptron(dropout=0.3)), seed=seed))

    together = jax.jit(jax.vmap(at))(jnp.arange(2))
    assert apart(jax.tree.map(lambda x: x[1], together), jax.jit(lambda: at(1))()) < 1e-6
    assert apart(*(jax.tree.map(lambda x, i=i: x[i], together[0]) for i in (0, 1))) > 1e-2


# ----------------------------------------------------------------------------------------------- compiled program


@pytest.mark.parametrize("optim", [AdamW(lr=0.01), AdamW(lr=0.01, ema=0.5), ScheduleFreeAdamW(lr=0.01)],
                         ids=["adamw", "ema", "schedule-free"])
def test_the_state_is_donated_and_nothing_hidden_is_copied(optim):
    experiment = toy(optim=optim)
    program = Program(experiment)
    state, batch = program.init(), program.batch(reader(experiment), 0)
    with jax.transfer_guard_host_to_device("disallow"):
        new, _ = program.train(state, batch)
        newer, _ = program.train(new, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves((newer, batch)))
    with jax.transfer_guard_host_to_device("disallow"), pytest.raises(Exception, match="[Dd]isallowed"):
        program.train(newer, reader(experiment)(0))  # the guard does see a batch that is still on the host


def test_there_is_one_compilation():
    experiment = toy()
    program = Program(experiment)
    assert program.train is program.train
    state, batch = program.init(), reader(experiment)(0)
    with pytest.raises((TypeError, ValueError)):
        program.train(state, jax.tree.map(lambda x: x[:4], batch))
    state, _ = program.train(state, batch)  # the right shape does run
    data = experiment.data.load()
    for records in (13, 5):  # both end with a ragged batch
        program.evaluate(state, eval_batches(data.validation, experiment.batch, records))
    assert program._evaluate._cache_size() == 1


def test_evaluation_counts_each_record_once_and_uses_the_averaged_parameters():
    experiment = toy(optim=AdamW(lr=Constant(0.1), ema=0.9))
    program, read = Program(experiment), reader(experiment)
    state = program.init()
    for step in range(4):
        state, _ = program.train(state, program.batch(read, step))
    validation = experiment.data.load().validation
    found, _ = program.evaluate(state, eval_batches(validation, experiment.batch))

    def by_hand(params: Any) -> float:
        logits = experiment.model.apply({"params": params}, validation.columns["x"], train=False)
        nll = -jax.nn.log_softmax(logits)[np.arange(13), validation.columns["y"]]
        return float(nll.mean())

    assert found["loss"] == pytest.approx(by_hand(state.opt_state.ema), abs=1e-5)
    assert abs(found["loss"] - by_hand(state.params)) > 1e-3
    assert found["error"] == 1 - found["accuracy"]  # the task's summary
    assert program.evaluate(state, eval_batches(validation, experiment.batch), stop=lambda: True) is None


