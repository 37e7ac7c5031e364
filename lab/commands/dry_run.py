"""``--dry-run``: prints the size and cost of a run without computing anything."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lab.adapt.lora import describe as adapters
from lab.adapt.lora import every
from lab.errors import Absent
from lab.experiment import Experiment
from lab.parallel.sharding import AXES, describe_state, mesh_sizes, state_shardings
from lab.train.check import LOOKS, load_data, model_outputs, try_out
from lab.train.console import facts, human
from lab.train.cost import Cost, cost_of, optimizer_flops, size_of
from lab.train.shapes import batch_spec, taught_of
from lab.train.step import State
from lab.train.teacher import with_teacher

SMALL, QUICK = 10**7, 10**10  # parameters, and FLOPs of a few records, of models that are tried out
RECORDS = [f"validation {unit}" for unit in (
    "records", "rows", "windows", "pairs", "images", "messages", "images, as stored")]


def show(experiment: Experiment) -> None:
    """Prints parameters per module, FLOPs, tokens and bytes. Reads data only if that is fast. Checks that model, task
    and data fit, as before a run, and computes the loss of a few records if that is quick.
    """
    console = Console(highlight=False)
    model_outputs(experiment)
    data = None
    with contextlib.suppress(Absent):  # reported below
        if not getattr(experiment.data, "slow", False):
            data = load_data(experiment)
    experiment = with_teacher(experiment)
    cost = cost_of(experiment)
    if data and cost.parameters < SMALL and cost.flops * LOOKS < QUICK * experiment.batch:
        try_out(experiment, data)
    units = experiment.batch * experiment.data.units_per_record

    modules = Table("module", "parameters", "arrays", title="Parameters", title_justify="left")
    for name, size, arrays in cost.modules(2):
        modules.add_row(name, f"{size:,}", str(arrays))
    modules.add_section()
    modules.add_row("all", f"{cost.parameters:,}", str(len(jax.tree.leaves(every(cost.state)))))
    console.print(modules)
    for line in _parts(experiment, cost.state):
        console.print(line, soft_wrap=True)

    unit = experiment.data.unit
    rule = 6 * cost.parameters * units
    costs = Table("", "", show_header=False, title="Cost", title_justify="left")
    costs.add_row("steps", f"{experiment.steps:,}")
    costs.add_row(f"{unit}/step", f"{units:,} ({experiment.batch} records x {experiment.data.units_per_record})")
    costs.add_row(f"total {unit}", human(units * experiment.steps))
    beside = f" ({cost.flops / rule:.2f} times the estimate 6 x parameters x tokens)" if unit == "tokens" else ""
    costs.add_row("FLOPs/step", human(cost.flops) + beside)
    optimizer = optimizer_flops(experiment, cost.state)
    if optimizer:
        costs.add_row("and of the optimizer", f"{human(optimizer)} ({optimizer / max(cost.flops, 1):+.0%})")
    costs.add_row("total FLOPs", human((cost.flops + optimizer) * experiment.steps))
    console.print(costs)

    memory = Table("", "bytes", show_header=False, title="Memory (all devices together)", title_justify="left")
    memory.add_row("parameters", human(size_of(cost.state.params)) + "B")
    for name, frozen in _frozen(experiment, cost.state).items():
        memory.add_row(name, human(size_of(frozen)) + "B")
    memory.add_row("optimizer state", human(size_of(cost.state.opt_state)) + "B")
    memory.add_row("gradients", human(size_of(cost.state.params)) + "B")
    memory.add_row("peak activations", human(cost.activations) + "B")
    memory.add_row("one batch", human(size_of(batch_spec(experiment))) + "B")
    console.print(memory)
    _placement(console, experiment, cost.state)
    try:
        described = experiment.data.describe() if hasattr(experiment.data, "describe") else {}
    except Absent as e:
        described = {"data": str(e)}
    example = described.pop("example", None)
    console.print(_evaluation(experiment, cost, described), soft_wrap=True)
    console.print("Data", style="italic")
    for line in facts(described):
        console.print(line, soft_wrap=True)
    if example:
        _example(console, example)


def _frozen(experiment: Experiment, state: State) -> dict[str, Any]:
    """What takes memory and is not trained: name -> (abstract) arrays."""
    found = {f"frozen base, {experiment.adapt.base_dtype}": state.base} if experiment.adapt is not None else {}
    return found | ({} if (taught := taught_of(experiment)) is None else {"teacher": taught})


def _parts(experiment: Experiment, state: State) -> Iterator[str]:
    """What the parts of an experiment that most have not say of themselves."""
    if experiment.adapt is not None:
        yield adapters(state)
    if experiment.private is not None:
        yield experiment.private.describe(experiment)


def _example(console: Console, pieces: Sequence[tuple[str, bool]]) -> None:
    """Prints the text of a record; what is learned is green, or in brackets where there are no colours."""
    colours = console.is_terminal and not console.no_color
    console.print(f"One example: what is {'green' if colours else 'in [brackets]'} is learned", style="italic",
                  markup=False)
    shown = Text()
    for text, learned in pieces:
        shown.append(text if colours or not learned else f"[{text}]", style="bold green" if learned else "")
    for line in shown.split(allow_blank=True):
        console.print(Text("  | ") + line, soft_wrap=True)


def _evaluation(experiment: Experiment, cost: Cost, described: Mapping[str, Any]) -> str:
    """The cost of all evaluations relative to training. Evaluating a record takes a forward pass, a third of the FLOPs
    of training on it."""
    settings = experiment.evaluate
    times = 2 + (experiment.steps - 1) // settings.every if settings.every else 2
    counts = [count for name, count in described.items() if name in RECORDS and isinstance(count, int)]
    records = min((n for n in (*counts[:1], settings.records) if n is not None), default=None)
    if records is None:
        return (f"Evaluation: {times} times on the whole validation split (size unknown until the data is loaded); "
                f"1,000 records cost as much as {1000 / 3 / experiment.batch:.3g} steps.")
    steps = times * records / 3 / experiment.batch
    share = steps / experiment.steps
    advice = " Less: --evaluate.records N, or a larger --evaluate.every." if share > 0.25 else ""
    return (f"Evaluation: {times} times {records:,} records of the validation split, "
            f"{human(cost.flops * steps)} FLOPs, {share:.0%} of those of training.{advice}")


def _placement(console: Console, experiment: Experiment, state: State) -> None:
    """Prints the state's shardings, for this machine's devices if the mesh fits them, else for as many as it needs."""
    devices = jax.device_count()
    needed = math.prod(max(getattr(experiment.mesh, axis), 1) for axis in AXES)
    if devices < needed:
        console.print(f"The mesh needs {needed} devices; this machine has {devices}.")
        devices = needed
    sizes = mesh_sizes(experiment.mesh, devices)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), AXES)
    shardings = state_shardings(state, mesh, experiment.mesh.rules)
    spread = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"
    rows = describe_state(state, shardings)
    arrays, size = str(sum(row[3] for row in rows)), human(sum(row[4] for row in rows)) + "B"
    title = f"The state on each device ({spread})"
    if all(row[2] == "replicated" for row in rows):
        console.print(f"{title}: {arrays} arrays, {size}, all replicated.", soft_wrap=True)
    else:
        table = Table(title=title, title_justify="left")
        table.add_column("parameter, with moments", overflow="fold")  # takes the rest of 80 columns
        for column in ("shape", "sharded over", "arrays", "bytes"):
            table.add_column(column, no_wrap=True)
        for path, shape, axes, count, own in rows:
            table.add_row(path, " x ".join(map(str, shape)), axes, str(count), human(own) + "B")
        table.add_section()
        table.add_row("all", "", "", arrays, size)
        console.print(table)
    if experiment.exact:
        from lab.train.gradients import exact_cost

        console.print(exact_cost(experiment, sum(x.size for x in jax.tree.leaves(state.params))))
