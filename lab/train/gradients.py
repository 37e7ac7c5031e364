"""Gradient sums over many devices: by the compiler, by `jax.pmap`, or in a fixed order.

`by_compiler` and `in_fixed_order` return a `SumGradients` (lab/train/step.py) for the training step, which is otherwise
unchanged; `pmapped` returns the whole step, with its own `SumGradients` inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec

from lab.errors import UserError
from lab.experiment import Experiment
from lab.parallel.sharding import ROWS
from lab.tasks.base import draws
from lab.train.step import Gradient, State, SumGradients, make_train_step, microbatched


def by_compiler(experiment: Experiment, mesh: jax.sharding.Mesh, shardings: Any) -> SumGradients:
    """The compiler partitions the computation. Gradients are constrained to the shardings of their parameters
    (`shardings`); unconstrained, XLA all-reduces whole gradients along "fsdp" and keeps a shard of each.

    With the axis "data" alone, each device sums its own rows in a `shard_map`, followed by one all-reduce per step.
    Otherwise XLA would all-reduce in every microbatch, scanned block and loss chunk. The compiler still partitions
    meshes with "fsdp", where whole gradients do not fit, models with dropout or BatchNorm, which span microbatches, and
    losses of a whole batch (`Task.whole_batch`).

    Private training always sums in the `shard_map`: a record's random numbers do not depend on the batch, and XLA
    partitions the convolutions of per-record gradients wrongly (jax 0.10.2 on CPUs: tests/test_private.py).
    """
    def placed(gradient: Gradient) -> Gradient:
        def gradient_placed(*args: Any) -> Any:
            grads, rest = gradient(*args)
            return jax.lax.with_sharding_constraint(grads, shardings), rest

        return gradient_placed

    def sum_gradients(gradient: Gradient, state: State, batch: Any) -> Any:
        sums = microbatched(experiment.grad_accum_steps)
        if mesh.size == 1 or experiment.private is None and (
                mesh.size != mesh.shape["data"] or jax.tree.leaves(state.model_state)
                or getattr(experiment.task, "whole_batch", False) or draws(
                    gradient, state.params, state.model_state, batch, state.step, 0)):
            return sums(placed(gradient), state, batch)

        def own(state: State, rows: Any) -> Any:
            grads, (weight, metrics, _) = sums(gradient, state, rows)
            return jax.lax.psum((grads, weight, metrics), ROWS)

        everywhere, divided = PartitionSpec(), PartitionSpec(ROWS)
        spread = jax.shard_map(own, mesh=mesh, in_specs=(everywhere, divided), out_specs=everywhere, check_vma=False)
        grads, weight, metrics = spread(state._replace(opt_state=()), batch)
        return grads, (weight, metrics, state.model_state)

    return sum_gradients


def pmapped(experiment: Experiment, mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    """``(state, batch) -> (state, metrics)`` with `jax.pmap`: each device has a copy of the state and its own rows.

    Runs the usual training step, with one `psum` of gradients, weights and metrics. As usual with pmap, dropout masks
    and batch statistics are per device; the new batch statistics are the mean over devices.

    Raises:
      UserError: the mesh has more than one axis, or there are several processes.
    """
    if mesh.size != mesh.shape["data"] or jax.process_count() > 1:
        raise UserError('parallel="pmap" is data parallelism on one machine: use --mesh.data only, one process, or '
                        '--parallel jit.')
    devices = list(mesh.devices.flat)

    def sum_gradients(gradient: Gradient, state: State, batch: Any) -> Any:
        first = jax.lax.axis_index("data") * experiment.grad_accum_steps

        def own(params: Any, model_state: Any, rows: Any, step: Any, part: Any) -> Any:
            return gradient(params, model_state, rows, step, first + part)

        grads, (weight, metrics, model_state) = microbatched(experiment.grad_accum_steps)(own, state, batch)
        grads, weight, metrics = jax.lax.psum((grads, weight, metrics), "data")
        return grads, (weight, metrics, jax.lax.pmean(model_state, "data"))

    step = make_train_step(experiment, sum_gradients)
    over_devices = jax.pmap(step, axis_name="data", in_axes=(None, 0), out_axes=None, devices=devices)

    def update(state: State, batch: Any) -> Any:
        n = len(devices)
        return over_devices(state, jax.tree.map(lambda x: rearrange(x, "(n B) ... -> n B ...", n=n), batch))

    return update


def in_fixed_order(experiment: Experiment, mesh: jax.sharding.Mesh) -> SumGradients:
    """Sums that are bitwise equal on any number of devices.

    Splits the batch into V = `virtual_shards` parts. Each device computes its parts in sequence, so that the program
    and its shapes do not depend on the device count. The parts' sums are then all-gathered and added pairwise. The
    cost, in memory and in communication, is V times the bytes of the parameters.

    On CPUs a bootstrap also needs XLA_FLAGS=--xla_cpu_max_isa=AVX: of a sum of two products LLVM fuses either into a
    multiply-add, not the same one in every program (jax 0.10.2, 2026-11-28).

    Raises:
      UserError: the devices do not divide V, or the mesh or model is unsupported (other axes, batch statistics).
    """
    parts, devices = experiment.virtual_shards, mesh.shape["data"]
    if mesh.size != devices:
        raise UserError("--exact is for data parallelism: use --mesh.data only.")
    if parts % devices:
        raise UserError(f"--exact with --virtual-shards {parts} runs on a number of devices that divides it, not on "
                        f"{devices}. Use --mesh.data.")

    def sum_gradients(gradient: Gradient, state: State, batch: Any) -> Any:
        if jax.tree.leaves(state.model_state):
            raise UserError("--exact is not for models with batch statistics: every part would have its own.")

        def on_a_device(params: Any, rows: Any, step: Any) -> Any:
            own = parts // devices
            first = jax.lax.axis_index(ROWS) * own
            cut = jax.tree.map(lambda x: rearrange(x, "(n B) ... -> n B ...", n=own), rows)

            def one(inputs: Any) -> Any:
                grads, (weight, metrics, _) = gradient(params, state.model_state, inputs[1], step, inputs[0])
                return grads, weight, metrics

            # The barriers stop XLA from fusing across the gather, which on one device is a no-op.
            sums = jax.lax.optimization_barrier(jax.lax.map(one, (first + jnp.arange(own), cut)))
            sums = jax.lax.optimization_barrier(jax.lax.all_gather(sums, ROWS, tiled=True))
            return jax.lax.optimization_barrier(jax.tree.map(_pairwise, sums))

        everywhere, divided = PartitionSpec(), PartitionSpec(ROWS)
        spread = jax.shard_map(on_a_device, mesh=mesh, in_specs=(everywhere, divided, everywhere), out_specs=everywhere,
                               check_vma=False)
        grads, weight, metrics = spread(state.params, batch, state.step)
        return grads, (weight, metrics, state.model_state)

    return sum_gradients


def _pairwise(x: jax.Array) -> jax.Array:
    """The sum over the first axis in a fixed order: a binary tree that adds neighbours first."""
    while x.shape[0] > 1:
        odd = x[x.shape[0] - x.shape[0] % 2 :]
        x = jnp.concatenate([x[0 : x.shape[0] - 1 : 2] + x[1::2], odd])
    return x[0]


def exact_cost(experiment: Experiment, parameters: int) -> str:
    """A message with the cost of --exact. `parameters`: the parameter count."""
    gathered = 4 * parameters * experiment.virtual_shards
    return (f"exact: {experiment.virtual_shards} virtual shards of {experiment.batch // experiment.virtual_shards} "
            f"records; {gathered / 1e9:.2f} GB of gradients on every device, gathered at every step")
