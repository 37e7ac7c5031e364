"""`./launch.sh evaluate RUN|LOCATION --tasks NAMES` and `--text FILE`: a language model by the field's measures."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax

from lab.commands.location import name_of
from lab.commands.sample_weights import check_flags, language_model
from lab.errors import UserError
from lab.files import make_folder, no_links
from lab.harness import FOLDER
from lab.harness.perplexity import read_text, text_perplexity
from lab.harness.run import check_limit, file_name, numbers_of, run_tasks, write
from lab.harness.scoring import Language
from lab.harness.tasks import check_package
from lab.harness.value import text_of
from lab.train.evaluation import own_variables
from lab.train.fitted import data_of
from lab.train.json_files import write_json
from lab.train.restore import open_run
from lab.weights.location import is_location


@dataclass(frozen=True)
class HarnessFlags:
    """What a language model can be evaluated on besides an experiment's data."""

    tasks: str | None = None
    """Tasks of lm-eval, separated by commas: blimp,hellaswag,gsm8k. Needs LAB_EXTRAS=lm-eval."""
    text: Path | None = None
    """A text file (also .gz, .xz): its perplexity and bits per byte, by a sliding window."""
    data: Path | None = None
    """With --tasks: a folder with their data; by default lm-eval downloads it."""
    limit: int | None = None
    """With --tasks: items per task; by default all."""
    batch: int | None = None
    """Rows per call; by default one microbatch per device (lab/harness/scoring.py). Changes no result."""
    stride: int | None = None
    """With --text: tokens by which the window moves on; by default half of it."""
    context: int | None = None
    """With --text: tokens of the window; by default the model's context, at most 1,024."""


def check_unused(flags: HarnessFlags, only: Mapping[str, str] | None = None) -> None:
    """Raises UserError for a flag that has no effect. `only`: flag -> the flag that it needs."""
    needs = {f.name: "--tasks or --text" for f in fields(flags)} if only is None else only
    for name, needed in needs.items():
        if getattr(flags, name) is not None:
            raise UserError(f"--{name} needs {needed}.")


def evaluate_text(run: Path, step: int | None, best: bool, experiment: Path | None, output: Path | None,
                  flags: HarnessFlags, others: Mapping[str, Any]) -> None:
    """Evaluates a language model on lm-eval's tasks or a text file, and writes the numbers to evaluations/ of the run
    folder, or for a location to evaluation-<name>/.

    `others`: flags that make no sense here, which must be unset.

    Raises:
      UserError: flags that exclude each other; no language model; see also `run_tasks` and `lab.harness.perplexity`.
    """
    tasks, text = flags.tasks, flags.text
    if tasks is not None and text is not None:
        raise UserError("--tasks and --text exclude each other.")
    what = "--tasks" if text is None else "--text"
    for flag, value in others.items():
        if value is not None:
            raise UserError(f"{flag} does not go with {what}.")
    check_unused(flags, dict.fromkeys(("stride", "context"), "--text") if text is None else
                 dict.fromkeys(("data", "limit"), "--tasks"))
    check_limit(flags.limit, flags.batch)
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if text is None:
        if not names:
            raise UserError("--tasks needs names of tasks: --tasks blimp,hellaswag.")
        check_package()
    location = is_location(str(run))
    place = output or (Path(f"evaluation-{name_of(run)}") if location else run / FOLDER)
    if location:
        check_flags(str(run), step, best, None)
    else:
        no_links(run)
    if text is not None:
        content = read_text(text)
        language, of_step = open_language(run, step, best, experiment, flags.batch)
        row = text_perplexity(language, content, flags.context, flags.stride)
        written = make_folder(place / of_step) / f"text-{file_name(text.stem)}.json"
        write_json(written, {"text": str(text), **row})
    else:
        opened = functools.cache(lambda: open_language(run, step, best, experiment, flags.batch))
        results = run_tasks(lambda: opened()[0], names, flags.data, flags.limit)
        row = numbers_of(results)
        written = write({"model_name": str(run), **results}, place / opened()[1], "+".join(names))[0]
    width = max(map(len, row))
    for name, value in row.items():
        print(f"{name:>{width}}  {format(value, ',') if isinstance(value, int) else format(value, '.6f')}")
    print(f"Written to {written}" + ("" if text is not None else " and, item by item, samples_*.jsonl beside it"))


def open_language(run: Path, step: int | None = None, best: bool = False, experiment: Path | None = None,
                  batch: int | None = None) -> tuple[Language, str]:
    """(model with its tokenizer, "step-<n>" or ""), of a run or a location. UserError if it continues no text."""
    if is_location(str(run)):
        return Language(*language_model(str(run)), batch), ""
    found, program, state = open_run(run, step, best, file=experiment)
    text = text_of(found.model, data_of(run, found))
    variables = program.compute(state, own_variables)
    return Language(found.model, variables, text, batch), f"step-{int(jax.device_get(state.step))}"
