"""All plots of a run. Each function takes numbers and writes a PNG file, replacing an older one."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab.errors import forgiving
from lab.files import make_folder, replace_file

COLOURS = {"train": "#9ab8d9", "smooth": "#1f5a96", "validation": "#c8501e", "test": "#3f7d3a"}
DPI = 120
NUMBERED = 20  # maximum classes for numbers in a confusion matrix
NAMED = 120  # maximum classes for their names
POINTS = 20_000  # maximum points of a scatter plot
OPTIMIZER = {"learning_rate": ("learning_rate",), "norms": ("gradient_norm", "update_norm", "parameter_norm")}


def new_figure(width: float, height: float, layout: str | None = "constrained") -> Any:
    """A figure for PNG output; `width` and `height` in inches. Forces Agg: importing matplotlib fails if MPLBACKEND,
    such as a notebook's, is not installed here. layout=None takes a third of the time, and needs margins."""
    asked = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure  # the object interface: no global figure, no display
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked
    return Figure(figsize=(width, height), dpi=DPI, layout=layout)


def _save(figure: Any, path: Path) -> Path:
    with forgiving(f"The picture {path.name}"):
        make_folder(path.parent)
        figure.savefig(buffer := io.BytesIO(), format="png")
        replace_file(path, buffer.getvalue())
    return path


# ------------------------------------------------------------------------------------------------------ curves


def curves(rows: Sequence[dict[str, Any]], folder: Path, metric: str | Sequence[str] = "loss") -> list[Path]:
    """Draws `folder`/<metric>.png for each metric, learning_rate.png and norms.png from the rows of metrics.jsonl.

    Skips metrics that no row has. Returns the files.
    """
    of = {split: [r for r in rows if r["split"] == split] for split in ("train", "validation", "test")}
    written = []
    for name in [metric] if isinstance(metric, str) else metric:
        series = {split: ([r["step"] for r in found if name in r], [r[name] for r in found if name in r])
                  for split, found in of.items()}
        if any(steps for steps, _ in series.values()):
            written.append(_metric(name, series, folder))
    for name, lines in OPTIMIZER.items():
        found = [r for r in of["train"] if all(line in r for line in lines)]
        if found:
            figure, axes = _axes(name.replace("_", " ") if len(lines) == 1 else "global norm")
            for line in lines:
                axes.plot([r["step"] for r in found], [r[line] for r in found], lw=1, label=line.replace("_", " "))
            if len(lines) > 1:
                axes.set_yscale("log")
                axes.legend(frameon=False)
            written.append(_save(figure, folder / f"{name}.png"))
    return written


def _axes(ylabel: str) -> tuple[Any, Any]:
    figure = new_figure(7, 4, layout=None)
    axes = figure.add_axes((0.115, 0.115, 0.865, 0.86))
    axes.set(xlabel="step", ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _metric(name: str, series: dict[str, tuple[list[int], list[float]]], folder: Path) -> Path:
    """Plots one metric. `series`: split -> (steps, values)."""
    figure, axes = _axes(name.replace("_", " "))
    steps, values = series["train"]
    if steps:
        axes.plot(steps, values, color=COLOURS["train"], lw=0.8, label="train, each step")
        if len(values) > 20:
            smooth = _smooth(values, span=max(5, len(values) // 50))
            axes.plot(steps, smooth, color=COLOURS["smooth"], lw=1.5, label="train, smoothed")
    for split, style in (("validation", "o-"), ("test", "D")):
        if series[split][0]:
            axes.plot(*series[split], style, ms=4, color=COLOURS[split], label=split)
    axes.legend(frameon=False)
    return _save(figure, folder / f"{name}.png")


def _smooth(values: Sequence[float], span: int) -> list[float]:
    """Exponential moving average with bias correction (Kingma & Ba 2015, section 3)."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = mean + (value - mean) / span, weight + (1 - weight) / span
        out.append(mean / weight)
    return out


# -------------------------------------------------------------------------------------------- classes and numbers


def confusion(matrix: np.ndarray, names: Sequence[str], path: Path, title: str = "") -> Path:
    """Plots a confusion matrix (C, C) [true, predicted] with the names of the C classes.

    Colours show the fraction of the true class, on a square-root scale to make rare errors visible. Cells show counts
    for up to 20 classes. The figure grows with C, so that up to 120 names are readable.
    """
    C = len(names)
    side = 3.2 + 0.45 * C if C <= NUMBERED else 3.0 + 0.15 * min(C, NAMED)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure = new_figure(side * 1.1, side)
    axes = figure.add_subplot()
    image = axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, fraction=0.04, label="share of the true class")
    bar.set_ticks(np.sqrt([0, 0.01, 0.1, 0.3, 0.6, 1]), labels=["0", "1 %", "10 %", "30 %", "60 %", "100 %"])
    if C <= NAMED:
        size = 8 if C <= NUMBERED else 5.5
        axes.set_xticks(range(C), names, rotation=90, fontsize=size)
        axes.set_yticks(range(C), names, fontsize=size)
    if C <= NUMBERED:
        for true, predicted in np.argwhere(matrix):
            colour = "white" if share[true, predicted] > 0.4 else "black"
            axes.text(predicted, true, f"{int(matrix[true, predicted])}", ha="center", va="center", fontsize=7,
                      color=colour)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(title, fontsize=9)
    return _save(figure, path)


def scatter(true: np.ndarray, predicted: np.ndarray, path: Path, title: str = "") -> Path:
    """Plots predicted against true values, both (n,), with the diagonal; at most 20,000 evenly spaced points."""
    spread = np.arange(min(len(true), POINTS)) * len(true) // min(len(true), POINTS)
    true, predicted = np.asarray(true)[spread], np.asarray(predicted)[spread]
    figure = new_figure(6, 6)
    axes = figure.add_subplot()
    axes.scatter(true, predicted, s=12 if len(true) < 2000 else 3, alpha=0.5 if len(true) < 2000 else 0.3, lw=0,
                 color=COLOURS["smooth"], rasterized=True)
    finite = np.concatenate([true, predicted])
    finite = finite[np.isfinite(finite)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0, 1)
    margin = 0.03 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    axes.plot(limits, limits, color=COLOURS["validation"], lw=1, label="predicted = true")
    axes.set(xlim=limits, ylim=limits, xlabel="true", ylabel="predicted", aspect="equal")
    axes.set_title(title, fontsize=8)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper left")
    return _save(figure, path)


def intervals(figures: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]], names: Sequence[str], path: Path,
              title: str = "") -> Path:
    """Plots figures (name, values, low ends, high ends), (n,) each, side by side: a point and its interval per name."""
    figure = new_figure(1 + 2.2 * len(figures), 1.3 + 0.28 * len(names))
    place = np.arange(len(names))
    for i, (name, values, low, high) in enumerate(figures):
        axes = figure.add_subplot(1, len(figures), i + 1)
        axes.hlines(place, low, high, color=COLOURS["smooth"])
        axes.plot(values, place, "o", ms=4, color=COLOURS["smooth"])
        axes.set_yticks(place, names if not i else [""] * len(names), fontsize=8)
        axes.set_title(name, fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(alpha=0.25)
        axes.margins(y=0.5 / len(names))
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    return _save(figure, path)


# ------------------------------------------------------------------------------------------------------ images


def alignments(maps: Sequence[tuple[np.ndarray, Sequence[str], Sequence[str]]], path: Path, across: str,
               down: str) -> Path:
    """Plots attention maps one below the other: (map (L, S), L names of rows, S names of columns) each. `across`,
    `down`: what columns and rows are."""
    sizes = [(max(len(columns), 4), max(len(rows), 4)) for _, rows, columns in maps]
    figure = new_figure(2.5 + 0.22 * max(width for width, _ in sizes), sum(1.4 + 0.22 * height for _, height in sizes),
                        layout="compressed")
    grid = figure.add_gridspec(len(maps), 1, height_ratios=[1.4 + 0.22 * height for _, height in sizes])
    shown = lambda names: [name.strip().replace("$", r"\$") or "\u2423" for name in names]
    for place, (values, rows, columns) in zip(grid, maps, strict=True):
        axes = figure.add_subplot(place)
        image = axes.imshow(values, cmap="Blues", vmin=0, vmax=max(float(values.max()), 1e-12), interpolation="nearest")
        axes.set_xticks(range(len(columns)), shown(columns), rotation=90, fontsize=7)
        axes.set_yticks(range(len(rows)), shown(rows), fontsize=7)
        axes.set(xlabel=across, ylabel=down)
        figure.colorbar(image, ax=axes, fraction=0.03, label="share of attention")
    return _save(figure, path)


def image_grid(images: np.ndarray, path: Path, titles: Sequence[str] = (), columns: int = 5,
               limits: tuple[float, float] | None = None) -> Path:
    """Plots images (n, H, W, C) in rows of `columns`, with optional titles.

    C is 1 or 3. uint8 is drawn unscaled; other dtypes are scaled from `limits`, by default the global min and max.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8:
        images = np.nan_to_num(images.astype(np.float32), posinf=0, neginf=0)
        low, high = limits or (float(images.min()), float(images.max()))
        images = np.clip((images - low) / max(high - low, 1e-12), 0, 1)
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    lines = max((title.count("\n") + 1 for title in titles), default=0)
    above = 0.18 * lines  # inches
    figure = new_figure(1.5 * columns, (1.5 + above) * rows, layout=None)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        bottom, whole = (rows - 1 - row) * (1.5 + above) + 0.04, (1.5 + above) * rows
        axes = figure.add_axes(((column + 0.03) / columns, bottom / whole, 0.94 / columns, 1.42 / whole))
        high = 255 if image.dtype == np.uint8 else 1
        axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=high,
                    interpolation="nearest")
        axes.set_axis_off()
        if len(titles):
            axes.set_title(titles[i], fontsize=7)
    return _save(figure, path)
