"""Attributions: how much each unit of a record contributes to the number that a `Question` is about."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lab.explain.question import ROWS, Question

GAP = 0.01  # completeness gap, as a share of the difference that is explained
FEWEST, MOST = ROWS - 1, 4096  # steps
PART = 4 * ROWS  # points whose gradients are in memory together


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
    difference, steps = float(values[0] - values[1]), fewest

    def sums(places: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Weighted sum of the gradients at these places of the line, 0 to 1."""
        total = np.zeros_like(x)
        for at in range(0, len(places), PART):  # bounds the memory
            part = places[at : at + PART].reshape(-1, *[1] * x.ndim)
            gradients = question.gradients(start + part * (x - start), variables)
            total += np.tensordot(weights[at : at + PART], gradients, 1)
        return total

    mean = sums(np.arange(steps + 1) / steps, np.r_[0.5, np.ones(steps - 1), 0.5]) / steps
    while True:
        total = (x - start) * mean
        missing = abs(float(total.sum()) - difference)
        short = missing / abs(difference) if difference else float("inf") if missing else 0.0
        if short < gap or 2 * steps > most:
            return Integrated(question.by_unit(total), steps, difference, short)
        mean = (mean + sums((np.arange(steps) + 0.5) / steps, np.ones(steps)) / steps) / 2
        steps *= 2


def gradient_x_input(question: Question, variables: Any = None) -> np.ndarray:
    """Gradient times input (Shrikumar et al. 2017), of the inputs as the model gets them: float64 (U,)."""
    return question.by_unit(question.gradients(question.x[None], variables)[0] * question.x.astype(np.float64))


def occlusion(question: Question, variables: Any = None) -> np.ndarray:
    """How much the score falls if a window of units has the baseline's inputs (Zeiler & Fergus 2014): float64 (U,), the
    mean over the windows that a unit is in; 0 for a unit in none."""
    windows, drops = question.windows, []
    whole = question.scores(question.x[None], variables)[0]
    for part in np.array_split(windows, -(-len(windows) // PART)):
        hidden = np.where(part[:, question.units], question.baseline, question.x)
        drops.append(whole - question.scores(hidden, variables))
    return np.concatenate(drops) @ windows / np.maximum(windows.sum(0), 1)
