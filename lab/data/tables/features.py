"""Encodes table columns as model inputs. Statistics come from the training rows only."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lab.data.pipeline import Batch
from lab.data.tables.columns import Columns, is_numeric, numbers, some
from lab.errors import UserError

# Why not scikit-learn's imputer, scaler and encoder (1.9.1): tried, they need 22 lines more, because a run's JSON must
# be set back into a dozen attributes, 5 of them private, and their errors name no row; and a constant column becomes
# 3e-17 where 0 is right. The tests compare the encoded tables with theirs.

LEARNABLE = 10  # so many categories may occur once each


@dataclass(frozen=True)
class Number:
    """A numeric column: (value - mean) / scale, with `fill` for a missing value."""

    name: str
    fill: float
    mean: float = 0.0
    scale: float = 1.0
    width = 1

    def encode(self, table: Columns) -> np.ndarray:
        """float64 (n, 1). UserError if a value is not a number."""
        values = numbers(table, self.name)
        return ((np.where(np.isnan(values), self.fill, values) - self.mean) / self.scale)[:, None]

    def decode(self, inputs: np.ndarray) -> list[float]:
        """The inputs (n, 1) in the column's units, up to float32 rounding."""
        return [float(f"{x:.6g}") for x in inputs[:, 0].astype(np.float64) * self.scale + self.mean]

    def __str__(self) -> str:
        return f"the training median {self.fill:.6g}"


@dataclass(frozen=True)
class Category:
    """A one-hot encoded column, with an input for each of `values` and `fill` for a missing value."""

    name: str
    fill: str
    values: tuple[str, ...]
    unseen: Literal["error", "zeros"]

    @property
    def width(self) -> int:
        """Number of inputs."""
        return len(self.values)

    def encode(self, table: Columns) -> np.ndarray:
        """float64 (n, width). UserError for an unknown value, unless `unseen` is "zeros"."""
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
        """The categories of inputs (n, width); "" for an unknown value."""
        return [self.values[int(row.argmax())] if row.any() else "" for row in inputs]

    def __str__(self) -> str:
        return f"the most frequent in training, {self.fill!r}"


Feature = Number | Category


def fit(table: Columns, name: str, rows: np.ndarray, *, standardise: bool, unseen: Literal["error", "zeros"],
        categories: int, text: bool = False) -> Feature:
    """Fits the encoding of a column on the training `rows`, int (m,); see `lab.data.tables.tables.Table`.

    `text`: the values are categories, even if they look like numbers.

    Raises:
      UserError: no values in the training rows, too many categories or one for every other row, or a text (in any row)
        in a numeric column.
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
        if len(count) > max(sum(count.values()) / 2, LEARNABLE) and not text and unseen == "error":
            raise UserError(
                f"{table.title}, column {name!r}: {len(count):,} different texts ({some(sorted(count))}) in "
                f"{sum(count.values()):,} training rows; dates, ranges, names and sentences are not "
                f"categories. Write them as numbers, or leave the column out (--data.source.drop); "
                f"--data.source.categorical accepts them anyway."
            )
        if count:
            fill = min(count, key=lambda value: (-count[value], value))
            return Category(name, fill, tuple(sorted(count)), unseen)
    raise UserError(f"{table.title}, column {name!r}: no training row has a value; leave it out with drop=.")


def _texts(table: Columns, name: str) -> list[str]:
    """The stripped cells; "" for a missing value."""
    return ["" if table.form.is_missing(value) else value.strip() for value in map(str, table.column(name))]


def encode(features: Sequence[Feature], table: Columns) -> np.ndarray:
    """float32 (n, F): all features, concatenated. UserError with line and column; see the features."""
    return np.concatenate([feature.encode(table) for feature in features], 1).astype(np.float32)


def gaps(features: Sequence[Feature], table: Columns) -> dict[Feature, int]:
    """Features with missing values -> number of missing values."""
    count = {}
    for feature in features:
        cells = table.column(feature.name)
        n = int(np.isnan(cells).sum()) if isinstance(cells, np.ndarray) else sum(map(table.form.is_missing, cells))
        if n:
            count[feature] = n
    return count


def moments(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of numbers (n,); the latter is 1 if all are equal."""
    constant = values.min() == values.max()
    return float(values[0] if constant else values.mean()), 1.0 if constant else float(values.std())


# ------------------------------------------------------------------------------------------------------- target


@dataclass(frozen=True)
class Target:
    """The column to predict: a class from `names`, or, without names, a number standardised on the training rows."""

    column: str
    names: tuple[str, ...] = ()
    mean: float = 0.0
    scale: float = 1.0

    def arrays(self, n: int, values: np.ndarray | None = None) -> Batch:
        """The arrays of n records except `inputs`. `values` (n,): classes, or numbers in the units of the file."""
        if self.names:
            return {} if values is None else {"targets": values.astype(np.int32)}
        high = np.float32(self.mean)  # two float32 parts, because devices compute in float32
        offset = np.array([high, self.mean - np.float64(high)], np.float32)
        units = {"scale": np.full(n, self.scale, np.float32), "offset": np.tile(offset, (n, 1))}
        return units | ({} if values is None else {"targets": ((values - self.mean) / self.scale).astype(np.float32)})


def known_numbers(table: Columns, name: str) -> np.ndarray:
    """A column of numbers, float64 (n,). UserError, with the line, if a value is missing."""
    values = numbers(table, name)
    for row in np.flatnonzero(np.isnan(values))[:1]:
        raise UserError(f"{table.where(row, name)}: the target is missing; give it, or delete the row.")
    return values
