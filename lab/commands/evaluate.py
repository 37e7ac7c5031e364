"""`./launch.sh evaluate RUN`: evaluate a checkpoint, or somebody else's weights, and write the task's full report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from lab.commands.arguments import call
from lab.commands.evaluate_text import HarnessFlags, check_unused, evaluate_text
from lab.commands.location import name_of, open_location
from lab.data.pipeline import Arrays
from lab.errors import UserError, forgiving
from lab.files import make_folder, no_links
from lab.tasks.adversarial import Adversarial, generate_images, judge_scores
from lab.tasks.base import EvalResult
from lab.train import evaluation
from lab.train.description import check_same, read_folder
from lab.train.json_files import write_json
from lab.train.program import Program
from lab.train.reference import with_reference
from lab.train.restore import open_run
from lab.train.step import State
from lab.train.teacher import check_teacher, with_teacher
from lab.weights.location import is_location

log = logging.getLogger(__name__)


def main(args: Sequence[str]) -> int:
    """RUN [--step N], or LOCATION --experiment FILE, or either with --tasks NAMES or --text FILE"""
    return call("evaluate", evaluate, args)


def evaluate(
    run: Annotated[Path, tyro.conf.Positional],
    step: int | None = None,
    best: bool = False,
    records: int | None = None,
    split: Literal["test", "validation"] = "validation",
    judge: Path | None = None,
    experiment: Path | None = None,
    output: Path | None = None,
    more: Annotated[HarnessFlags, tyro.conf.arg(name="")] = HarnessFlags(),  # noqa: B008 (frozen)
) -> None:
    """Evaluates a checkpoint of a run and writes the task's full report to evaluation-<split>-<step>/ in its folder.

    Or evaluates pretrained weights on the data and the task of an experiment: ./launch.sh evaluate hf:ORG/NAME
    --experiment FILE.

    A language model, of a run or a location, also by --tasks or --text: see lab/harness/README.md.

    Args:
      run: the run folder; or weights: a folder with config.json, a .gguf file, hf:ORG/NAME or package:NAME/PATH.
      step: use the checkpoint of this step; by default the latest.
      best: use the checkpoint with the best validation metric.
      records: use this many evenly spaced records; by default all.
      split: by default validation. Training evaluates the test split once, at the end of a run.
      judge: for a GAN: the run folder of a classifier of such images, which labels the samples.
      experiment: for weights: the experiment file that has the data and the task. For a run: its experiment file,
        needed if it defines classes and was not run on this machine.
      output: the folder to write to, for a run by default its own, for weights evaluation-<name> in this folder.
    """
    if more.tasks is not None or more.text is not None:
        others = {"--experiment": experiment if is_location(str(run)) else None, "--records": records,
                  "--judge": judge, "--split": None if split == "validation" else split}
        return evaluate_text(run, step, best, experiment, output, more, others)
    check_unused(more)
    found, data, program, state, place = opened(run, step, best, experiment)
    place = output or place
    if judge is not None and not isinstance(found.task, Adversarial):
        raise UserError("--judge is for a GAN: this run makes no images.")
    name = f"evaluation-{split}-{int(jax.device_get(state.step))}"
    folder = place / name
    outcome = evaluation.evaluate(program, state, data, split, folder, records)
    size = len(outcome.records)
    print(f"{min(records or size, size):,} of {size:,} {split} records")
    row: dict[str, Any] = {"step": outcome.step, "split": split, **outcome.means}
    if judge is not None:
        row |= _judged(outcome, judge)
    for key, value in row.items():
        if "/" in key:  # of a group: in the table of `artifacts`
            continue
        print(f"{key:>16}  {value if isinstance(value, str | int) else format(value, '.6f')}")
    make_folder(folder)
    write_json(place / f"{name}.json", row)  # first, so that no later failure loses the numbers
    with forgiving("The pictures and samples"):
        for line in found.task.artifacts(outcome):
            print(line)
    print(f"Written to {place / name}.json and {folder}")


def opened(run: Path, step: int | None, best: bool, experiment: Path | None) -> tuple[Any, Any, Program, State, Path]:
    """(experiment, data, program, state, the folder to write to) of a run or of pretrained weights."""
    if is_location(str(run)):
        found, data, program, state = open_location(run, experiment, step=step, best=best)
        if getattr(found.task, "reference", None):
            raise UserError(f"{type(found.task).__name__} compares a model with what it was as its run began, and "
                            f"{run} are weights without a run: evaluate a run folder.")
        return found, data, program, state, Path(f"evaluation-{name_of(run)}")
    no_links(run)
    found = read_folder(run, experiment)
    data = found.data.load()
    check_same(run, found, data.fingerprint)
    try:
        taught = with_teacher(found)
        check_teacher(taught, data, run)
        found = taught
    except UserError as e:
        log.warning("note: metrics of the distillation are left out. %s", e)
    found, program, state = open_run(run, step, best, found)
    return found, with_reference(found, program, data, run), program, state, run


def _judged(outcome: EvalResult, judge: Path, number: int = 2000) -> dict[str, Any]:
    """Label statistics of `number` samples of a GAN, by a classifier of the same images."""
    _, program, state = open_run(judge)
    images = generate_images(outcome.compute, number, outcome.seed)
    wanted = program.spec["inputs"].shape[1:] if "inputs" in program.spec else None
    if wanted != images.shape[1:]:  # as stored: larger images would be cropped silently
        raise UserError(f"{judge} cannot judge images of shape {images.shape[1:]}: its own inputs are {wanted}.")
    labelled = evaluation.predict(program, state, Arrays({"inputs": images}))
    if "probabilities" not in labelled:
        raise UserError(f"{judge} is not a classifier.")
    return {f"judge_{name}": value for name, value in judge_scores(labelled["probabilities"]).items()}
