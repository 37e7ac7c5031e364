"""Figures of an explanation: pure functions from numbers to a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lab.train.plots import new_figure

FOR, AGAINST = "#c8501e", "#1f5a96"
BARS = 15  # most columns of a table that have bars
LAYERS, HEADS = 12, 12  # most that are drawn


def _colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("against-for", [AGAINST, "#ffffff", FOR])


def strength(values: np.ndarray) -> float:
    """The size of value that gets the full colour: the 99.5th percentile, so that one pixel does not fade the rest."""
    size = np.abs(values[np.isfinite(values) & (values != 0)])
    return float(np.percentile(size, 99.5)) if len(size) else 1.0


def _shown(axes: Any, image: np.ndarray, **how: Any) -> None:
    axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1, **how)
    axes.set_axis_off()


def overlays(image: np.ndarray, maps: Mapping[str, np.ndarray]) -> Any:
    """The image (H, W, C) in [0, 1], and on its outlines each map (H, W): orange for, blue against."""
    figure = new_figure(3.1 * (1 + len(maps)), 3.2 * image.shape[0] / image.shape[1] + 0.9)
    figure.set_layout_engine("compressed")  # for panels of a fixed shape
    axes = figure.subplots(1, 1 + len(maps), squeeze=False)[0]
    _shown(axes[0], image, interpolation="nearest")
    axes[0].set_title("input", fontsize=10)
    _bar(figure, axes[0], 1.0).ax.set_visible(False)  # keeps the panels level
    for place, (name, values) in zip(axes[1:], maps.items(), strict=True):
        most = strength(values)
        _shown(place, 0.75 + 0.25 * image, interpolation="nearest")
        share = np.clip(np.abs(values) / most, 0, 1)
        place.imshow(values, cmap=_colours(), vmin=-most, vmax=most, interpolation="nearest",
                     alpha=0.95 * np.sqrt(share))
        _bar(figure, place, most).ax.tick_params(labelsize=7)
        place.set_title(name, fontsize=10)
    return figure


def _bar(figure: Any, axes: Any, most: float) -> Any:
    """A colour bar by itself: that of a picture would have its transparency."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return figure.colorbar(ScalarMappable(Normalize(-most, most), _colours()), ax=axes, orientation="horizontal",
                           shrink=0.8, aspect=30, pad=0.02)


def bars(names: Sequence[str], maps: Mapping[str, np.ndarray]) -> Any:
    """One panel per method, one bar per column, the largest of the first method on top; at most `BARS`."""
    order = np.argsort(-np.abs(next(iter(maps.values()))), kind="stable")[:BARS]
    figure = new_figure(10.5, 0.9 + 0.27 * len(order))
    panels = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for axes, (title, values) in zip(panels, maps.items(), strict=True):
        shown = values[order]
        axes.barh(range(len(order)), shown, color=[FOR if x > 0 else AGAINST for x in shown], height=0.7)
        axes.axvline(0, color="#888888", lw=0.8)
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.08)
    panels[0].set_yticks(range(len(order)), [names[i] for i in order], fontsize=9)
    panels[0].invert_yaxis()
    return figure


def attention_grid(maps: np.ndarray, grid: tuple[int, int] | None, reader: int | None) -> Any:
    """Small maps, a row per layer and a column per head.

    Args:
      maps: (layers, heads, L, S).
      grid: rows and columns of the patches of an image, the last positions: draws how strongly the reader attends to
        each patch. None: draws queries (down) x keys (across).
      reader: the query to draw for images; None: the mean over all.
    """
    layers, heads = _chosen(len(maps), LAYERS), _chosen(maps.shape[1], HEADS)
    size = min(1.5, 10.5 / len(heads))
    figure = new_figure(max(size * len(heads) + 0.5, 3.0), size * len(layers) + 0.5)
    places = figure.subplots(len(layers), len(heads), squeeze=False)
    for row, layer in zip(places, layers, strict=True):
        for axes, head in zip(row, heads, strict=True):
            found = maps[layer, head]
            if grid is not None:
                found = found.mean(0) if reader is None else found[reader]
                found = found[-grid[0] * grid[1]:].reshape(grid)
            low = 0.0 if grid is None else float(found.min())  # patches share alike more often than tokens
            axes.imshow(found, cmap="Oranges", vmin=low, vmax=max(float(found.max()), 1e-9), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if layer == layers[0]:
                axes.set_title(f"head {head + 1}", fontsize=8)
            if head == heads[0]:
                axes.set_ylabel(f"layer {layer + 1}", fontsize=8)
    return figure


def _chosen(count: int, most: int) -> list[int]:
    """All of `count` numbers, or `most` of them, evenly spaced with both ends."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})
