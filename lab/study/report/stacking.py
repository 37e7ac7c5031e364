"""The table of a stack, from the predictions of its members: the members, their mean, other arms, and the stack.

A logistic regression (scikit-learn's) learns the classes of the training records from the members' probabilities of
them, each by a run that did not learn the record (Wolpert 1992, "Stacked generalization"). It is then applied to the
probabilities of the members that learned all records. So no target of a record has a part in its features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from lab.errors import UserError, forgiving
from lab.study.design.arms import FOLD
from lab.study.report import stats
from lab.study.report.items import item_interval
from lab.study.report.render import Block, Heading, Table, Text
from lab.study.report.results import Results

FILE = "stack.safetensors"
"""folds (n,): the fold of each training record; folds/targets (n,), folds/MEMBER/SEED (n, C): out-of-fold
probabilities; whole/targets (m,), whole/NAME/SEED (m, C): of the study's split, by runs on all training records."""
NOTE = ("Held out: accuracy on training records. Members and their mean: out of fold; a bootstrap: out of bag; the "
        "stack: cross-validated over the same folds, slightly optimistic, since the features that it learns from come "
        "from members that learned the held-out fold. Intervals over records (bootstrap, percentiles; differences "
        "paired by record) hold for these runs and other records; those over seeds (t) for these records and other "
        "runs. A difference should hold in both.")


@dataclass(frozen=True)
class Row:
    """One classifier: values by seed."""

    right: np.ndarray
    """Whether each record of the split is classified right, (seeds, m)."""
    loss: float
    """Mean of -log p of the true class, in nats."""
    held_out: float | None = None
    """Accuracy on held-out training records."""


def of_cells(folder: Path) -> str | None:
    """The identity of the cells that the file is of; None without a file."""
    return _read(folder)[0] if (folder / FILE).exists() else None


def _read(folder: Path) -> tuple[str, dict[str, np.ndarray]]:
    try:
        with safe_open(folder / FILE, "np") as file:
            return (file.metadata() or {})["cells"], {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError) as e:
        raise UserError(f"{folder / FILE} is damaged ({e}). Delete it and type the study's command again.") from None


def stacked(features: np.ndarray, targets: np.ndarray, unseen: np.ndarray, l2: float) -> np.ndarray:
    """The probabilities (m, C) of the classes for features `unseen` (m, M, C), by a logistic regression on `features`
    (n, M, C), the probabilities by M members, and targets (n,)."""
    from sklearn.linear_model import LogisticRegression

    flat, C = features.reshape(len(features), -1), features.shape[-1]
    found = np.full((len(unseen), C), 0.0)
    if (classes := np.unique(targets)).size == 1:
        found[:, classes] = 1.0
        return found
    with warnings.catch_warnings(action="ignore"):
        model = LogisticRegression(C=1 / l2, max_iter=1000).fit(flat, targets)
    found[:, model.classes_] = model.predict_proba(unseen.reshape(len(unseen), -1))
    return found


def held_out_stack(features: np.ndarray, targets: np.ndarray, folds: np.ndarray, l2: float) -> np.ndarray:
    """The stack's probabilities (n, C) of each fold, learned from the features (n, M, C) of the others."""
    found = np.zeros((len(features), features.shape[-1]))
    for fold in np.unique(folds):
        own = folds == fold
        found[own] = stacked(features[~own], targets[~own], features[own], l2)
    return found


def _row(probabilities: list[np.ndarray], targets: np.ndarray, held_out: float | None) -> Row:
    right = np.stack([p.argmax(-1) == targets for p in probabilities])
    true = np.stack([p[np.arange(len(targets)), targets] for p in probabilities])
    return Row(right, float(-np.log(np.maximum(true, 1e-45)).mean()), held_out)


def rows(results: Results, arrays: Mapping[str, np.ndarray], seeds: list[int]) -> dict[str, Row]:
    """Name -> row; the stack is the last one."""
    members, beside = results.factors["members"], results.factors["beside"]
    l2, fold, train, asked = results.factors["l2"], *(arrays[k] for k in ("folds", "folds/targets", "whole/targets"))
    whole = {name: [arrays[f"whole/{name}/{seed}"] for seed in seeds] for name in (*members, *beside)}
    parts = {name: [arrays[f"folds/{name}/{seed}"] for seed in seeds] for name in members}
    learned = [np.stack(each, 1) for each in zip(*parts.values(), strict=True)]  # for each seed (n, M, C)
    given = [np.stack(each, 1) for each in zip(*(whole[name] for name in members), strict=True)]

    def accuracy(probabilities: list[np.ndarray]) -> float:
        return float(np.mean([(p.argmax(-1) == train).mean() for p in probabilities]))

    found = {name: _row(whole[name], asked, accuracy(parts[name])) for name in members}
    found["mean"] = _row([x.mean(1) for x in given], asked, accuracy([x.mean(1) for x in learned]))
    for name in beside:
        bags = [cell.result.get("out_of_bag", {}).get("accuracy") for cell in results.cells if cell.arm == name
                and cell.seed in seeds]
        found[name] = _row(whole[name], asked, None if None in bags else float(np.mean(bags)))
    found["stack"] = _row([stacked(x, train, y, l2) for x, y in zip(learned, given, strict=True)], asked,
                          accuracy([held_out_stack(x, train, fold, l2) for x in learned]))
    return found


def _ends(low: float, high: float, sign: str = "") -> str:
    return "" if np.isnan(low) else f"{100 * low:{sign}.2f} to {100 * high:{sign}.2f}"


def _shown(name: str, row: Row, stack: Row) -> list[str]:
    """The cells of a row, in percent; the last three compare the stack with it."""
    cells = [name, "" if row.held_out is None else f"{100 * row.held_out:.2f}", f"{100 * row.right.mean():.2f}",
             _ends(*item_interval(row.right.mean(0))), f"{row.loss:.4f}"]
    if row is stack:
        return [*cells, "", "", ""]
    gain, *ends = _gain(row, stack)
    return [*cells, f"{100 * gain:+.2f}", *(_ends(*each, "+") for each in ends)]


def _gain(row: Row, stack: Row) -> tuple[float, tuple[float, float], tuple[float, float]]:
    """The stack's accuracy minus a row's, with 95 % intervals over records and over seeds."""
    more = stack.right.astype(float) - row.right
    low, high = stats.interval(more.mean(1))
    return float(more.mean()), item_interval(more.mean(0)), (float(low), float(high))


def _compared(name: str, row: Row, stack: Row) -> str:
    """A sentence: whether the stack differs from a row, over records and over seeds."""
    gain, *ends = _gain(row, stack)
    sides = {1 if low > 0 else -1 if high < 0 else 0 for low, high in ends if not np.isnan(low)}
    word = {1: "better than", -1: "worse than"}.get(min(sides, key=abs) if len(sides) == 1 else 0,
                                                    "not distinguishable from")
    which = "the mean" if name == "mean" else f"{name}, the best member on held-out records"
    return f"The stack is {word} {which}: {100 * gain:+.2f} points."


def _table(results: Results) -> list[Block]:
    """The blocks of a stack."""
    folder = next(cell.folder for cell in results.cells).parents[2]
    folds = {arm.name for arm in results.arms if FOLD in arm.changes}
    counts = {status: sum(c.arm in folds and c.status == status for c in results.cells)
              for status in ("done", "diverged", "failed", "missing")}
    told = " + ".join(f"{n} {status}" for status, n in counts.items() if n or status == "done")
    base = "".join(f" {name} is the arm base above." for name, arm in results.factors["members"].items()
                   if arm == "base" != name)
    blocks: list[Block] = [Heading("The stack", 2), Text(
        f"A logistic regression (l2 {results.factors['l2']:g}) on the members' probabilities of records that they did "
        f"not learn. Mean: of the members' probabilities.{base} Held out: training records, out of fold (a bootstrap: "
        f"out of bag). Gain: the stack's accuracy minus the row's. Runs that hold out one of "
        f"{results.factors['folds']} folds: {told}; no table above has them.")]
    if not (folder / FILE).exists():
        return [*blocks, Text("No seed has finished in all arms, so there is nothing to stack yet: type the study's "
                              "command again.")]
    arrays = _read(folder)[1]
    first = next(iter(results.factors["members"]))
    seeds = [seed for seed in results.seeds if f"whole/{first}/{seed}" in arrays and seed not in results.tuning_seeds]
    if left := [seed for seed in results.seeds if seed not in [*seeds, *results.tuning_seeds]]:
        blocks.append(Text(f"WARNING: seeds {', '.join(map(str, left))} have not finished in all arms and are left "
                           f"out of the stack."))
    found = rows(results, arrays, seeds)
    table = Table(f"Accuracy in % of {len(arrays['whole/targets']):,} {results.split} records, mean of seeds "
                  f"{', '.join(map(str, seeds))}; 95 % intervals over records",
                  ["", "held out", "accuracy", "95 %", "loss", "gain", "95 %", "over seeds"],
                  [_shown(name, row, found["stack"]) for name, row in found.items()], wide=("loss", "over seeds"))
    best = max(results.factors["members"], key=lambda name: found[name].held_out)
    return [*blocks, table, *(Text(_compared(name, found[name], found["stack"])) for name in (best, "mean")),
            Text(NOTE, terminal=False)]


def with_stack(results: Results, build: Callable[[Results], list[Block]]) -> list[Block]:
    """A study's report; that of a stack is without the arms of the folds and has the stack's table, before the last two
    blocks, which say how to read all."""
    if results.kind != "stack":
        return build(results)
    whole = [arm for arm in results.arms if FOLD not in arm.changes]
    names = {arm.name for arm in whole}
    blocks = build(replace(results, arms=whole, cells=[c for c in results.cells if c.arm in names]))
    with forgiving("The table of the stack"):
        return [*blocks[:-2], *_table(results), *blocks[-2:]]
    return [*blocks, Text("WARNING: The table of the stack failed and is left out.")]
