"""Commands on a finished or unfinished run folder: sample from it, evaluate it, predict with it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from lab import report
from lab.data.pipeline import Arrays
from lab.errors import UserError
from lab.files import make_folder, no_links
from lab.restore import open_run
from lab.run_folder import check_same, write_json
from lab.step import eval_params
from lab.tasks.adversarial import Adversarial, generate_images, judge_scores
from lab.tasks.base import Outcome

Run = Annotated[Path, tyro.conf.Positional]


def sample(run: Run, prompt: tuple[str, ...] = ("",), new_tokens: int = 200, temperature: float = 0.8,
           top_k: int | None = None, top_p: float = 1.0, greedy: bool = False, seed: int = 0, step: int | None = None,
           best: bool = False) -> None:
    """Continues texts with a trained language model.

    Args:
      run: the run folder.
      prompt: one text or several to continue; empty starts a new text.
      new_tokens: how many tokens to add at most; prompt and new tokens together fit the model's context.
      temperature: divides the logits; small is safe, 1 is the model's own distribution.
      top_k: choose among the k most likely tokens only.
      top_p: choose among the smallest set of tokens with this probability only.
      greedy: always take the most likely token.
      seed: another seed, another text.
      step: sample from the checkpoint after this many updates; by default the latest.
      best: sample from the checkpoint with the best validation metric.
    """
    from lab.generate import sample_texts

    for name, value, good in (("new-tokens", new_tokens, new_tokens >= 1),
                              ("top-k", top_k, top_k is None or top_k >= 1),
                              ("temperature", temperature, temperature >= 0), ("top-p", top_p, 0 < top_p <= 1)):
        if not good:
            raise UserError(f"--{name} {value} is out of range.")
    experiment, _, state = open_run(run, step, best)
    data = experiment.data.load()
    check_same(run, experiment, data.fingerprint)
    if not hasattr(data, "decode"):
        raise UserError(f"{run} is not a language model: there is no text to sample.")
    texts = sample_texts(experiment.model, eval_params(experiment, state), data, list(prompt), seed=seed,
                         new_tokens=new_tokens, temperature=0.0 if greedy else temperature, top_k=top_k, top_p=top_p)
    for text, continuation in zip(prompt, texts, strict=True):
        print(text + continuation)
        if len(prompt) > 1:
            print("---")


def evaluate(run: Run, step: int | None = None, best: bool = False, records: int | None = None,
             split: Literal["test", "validation"] | None = None, judge: Path | None = None) -> None:
    """Evaluates a checkpoint of a run, and writes the task's whole report to evaluation-<split>-<step>/ in its folder.

    Args:
      run: the run folder.
      step: the checkpoint after this many updates; by default the latest.
      best: the checkpoint with the best validation metric.
      records: use that many evenly spaced records; by default all.
      split: by default the test split, where the data has one.
      judge: for a GAN, the run folder of a classifier of such images, which labels the samples.
    """
    experiment, program, state = open_run(run, step, best)
    data = experiment.data.load()
    check_same(run, experiment, data.fingerprint)
    split = split or ("validation" if data.test is None else "test")
    if judge is not None and not isinstance(experiment.task, Adversarial):
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
    no_links(run)
    make_folder(folder)
    for line in experiment.task.artifacts(outcome):
        print(line)
    write_json(run / f"{name}.json", row)
    print(f"Written to {run / name}.json and {folder}")


def _judged(outcome: Outcome, judge: Path, number: int = 2000) -> dict[str, Any]:
    """How a classifier of the same images labels `number` samples of a GAN."""
    _, program, state = open_run(judge)
    images = generate_images(outcome.model, outcome.variables, number, outcome.seed)
    wanted = program.spec["inputs"].shape[1:] if "inputs" in program.spec else None
    if wanted != images.shape[1:]:  # as stored: larger ones would lose their borders without a word
        raise UserError(f"{judge} cannot judge images of shape {images.shape[1:]}: its own inputs are {wanted}.")
    labelled = report.predict(program, state, Arrays({"inputs": images}))
    if "probabilities" not in labelled:
        raise UserError(f"{judge} is not a classifier.")
    return {f"judge_{name}": value for name, value in judge_scores(labelled["probabilities"]).items()}


def predict(run: Run, input: Path, output: Path = Path("predictions.csv"), step: int | None = None,
            best: bool = False) -> None:
    """Writes the predictions of a run for new records as CSV.

    Args:
      run: the run folder.
      input: a CSV with the columns of the training data, a text file with one message a line, an image, a folder of
        images: what the run's data reads.
      output: the CSV to write: a row per record, with the prediction and, for classes, their probabilities.
      step: the checkpoint after this many updates; by default the latest.
      best: the checkpoint with the best validation metric.
    """
    if not input.exists():
        raise UserError(f"{input} does not exist.")
    experiment, program, state = open_run(run, step, best)
    data = experiment.data.load()
    check_same(run, experiment, data.fingerprint)
    names, records = data.read(input)
    columns = experiment.task.columns(report.predict(program, state, records), data)
    try:
        with output.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["record", *columns])
            writer.writerows(zip(names, *columns.values(), strict=True))
    except OSError as e:
        raise UserError(f"--output {output} cannot be written: {e.strerror}.") from None
    print(f"{len(names):,} predictions are in {output}")
