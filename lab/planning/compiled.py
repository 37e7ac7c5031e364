"""Compiles an experiment for AOT topology devices: memory, collectives, and a lower bound on the step time."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax

from lab.errors import UserError
from lab.experiment import Experiment
from lab.parallel.sharding import bytes_per_device
from lab.planning import hlo, topologies
from lab.planning.roofline import Roofline, roofline
from lab.planning.topologies import GiB, Topology
from lab.train.cost import cost_of, step_flops
from lab.train.program import Program

UNITS = {"K": 2**10, "M": 2**20, "G": GiB, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device during a step. None: unknown, because the compiler ran out of memory or did not run."""

    parameters: int
    optimizer: int
    other: int | None
    """Batch, mutable collections, step, and the compiler's padding of small arrays."""
    outputs: int | None
    """Outputs that do not alias a donated argument."""
    temporaries: int | None
    """Activations, gradients, gathered parameters, workspaces."""
    code: int | None
    total: int | None
    """None if not compiled."""


@dataclass(frozen=True)
class CompiledPlan:
    """The compiled step of one experiment on one topology."""

    topology: Topology
    mesh: dict[str, int]
    """Axis -> devices."""
    memory: Memory
    flops: int
    """Matmul FLOPs per step over all devices, including recomputation."""
    model_flops: int
    """The same without recomputation, for MFU."""
    activations: int
    """Bytes of residuals per device for the backward pass of a microbatch, before compiler fusion."""
    collectives: list[hlo.Collective]
    traffic: int
    """Bytes read and written in each device's memory per step."""
    roofline: Roofline | None
    compile_seconds: float | None

    @property
    def fits(self) -> bool | None:
        """Whether the step fits the device's memory; None if either size is unknown."""
        if self.memory.total is None or self.topology.chip.memory is None:
            return None
        return self.memory.total <= self.topology.chip.memory


def compile_plan(experiment: Experiment, topology: Topology) -> CompiledPlan:
    """Compiles the training step for `topology`. Without JAX's GPU packages, a GPU step is only traced.

    Memory excludes the records kept by `data_on_device`.

    Raises:
      UserError: the mesh or batch does not fit the devices, or the compiler is not installed.
    """
    experiment = replace(experiment, steps_per_call=1, deterministic=False)  # compiling deterministic ops needs a GPU
    devices = topologies.devices(topology)
    program = Program(experiment, devices=devices)
    state, placed, cost = program.abstract, program.shardings, cost_of(experiment)
    memory = Memory(bytes_per_device(state.params, placed.params),
                    bytes_per_device(state.opt_state, placed.opt_state), *[None] * 5)
    collectives, traffic, seconds, flops = [], 0, None, step_flops(experiment)
    if topologies.can_compile(topology):
        lowered, start = program.lower(), time.monotonic()
        try:
            compiled = lowered.compile(program.options)
        except jax.errors.JaxRuntimeError as e:
            memory = replace(memory, total=needed(str(e)))
        else:
            memory = _measured(compiled, memory)
            parsed = hlo.HloModule(compiled.as_text())
            collectives, traffic = parsed.collectives(), parsed.traffic()
        seconds = time.monotonic() - start
    sent = sum(c.sent for c in collectives)
    bound = roofline(topology, experiment.precision, flops, traffic, sent)
    mesh = {name: size for name, size in program.mesh.shape.items() if size > 1}
    return CompiledPlan(topology, mesh, memory, flops, cost.flops, cost.activations // len(devices), collectives,
                        traffic, bound, seconds)


def _measured(compiled: jax.stages.Compiled, memory: Memory) -> Memory:
    found = compiled.memory_analysis()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    code, temporaries = found.generated_code_size_in_bytes, found.temp_size_in_bytes
    return replace(memory, other=found.argument_size_in_bytes - memory.parameters - memory.optimizer, outputs=outputs,
                   temporaries=temporaries, code=code,
                   total=found.argument_size_in_bytes + outputs + temporaries + code)


def needed(message: str) -> int:
    """Bytes that a program needs, parsed from the compiler's out-of-memory error.

    Raises:
      UserError: compilation failed for another reason.
    """
    found = re.search(r"(?:temporaries \(|[Uu]sed )([\d.]+)([KMGT])", message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        raise UserError(f"The compiler cannot make this program: {message.splitlines()[0][:300]}")
    return round(float(found[1]) * UNITS[found[2]])


def alternatives(experiment: Experiment, plan: CompiledPlan) -> Iterator[tuple[str, Experiment]]:
    """Changes that may reduce memory without changing results: (flags, changed experiment). The last combines all."""
    changes: list[tuple[str, dict[str, Any]]] = []
    mesh, sizes, devices = experiment.mesh, plan.mesh, plan.topology.devices
    if sizes.get("data", 1) > 1:
        fsdp = sizes.get("fsdp", 1) * sizes["data"]
        flags = f"--mesh.fsdp {fsdp}" + ("" if mesh.data == -1 else " --mesh.data 1")
        changes.append((flags, {"mesh": replace(mesh, data=1, fsdp=fsdp)}))
    if getattr(experiment.model, "remat", None) == "none":
        changes.append(("--model.remat blocks", {"model": experiment.model.clone(remat="blocks")}))
    rows = devices // math.prod(sizes.get(axis, 1) for axis in ("tensor", "sequence"))
    more = [n for n in range(experiment.grad_accum_steps + 1, experiment.batch // rows + 1)
            if experiment.batch % (n * rows) == 0]
    if more:
        wanted = experiment.grad_accum_steps * _shrink(plan)
        number = next((n for n in more if n >= wanted), more[-1])
        changes.append((f"--grad-accum-steps {number}", {"grad_accum_steps": number}))
    for flags, fields in changes:
        yield flags, replace(experiment, **fields)
    if len(changes) > 1:
        together = {name: value for _, fields in changes for name, value in fields.items()}
        yield " ".join(flags for flags, _ in changes), replace(experiment, **together)


def _shrink(plan: CompiledPlan) -> float:
    """The factor by which the temporaries must shrink to fit 90% of the memory."""
    state = plan.memory.parameters + plan.memory.optimizer
    free = 0.9 * plan.topology.chip.memory - state - plan.memory.parameters  # gradients do not shrink
    return (plan.memory.total - state) / free if free > 0 else math.inf
