"""`./launch.sh EXPERIMENT.py`: train an experiment or resume its run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lab.commands.arguments import check_run_dir, find_experiment, parse
from lab.commands.same_everywhere import same_everywhere
from lab.errors import UserError
from lab.parallel.backend import start_jax
from lab.train.experiment_file import load

if TYPE_CHECKING:
    from lab.parallel.processes import Processes


@dataclass(frozen=True)
class TrainOptions:
    """Options of this command, in addition to the experiment's fields."""

    run_dir: str | None = None
    """Run folder; by default runs/<experiment>-<fingerprint>."""
    checkpoint_dir: str | None = None
    """Folder or bucket (gs://BUCKET/RUN, needs LAB_EXTRAS=bucket) for checkpoints; by default in the run folder. With a
    bucket, machines need no shared disk: only process 0 has a run folder."""
    accept: bool = False
    """Resume a run, or accept its result, although code or data changed since it began."""
    rerun: bool = False
    """Delete and rerun a run whose code or data changed since it began."""
    tensorboard: bool = False
    """Also write TensorBoard event files to tensorboard/ in the run folder (needs LAB_EXTRAS=tensorboard)."""
    dry_run: bool = False
    """Print the size and cost of the run, then exit."""
    full: bool = False
    """Run the real experiment, even without an accelerator."""
    local: bool = False
    """Run the small local config, even with an accelerator."""


def train(args: Sequence[str], processes: Processes) -> int:
    """EXPERIMENT.py [--flags]"""
    path = find_experiment(args[0])
    module = load(path)
    if hasattr(module, "study") or any(a.partition("=")[0] == "--vary" for a in args):
        from lab.commands.study import study

        return study(path, module, args[1:], processes)
    experiment, options, path = parse(path, args[1:], TrainOptions, module)
    check_run_dir(options.run_dir)
    if options.accept and options.rerun:
        raise UserError("--accept and --rerun exclude each other.")
    on_change = "accept" if options.accept else "rerun" if options.rerun else "refuse"
    start_jax()
    if options.dry_run:
        from lab.commands.dry_run import show

        show(experiment)
        return 0
    from lab.train import loop
    from lab.train.console import Screen
    from lab.train.description import finished, run_again
    from lab.train.progress import describe_result

    folder = Path(options.run_dir or f"runs/{path.stem}-{experiment.fingerprint()}")
    same_everywhere(processes, experiment, folder, options.checkpoint_dir, path)
    result = processes.share(finished(folder) if processes.first else None)
    with Screen(quiet=not processes.first) as screen:
        screen.info(f"Run folder: {folder}")
        if result is not None and not processes.share(processes.first and run_again(folder, experiment, on_change)):
            screen.info("Run already complete. Delete its folder, or change the seed, to run it again.")
            screen.info(describe_result(result))
            return 0
        return loop.train(experiment, folder, screen, path, tensorboard=options.tensorboard, processes=processes,
                          checkpoints=options.checkpoint_dir, on_change=on_change)
