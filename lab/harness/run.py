"""Runs lm-eval's tasks on a language model and writes its results and the answers to every item."""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab.errors import UserError
from lab.files import make_folder, replace_file
from lab.harness.scoring import Language
from lab.harness.tasks import check_package, load_tasks, named

SEED = 1234  # of few-shot examples: lm-eval's own
RANDOM = 0  # of Python's generator, by which some tasks shuffle choices as they load: lm-eval's own
RESAMPLES = 1000  # for the standard error of metrics that are no means


def check_limit(limit: int | None, batch: int | None) -> None:
    """Raises UserError for a number below 1."""
    for flag, value in (("--limit", limit), ("--batch", batch)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, not {value}.")


def run_tasks(language: Callable[[], Language], names: Sequence[str], data: Path | None,
              limit: int | None) -> dict[str, Any]:
    """lm-eval's result: `results`, `configs`, `versions`, ..., and `samples`, a list of items for each task.

    Args:
      language: makes the model, once the tasks are known to exist.
      names: tasks, groups and tags.
      data: a folder with the tasks' data, see `lab.harness.local_data`; None: lm-eval downloads it.
      limit: items per task; None: all.

    Raises:
      UserError: lm-eval is not installed; an unknown task; no data; a task that this model cannot answer.
    """
    check_package()
    random.seed(RANDOM)
    np.random.seed(SEED)
    tasks = load_tasks(names, data)
    from lm_eval import __version__, evaluator

    from lab.harness.adapter import HarnessModel

    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork a process that has JAX's threads
    begin = time.time()
    try:
        found = evaluator.evaluate(HarnessModel(language()), tasks, limit=limit, bootstrap_iters=RESAMPLES)
    except ValueError as e:  # tasks that run code, or show images
        if not str(e).startswith("Attempted to run task"):
            raise
        raise UserError(f"{str(e).splitlines()[0]} This is not possible here.") from None
    config = {"limit": limit, "random_seed": RANDOM, "numpy_seed": SEED, "fewshot_seed": SEED,
              "bootstrap_iters": RESAMPLES}
    return {**found, "config": config, "lm_eval_version": __version__, "date": begin,
            "total_evaluation_time_seconds": str(time.time() - begin)}


def numbers_of(results: Mapping[str, Any]) -> dict[str, float]:
    """blimp_causative.acc and blimp_causative.acc_stderr, ... of lm-eval's result; see `named`."""
    return {named(task, *key.split(",", 1)): float(value) for task, row in results["results"].items()
            for key, value in row.items() if "," in key and isinstance(value, int | float)}


def write(results: Mapping[str, Any], folder: Path, title: str) -> list[Path]:
    """Writes results-<title>.json in lm-eval's format, and samples_<task>.jsonl, a line for each item; returns the
    paths."""
    from lm_eval.utils import handle_non_serializable

    make_folder(folder)
    paths = []
    for task, items in results["samples"].items():
        lines = [json.dumps(item, default=handle_non_serializable, ensure_ascii=False) for item in items]
        paths.append(folder / f"samples_{file_name(task)}.jsonl")
        replace_file(paths[-1], "".join(f"{line}\n" for line in lines))
    rest = {name: value for name, value in results.items() if name != "samples"}
    paths.insert(0, folder / f"results-{file_name(title)}.json")
    replace_file(paths[0], json.dumps(rest, indent=2, default=handle_non_serializable) + "\n")
    return paths


def file_name(text: str) -> str:
    """A text as part of a file name."""
    return re.sub(r"[^\w.+-]+", "_", text)[:100]
