"""How the inputs and targets of training records are distributed, in few numbers, and how far other records are off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lab.data.pipeline import Arrays

BINS = 10
VALUES = 50  # of a category, at most; rarer ones count as other values do
READ = 10_000, 500  # training records: in memory; if each must be read
LEAST = 1e-4  # stands for a share of 0, whose logarithm is infinite
Bins = Mapping[str, Any]
"""JSON: `shares` of the bins, and either their `edges` (numbers; a value belongs to the bin below its edge) or their
`values`, followed by one bin for all other values."""


def values_of(data: Any, records: Any) -> dict[str, Sequence[Any]]:
    """The features of records whose distribution means something: a table's columns, the number of tokens of messages.
    Nothing of images, which would have to be decoded."""
    if not isinstance(records, Arrays):
        return {}
    if hasattr(data, "in_units"):
        return data.in_units(records.arrays["inputs"])
    return {"length": records.arrays["mask"].sum(-1).tolist()} if "mask" in records.arrays else {}


def statistics(data: Any) -> dict[str, Bins]:
    """Feature -> its bins over the training records; `prediction` is the target."""
    if data.train is None or len(data.train) == 0:
        return {}
    most = min(len(data.train), READ[0] if isinstance(data.train, Arrays) else READ[1])
    records = Arrays(data.train[np.linspace(0, len(data.train) - 1, most).astype(np.int64)])
    found = dict(values_of(data, records))
    if np.ndim(records.arrays.get("targets")) == 1:
        found["prediction"] = data.in_words(records.arrays["targets"])
    return {name: bins_of(values) for name, values in found.items()}


def bins_of(values: Sequence[Any]) -> Bins:
    """Ten bins of equal shares for numbers, a bin for each frequent value of anything else."""
    if all(isinstance(value, int | float) for value in values):
        edges = np.unique(np.quantile(np.asarray(values, np.float64), np.arange(1, BINS) / BINS))
        bins: Bins = {"edges": edges.tolist()}
    else:
        bins = {"values": [value for value, _ in Counter(map(str, values)).most_common(VALUES)]}
    return {**bins, "shares": (counts(bins, values) / len(values)).tolist()}


def counts(bins: Bins, values: Sequence[Any]) -> np.ndarray:
    """How many values are in each bin."""
    if "edges" in bins:
        places = np.searchsorted(bins["edges"], np.array([np.nan if x is None else x for x in values], np.float64))
    else:
        known = {value: i for i, value in enumerate(bins["values"])}
        places = np.array([known.get(str(value), len(known)) for value in values], np.int64)
    return np.bincount(places, minlength=len(bins.get("edges", bins.get("values"))) + 1)


def stability(bins: Bins, values: Sequence[Any]) -> float:
    """Population stability index: the sum over bins of (a - e) ln(a / e), a and e the shares of the bin among `values`
    and in training. By custom, below 0.1 nothing has moved, and above 0.25 much has."""
    actual, expected = (np.maximum(shares, LEAST) for shares in (counts(bins, values) / len(values), bins["shares"]))
    return float(np.sum((actual - expected) * np.log(actual / expected)))
