"""`./launch.sh predict RUN --input FILE`: predictions for new records, as CSV."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import tyro

from lab.commands.arguments import call
from lab.commands.location import open_location
from lab.errors import UserError
from lab.train import evaluation
from lab.train.description import check_same
from lab.train.fitted import data_of
from lab.train.restore import open_run
from lab.weights.location import is_location


def main(args: Sequence[str]) -> int:
    """RUN --input FILE, or LOCATION --experiment FILE --input FILE"""
    return call("predict", predict, args)


def predict(
    run: Annotated[Path, tyro.conf.Positional],
    input: Path | None = None,
    output: Path = Path("predictions.csv"),
    split: Literal["test", "validation", "train"] | None = None,
    id: str | None = None,
    strict: bool = False,
    step: int | None = None,
    best: bool = False,
    experiment: Path | None = None,
) -> None:
    """Writes the predictions of a run as CSV, for new records or for a split of the run's data.

    Or those of pretrained weights, with the data and the task of an experiment: ./launch.sh predict hf:ORG/NAME
    --experiment FILE --input FILE.

    Args:
      run: the run folder; or weights: a folder with config.json, a .gguf file, hf:ORG/NAME or package:NAME/PATH.
      input: new records in a format that the run's data reads: a CSV with the columns of the training data, a text
        file with one message or source per line, a .jsonl file with their key, an image, or a folder of images.
      output: the CSV to write, or - for standard output. One row per record: `record` (its number in the input, from
        0), the prediction, class probabilities p_<class> for classifiers, and `truth` if the input has the target.
      split: predict this split of the run's data instead of an input; requires the data. Records are numbered as in
        their file or folder.
      id: a column of the input to copy to the output; as input_<column> if the output has its own of that name.
      strict: treat a blank row or line as an error; by default it is skipped and counted.
      step: use the checkpoint of this step; by default the latest.
      best: use the checkpoint with the best validation metric.
      experiment: for weights: the experiment file that has the data and the task. For a run: its experiment file,
        needed if it defines classes and was not run on this machine.
    """
    if (input is None) == (split is None):
        raise UserError("Say what to predict: --input FILE, or --split test for the run's own data, and not both.")
    if input is not None and not input.exists():
        raise UserError(f"{input} does not exist.")
    if is_location(str(run)):
        trained, data, program, state = open_location(run, experiment, step=step, best=best)
    else:
        trained, program, state = open_run(run, step, best, file=experiment)
        data = data_of(run, trained) if split is None else trained.data.load()
        check_same(run, trained, data.fingerprint)
    found = data.read(input, id, strict) if split is None else data.own(split, id)
    columns = trained.task.columns(evaluation.predict(program, state, found.records), data)
    beside = {f"input_{name}" if name in ("record", "truth", *columns) else name: cells
              for name, cells in found.beside.items()}
    columns = {"record": found.numbers, **beside, **columns}
    columns |= {} if found.truth is None else {"truth": found.truth}
    if output == Path("-"):
        _write(sys.stdout, columns)
        return
    try:
        with output.open("w", newline="", encoding="utf-8") as file:
            _write(file, columns)
    except OSError as e:
        raise UserError(f"--output {output} cannot be written: {e.strerror}.") from None
    print(f"{len(found.numbers):,} predictions are in {output}")


def _write(file: TextIO, columns: Mapping[str, Sequence[Any]]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
