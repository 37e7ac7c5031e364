"""What is explained: one number that a model computes from one record."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array

ROWS = 17  # points that are computed at once: both ends and 15 between are 16 steps of an integral


@dataclass(frozen=True)
class Question:
    """One number of a model's output for one record, seen as a function of the record's inputs.

    Inputs are what a gradient exists for: normalised pixels, encoded columns, embeddings of tokens. `units` are what a
    reader thinks in: a pixel with all its channels, a column with all its categories, a token with its whole embedding.
    """

    score: Callable[[Any, Array], Array]
    """(variables, inputs (B, *shape)) -> float32 (B,); differentiable, and each row by itself."""
    variables: Any
    x: np.ndarray
    """The record's inputs, float32 (*shape)."""
    baseline: np.ndarray
    """The inputs that it is compared with, float32 (*shape)."""
    units: np.ndarray
    """The unit of each input, int (*shape), from 0."""
    windows: np.ndarray
    """The units that occlusion hides together, bool (n, U)."""

    def by_unit(self, values: np.ndarray) -> np.ndarray:
        """Values of inputs (*shape), summed over each unit: float64 (U,)."""
        return np.bincount(self.units.ravel(), np.asarray(values, np.float64).ravel(), self.windows.shape[1])

    @functools.cached_property
    def moved(self) -> np.ndarray:
        """The units whose inputs differ from the baseline, bool (U,). Only these can have an attribution."""
        return self.by_unit(self.x != self.baseline) > 0

    @functools.cached_property
    def _scores(self) -> Callable[[Any, Array], Array]:
        return jax.jit(self.score)

    @functools.cached_property
    def _slopes(self) -> Callable[[Any, Array], Array]:
        return jax.jit(jax.grad(lambda variables, x: self.score(variables, x).sum(), argnums=1))

    def scores(self, points: np.ndarray, variables: Any = None) -> np.ndarray:
        """The number at each of the points (n, *shape): float64 (n,). `variables`: other than its own."""
        return self._in_parts(self._scores, points, variables)

    def gradients(self, points: np.ndarray, variables: Any = None) -> np.ndarray:
        """The number's gradient at each of the points (n, *shape): float64 (n, *shape)."""
        return self._in_parts(self._slopes, points, variables)

    def _in_parts(self, f: Callable[[Any, Array], Array], points: np.ndarray, variables: Any) -> np.ndarray:
        variables = self.variables if variables is None else variables
        found = []
        for at in range(0, len(points), ROWS):
            part = points[at : at + ROWS].astype(np.float32)
            padded = np.concatenate([part, np.repeat(part[-1:], ROWS - len(part), axis=0)])  # one program for all
            found.append(np.asarray(f(variables, padded), np.float64)[: len(part)])
        return np.concatenate(found)


def each_unit(count: int, chosen: np.ndarray | None = None) -> np.ndarray:
    """Windows of one unit each, bool (n, count); `chosen`, bool (count,): for these units only."""
    every = np.eye(count, dtype=bool)
    return every if chosen is None else every[chosen]


def squares(height: int, width: int, side: int) -> np.ndarray:
    """Windows of `side` x `side` pixels that overlap by half and cover the image: bool (n, height * width)."""
    def starts(size: int) -> list[int]:
        return sorted({*range(0, max(size - side, 0) + 1, max(side // 2, 1)), max(size - side, 0)})

    found = np.zeros((len(starts(height)), len(starts(width)), height, width), bool)
    for i, top in enumerate(starts(height)):
        for j, left in enumerate(starts(width)):
            found[i, j, top : top + side, left : left + side] = True
    return found.reshape(-1, height * width)
