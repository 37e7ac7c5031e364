"""The report by group of a whole split: every metric with counts and 95 % intervals, and the gaps between groups.

Shares (accuracy, rates) have Wilson's interval (1927), the difference of two shares Newcombe's hybrid of both (1998,
method 10), all other figures the bootstrap's percentiles, with the records of each group resampled by themselves. The
intervals hold for other records of the same kind, not for another training run. NumPy and SciPy only; nothing here is
part of a compiled step.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from lab.files import replace_file
from lab.tasks import groups, reports
from lab.tasks.base import EvalResult
from lab.train import plots

LEVEL, RESAMPLES = 0.95, 999
FEW = 30  # records below which a group's figures say little
DRAWN = 6  # figures in the picture
Ends = tuple[np.ndarray, np.ndarray]


def wilson(hits: np.ndarray, n: np.ndarray) -> Ends:
    """Wilson's score interval of shares hits / n, any shape; NaN for n = 0."""
    hits, n, z = np.asarray(hits, float), np.where(np.asarray(n) > 0, n, np.nan), special.ndtri((1 + LEVEL) / 2)
    share = hits / n
    middle, half = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return np.maximum((middle - half) / (1 + z * z / n), 0), np.minimum((middle + half) / (1 + z * z / n), 1)


@dataclass(frozen=True)
class Figure:
    """A metric of each group, (G,) each, NaN where it is not defined; and its gap, the difference between the groups
    with the highest and the lowest value."""

    name: str
    values: np.ndarray
    ends: Ends
    gap_ends: tuple[float, float]
    interval: str
    digits: str = ".4f"

    @property
    def gap(self) -> float:
        """See `groups.spread`."""
        return float(groups.spread(self.values))

    def at(self, g: int) -> str:
        """A group's value, with its interval."""
        return _shown(self.values[g], (self.ends[0][g], self.ends[1][g]), self.digits)

    @property
    def order(self) -> tuple[int, int]:
        """The groups with the lowest and the highest value."""
        return _extremes(self.values)


def _extremes(values: np.ndarray) -> tuple[int, int]:
    known = np.isfinite(values)
    return int(np.argmin(np.where(known, values, np.inf))), int(np.argmax(np.where(known, values, -np.inf)))


def share(name: str, hits: np.ndarray, n: np.ndarray) -> Figure:
    """The figure hits / n, int (G,) each."""
    low, high = wilson(hits, n)
    with np.errstate(invalid="ignore"):
        values = np.asarray(hits, float) / n
    a, b = _extremes(values)  # Newcombe: the ends' distances to the shares, added as squares
    down, up = np.hypot(values[b] - low[b], high[a] - values[a]), np.hypot(high[b] - values[b], values[a] - low[a])
    gap = values[b] - values[a]
    return Figure(name, values, (low, high), (float(gap - down), float(gap + up)), "Wilson")


def resampled(names: Sequence[str], rows: Sequence[np.ndarray], figures: Callable[[np.ndarray], Sequence[float]],
              digits: str = ".4f") -> list[Figure]:
    """Figures of the records `rows` of each group, `figures(records)` -> one number for each name."""
    found = np.array([figures(own) if len(own) else [np.nan] * len(names) for own in rows])
    draws = np.stack([_draws(own, figures, len(names)) for own in rows])  # (G, figures, RESAMPLES)
    result = []
    for i, name in enumerate(names):
        a, b = _extremes(found[:, i])
        ends = np.array([_percentiles(own) for own in draws[:, i]]).T
        result.append(Figure(name, found[:, i], (ends[0], ends[1]), _percentiles(draws[b, i] - draws[a, i]),
                             "bootstrap", digits))
    return result


def _draws(rows: np.ndarray, figures: Callable[[np.ndarray], Sequence[float]], count: int) -> np.ndarray:
    """The figures of RESAMPLES bootstrap samples of `rows`, (count, RESAMPLES), the same in every call."""
    from scipy.stats import bootstrap  # half a second, and only for reports

    def many(samples: np.ndarray, axis: int) -> np.ndarray:
        flat = samples.reshape(-1, samples.shape[-1])
        return np.stack([figures(own) for own in flat], -1).reshape(count, *samples.shape[:-1])

    if len(rows) < 2:
        return np.full((count, RESAMPLES), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings(action="ignore"):
        return bootstrap((rows,), many, n_resamples=RESAMPLES, batch=100, method="percentile",
                         rng=len(rows)).bootstrap_distribution


def _percentiles(draws: np.ndarray) -> tuple[float, float]:
    """The interval (low, high); NaN if the figure is not defined for a tenth of the draws."""
    known = draws[np.isfinite(draws)]
    if len(known) < 0.9 * len(draws):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def of_classes(outcome: EvalResult, column: str | None, targets: np.ndarray, probabilities: np.ndarray,
               names: Sequence[str], prefix: str = "") -> list[str]:
    """Writes the report of a classifier; returns lines to print, none without a column.

    Figures: accuracy, loss, macro precision, recall and F1, and for each class the share of records predicted as it
    (selection rate), and those of the records that are of it (true positives) and not (false positives). For two
    classes: of class 1 only, and auc. `targets` int (n,), `probabilities` (n, C).
    """
    if column is None:
        return []
    fields, rows = _rows(outcome, column)
    C, predicted = len(names), probabilities.argmax(-1)
    loss = -np.log(np.maximum(probabilities[np.arange(len(targets)), targets], 1e-45, dtype=np.float64))
    rank = np.unique(probabilities[:, -1], return_inverse=True)[1]
    macro = ["loss", "precision", "recall", "f1", *(["auc"] if C == 2 else [])]

    def figures(own: np.ndarray) -> list[float]:
        found = reports.macro(reports.confusion(targets[own], predicted[own], C))
        scores = np.bincount(targets[own] * (rank.max() + 1) + rank[own], minlength=C * (rank.max() + 1))
        auc = [reports.area(scores.reshape(C, -1))] if C == 2 else []
        return [float(loss[own].mean()), *found.values(), *auc]

    confusion = np.stack([reports.confusion(targets[own], predicted[own], C) for own in rows])
    total, of_class, chosen = confusion.sum((1, 2)), confusion.sum(2), confusion.sum(1)
    hits = np.diagonal(confusion, axis1=1, axis2=2)
    by_class = [figure for c in ([1] if C == 2 else range(C)) for figure in (
        share(f"selection rate of {names[c]}", chosen[:, c], total),
        share(f"true positive rate of {names[c]}", hits[:, c], of_class[:, c]),
        share(f"false positive rate of {names[c]}", chosen[:, c] - hits[:, c], total - of_class[:, c]))]
    rest = resampled(macro, rows, figures)
    found = [share("accuracy", hits.sum(1), total), *(by_class + rest if C == 2 else rest + by_class)]
    lines = [_largest("Demographic parity difference", chosen, total[:, None],
                      [f"predicted as {name}" for name in names], fields),
             _largest("Equalized odds difference", confusion.reshape(len(fields), -1), of_class.repeat(C, -1),
                      [f"{a} predicted as {b}" for a in names for b in names], fields)]
    return _written(outcome, column, prefix, fields, [len(own) for own in rows], found, lines)


def of_numbers(outcome: EvalResult, column: str | None, true: np.ndarray, predicted: np.ndarray,
               prefix: str = "") -> list[str]:
    """Writes the report of a regression; returns lines to print, none without a column.

    Figures in units of the target: rmse, mae, r2, the mean of the predictions (whose gap is what a demographic parity
    difference is for classes) and of the targets, and mean_error, the mean of prediction - target. Arrays (n, ...).
    """
    if column is None:
        return []
    fields, rows = _rows(outcome, column)
    true, predicted = (x.reshape(len(x), -1) for x in (true, predicted))
    error = predicted - true

    def figures(own: np.ndarray) -> list[float]:
        square, spread = np.square(error[own]).mean(), np.square(true[own] - true[own].mean()).mean()
        return [float(np.sqrt(square)), float(np.abs(error[own]).mean()),
                float(1 - square / spread) if spread > 0 else float("nan"), float(predicted[own].mean()),
                float(true[own].mean()), float(error[own].mean())]

    names = ["rmse", "mae", "r2", "mean prediction", "mean target", "mean error"]
    return _written(outcome, column, prefix, fields, [len(own) for own in rows],
                    resampled(names, rows, figures, f".{reports.digits(true) - 2}g"), [])


# ---------------------------------------------------------------------------------------------------- written


def _rows(outcome: EvalResult, column: str) -> tuple[list[str], list[np.ndarray]]:
    """The groups, and the numbers of the records of each."""
    fields = groups.fields_of(outcome.records[np.arange(1)], column)
    found = reports.read(outcome.records, *fields)
    return fields, [np.flatnonzero(found[name]) for name in fields]


def _shown(value: float, ends: tuple[float, float], digits: str) -> str:
    if not np.isfinite(value):
        return "-"
    short = digits.replace(".4f", ".3f")
    return f"{value:{digits}}" + (f" ({ends[0]:{short}} to {ends[1]:{short}})" if np.isfinite(ends).all() else "")


def _largest(name: str, hits: np.ndarray, n: np.ndarray, of: Sequence[str], fields: Sequence[str]) -> str:
    """A line about the largest gap of the shares hits / n (G, K), each `of` something. Of equal ones the last."""
    with np.errstate(invalid="ignore"):
        gaps = groups.spread(hits / n)
    if np.isnan(gaps).all():
        return f"{name}: not defined, fewer than two groups have the records for it."
    k = len(gaps) - 1 - int(np.nanargmax(gaps.round(12)[::-1]))
    found = share(of[k], hits[:, k], np.broadcast_to(n, hits.shape)[:, k])
    low, high = found.order
    return f"{name} {_shown(found.gap, found.gap_ends, found.digits)}: {found.name}, {fields[high]} - {fields[low]}"


def _written(outcome: EvalResult, column: str, prefix: str, fields: Sequence[str], sizes: Sequence[int],
             found: Sequence[Figure], lines: Sequence[str]) -> list[str]:
    """Writes groups.csv, groups.txt and plots/groups.png; returns the text of the second."""
    writer = csv.writer(buffer := io.StringIO(), lineterminator="\n")
    writer.writerow(["metric", "group", "records", "value", "low", "high", "interval"])
    for f in found:
        writer.writerows([f.name, group, sizes[g], f.values[g], f.ends[0][g], f.ends[1][g], f.interval]
                         for g, group in enumerate(fields))
        writer.writerow([f.name, "gap", sum(sizes), f.gap, *f.gap_ends, f.interval])
    replace_file(outcome.folder / f"{prefix}groups.csv", buffer.getvalue())
    shown = [f for f in found if " of " not in f.name] if len(found) > 3 * reports.FEW else found
    rows = [["", "lowest", "highest", "gap"]]
    rows += [[f.name, *(f"{f.at(g)} {fields[g]}" for g in f.order), _shown(f.gap, f.gap_ends, f.digits)] for f in shown]
    width = [max(len(row[i]) for row in rows) for i in range(4)]
    table = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, width, strict=True)).rstrip() for row in rows]
    few = [f"{group} ({n})" for group, n in zip(fields, sizes, strict=True) if n < FEW]
    text = [f"By {column}, {outcome.split} split: {', '.join(f'{g} {n:,}' for g, n in zip(fields, sizes, strict=True))}"
            f" records; 95 % intervals over records, Wilson's for shares, bootstrap for the rest", *table, *lines]
    text += [f"Groups with few records, whose figures say little: {', '.join(few)}."] if few else []
    replace_file(outcome.folder / f"{prefix}groups.txt", "\n".join(text) + "\n")
    plots.intervals([(f.name, f.values, *f.ends) for f in found[:DRAWN]], fields,
                    outcome.folder / "plots" / f"{prefix}groups.png", f"By {column}, {outcome.split} split, 95 %")
    return [text[0], *(f"  {line}" for line in text[1:])]
