"""The beginning of a run: the state and the metric rows that it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab.adapt.lora import describe
from lab.errors import UserError
from lab.experiment import Experiment
from lab.train import metrics
from lab.train.evaluation import frozen_paths
from lab.train.json_files import write_json
from lab.train.records_on_device import exchanged
from lab.train.reference import keep_reference, with_reference
from lab.train.restore import initial_arrays, with_base
from lab.train.step import State
from lab.train.teacher import check_teacher


def first_state(run: Any) -> tuple[State, int]:
    """(state, step at which a new run begins) of a `TrainingRun` (loop.py): its latest checkpoint, else the state that
    arms of a study share, else pretrained and random parameters. The step is above 0 when continuing another run.

    Raises:
      UserError: a damaged checkpoint, or pretrained parameters that do not fit.
    """
    state = run.checkpoints.restore(run.program.abstract)
    if state is not None:
        run.checkpoints.discard_after(int(state.step))
        run.screen.info(f"Resuming from step {int(state.step)} of {run.experiment.steps}.")
        return with_base(run.experiment, run.program, state, run.data), 0
    if state := run.shared.begin(run.program, run.folder):
        return state, 0
    if metrics.read_rows(run.folder / "metrics.jsonl"):
        run.screen.info(f"There is no checkpoint in {run.folder} yet: starting again from step 0.")
    arrays, report = initial_arrays(run.experiment.init_from, run.program.abstract, run.data)
    _say_pretrained(run, report)
    state = run.program.init(arrays)
    if (begun := int(state.step)) >= run.experiment.steps:
        raise UserError(f"--steps {run.experiment.steps} counts all steps, and {report['from']} made {begun} of them: "
                        f"give more.")
    return state, begun


def add_reference(run: Any) -> None:
    """Gives the records and the program of a `TrainingRun` what its task needs of the model as the run begins, if
    anything, and keeps it in the run folder: see reference.py and teacher.py."""
    check_teacher(run.program.experiment, run.data, run.folder, run.stop.processes)
    if not getattr(run.experiment.task, "reference", None):
        return
    run.screen.progress("Computing the reference ...")
    state, processes = run.state if run.step == run.begun_at else None, run.stop.processes
    run.data = with_reference(run.experiment, run.program, run.data, run.folder, state, processes)
    run.program = exchanged(run.program, run.data.train)
    if processes.first:
        keep_reference(run.experiment, run.data, run.folder)


def _describe(report: dict[str, Any], frozen: list[str], file: Path) -> str:
    """A summary of the report in a line or two. `file` has the full lists."""
    lines = [f"Frozen: {_shortly(frozen)}. The whole list is in {file}."]
    if report:
        lines.insert(0, f"Parameters from {report['from']}: {len(report['loaded'])} loaded "
                        f"({_shortly(report['loaded'])}); at random: {_shortly(report['random'])}; not taken: "
                        f"{_shortly(report['not taken'])}.")
    return "\n".join(lines)


def _shortly(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "") if paths else "nothing"


def _say_pretrained(run: Any, report: dict[str, Any]) -> None:
    if run.experiment.adapt is not None:
        run.screen.info(describe(run.program.abstract))
    frozen = frozen_paths(run.experiment, run.program.abstract.params)
    if report or frozen:
        write_json(run.folder / "pretrained.json", {**report, "frozen": frozen})
        run.screen.info(_describe(report, frozen, run.folder / "pretrained.json"))


def open_rows(run: Any) -> metrics.Rows:
    """The metric rows so far. Other processes get only process 0's evaluation rows, to make the same decisions."""
    processes, path = run.stop.processes, run.folder / "metrics.jsonl"
    saved = run.checkpoints.beside(run.step) if run.step in run.checkpoints.steps() else None
    rows = metrics.Rows(path, run.step, saved if processes.first else None)
    if run.experiment.private is not None:
        run.screen.info(run.experiment.private.describe(run.experiment))
        rows.beside = lambda step: {"epsilon": run.experiment.private.epsilon(step)}
    evaluations = processes.share([row for row in rows.rows if row["split"] != "train"])
    if not processes.first:
        rows.rows = evaluations
    if run.step and not rows.rows:  # a resumed run has at least its first evaluation
        run.screen.info("The run folder is new: metrics, the best state and patience count from here.")
    return rows


def last_step(experiment: Experiment, stride: int) -> int:
    """The step at which a run ends: that of the experiment, or the last within its privacy budget. `stride`: the steps
    of a call, which divide it."""
    return experiment.private.last_step(experiment.steps, stride) if experiment.private else experiment.steps


def open_tensorboard(folder: Path) -> Any:
    """A TensorBoard writer in the run folder. UserError without tensorboardX."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs tensorboardX: LAB_EXTRAS=tensorboard ./launch.sh ...") from None
    return SummaryWriter(str(folder / "tensorboard"))
