"""Commands on a finished or unfinished run folder: sample from it, evaluate it, predict with it."""

from __future__ import annotations

import csv
import functools
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from lab import report
from lab.data.pipeline import Arrays
from lab.errors import UserError
from lab.files import make_folder, no_links
from lab.fitted import data_of
from lab.restore import open_run
from lab.run_folder import check_same, write_json
from lab.tasks.adversarial import Adversarial, generate_images, judge_scores
from lab.tasks.base import Outcome

Run = Annotated[Path, tyro.conf.Positional]


def sample(run: Run, prompt: tuple[str, ...] = ("",), new_tokens: int = 200, temperature: float = 0.8,
           top_k: int | None = None, top_p: float = 1.0, greedy: bool = False, seed: int = 0, step: int | None = None,
           best: bool = False, experiment: Path | None = None) -> None:
    """Continues texts with a trained language model.

    Args:
      run: the run folder.
      prompt: one text or several to continue; empty starts a new text.
      new_tokens: how many tokens to add at most. Beyond the model's context a window slides along.
      temperature: divides the logits; small is safe, 1 is the model's own distribution.
      top_k: choose among the k most likely tokens only.
      top_p: choose among the smallest set of tokens with this probability only.
      greedy: always take the most likely token.
      seed: another seed, another text.
      step: sample from the checkpoint after this many updates; by default the latest.
      best: sample from the checkpoint with the best validation metric.
      experiment: the run's experiment file, if it defines classes of its own and was not run on this machine.
    """
    from lab.generate import sample_texts

    for name, value, good in (("new-tokens", new_tokens, new_tokens >= 1),
                              ("top-k", top_k, top_k is None or top_k >= 1),
                              ("temperature", temperature, temperature >= 0), ("top-p", top_p, 0 < top_p <= 1)):
        if not good:
            raise UserError(f"--{name} {value} is out of range.")
    found, program, state = open_run(run, step, best, file=experiment)
    data = data_of(run, found)
    if not hasattr(data, "decode"):
        raise UserError(f"{run} is not a language model: there is no text to sample.")
    prompt = prompt or ("",)
    compute = functools.partial(program.compute, state)
    texts = sample_texts(compute, found.model.context, data, list(prompt), seed=seed, new_tokens=new_tokens,
                         temperature=0.0 if greedy else temperature, top_k=top_k, top_p=top_p)
    for text, continuation in zip(prompt, texts, strict=True):
        print(text + continuation)
        if len(prompt) > 1:
            print("---")


def evaluate(run: Run, step: int | None = None, best: bool = False, records: int | None = None,
             split: Literal["test", "validation"] = "validation", judge: Path | None = None,
             experiment: Path | None = None) -> None:
    """Evaluates a checkpoint of a run, and writes the task's whole report to evaluation-<split>-<step>/ in its folder.

    Args:
      run: the run folder.
      step: the checkpoint after this many updates; by default the latest.
      best: the checkpoint with the best validation metric.
      records: use that many evenly spaced records; by default all.
      split: by default validation: the test split is evaluated once, when a run ends.
      judge: for a GAN, the run folder of a classifier of such images, which labels the samples.
      experiment: the run's experiment file, if it defines classes of its own and was not run on this machine.
    """
    no_links(run)
    found, program, state = open_run(run, step, best, file=experiment)
    data = found.data.load()
    check_same(run, found, data.fingerprint)
    if judge is not None and not isinstance(found.task, Adversarial):
        raise UserError("--judge is for a GAN: this run makes no images.")
    name = f"evaluation-{split}-{int(jax.device_get(state.step))}"
    folder = run / name
    outcome = report.evaluate(program, state, data, split, folder, records)
    size = len(outcome.records)
    print(f"{min(records or size, size):,} of {size:,} {split} records")
    row: dict[str, Any] = {"step": outcome.step, "split": split, **outcome.means}
    if judge is not None:
        row |= _judged(outcome, judge)
    for key, value in row.items():
        print(f"{key:>16}  {value if isinstance(value, str | int) else format(value, '.6f')}")
    make_folder(folder)
    for line in found.task.artifacts(outcome):
        print(line)
    write_json(run / f"{name}.json", row)
    print(f"Written to {run / name}.json and {folder}")


def _judged(outcome: Outcome, judge: Path, number: int = 2000) -> dict[str, Any]:
    """How a classifier of the same images labels `number` samples of a GAN."""
    _, program, state = open_run(judge)
    images = generate_images(outcome.compute, number, outcome.seed)
    wanted = program.spec["inputs"].shape[1:] if "inputs" in program.spec else None
    if wanted != images.shape[1:]:  # as stored: larger ones would lose their borders without a word
        raise UserError(f"{judge} cannot judge images of shape {images.shape[1:]}: its own inputs are {wanted}.")
    labelled = report.predict(program, state, Arrays({"inputs": images}))
    if "probabilities" not in labelled:
        raise UserError(f"{judge} is not a classifier.")
    return {f"judge_{name}": value for name, value in judge_scores(labelled["probabilities"]).items()}


def predict(run: Run, input: Path | None = None, output: Path = Path("predictions.csv"),
            split: Literal["test", "validation", "train"] | None = None, id: str | None = None, strict: bool = False,
            step: int | None = None, best: bool = False, experiment: Path | None = None) -> None:
    """Writes the predictions of a run as CSV: for new records, or for those of one of its own splits.

    Args:
      run: the run folder.
      input: a CSV with the columns of the training data, a text file with one message a line, an image, a folder of
        images: what the run's data reads.
      output: the CSV to write: a row per record with `record` (its number in the input, from 0), the prediction, for
        classes their probabilities p_<class>, and `truth` where the input has the target.
      split: predict this split of the run's own data instead of an input; for this the data must be there.
      id: a column of the input to keep beside the predictions.
      strict: a blank row or line is an error; by default it is skipped, and counted.
      step: the checkpoint after this many updates; by default the latest.
      best: the checkpoint with the best validation metric.
      experiment: the run's experiment file, if it defines classes of its own and was not run on this machine.
    """
    if (input is None) == (split is None):
        raise UserError("Say what to predict: --input FILE, or --split test for the run's own data, and not both.")
    if input is not None and not input.exists():
        raise UserError(f"{input} does not exist.")
    trained, program, state = open_run(run, step, best, file=experiment)
    if split is None:
        data = data_of(run, trained)
        found = data.read(input, id, strict)
    else:
        data = trained.data.load()
        check_same(run, trained, data.fingerprint)
        found = data.own(split, id)
    columns = trained.task.columns(report.predict(program, state, found.records), data)
    columns = {"record": found.numbers, **found.beside, **columns}
    columns |= {} if found.truth is None else {"truth": found.truth}
    try:
        with output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
    except OSError as e:
        raise UserError(f"--output {output} cannot be written: {e.strerror}.") from None
    print(f"{len(found.numbers):,} predictions are in {output}")
