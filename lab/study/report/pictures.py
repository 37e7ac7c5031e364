"""Figures of a report: pure functions from numbers to a figure."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lab.study.report.stats import ALPHA, Comparison, interval, spread_out
from lab.train.plots import new_figure

BASE = "#222222"
COLOURS = ("#1f5a96", "#c8501e", "#3f7d3a", "#8a4fa3", "#b8860b", "#1a8a8a", "#c2407a", "#6b6b2b", "#5b7fd6", "#8c3b2a")
STYLES = ("-", "--", ":", "-.")  # with 10 colours: 40 distinguishable arms
FEW = 6  # most arms whose bands stay distinguishable
WIDE = 3  # a bootstrap interval wider than this multiple of the t interval is cut off
Curve = tuple[np.ndarray, np.ndarray]


def png(figure: Any) -> bytes:
    """The figure as PNG bytes. Omits matplotlib's version, so that equal numbers give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _plain(axes: Any, **labels: str) -> None:
    axes.set(**labels)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _style(number: int) -> dict[str, Any]:
    """Line style of the n-th arm; the base (first) is black."""
    if number == 0:
        return {"color": BASE, "ls": "-"}
    return {"color": COLOURS[(number - 1) % len(COLOURS)], "ls": STYLES[(number - 1) // len(COLOURS) % len(STYLES)]}


# ------------------------------------------------------------------------------------------------------ curves


def together(curves: Sequence[Sequence[tuple[int, float]]]) -> Curve:
    """Curves of several seeds at their common steps: steps (m,), values (seeds, m)."""
    common = sorted(set.intersection(*({step for step, _ in c} for c in curves))) if curves else []
    return np.array(common), np.array([[dict(c)[step] for step in common] for c in curves])


def learning_curves(arms: Mapping[str, Curve], scales: Mapping[str, Mapping[str, float]], metric: str) -> Any:
    """One panel per unit of cost; for each arm the mean over seeds and a band from the lowest to the highest seed.

    Args:
      arms: name -> steps (m,), values (seeds, m); the base is first.
      scales: unit (such as "FLOPs") -> arm -> units per step. A panel omits arms missing from its scale.
      metric: name of the metric.

    The vertical range ignores the first fifth of each curve, whose large values would flatten the rest.
    """
    columns, rows = (1, 1) if len(scales) == 1 else (2, math.ceil(len(scales) / 2))
    beside = max(1, min(len(arms), int(9.4 / (1.3 + 0.085 * max(map(len, arms), default=0)))))  # legend columns
    figure = new_figure(9.4, 3.4 * rows + 0.2 * math.ceil(len(arms) / beside) + 0.2)  # as wide as the page
    late = [values[:, steps >= 0.2 * steps[-1]].ravel() for steps, values in arms.values() if len(steps)]
    seen = np.concatenate(late) if late else np.zeros(0)
    seen = seen[np.isfinite(seen)]
    handles: dict[str, Any] = {}
    for place, (unit, factors) in enumerate(scales.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        for number, (name, (steps, values)) in enumerate(arms.items()):
            if name in factors and len(steps):
                x, style = steps * float(factors[name]), _style(number)
                line, = axes.plot(x, values.mean(0), lw=1.6, zorder=3 if number == 0 else 2, **style)
                handles.setdefault(f"{name} (n = {len(values)})", line)
                if len(values) > 1:
                    axes.fill_between(x, values.min(0), values.max(0), color=style["color"], lw=0,
                                      alpha=0.15 if len(arms) <= FEW else 0.04)
        _plain(axes, xlabel=unit, ylabel=metric.replace("_", " "))
        if len(seen) and np.ptp(seen) > 0:
            axes.set_ylim(seen.min() - 0.05 * np.ptp(seen), seen.max() + 0.05 * np.ptp(seen))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=beside, frameon=False, fontsize=9)
    return figure


# ------------------------------------------------------------------------------------------------------ effects


def forest(comparisons: Mapping[str, Comparison], label: str, mode: str) -> Any:
    """Differences with their intervals, coloured if significant after Holm's correction.

    The thick line is the t interval, the thin line below it the bootstrap interval, which ends in an arrow if more
    than three times as wide. Arms without a pair are left out.
    """
    rows = {name: c for name, c in comparisons.items() if c.n}
    figure = new_figure(7.5, 1.3 + 0.42 * len(rows))
    axes = figure.add_subplot()
    for y, c in enumerate(rows.values()):
        mean, t, boot = c.difference, c.t, c.bootstrap
        good = (mean > 0) == (mode == "max")
        colour = BASE if not c.holm <= ALPHA else COLOURS[2] if good else COLOURS[1]
        axes.plot(mean, y, "o", color=colour, ms=6, zorder=3)
        axes.plot(t, (y, y), color=colour, lw=2.5, solid_capstyle="butt", zorder=2)
        for end, side, marker in zip(boot, t, "<>", strict=True):
            if math.isfinite(side) and not math.isnan(end):
                limit = mean + WIDE * (side - mean)
                beyond = abs(end - mean) > abs(limit - mean)
                axes.plot((mean, limit if beyond else end), (y + 0.22,) * 2, color=colour, lw=0.9,
                          marker=marker if beyond else "|", markevery=[1], ms=4)
    axes.axvline(0, color="#888888", lw=1, ls="--", zorder=1)
    _plain(axes, xlabel=label)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    good, bad = (1, 0) if mode == "max" else (0, 1)
    axes.text(good, 1.0, "better", transform=axes.transAxes, ha="right" if good else "left", va="bottom",
              color=COLOURS[2], fontsize=9)
    axes.text(bad, 1.0, "worse", transform=axes.transAxes, ha="right" if bad else "left", va="bottom",
              color=COLOURS[1], fontsize=9)
    return figure


def _bars(axes: Any, x: Sequence[float], values: Sequence[np.ndarray], colour: str, label: str, style: str) -> None:
    """Means with t intervals; each seed is a dash."""
    ends = [interval(v) for v in values]
    means = np.array([np.mean(v) for v in values])
    low, high = (np.nan_to_num(np.array([e[i] for e in ends]), nan=0.0) for i in (0, 1))
    known = np.array([len(v) > 1 for v in values])
    errors = np.where(known, [means - low, high - means], 0)
    axes.errorbar(x, means, yerr=errors, color=colour, ls=style, marker="o", ms=5, lw=1.5, capsize=3, label=label)
    for place, v in zip(x, values, strict=True):
        axes.plot([place] * len(v), v, "_", color=colour, alpha=0.6, ms=9, zorder=1)


def sweep(lines: Mapping[str, tuple[Sequence[float], Sequence[np.ndarray]]], optima: Mapping[str, float],
          axis: str, metric: str) -> Any:
    """The metric over a numeric axis: line -> (x ascending (m,), per-seed values at each x); marks optima."""
    figure = new_figure(7.5, 4.4)
    axes = figure.add_subplot()
    everywhere = np.concatenate([np.asarray(x, float) for x, _ in lines.values()])
    if logarithmic := spread_out(everywhere):
        axes.set_xscale("log")
    for number, (name, (x, values)) in enumerate(lines.items()):
        style, aside = _style(number + 1), number - (len(lines) - 1) / 2  # offset, so that bars do not overlap
        places = np.asarray(x, float)
        places = places * 1.03**aside if logarithmic else places + 0.008 * aside * np.ptp(everywhere)
        _bars(axes, places, values, style["color"], name, style["ls"])
        if name in optima:
            axes.axvline(optima[name], color=style["color"], lw=1, ls=":")
    _plain(axes, xlabel=axis, ylabel=metric.replace("_", " "))
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=9)
    return figure


def interactions(levels: Mapping[str, Sequence[str]], values: np.ndarray, metric: str, most: int = 6) -> Any:
    """For each pair of factors (up to `most`): the metric over one factor's levels, one line per level of the other.

    Args:
      levels: factor -> names of its levels.
      values: (levels of factor 0, levels of factor 1, ..., n); each panel averages over the factors it omits.
      metric: name of the metric.

    Parallel lines mean no interaction.
    """
    names = list(levels)
    pairs = list(itertools.combinations(range(len(names)), 2))[:most]
    columns = min(len(pairs), 3)
    rows = math.ceil(len(pairs) / columns)
    figure = new_figure(4.2 * columns, 3.6 * rows)
    for place, (i, j) in enumerate(pairs, 1):
        axes = figure.add_subplot(rows, columns, place)
        others = tuple(k for k in range(len(names)) if k not in (i, j))
        shown = values.mean(others) if others else values  # (levels i, levels j, n)
        for number, level in enumerate(levels[names[j]]):
            places = np.arange(len(levels[names[i]])) + 0.04 * number
            style = _style(number + 1)
            _bars(axes, places, list(shown[:, number]), style["color"], f"{names[j]} {level}", style["ls"])
        _plain(axes, xlabel=names[i], ylabel=metric.replace("_", " "))
        axes.set_xticks(range(len(levels[names[i]])), levels[names[i]])
        axes.margins(x=0.2)
        axes.legend(frameon=False, fontsize=9)
    return figure
