"""Metrics by group of records, the gaps between groups, and weights that make group and class independent.

A metric of a group is the task's metric with the weights of the other groups' records set to 0. So it is (sum, weight)
or counts like every metric: exact over ragged batches, microbatches, devices and hosts. Its name is METRIC/GROUP, such
as accuracy/sex=female; see `lab.data.tables.groups` for the fields of a record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lab.errors import UserError, nearest
from lab.tasks import reports

SIZE = "records"  # the metric that is a group's number of records
Counts = Mapping[str, np.ndarray]


def fields_of(names: Iterable[str], groups: str) -> list[str]:
    """Those of a record's fields that are groups of the column `groups`, sorted.

    Raises:
      UserError: there are none.
    """
    names = list(names)
    if found := sorted(name for name in names if name.startswith(f"{groups}=")):
        return found
    known = {name.partition("=")[0] for name in names if "=" in name}
    there = nearest(groups, known, f" They have {', '.join(sorted(names))}.")
    raise UserError(f"--task.groups {groups}: the records have no field {groups}=VALUE.{there} The columns of tables "
                    f"and of messages in CSV files become such fields; data of your own needs arrays of 0 and 1 with "
                    f"this name.")


def by_group(groups: str, batch: Mapping[str, Array], score: Callable[[Array], Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics of each group, and its number of records. `score`: weights (B,) -> metrics of a batch."""
    fields = fields_of(batch, groups)
    weight_GB = jnp.stack([batch[name].astype(jnp.float32) * batch["weight"] for name in fields])
    found = {**jax.vmap(score)(weight_GB), SIZE: weight_GB.sum(1)}
    return {f"{name}/{group}": jax.tree.map(lambda x, g=g: x[g], value)
            for name, value in found.items() for g, group in enumerate(fields)}


def of_group(values: Mapping[str, Any], group: str) -> dict[str, Any]:
    """The metrics or counts of one group, by the name that they have for all records."""
    return {name.removesuffix(f"/{group}"): value for name, value in values.items() if name.endswith(f"/{group}")}


def summary(means: Mapping[str, float], counts: Counts,
            of_all: Callable[[dict[str, float], dict[str, np.ndarray]], dict[str, float]]) -> dict[str, float]:
    """What follows from the sums by group: the metrics that are no means (`of_all` computes them for all records),
    the largest gap of each metric between two groups as METRIC_gap, and for classes the differences of `disparity`.
    Groups for which a metric is not defined do not count; NaN with fewer than two.
    """
    groups = [name.removeprefix(f"{SIZE}/") for name in counts if name.startswith(f"{SIZE}/")]
    found: dict[str, float] = {}
    every: dict[str, list[float]] = {}
    for group in groups:
        own, numbers = of_group(means, group), of_group(counts, group)
        more = of_all(own, numbers)
        for name, value in (own | more).items():
            every.setdefault(name, []).append(value)
        found |= {f"{name}/{group}": value for name, value in more.items()}
        found[f"{SIZE}/{group}"] = float(numbers[SIZE])
    found |= {f"{name}_gap": float(spread(np.array(values))) for name, values in every.items()}
    if all(f"confusion/{group}" in counts for group in groups):
        found |= disparity(np.stack([counts[f"confusion/{group}"] for group in groups]))
    return found


def spread(values: np.ndarray) -> np.ndarray:
    """Largest difference between two of the groups (G, ...), without NaN; NaN with fewer than two others."""
    known = np.isfinite(values)
    high, low = (f(np.where(known, values, other), 0) for f, other in ((np.max, -np.inf), (np.min, np.inf)))
    return np.where(known.sum(0) > 1, np.subtract(high, low, where=known.any(0), out=np.zeros(high.shape)), np.nan)


def rates(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(share of records predicted as each class (G, C), the same of the records of each true class (G, C, C)), from
    counts (G, C, C) [group, true, predicted]; NaN for 0 / 0."""
    confusion = np.asarray(confusion, np.float64)
    with np.errstate(invalid="ignore"):
        return confusion.sum(1) / confusion.sum((1, 2))[:, None], confusion / confusion.sum(2, keepdims=True)


def disparity(confusion: np.ndarray) -> dict[str, float]:
    """Demographic parity difference and equalized odds difference, from counts (G, C, C) [group, true, predicted].

    The first is the largest difference between two groups in the share of records predicted as a class (Dwork et al.
    2012; Calders & Verwer 2010), the second that among the records of one true class (Hardt, Price & Srebro 2016). For
    two classes they are fairlearn's `demographic_parity_difference` and `equalized_odds_difference`, whose selection
    rate is that of class 1. A group without records of a class has no rate there and does not count; fairlearn counts
    it as 0.
    """
    def largest(values: np.ndarray) -> float:
        gaps = spread(values)
        return float(np.nanmax(gaps)) if np.isfinite(gaps).any() else float("nan")

    selected, odds = rates(confusion)
    return {"demographic_parity_difference": largest(selected), "equalized_odds_difference": largest(odds)}


# ------------------------------------------------------------------------------------------------------ reweighing

Weights = tuple[tuple[float, ...], ...]


def reweighing(targets: np.ndarray, members: np.ndarray, classes: int) -> Weights:
    """The weight of each group and class (G, C): P(group) P(class) / P(group, class), with which group and class are
    independent (Kamiran & Calders, "Data preprocessing techniques for classification without discrimination", 2012);
    1 where there are no records.

    Args:
      targets: int (n,).
      members: (n, G), 1 for the group of a record.

    Raises:
      UserError: a record has not exactly one group.
    """
    if (wrong := np.flatnonzero(members.sum(1) != 1)).size:
        raise UserError(f"--task.reweigh needs one group for each record; training record {wrong[0]} is in "
                        f"{int(members[wrong[0]].sum())} of them.")
    count = members.astype(np.float64).T @ np.eye(classes)[targets]
    expected = count.sum(1, keepdims=True) * count.sum(0) / count.sum()
    weights = np.divide(expected, count, out=np.ones_like(count), where=count > 0)
    return tuple(tuple(row) for row in weights.tolist())


def training_weights(data: Any, groups: str) -> Weights:
    """`reweighing` of loaded data's training records. UserError if they have no such groups, or no classes."""
    fields = fields_of(data.train[np.arange(1)], groups)
    found = reports.read(data.train, "targets", *fields)
    targets = found["targets"]
    if targets.ndim != 1 or targets.dtype.kind not in "iu":
        raise UserError("--task.reweigh needs targets that are whole numbers, one for each record.")
    return reweighing(targets, np.stack([found[name] for name in fields], -1),
                      data.metadata.get("classes") or int(targets.max()) + 1)


def record_weights(weights: Weights | None, groups: str, batch: Mapping[str, Array], target_BC: Array) -> Array:
    """float32 (B,): the weight of each record's group and class; of soft targets the expected one."""
    if weights is None:
        raise UserError("--task.reweigh has no weights yet: Experiment.filled() computes them.")
    member_BG = jnp.stack([batch[name] for name in fields_of(batch, groups)], -1).astype(jnp.float32)
    weight_GC = jnp.asarray(weights, jnp.float32)
    if weight_GC.shape != (member_BG.shape[-1], target_BC.shape[-1]):
        raise UserError(f"--task.reweigh: the weights are for {weight_GC.shape[0]} groups and {weight_GC.shape[1]} "
                        f"classes, and there are {member_BG.shape[-1]} and {target_BC.shape[-1]}.")
    return ((member_BG @ weight_GC) * target_BC).sum(-1)
