"""`./launch.sh STUDY.py`, or `EXPERIMENT.py --vary FIELD=a,b`: arms x seeds, and a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.commands.arguments import choose_config, parse
from lab.errors import UserError
from lab.parallel.backend import start_jax

if TYPE_CHECKING:
    from lab.parallel.processes import Processes


def study(path: Path, module: Any, args: Sequence[str], processes: Processes) -> int:
    """STUDY.py, or EXPERIMENT.py --vary FIELD=a,b"""
    from lab.study.run.command import StudyOptions, make_study, run_study

    base, options, _ = parse(path, args, StudyOptions, module)
    written = choose_config(module, args)[0] if hasattr(module, "study") else None
    checked = make_study(written, base, options)
    if processes.count > 1:
        raise UserError("A study runs in one process at a time. Start the same command several times instead: they "
                        "share the cells among themselves, also on several machines with one disk.")
    start_jax()
    return run_study(checked, options, path, [str(path), *args])
