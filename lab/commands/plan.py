"""`./launch.sh plan EXPERIMENT.py --on v5e-256`: memory and a time bound for a run on another machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from lab.commands.arguments import find_experiment, parse, with_example
from lab.errors import UserError
from lab.planning import topologies


@dataclass(frozen=True)
class PlanOptions:
    """Options of this command, in addition to the experiment's fields."""

    on: str = ""
    """The machine, such as cpu:8, v5e-256, v4-32, v5p-64, v6e-8 or h100:8."""
    full: bool = False
    """Plan the real experiment (the default)."""
    local: bool = False
    """Plan the small local config."""


def main(args: Sequence[str]) -> int:
    """EXPERIMENT.py --on v5e-256"""
    args = with_example(args)
    if not args or args[0].startswith("-"):
        raise UserError("Say what to plan: ./launch.sh plan experiments/gpt_small.py --on v5e-8")
    where = next((b for a, b in zip(args, [*args[1:], ""], strict=True) if a == "--on"), "")
    where = next((a.removeprefix("--on=") for a in args if a.startswith("--on=")), where)
    if not where and not {"-h", "--help"} & set(args):
        raise UserError(f"Say where it would run: --on NAME, which is one of {topologies.names()}.")
    os.environ.update(topologies.environment(topologies.find(where or "cpu:1")))  # before JAX starts
    real = args if {"--full", "--local"} & set(args) else [*args, "--full"]
    experiment, options, _ = parse(find_experiment(args[0]), real[1:], PlanOptions, verb="plan")
    from lab.planning.tables import show
    from lab.train.teacher import with_teacher

    show(with_teacher(experiment), options.on)
    return 0
