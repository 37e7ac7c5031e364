"""Columns of a table as numbers for a model. What is learnt from data is learnt from the training rows only."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lab.data.pipeline import Batch
from lab.data.tables.columns import Columns, is_numeric, numbers
from lab.errors import UserError


@dataclass(frozen=True)
class Number:
    """A column of numbers: (value - mean) / scale, where `fill` is the value of a missing one."""

    name: str
    fill: float
    mean: float = 0.0
    scale: float = 1.0
    width = 1

    def encode(self, table: Columns) -> np.ndarray:
        """float64 (n, 1). UserError for what is no number."""
        values = numbers(table, self.name)
        return ((np.where(np.isnan(values), self.fill, values) - self.mean) / self.scale)[:, None]

    def decode(self, inputs: np.ndarray) -> list[float]:
        """The column of (n, 1) inputs, in its units: about what it was, since inputs are float32."""
        return [float(f"{x:.6g}") for x in inputs[:, 0].astype(np.float64) * self.scale + self.mean]

    def __str__(self) -> str:
        return f"the training median {self.fill:.6g}"


@dataclass(frozen=True)
class Category:
    """A column of text: one column of 0 and 1 for each of `values`, where `fill` is the value of a missing one."""

    name: str
    fill: str
    values: tuple[str, ...]
    unseen: Literal["error", "zeros"]

    @property
    def width(self) -> int:
        """Number of columns it becomes."""
        return len(self.values)

    def encode(self, table: Columns) -> np.ndarray:
        """float64 (n, width). UserError for a value that is not known, unless `unseen` says otherwise."""
        place = {value: i for i, value in enumerate(self.values)}
        out = np.zeros((len(table), len(place)))
        for row, value in enumerate(_texts(table, self.name)):
            value = value or self.fill
            if value in place:
                out[row, place[value]] = 1
            elif self.unseen == "error":
                raise UserError(
                    f"{table.where(row, self.name)}: no training row has the category {value!r}, only "
                    f'{some(self.values)}; correct it, or train with unseen="zeros" to let it count as none of them.'
                )
        return out

    def decode(self, inputs: np.ndarray) -> list[str]:
        """The categories of (n, width) inputs; "" where none of them was known."""
        return [self.values[int(row.argmax())] if row.any() else "" for row in inputs]

    def __str__(self) -> str:
        return f"the most frequent in training, {self.fill!r}"


Feature = Number | Category


def fit(table: Columns, name: str, rows: np.ndarray, *, standardise: bool, unseen: Literal["error", "zeros"],
        categories: int, text: bool = False) -> Feature:
    """What a column becomes, from the training `rows`, int (m,), only; see `lab.data.tables.tables.Table` for the rest.

    `text`: its values are categories, whatever they look like.

    Raises:
      UserError: no value in a training row, too many categories, or a text (in any row) in a column of numbers.
    """
    cells = table.column(name)
    if isinstance(cells, np.ndarray) or not text and is_numeric(table, name, rows):
        values = numbers(table, name)[rows]
        known = values[~np.isnan(values)]
        if len(known):
            fill = float(np.median(known))
            return Number(name, fill, *(moments(np.where(np.isnan(values), fill, values)) if standardise else ()))
    else:
        texts = _texts(table, name)
        count = Counter(texts[row] for row in rows if texts[row])
        if len(count) > categories:
            raise UserError(
                f"{table.title}, column {name!r}: {len(count):,} different texts ({some(sorted(count))}) are more than "
                f"the {categories} categories allowed; leave it out with drop=, or allow more with categories=."
            )
        if count:
            fill = min(count, key=lambda value: (-count[value], value))
            return Category(name, fill, tuple(sorted(count)), unseen)
    raise UserError(f"{table.title}, column {name!r}: no training row has a value; leave it out with drop=.")


def _texts(table: Columns, name: str) -> list[str]:
    """The cells without spaces around them; "" where the value is missing."""
    return ["" if table.form.is_missing(value) else value.strip() for value in map(str, table.column(name))]


def encode(features: Sequence[Feature], table: Columns) -> np.ndarray:
    """float32 (n, F): the features side by side. UserError with line and column; see the features."""
    return np.concatenate([feature.encode(table) for feature in features], 1).astype(np.float32)


def gaps(features: Sequence[Feature], table: Columns) -> dict[Feature, int]:
    """The features with missing values, and how many."""
    count = {}
    for feature in features:
        cells = table.column(feature.name)
        n = int(np.isnan(cells).sum()) if isinstance(cells, np.ndarray) else sum(map(table.form.is_missing, cells))
        if n:
            count[feature] = n
    return count


def moments(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of (n,) numbers; the latter counts as 1 where all are equal."""
    constant = values.min() == values.max()
    return float(values[0] if constant else values.mean()), 1.0 if constant else float(values.std())


def some(values: Sequence[str]) -> str:
    """The first few of them, for people."""
    return ", ".join(repr(value) for value in values[:5]) + (", ..." if len(values) > 5 else "")


# ------------------------------------------------------------------------------------------------------- target


@dataclass(frozen=True)
class Target:
    """The column to predict: one of `names`, or, where there are none, a number with the training rows' moments."""

    column: str
    names: tuple[str, ...] = ()
    mean: float = 0.0
    scale: float = 1.0

    def arrays(self, n: int, values: np.ndarray | None = None) -> Batch:
        """The arrays besides `inputs` of n records. `values` (n,): classes, or numbers in the units of the file."""
        if self.names:
            return {} if values is None else {"targets": values.astype(np.int32)}
        high = np.float32(self.mean)  # and what float32 rounds away: devices compute in float32
        offset = np.array([high, self.mean - np.float64(high)], np.float32)
        units = {"scale": np.full(n, self.scale, np.float32), "offset": np.tile(offset, (n, 1))}
        return units | ({} if values is None else {"targets": ((values - self.mean) / self.scale).astype(np.float32)})


def known_numbers(table: Columns, name: str) -> np.ndarray:
    """A column of numbers without gaps, float64 (n,). UserError, with its line, where a value is missing."""
    values = numbers(table, name)
    for row in np.flatnonzero(np.isnan(values))[:1]:
        raise UserError(f"{table.where(row, name)}: the target is missing; give it, or delete the row.")
    return values
