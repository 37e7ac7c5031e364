"""Prints a compiled plan as tables: memory, work per step, and alternatives that may fit."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lab.errors import UserError
from lab.experiment import Experiment
from lab.planning import hlo, topologies
from lab.planning.compiled import CompiledPlan, alternatives, compile_plan
from lab.planning.roofline import mfu
from lab.planning.topologies import GiB
from lab.train.console import human


def show(experiment: Experiment, machine: str) -> None:
    """Prints the requirements of the compiled training step and, if it does not fit, those of alternative settings.

    Raises:
      UserError: unknown machine, missing compiler, or a mesh or batch that does not fit the devices.
    """
    console = Console(highlight=False, soft_wrap=True)
    topology = topologies.find(machine)
    if topologies.can_compile(topology):
        console.print(f"Compiling the step for {topology.name}; this can take minutes ...")
    plan = compile_plan(experiment, topology)
    _memory(console, plan)
    _work(console, plan, experiment)
    if plan.fits is False:
        _changes(console, plan, experiment)


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GiB:.2f} GiB" if size >= GiB / 10 else f"{size / 2**20:.1f} MiB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.{1 if seconds >= 0.01 else 4}f} ms"


def _memory(console: Console, plan: CompiledPlan) -> None:
    memory, chip = plan.memory, plan.topology.chip
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items()) or "1 device"
    table = Table("", "", show_header=False, title=f"Memory of each of {plan.topology.devices} devices ({mesh})",
                  title_justify="left")
    table.add_row("parameters", _gib(memory.parameters))
    table.add_row("optimizer state", _gib(memory.optimizer))
    table.add_row("gradients (among the temporaries)", _gib(memory.parameters))
    if memory.temporaries is not None:
        table.add_row("batch, other state, padding", _gib(memory.other))
        table.add_row("results", _gib(memory.outputs))
        table.add_row("temporaries", _gib(memory.temporaries))
        table.add_row("program", _gib(memory.code))
    else:
        table.add_row("activations, at most", _gib(plan.activations))
    table.add_section()
    table.add_row("all", _gib(memory.total))
    table.add_row("available", _gib(chip.memory))
    console.print(table)
    if plan.fits is not None:
        share = f"{memory.total / chip.memory:.0%} of the memory"
        console.print(f"It fits: {share}." if plan.fits else f"It does NOT fit: {share}.")
        if memory.parameters + memory.optimizer > chip.memory and plan.mesh.get("fsdp", 1) == 1:
            console.print("Parameters and optimizer state alone are too large, since every device holds all of them; "
                          "--mesh.fsdp divides them.")
    elif plan.topology.chip.kind == "gpu":
        state = memory.parameters + memory.optimizer
        console.print(f"Not compiled, which needs JAX's packages for GPUs, but no GPU: "
                      f"LAB_ACCELERATOR=cuda12 ./launch.sh plan ... . Parameters, optimizer state and gradients take "
                      f"{(state + memory.parameters) / chip.memory:.0%} of the memory.")


def _work(console: Console, plan: CompiledPlan, experiment: Experiment) -> None:
    table = Table("", "", show_header=False, title="FLOPs/step", title_justify="left")
    table.add_row("FLOPs, all devices",
                  f"{human(plan.model_flops)}; {human(plan.flops)} with recomputation and the optimizer")
    if plan.traffic:
        table.add_row("memory traffic of a device", human(plan.traffic) + "B")
    for kind, (times, size, sent) in hlo.totals(plan.collectives).items():
        table.add_row(kind, f"{times:,} x, arrays of {human(size)}B, a device sends {human(sent)}B")
    if plan.compile_seconds is not None:
        table.add_row("compiled in", f"{plan.compile_seconds:.0f} s")
    console.print(table)
    bound = plan.roofline
    if bound is None:
        console.print("No bound on time: this chip's peaks are unknown.")
        return
    unit, units = experiment.data.unit, experiment.batch * experiment.data.units_per_record
    table = Table("", "", "MFU", f"{unit} a day", f"{experiment.steps:,} steps", title_justify="left",
                  title="Time/step: a lower bound, not a forecast")
    compiled = plan.memory.temporaries is not None
    for name in ("compute", "memory", "network") if compiled else ():
        table.add_row(name, _ms(getattr(bound, name)))
    table.add_section()
    whole = {f"fully overlapped ({bound.limit}-bound)": bound.seconds, "no overlap": bound.one_by_one}
    for name, seconds in whole.items() if compiled else [("compute", bound.compute)]:
        share = mfu(plan.topology, experiment.precision, plan.model_flops, seconds)
        table.add_row(name, _ms(seconds), f"{share:.0%}", human(86400 / seconds * units),
                      f"{human(seconds * experiment.steps / 3600)} h")
    console.print(table)


def _changes(console: Console, plan: CompiledPlan, experiment: Experiment) -> None:
    """Compiles the alternatives and prints one row for each as soon as it is done."""
    console.print("Changes that leave the mathematics alone, each compiled:")
    for flags, changed in alternatives(experiment, plan):
        try:
            other = compile_plan(changed, plan.topology)
        except UserError as e:
            console.print(f"  {flags}: {e}")
            continue
        time = f", at least {other.roofline.seconds:.3g} s/step" if other.fits and other.roofline else ""
        verdict = "fits" if other.fits else "does not fit"
        console.print(f"  {flags}: {_gib(other.memory.total)}, {verdict}{time} (compiled in "
                      f"{other.compile_seconds:.0f} s)")
