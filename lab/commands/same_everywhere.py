"""Several processes must have been started for the same run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lab.configuration.values import flat, to_json
from lab.experiment import Experiment

if TYPE_CHECKING:
    from lab.parallel.processes import Processes


def same_everywhere(processes: Processes, experiment: Experiment, folder: Path, checkpoints: str | None,
                    file: Path) -> None:
    """Barrier that checks that all processes have the same experiment, run folder and code.

    Raises:
      UserError: this process differs from process 0.
    """
    if processes.count > 1:
        from lab.parallel.processes import code_version
        from lab.train.beside import versions

        flags = {f"--{name}": value for name, value in flat(to_json(experiment)).items()}
        processes.check_same(flags, "Start all processes with the same flags.")
        folders = {"--run-dir": str(folder), "--checkpoint-dir": checkpoints}
        processes.check_same(folders, "Start all processes with the same flags.")
        processes.check_same(code_version(file) | versions(file), "Bring all machines to the same code and packages.")
