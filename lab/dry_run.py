"""``--dry-run``: what a run would do and cost, printed before anything is computed."""

from __future__ import annotations

import jax
from rich.console import Console
from rich.table import Table

from lab.console import facts, human
from lab.errors import UserError
from lab.experiment import Experiment
from lab.plan import make_plan, size_of
from lab.program import batch_spec


def show(experiment: Experiment) -> None:
    """Prints parameters per module, FLOPs, tokens and bytes. Reads no data and runs nothing on a device."""
    console = Console(highlight=False)
    plan = make_plan(experiment)
    units = experiment.batch * experiment.data.units_per_record

    modules = Table("module", "parameters", "arrays", title="Parameters", title_justify="left")
    for name, size, arrays in plan.modules(2):
        modules.add_row(name, f"{size:,}", str(arrays))
    modules.add_section()
    modules.add_row("all", f"{plan.parameters:,}", str(len(jax.tree.leaves(plan.state.params))))
    console.print(modules)

    unit = experiment.data.unit
    rule = 6 * plan.parameters * units
    cost = Table("", "", show_header=False, title="Cost", title_justify="left")
    cost.add_row("updates", f"{experiment.steps:,}")
    cost.add_row(f"{unit} an update", f"{units:,} ({experiment.batch} records x {experiment.data.units_per_record})")
    cost.add_row(f"{unit} in all", human(units * experiment.steps))
    beside = f" ({plan.flops / rule:.2f} x the rule 6 x parameters x tokens)" if unit == "tokens" else ""
    cost.add_row("FLOPs an update", human(plan.flops) + beside)
    cost.add_row("FLOPs in all", human(plan.flops * experiment.steps))
    console.print(cost)

    memory = Table("", "bytes", show_header=False, title="Memory (all devices together)", title_justify="left")
    memory.add_row("parameters", human(size_of(plan.state.params)) + "B")
    memory.add_row("optimizer state", human(size_of(plan.state.opt_state)) + "B")
    memory.add_row("gradients", human(size_of(plan.state.params)) + "B")
    memory.add_row("kept for the backward pass, at most", human(plan.activations) + "B")
    memory.add_row("one batch", human(size_of(batch_spec(experiment))) + "B")
    console.print(memory)
    try:
        described = experiment.data.describe()
    except UserError as e:
        described = {"data": str(e)}
    console.print("Data", style="italic")
    for line in facts(described):
        console.print(line, soft_wrap=True)
