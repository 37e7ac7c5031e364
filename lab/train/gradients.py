"""How the sums of a batch come about on many devices: by the compiler, by `jax.pmap`, or in a fixed order.

Each is a `Total` (see lab/train/step.py); the step around it stays the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lab.errors import UserError
from lab.experiment import Experiment
from lab.parallel.sharding import ROWS
from lab.tasks.base import draws
from lab.train.step import Gradient, State, Total, make_train_step, microbatched


def compiled(experiment: Experiment, mesh: jax.sharding.Mesh, shardings: Any) -> Total:
    """The compiler divides the work. Gradients are born where their parameters live (`shardings`, theirs): without
    being told, it sums whole gradients on every device of "fsdp" (an all-reduce) and throws most of them away.

    With "data" alone each device adds up its own rows, and all devices' sums are added once: left to itself the
    compiler adds them in every microbatch, in every scanned block and in every chunk of a loss. (Along "fsdp" no device
    has room for whole gradients.) Random numbers and batch statistics belong to whole microbatches, so a model with
    either stays with the compiler.
    """
    def placed(gradient: Gradient) -> Gradient:
        def gradient_placed(*args: Any) -> Any:
            grads, rest = gradient(*args)
            return jax.lax.with_sharding_constraint(grads, shardings), rest

        return gradient_placed

    def total(gradient: Gradient, state: State, batch: Any) -> Any:
        sums = microbatched(experiment.grad_accum_steps)
        if mesh.size != mesh.shape["data"] or mesh.size == 1 or jax.tree.leaves(state.model_state) or draws(
                gradient, state.params, state.model_state, batch, state.step, 0):
            return sums(placed(gradient), state, batch)

        def own(state: State, rows: Any) -> Any:
            grads, (weight, metrics, _) = sums(gradient, state, rows)
            return jax.lax.psum((grads, weight, metrics), "data")

        everywhere, divided = PartitionSpec(), PartitionSpec("data")
        spread = jax.shard_map(own, mesh=mesh, in_specs=(everywhere, divided), out_specs=everywhere, check_vma=False)
        grads, weight, metrics = spread(state._replace(opt_state=()), batch)
        return grads, (weight, metrics, state.model_state)

    return total


def pmapped(experiment: Experiment, mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    """``(state, batch, seed) -> (state, metrics)`` with `jax.pmap`: every device has a copy of the state and its rows.

    The same step inside, and one `psum` of what it sums. What a device draws by itself (dropout masks, batch
    statistics) is its own, as it is with the usual pmap programs; the statistics kept are the mean of all devices'.

    Raises:
      UserError: the mesh has more than one axis, or there are several processes.
    """
    if mesh.size != mesh.shape["data"] or jax.process_count() > 1:
        raise UserError('parallel="pmap" is data parallelism on one machine: use --mesh.data only, one process, or '
                        '--parallel jit.')
    devices = list(mesh.devices.flat)

    def total(gradient: Gradient, state: State, batch: Any) -> Any:
        first = jax.lax.axis_index("data") * experiment.grad_accum_steps

        def own(params: Any, model_state: Any, rows: Any, step: Any, part: Any) -> Any:
            return gradient(params, model_state, rows, step, first + part)

        grads, (weight, metrics, model_state) = microbatched(experiment.grad_accum_steps)(own, state, batch)
        grads, weight, metrics = jax.lax.psum((grads, weight, metrics), "data")
        return grads, (weight, metrics, jax.lax.pmean(model_state, "data"))

    step = make_train_step(experiment, total)
    over_devices = jax.pmap(step, axis_name="data", in_axes=(None, 0), out_axes=None, devices=devices)

    def update(state: State, batch: Any) -> Any:
        n = len(devices)
        return over_devices(state, jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), batch))

    return update


def in_fixed_order(experiment: Experiment, mesh: jax.sharding.Mesh) -> Total:
    """Sums whose bits do not depend on how many devices there are.

    The batch is cut into `virtual_shards` parts. Each is computed alone, one after another on its device, so that every
    number of devices runs the same program on the same shapes; then all parts' sums are gathered everywhere and added
    pairwise. That costs a gradient per part in memory, and gathering them: V times the bytes of the parameters.

    Raises:
      UserError: the parts cannot be divided among the devices, or the experiment has what hangs on whole batches.
    """
    parts, devices = experiment.virtual_shards, mesh.shape["data"]
    if mesh.size != devices:
        raise UserError("--exact is for data parallelism: use --mesh.data only.")
    if parts % devices:
        raise UserError(f"--exact with --virtual-shards {parts} runs on a number of devices that divides it, not on "
                        f"{devices}. Use --mesh.data.")

    def total(gradient: Gradient, state: State, batch: Any) -> Any:
        if jax.tree.leaves(state.model_state):
            raise UserError("--exact is not for models with batch statistics: every part would have its own.")

        def on_a_device(params: Any, rows: Any, step: Any) -> Any:
            own = parts // devices
            first = jax.lax.axis_index(ROWS) * own
            cut = jax.tree.map(lambda x: x.reshape(own, x.shape[0] // own, *x.shape[1:]), rows)

            def one(inputs: Any) -> Any:
                grads, (weight, metrics, _) = gradient(params, state.model_state, inputs[1], step, inputs[0])
                return grads, weight, metrics

            # The barriers keep the compiler from fusing across, which it would do where there is nothing to gather.
            sums = jax.lax.optimization_barrier(jax.lax.map(one, (first + jnp.arange(own), cut)))
            sums = jax.lax.optimization_barrier(jax.lax.all_gather(sums, ROWS, tiled=True))
            return jax.lax.optimization_barrier(jax.tree.map(_pairwise, sums))

        everywhere, divided = PartitionSpec(), PartitionSpec(ROWS)
        spread = jax.shard_map(on_a_device, mesh=mesh, in_specs=(everywhere, divided, everywhere), out_specs=everywhere,
                               check_vma=False)
        grads, weight, metrics = spread(state.params, batch, state.step)
        return grads, (weight, metrics, state.model_state)

    return total


def _pairwise(x: jax.Array) -> jax.Array:
    """The sum over the first axis, neighbours first, whatever the compiler would prefer."""
    while x.shape[0] > 1:
        odd = x[x.shape[0] - x.shape[0] % 2 :]
        x = jnp.concatenate([x[0 : x.shape[0] - 1 : 2] + x[1::2], odd])
    return x[0]


def exact_cost(experiment: Experiment, parameters: int) -> str:
    """What --exact costs, for people. `parameters`: their number."""
    gathered = 4 * parameters * experiment.virtual_shards
    return (f"exact: {experiment.virtual_shards} virtual shards of {experiment.batch // experiment.virtual_shards} "
            f"records; {gathered / 1e9:.2f} GB of gradients on every device, gathered at every update")
