"""Regression: squared or absolute error, in the units of the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lab.errors import UserError
from lab.tasks import group_report, reports
from lab.tasks.base import EvalResult, Metrics
from lab.tasks.supervised import Score, Supervised, described, each, in_units
from lab.train import plots


@dataclass(frozen=True)
class Regress(Supervised):
    """Regression. Output and targets are standardised (see `in_units`), (B,) or (B, ...); a record's loss is the mean
    over its elements. The output may also be `Members`.

    Metrics: loss (the criterion on standardised targets), objective (for an ensemble, the sum over its members), mse
    and mae in (squared) units of the target; in evaluation rmse, in units of the target, and r2 = 1 - sum (y - f)^2 /
    sum (y - mean y)^2. r2 uses sums of standardised values, for precision; NaN if all targets are equal. With `groups`
    also mean_error, the mean of f - y in units of the target.
    """

    criterion: Literal["mse", "mae", "huber"] = "mse"
    """The loss, with the error e in units of the training targets' standard deviation: e^2, |e|, or Huber's (1964):
    e^2 / 2 up to |e| = 1, then |e| - 1/2."""

    curves: ClassVar[tuple[str, ...]] = ("loss", "mae")

    def _score(self, output: Any, targets: Array, batch: Mapping[str, Array], train: bool) -> Score:
        """See `Supervised.score`; of `batch` also "scale" (B,), default 1. Raises UserError if the shapes of output and
        targets differ."""
        members = self._members(output, targets)
        targets, weight_B = targets.astype(jnp.float32), batch["weight"].astype(jnp.float32)
        weight = weight_B.sum()
        scale_B = batch.get("scale", jnp.ones_like(weight_B))

        def total(value: Array) -> tuple[Array, Array]:
            return (value.reshape(len(weight_B), -1).mean(-1) * weight_B).sum(), weight

        error = members.mean(1) - targets
        square, absolute = total(jnp.square(error)), jnp.abs(error).reshape(len(weight_B), -1)
        metrics: Metrics = {"loss": total(self._each(error)), "mae": total(absolute * scale_B[:, None]),
                            "mse": total(jnp.square(absolute * scale_B[:, None]))}
        if self.groups is not None:
            metrics["mean_error"] = total(error.reshape(len(weight_B), -1) * scale_B[:, None])
        if not train:
            metrics["moments"] = jnp.stack([weight, total(targets)[0], total(jnp.square(targets))[0], square[0]])
        if members.shape[1] == 1:
            return *metrics["loss"], metrics
        each = self._each(members - targets[:, None])
        objective = total(each)[0] * members.shape[1], weight
        return *objective, metrics | {"objective": objective}

    def _members(self, output: Any, targets: Any) -> Array:
        """float32 (B, M, ...)."""
        members = each(output)
        if members.shape[2:] != targets.shape[1:]:
            wanted = ", ".join(("records", *map(str, targets.shape[1:])))
            raise UserError(f"Regress needs an output of the targets' shape, ({wanted}), and the model's is "
                            f"{described(output)}. (One number a record has no axis of its own: y[:, 0].)")
        if not jnp.issubdtype(targets.dtype, jnp.number) or jnp.issubdtype(targets.dtype, jnp.complexfloating):
            raise UserError(f"Regress needs targets that are real numbers, not {targets.dtype}.")
        return members

    def check(self, output: Any, data: Any) -> None:
        """Raises UserError if the shapes of output and targets differ, or a target is not finite; see also
        `Supervised.check`."""
        super().check(output, data)
        for split, targets in reports.read_some(data, "targets").items():
            jax.eval_shape(self._members, output, targets)
            if not np.isfinite(targets).all():
                raise UserError(f"The {split} split has targets that are not finite numbers.")

    def _each(self, error: Array) -> Array:
        """The elementwise criterion."""
        size = jnp.abs(error)
        if self.criterion == "mae":
            return size
        return jnp.square(error) if self.criterion == "mse" else jnp.where(size < 1, size * size / 2, size - 0.5)

    def _summary(self, means: Mapping[str, float], counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        """rmse in units of the target, and r2."""
        weight, first, second, error = np.asarray(counts["moments"], np.float64)
        spread = second - first**2 / weight if weight else 0.0
        return {"rmse": float(np.sqrt(means["mse"])), "r2": float(1 - error / spread) if spread > 0 else float("nan")}

    def answer(self, output: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        """"prediction" (B, ...), the mean over members, standardised like the targets, with their "scale" and
        "offset"; see `in_units`."""
        units = {name: batch[name] for name in ("scale", "offset") if name in batch}
        return {"prediction": each(output).mean(1)} | units

    def columns(self, predictions: Mapping[str, np.ndarray], data: Any) -> dict[str, list[Any]]:
        """The prediction in units of the target."""
        return {"prediction": in_units(predictions, "prediction").tolist()}

    def artifacts(self, outcome: EvalResult) -> list[str]:
        """Writes plots/scatter.png and the records with the largest errors; returns lines to print."""
        return self.report(outcome) + reports.beside(outcome)

    def report(self, outcome: EvalResult, prefix: str = "") -> list[str]:
        """`artifacts` without the baselines; `prefix`: of the file names."""
        true = in_units(reports.read(outcome.records, "targets", "scale", "offset"), "targets")
        predicted = in_units(outcome.predict(), "prediction")
        title = f"{outcome.split.capitalize()} split, {len(true):,} records"
        head = f"{title}: {reports.fit(true, predicted)}"
        plots.scatter(true, predicted, outcome.folder / "plots" / f"{prefix}scatter.png", head)
        worst = np.argsort(-np.abs(predicted - true), kind="stable")[:reports.MOST]
        digits = reports.digits(true)
        reports.write_worst(outcome, worst, {"true": [f"{x:.{digits}g}" for x in true[worst]],
                                             "predicted": [f"{x:.{digits}g}" for x in predicted[worst]],
                                             "error": [f"{x:+.6g}" for x in (predicted - true)[worst]]}, prefix)
        return [head, *group_report.of_numbers(outcome, self.groups, true, predicted, prefix)]
