"""Attributions: how much each unit of a record contributes to the number that a `Question` is about."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lab.explain.question import Question

GAP = 0.01  # completeness gap, as a share of the difference that is explained
FEWEST, MOST = 16, 4096  # steps


class Integrated(NamedTuple):
    """Integrated gradients and how good the integral is."""

    values: np.ndarray
    """float64 (U,)."""
    steps: int
    difference: float
    """The score of the record less that of the baseline."""
    gap: float
    """|sum of all attributions - difference| / |difference|; infinite if only the difference is 0."""


def integrated_gradients(question: Question, variables: Any = None, *, gap: float = GAP, fewest: int = FEWEST,
                         most: int = MOST) -> Integrated:
    """Integrated gradients (Sundararajan et al. 2017, equation 1): (x - x') times the mean gradient on the straight
    line from the baseline x' to x.

    The mean is by the trapezoidal rule. Its steps are doubled until the completeness gap is below `gap`, or there are
    `most`; doubling reuses all gradients.
    """
    x, start = question.x.astype(np.float64), question.baseline.astype(np.float64)
    values = question.scores(np.stack([x, start]), variables)
    difference, steps = float(values[0] - values[1]), 1
    mean = question.gradients(np.stack([start, x]), variables).mean(0)
    while True:
        total = (x - start) * mean
        missing = abs(float(total.sum()) - difference)
        short = missing / abs(difference) if difference else float("inf") if missing else 0.0
        if steps >= fewest and short < gap or steps >= most:
            return Integrated(question.by_unit(total), steps, difference, short)
        places = (np.arange(steps) + 0.5) / steps
        middle = np.zeros_like(x)
        for part in np.array_split(places, max(1, steps // 64)):  # bounds the memory
            points = start + part.reshape(-1, *[1] * x.ndim) * (x - start)
            middle += question.gradients(points, variables).sum(0) / steps
        mean, steps = (mean + middle) / 2, 2 * steps


def gradient_x_input(question: Question, variables: Any = None) -> np.ndarray:
    """Gradient times input (Shrikumar et al. 2017), of the inputs as the model gets them: float64 (U,)."""
    return question.by_unit(question.gradients(question.x[None], variables)[0] * question.x.astype(np.float64))


def occlusion(question: Question, variables: Any = None) -> np.ndarray:
    """How much the score falls if a window of units has the baseline's inputs (Zeiler & Fergus 2014): float64 (U,), the
    mean over the windows that a unit is in; 0 for a unit in none."""
    windows, drops = question.windows, []
    whole = question.scores(question.x[None], variables)[0]
    for part in np.array_split(windows, max(1, len(windows) // 64)):
        hidden = np.where(part[:, question.units], question.baseline, question.x)
        drops.append(whole - question.scores(hidden, variables))
    return np.concatenate(drops) @ windows / np.maximum(windows.sum(0), 1)
