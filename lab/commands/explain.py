"""`./launch.sh explain RUN|LOCATION --input FILE|TEXT`: why the model answers as it does, as a page and as numbers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from lab.commands.arguments import call
from lab.commands.explain_models import subject_of
from lab.commands.location import name_of
from lab.errors import UserError
from lab.explain.asked import Asked
from lab.explain.explanation import as_json, explain
from lab.explain.page import blocks, checked, strongest, summary
from lab.files import make_folder, replace_file
from lab.study.report.render import drawn, html, terminal
from lab.train.json_files import write_json
from lab.weights.location import is_location

SHOWN = 5  # units on the screen


def main(args: Sequence[str]) -> int:
    """RUN or LOCATION, --input FILE or TEXT"""
    return call("explain", explain_one, args)


def explain_one(
    run: Annotated[str, tyro.conf.Positional],
    input: str,
    record: int | None = None,
    target: str | None = None,
    against: str | None = None,
    baseline: str | None = None,
    output: Path | None = None,
    step: int | None = None,
    best: bool = False,
    experiment: Path | None = None,
) -> None:
    """Explains one answer of a model by integrated gradients, gradient x input, occlusion and attention maps, and
    checks that the maps change if the weights are random. Writes a page (HTML), the numbers beside it (JSON) and, of a
    Transformer, all attention maps (.npz).

    Args:
      run: the run folder; or weights: hf:ORG/NAME, package:NAME/PATH, a .gguf file, a folder with config.json.
      input: what the model answers to: a text, or a file that the run's data reads (a CSV with the columns of the
        training data, a text file with one message per line, an image). For a language model, a file is one text.
      record: the number of the record in the file, from 0; by default the first.
      target: the class to explain, by default the predicted one. Of a language model: the next token. Of an encoder:
        the text to compare with.
      against: explain why the target rather than this class or token: the difference of their logits. By default of
        classes: all others.
      baseline: what the input is compared with. Images: zero (black; default), mean (the data's mean pixel) or a file.
        Tables: mean (numbers at their training mean, categories at the most frequent one; default), zero or a file.
        Text: pad (the embedding of padding; default), mean (the mean embedding; default of a language model) or zero.
      output: the page to write; by default explanation.html in the run folder, or explanation-<name>.html here.
      step: use the checkpoint of this step; by default the latest.
      best: use the checkpoint with the best validation metric.
      experiment: the run's experiment file, needed if it defines classes and was not run on this machine. For the
        weights of a classifier: the experiment file that has the data and the task.
    """
    place = output or (Path(f"explanation-{name_of(Path(run))}.html") if is_location(run) else
                       Path(run) / "explanation.html")
    if place.suffix != ".html":
        raise UserError(f"--output {place} must end in .html.")
    subject = subject_of(run, Asked(input, record, target, against, baseline), step, best, experiment)
    found = explain(subject)
    make_folder(place.parent)
    replace_file(place, html(drawn(blocks(found))))
    write_json(place.with_suffix(".json"), as_json(found))
    written = [str(place), place.with_suffix(".json").name]
    if subject.attention is not None:
        np.savez_compressed(buffer := io.BytesIO(), attention=subject.attention)
        replace_file(place.with_suffix(".npz"), buffer.getvalue())
        written.append(place.with_suffix(".npz").name)
    terminal([*summary(found), *([strongest(found, SHOWN)] if subject.kind != "image" else []), *checked(found)])
    print(f"Written to {', '.join(written)}")
