"""`./launch.sh promote CANDIDATE --over INCUMBENT --metric accuracy`: move the link that is served to a better run."""

from __future__ import annotations

import datetime
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from lab.commands.arguments import call
from lab.errors import UserError, nearest
from lab.files import make_folder, no_links, open_file
from lab.study.report.items import item_interval
from lab.train.description import check_same
from lab.train.evaluation import by_record
from lab.train.restore import open_run

LOWER = ("loss", "error", "perplexity", "bits", "nll")  # parts of the names of metrics of which less is better


class Comparison(NamedTuple):
    """Two runs on the same records. `difference` and `interval`: of a record, positive if the candidate is better."""

    candidate: float
    incumbent: float
    difference: float
    interval: tuple[float, float]
    records: int
    mode: str


def main(args: Sequence[str]) -> int:
    """CANDIDATE --over INCUMBENT --metric NAME"""
    return call("promote", promote, args)


def promote(candidate: Annotated[Path, tyro.conf.Positional], over: Path, metric: str = "loss",
            margin: float = 0.0, split: Literal["validation", "test"] = "validation", records: int | None = None,
            mode: Literal["min", "max"] | None = None, best: bool = False, link: Path | None = None) -> int:
    """Compares two runs on the same records and, if the candidate is better, moves the link to it that `serve` follows.

    Better: the 95 % interval of the difference (bootstrap, paired by record) is above 0; with a margin, above minus
    the margin. Exit status 0 if the link was moved, 1 if not. LINK.jsonl logs every comparison.

    Args:
      candidate: the run folder of the new model.
      over: the run folder of the model that is served, or the link to it.
      metric: a metric of the task's, such as accuracy.
      margin: how much worse the candidate may be, in the metric's unit.
      split: the records to compare on.
      records: use this many evenly spaced records; by default all.
      mode: whether less (min) or more (max) of the metric is better; by default by its name.
      best: use the checkpoint of each run with the best validation metric; then `serve` needs --best, too.
      link: the link to move; by default OVER, if it is a link, else `served` beside it.
    """
    if not margin >= 0:
        raise UserError(f"--margin {margin} is negative: it is how much worse the candidate may be.")
    if records is not None and records < 2:
        raise UserError(f"--records {records}: an interval needs at least 2 records.")
    link = link or (over if over.is_symlink() else over.parent / "served")
    if os.path.lexists(link) and not link.is_symlink():
        raise UserError(f"{link} is not a link. Name another with --link.")
    new, old = candidate.resolve(), over.resolve()
    if new == old:
        raise UserError(f"{candidate} and {over} are the same run.")
    served = _target(link)
    if served not in (None, old):
        raise UserError(f"{link} points to {served}, not to {over}: compare with what is served, --over {link}.")
    found = compare(new, old, metric, mode, split, records, best)
    low, high = found.interval
    won = low > -margin
    direction = "more" if found.mode == "max" else "less"
    print(f"{metric} on {found.records:,} {split} records ({direction} is better)")
    print(f"  candidate  {found.candidate:.6f}  {candidate}")
    print(f"  incumbent  {found.incumbent:.6f}  {over}")
    print(f"  better by  {found.difference:.6f}, 95 % interval {low:.6f} to {high:.6f}")
    if won:
        move(link, new, served)
    _log(link, {"served": str(new if won else served or old), "promoted": won, "candidate": str(new),
                "incumbent": str(old), "metric": metric, "mode": found.mode, "split": split,
                "records": found.records, "best": best, "candidate_value": found.candidate,
                "incumbent_value": found.incumbent, "difference": found.difference, "low": low, "high": high,
                "margin": margin})
    needed = "0" if margin == 0 else f"-{margin:g}"
    print(f"Promoted: {link} points to {new}." if won else
          f"Not promoted: the interval is not above {needed}. {link} is as it was.")
    return 0 if won else 1


def compare(candidate: Path, incumbent: Path, metric: str, mode: str | None, split: str, records: int | None,
            best: bool) -> Comparison:
    """Evaluates two runs on the same records.

    The interval of the difference of two ratios of sums is that of the mean of its linearised terms (Cochran 1977,
    6.3): (a_i - b_i - D w_i) / mean(w) + D, which are the differences themselves where all weights are equal.

    Raises:
      UserError: runs on other data, no such split or metric, or records that weigh otherwise.
    """
    opened = []
    for run in (candidate, incumbent):
        no_links(run)
        experiment, program, state = open_run(run, best=best)
        data = experiment.data.load()
        check_same(run, experiment, data.fingerprint)
        opened.append((experiment, data.fingerprint, by_record(program, state, data, split, records)))
    (experiment, mine, new), (_, other, old) = opened
    if mine != other:
        raise UserError(f"{candidate} and {incumbent} were trained on different data (or tokenizers): their records "
                        f"are not the same.")
    for given in (new, old):
        if metric not in given:
            others = f" There are {', '.join(given)}."
            raise UserError(f"There is no metric {metric!r} of single records.{nearest(metric, given, others)}")
    (a, w), (b, weights) = new[metric], old[metric]
    if not np.array_equal(w, weights):
        raise UserError(f"The records weigh differently in the two runs, so that {metric} cannot be paired.")
    mode = mode or (experiment.evaluate.mode if metric == experiment.evaluate.metric else
                    "min" if any(word in metric for word in LOWER) else "max")
    sign = 1 if mode == "max" else -1
    first, second = float(a.sum() / w.sum()), float(b.sum() / w.sum())
    difference = sign * (first - second)
    terms = (sign * (a - b) - difference * w) / w.mean() + difference
    return Comparison(first, second, difference, item_interval(terms), len(terms), mode)


def _target(link: Path) -> Path | None:
    return link.resolve() if link.is_symlink() else None


def move(link: Path, target: Path, expected: Path | None) -> None:
    """Lets a link point to `target`, atomically. UserError if it no longer points to `expected`."""
    if _target(link) != expected:
        raise UserError(f"{link} was moved to {_target(link)} meanwhile. Compare with that one.")
    make_folder(link.parent)
    beside = link.with_name(f".{link.name}-{secrets.token_hex(4)}")
    beside.symlink_to(os.path.relpath(target, link.parent.resolve()))
    os.replace(beside, link)


def _log(link: Path, row: dict[str, Any]) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with open_file(link.with_name(link.name + ".jsonl")) as file:
        file.write(json.dumps({"time": now} | row) + "\n")
