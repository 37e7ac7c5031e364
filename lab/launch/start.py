"""Launches lab commands on SLURM, ssh hosts, Cloud TPU or SkyPilot. Standard library only; does not import JAX.

lab/bootstrap.py calls `main` if the first argument is an option from options.py, so that a login node or laptop needs
no Python environment. The engines are existing tools; these modules only write their inputs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from lab.errors import UserError, check_words
from lab.launch.job import Job, make_job
from lab.launch.options import ENGINES, HELP, Options, parse


def main(words: Sequence[str]) -> int:
    """Runs the selected engine; returns the exit status."""
    try:
        check_words(words)
        options, command = parse(words)
        if options.help:
            print(HELP, end="")
            return 0
        engine = next(flag for flag in ENGINES if getattr(options, flag[2:]) is not None)
        return _engine(engine)(options, make_job(command, engine))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _engine(flag: str) -> Callable[[Options, Job], int]:
    if flag == "--slurm":
        from lab.launch.slurm import launch
    elif flag == "--hosts":
        from lab.launch.hosts import launch
    elif flag == "--tpu":
        from lab.launch.tpu import launch
    else:
        from lab.launch.sky import launch
    return launch
