"""Start a command of lab elsewhere: SLURM, ssh hosts, Cloud TPU, SkyPilot. Standard library only: no JAX is imported.

lab/bootstrap.py hands over to `main` when the first word is one of the options in options.py, so that a login node or
a laptop needs no environment of its own. Each engine is an existing one; these files only write what it is told.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from lab.errors import UserError, check_words
from lab.launch.job import Job, make_job
from lab.launch.options import ENGINES, HELP, Options, parse


def main(words: Sequence[str]) -> int:
    """Runs the engine that the options name; returns the exit status."""
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
