"""Pure functions that are compiled: initial state, training step, evaluation step, prediction step."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax import Array

from lab.configuration.parts import check_loss
from lab.experiment import Experiment
from lab.models.members import Several, bootstrap, per_member
from lab.optim.matrices import matrices
from lab.parallel.sharding import path_of
from lab.tasks.base import transform_batch
from lab.train.frozen import as_trained

Batch = Mapping[str, Array]
Metrics = dict[str, Any]


class State(NamedTuple):
    """Everything a checkpoint stores; the rest follows from (experiment, seed, step)."""

    step: Array
    """Completed steps, int32."""
    params: Any
    model_state: Any
    """Mutable collections of the model (BatchNorm statistics)."""
    opt_state: Any


def key_for(seed: int | Array, name: str, *counts: int | Array) -> Array:
    """The random key of one purpose: ``fold_in(key(seed), name, counts...)``. Keys are never split or stored."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    for count in counts:
        key = jax.random.fold_in(key, count)
    return key


def cast(tree: Any, precision: str) -> Any:
    """Casts floating-point arrays to the compute dtype. Gradients come back in the dtype of the parameters."""
    def one(x: Array) -> Array:
        return x.astype(precision) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)


def prepare(experiment: Experiment, batch: Batch, train: bool, *counts: int | Array) -> Batch:
    """The batch after the data's transform, as the task sees it. Each record gets its own random key.

    The key is a function of (seed, counts, record index), so augmentation and masking do not depend on batch order,
    batch size or devices. Nor do the records' weights in a bootstrap, which belong to a training batch.
    """
    key = key_for(experiment.seed, "records", *counts)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, batch["index"])
    drawn = bootstrap(experiment.model, experiment.seed, batch["index"]) if train else {}
    return {**transform_batch(experiment.data, batch, keys, train), **drawn}


def init_state(experiment: Experiment, batch: Batch, arrays: Mapping[str, Array] | None = None) -> State:
    """The state before the first step, for batches shaped like `batch`.

    `arrays`: pretrained arrays that replace the random ones, by path in `params` or `model_state`. To continue another
    run it also holds that run's optimizer state and step, as "state/opt_state/..." and "state/step".
    """
    prepared = prepare(experiment, batch, False)
    variables = experiment.task.init(experiment.model, key_for(experiment.seed, "init"), prepared)
    model_state = {name: value for name, value in variables.items() if name != "params"}
    fresh = State(jnp.zeros((), jnp.int32), variables["params"], model_state, ())
    state = jax.tree.map_with_path(lambda path, x: (arrays or {}).get(path_of(path[1:]), x), fresh)
    if experiment.adapt is not None:
        state = experiment.adapt.begin(state, matrices(experiment, batch), key_for(experiment.seed, "adapt"))
    state = state._replace(opt_state=make_optimizer(experiment, batch).init(state.params, state.model_state))
    return jax.tree.map_with_path(lambda path, x: (arrays or {}).get(f"state/{path_of(path)}", x), state)


def make_optimizer(experiment: Experiment, batch: Batch) -> optax.GradientTransformationExtraArgs:
    """The experiment's optimizer; a model of `Several` members gets one per member. `batch`: see `init_state`."""
    optimizer, several = experiment.optimizer, isinstance(experiment.model, Several)
    found = matrices(experiment, batch) if optimizer.needs_matrices else {}
    tx = optimizer.build(experiment.steps, experiment.adapt.matrices(found) if experiment.adapt else found)
    return per_member(tx) if several else tx


Gradient = Callable[..., Any]
"""(params, model_state, rows, step, part) -> (grads, (weight, metrics, model_state)): sums over microbatch `part`."""
SumGradients = Callable[[Gradient, State, Batch], Any]
"""(gradient, state, batch) -> (grads, (weight, metrics, model_state)): sums over the whole batch."""


def microbatched(n: int) -> SumGradients:
    """Gradient accumulation over n microbatches. Microbatch j is rows j::n, so that each spans all devices."""
    def sum_gradients(gradient: Gradient, state: State, batch: Batch) -> Any:
        if n == 1:
            return gradient(state.params, state.model_state, batch, state.step, 0)
        parts = jax.tree.map(lambda x: rearrange(x, "(B n) ... -> n B ...", n=n), batch)

        def body(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            model_state, sums = carry
            part, rows = inputs
            grads, (weight, metrics, model_state) = gradient(state.params, model_state, rows, state.step, part)
            return (model_state, jax.tree.map(jnp.add, sums, (grads, weight, metrics))), None

        first = jax.tree.map(lambda x: x[0], parts)
        grads, (weight, metrics, _) = jax.eval_shape(gradient, state.params, state.model_state, first, state.step, 0)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, weight, metrics))
        (model_state, (grads, weight, metrics)), _ = jax.lax.scan(
            body, (state.model_state, zeros), (jnp.arange(n), parts)
        )
        return grads, (weight, metrics, model_state)

    return sum_gradients


def make_loss(experiment: Experiment, base: Any = None) -> Callable[..., tuple[Array, tuple]]:
    """The training loss: ``(params, model_state, rows, step, part) -> (loss sum, (weight, metrics, model_state))``.
    `base`: with adapters, the frozen parameters."""

    def loss(params: Any, model_state: Any, rows: Batch, step: Array, part: Array | int) -> tuple[Array, tuple]:
        rngs = {"dropout": key_for(experiment.seed, "dropout", step, part)}
        whole = experiment.adapt.in_training(params, base) if experiment.adapt else params
        variables = {"params": cast(whole, experiment.precision), **model_state}
        with as_trained(experiment):
            result = experiment.task.loss(experiment.model, variables, rows, rngs, train=True)
        loss_sum, weight, metrics, model_state = check_loss(experiment.task, result, train=True)
        return loss_sum, (weight, metrics, model_state)

    return loss


def make_train_step(experiment: Experiment, sum_gradients: SumGradients | None = None
                    ) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """One training step as a pure function. Numbers in the experiment may be traced scalars.

    The loss is (sum of losses) / (sum of weights) over the whole batch, for any number of microbatches. Every metric is
    (sum, weight). `sum_gradients` computes the sums; by default it accumulates over `experiment.grad_accum_steps`.
    """
    rate = experiment.optim.rate(experiment.steps)
    sum_gradients = sum_gradients or microbatched(experiment.grad_accum_steps)
    if experiment.private is not None:
        sum_gradients = experiment.private.protected(sum_gradients, key_for(experiment.seed, "noise"))

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        optimizer = make_optimizer(experiment, batch)
        batch = prepare(experiment, batch, True, state.step)
        gradient = jax.grad(make_loss(experiment, getattr(state, "base", None)), has_aux=True)
        grads, (weight, metrics, model_state) = sum_gradients(gradient, state, batch)
        grads = jax.tree.map(lambda g: g / jnp.where(weight > 0, weight, 1), grads)
        with jax.named_scope("optimizer"):  # the name its operations have in a profile
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, model_state=model_state)
            params = optax.apply_updates(state.params, updates)
        one = jnp.ones(())
        metrics |= {"gradient_norm": (optax.tree.norm(grads), one), "update_norm": (optax.tree.norm(updates), one),
                    "parameter_norm": (optax.tree.norm(params), one), "learning_rate": (rate(state.step), one)}
        return state._replace(step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state), metrics

    return train_step


def eval_params(experiment: Experiment, state: State) -> Any:
    """Parameters for evaluation and sampling, in the compute dtype: averaged if the optimizer keeps an average."""
    params = experiment.optim.eval_params(state.opt_state, state.params)
    return cast(experiment.adapt.merged(params, state.base) if experiment.adapt else params, experiment.precision)


def eval_variables(experiment: Experiment, state: State) -> dict[str, Any]:
    """Flax variables for evaluation: `eval_params` and the matching mutable collections."""
    return {
        "params": eval_params(experiment, state),
        **experiment.optim.eval_model_state(state.opt_state, state.model_state),
    }


def make_eval_step(experiment: Experiment) -> Callable[[State, Batch], Metrics]:
    """Evaluation step: the metrics of one batch, with `eval_params`."""
    def eval_step(state: State, batch: Batch) -> Metrics:
        batch = prepare(experiment, batch, False)
        found = experiment.task.loss(experiment.model, eval_variables(experiment, state), batch, {}, train=False)
        return check_loss(experiment.task, found, train=False)[2]

    return eval_step


def make_predict_step(experiment: Experiment) -> Callable[[State, Batch], dict[str, Array]]:
    """Prediction step: `Task.predict` of one batch, with `eval_params`; name -> (B, ...)."""
    def predict_step(state: State, batch: Batch) -> dict[str, Array]:
        batch = prepare(experiment, batch, False)
        return experiment.task.predict(experiment.model, eval_variables(experiment, state), batch)

    return predict_step
