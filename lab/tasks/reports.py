"""Reports on the predictions of a whole split: scores from a confusion matrix, tables, and the worst mistakes.

NumPy only; nothing here is part of a compiled step.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lab.errors import forgiving
from lab.files import replace_file
from lab.tasks.base import EvalResult
from lab.train import plots

MOST = 25  # worst records to write
FEW = 20  # maximum classes in a printed table, or in a plot with numbers
SOME = 256  # records to sample if each must be read from a file
CHUNK = 1024  # records per read


def read(records: Any, *names: str) -> dict[str, np.ndarray]:
    """The fields `names` that the records have, for all records. Reads in pieces, to bound memory for images."""
    parts = []
    for start in range(0, len(records), CHUNK):
        rows = records[np.arange(start, min(start + CHUNK, len(records)))]
        parts.append({name: rows[name] for name in names if name in rows})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def read_some(data: Any, name: str) -> dict[str, np.ndarray]:
    """A field of every split's records: all records if they are in memory, else SOME evenly spaced ones."""
    splits = {split: records for split in ("train", "validation", "test") if (records := getattr(data, split))}
    found = {}
    for split, records in splits.items():
        arrays = getattr(records, "arrays", None)
        if arrays is None:
            arrays = records[np.unique(np.linspace(0, len(records) - 1, min(SOME, len(records))).astype(int))]
        if name in arrays:
            found[split] = np.asarray(arrays[name])
    return found


def beside(outcome: EvalResult) -> list[str]:
    """Lines to print: baseline results on the test split, or on validation if there is no test split."""
    same = outcome.split == ("validation" if outcome.data.test is None else "test")
    lines: list[str] = []
    with forgiving("The comparison with simple methods"):
        lines += [f"Baseline{' (same split)' if same else ''}: {line}" for line in outcome.data.reference()]
    return lines


# ----------------------------------------------------------------------------------------------------- figures


class Figures(NamedTuple):
    """Scores per class, (C,) each; 0 for 0 / 0 (scikit-learn's zero_division=0)."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray
    """Number of records of the class."""
    occurs: np.ndarray
    """Whether the class occurs as target or prediction."""


def confusion(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """int (C, C) [true, predicted], from classes (n,)."""
    pairs = true.astype(np.int64) * classes + predicted
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def class_figures(confusion: np.ndarray) -> Figures:
    """Precision, recall, F1 (their harmonic mean) and support of every class from (C, C) [true, predicted]."""
    confusion = np.asarray(confusion, np.float64)
    hits, support, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)

    def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.divide(a, b, out=np.zeros_like(a), where=b > 0)

    return Figures(ratio(hits, predicted), ratio(hits, support), ratio(2 * hits, support + predicted), support,
                   support + predicted > 0)


def macro(confusion: np.ndarray) -> dict[str, float]:
    """Means of precision, recall and F1 over the classes that occur. F1 is the mean of F1s, not the F1 of the means."""
    figures = class_figures(confusion)
    if not figures.occurs.any():
        return dict.fromkeys(("precision", "recall", "f1"), float("nan"))
    return {name: float(getattr(figures, name)[figures.occurs].mean()) for name in ("precision", "recall", "f1")}


def area(histogram: np.ndarray) -> float:
    """Area under the ROC curve from counts (2, bins) of scores by true class, bins in increasing order.

    It is the share of correctly ordered (negative, positive) pairs; a tie counts 1/2 (Hanley & McNeil 1982).
    NaN if a class has no records.
    """
    negative, positive = np.asarray(histogram, np.float64)
    pairs = negative.sum() * positive.sum()
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / pairs) if pairs else float("nan")


def digits(values: np.ndarray) -> int:
    """Significant digits to print for numbers (n,): enough for 6 digits of their standard deviation."""
    spread, size = float(values.std()), float(np.abs(values).max())
    return 6 + (max(0, round(np.log10(size / spread))) if spread > 0 else 0)


def fit(true: np.ndarray, predicted: np.ndarray) -> str:
    """RMSE, MAE and R2 of predictions (n,), as text."""
    error = predicted - true
    spread = np.square(true - true.mean()).sum()
    r2 = 1 - np.square(error).sum() / spread if spread > 0 else float("nan")
    return f"RMSE {np.sqrt(np.square(error).mean()):.4g}, MAE {np.abs(error).mean():.4g}, R2 {r2:.4f}"


# ------------------------------------------------------------------------------------------------------ tables


def class_names(classes: Sequence[str], count: int) -> Sequence[str]:
    """The class names, or the class numbers if there are no names."""
    return classes if len(classes) == count else tuple(str(i) for i in range(count))


def column_names(prefix: str, names: Sequence[str]) -> list[str]:
    """prefix_<name> for each, unique and of letters, digits and _ only: usable as pandas attributes."""
    found: list[str] = []
    for name in names:
        column = re.sub(r"\W+", "_", f"{prefix}_{name}")
        found.append(column if column not in found else f"{column}_{len(found)}")
    return found


def headline(title: str, confusion: np.ndarray) -> str:
    """One line: accuracy and the macro averages."""
    figures = macro(confusion)
    return (f"{title}: accuracy {np.trace(confusion) / max(confusion.sum(), 1):.4f}; macro precision "
            f"{figures['precision']:.4f}, recall {figures['recall']:.4f}, F1 {figures['f1']:.4f}")


def class_table(confusion: np.ndarray, names: Sequence[str], rows: Sequence[int] | None = None) -> list[str]:
    """Precision, recall, F1 and support, one line per class (of `rows`), then the macro averages."""
    figures = class_figures(confusion)
    rows = range(len(names)) if rows is None else rows
    width = max(len(name) for name in ("macro average", *(names[i] for i in rows)))

    def line(name: str, precision: float, recall: float, f1: float, support: float) -> str:
        return f"{name:<{width}}  {precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {int(support):7,}"

    return [f"{'class':<{width}}  precision  recall      F1  support",
            *(line(names[i], *(figure[i] for figure in figures[:4])) for i in rows),
            line("macro average", *macro(confusion).values(), figures.support.sum())]


def shortened(confusion: np.ndarray, names: Sequence[str]) -> list[str]:
    """`class_table` to print; with more than FEW classes, only the 5 occurring classes with the lowest F1."""
    if len(names) <= FEW:
        return class_table(confusion, names)
    figures = class_figures(confusion)
    occurring = np.flatnonzero(figures.occurs)
    worst = occurring[np.argsort(figures.f1[occurring], kind="stable")[:5]]
    return [f"The {len(worst)} of {len(names)} classes with the lowest F1 (all in report.txt):",
            *class_table(confusion, names, worst.tolist())]


# ------------------------------------------------------------------------------------------------------- worst


def write_worst(outcome: EvalResult, chosen: np.ndarray, facts: Mapping[str, Sequence[str]], prefix: str = "") -> None:
    """Writes the `chosen` records, worst first, each with its `facts` (name -> one text per record).

    Images: plots/worst.png. Texts (integer inputs, if the data has `decode`): worst.txt. Tables: worst.csv, with the
    inputs in the units of the file if the data has `in_units`, else as the model gets them. If nothing is chosen, the
    files of an earlier call are removed.
    """
    folder = outcome.folder
    pictures, texts, table = (folder / "plots" / f"{prefix}worst.png", folder / f"{prefix}worst.txt",
                              folder / f"{prefix}worst.csv")
    for path in (pictures, texts, table):
        path.unlink(missing_ok=True)
    if not len(chosen):
        return
    rows = outcome.records[np.asarray(chosen)]
    inputs = rows["inputs"]
    captions = [[f"{name} {values[i]}" for name, values in facts.items()] for i in range(len(chosen))]
    if inputs.ndim == 4:
        plots.image_grid(inputs, pictures, ["\n".join(line[:30] for line in lines) for lines in captions])
    elif hasattr(outcome.data, "decode"):
        masks = rows.get("mask", np.ones_like(inputs))
        shown = [outcome.data.decode(ids[mask > 0]) for ids, mask in zip(inputs, masks, strict=True)]
        replace_file(texts, "".join(f"--- record {i}: {', '.join(lines)}\n{text}\n\n"
                                    for i, lines, text in zip(chosen, captions, shown, strict=True)))
    elif inputs.ndim == 2:
        names = getattr(outcome.data, "feature_names", None) or [f"input {i}" for i in range(inputs.shape[1])]
        columns = ({name: [f"{x:.6g}" for x in inputs[:, i]] for i, name in enumerate(names)}
                   if not hasattr(outcome.data, "in_units") else outcome.data.in_units(inputs))
        writer = csv.writer(buffer := io.StringIO(), lineterminator="\n")
        writer.writerow(["record", *facts, *columns])
        writer.writerows(zip(chosen, *facts.values(), *columns.values(), strict=True))
        replace_file(table, buffer.getvalue())
