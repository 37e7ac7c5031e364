"""Joint training of several supervised tasks on one trunk (Caruana, "Multitask Learning", 1997)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lab.errors import UserError
from lab.tasks import reports
from lab.tasks.base import EvalResult, Loss, Task
from lab.tasks.regress import Regress
from lab.tasks.supervised import Classify, forward
from lab.train import plots

PAIRS = 10  # pairs of input and reconstruction to draw


@dataclass(frozen=True)
class Part:
    """One of the tasks, with the model output it applies to and its target."""

    name: str
    """Name of the model output; also the prefix of the metrics, columns and files."""
    task: Classify | Regress
    weight: float = 1.0
    """Weight of this loss in the sum."""
    target: Literal["targets", "inputs"] = "targets"
    """The target: the record's targets, or the model's inputs (reconstruction; Regress only)."""
    groups: tuple[int, ...] = ()
    """The coarse group of each class, to predict groups (Classify only). (): predict classes."""
    group_names: tuple[str, ...] = ()
    """Names of the groups, for tables and plots."""

    def of(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with this part's "targets"."""
        if self.target == "inputs":  # "scale" and "offset" are those of the targets
            rest = {name: value for name, value in batch.items() if name not in ("scale", "offset")}
            return rest | {"targets": batch["inputs"]}
        if not self.groups or "targets" not in batch:
            return dict(batch)
        targets, groups = batch["targets"], jnp.asarray(self.groups)
        if targets.ndim == 2:
            return {**batch, "targets": targets @ jax.nn.one_hot(groups, max(self.groups) + 1)}
        known = jnp.where(targets < 0, len(self.groups), targets)  # an invalid class is an invalid group
        return {**batch, "targets": groups.at[known].get(mode="fill", fill_value=-1)}

    def own(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The `values` whose names have this part's prefix, with the prefix removed."""
        start = f"{self.name}_"
        return {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}

    def named(self, values: Mapping[str, Any], separator: str = "_") -> dict[str, Any]:
        """The inverse of `own`."""
        return {f"{self.name}{separator}{name}": value for name, value in values.items()}

    def classes(self, data: Any) -> tuple[str, ...]:
        """Names of the classes or groups that this part predicts."""
        return self.group_names if self.groups else data.classes


@dataclass(frozen=True)
class MultiTask(Task):
    """Minimises the weighted sum of its parts' losses, each a mean over records. The model returns a dict of outputs.

    Metrics: loss, the weighted sum, and every metric of every part as <part>_<metric>. A part's class
    weights apply to its loss, but the sum is divided by the number of records, as for every part.
    """

    parts: tuple[Part, ...] = ()
    """The tasks."""

    @property
    def curves(self) -> tuple[str, ...]:
        """The loss, and the curves of the parts."""
        return ("loss", *(f"{part.name}_{name}" for part in self.parts for name in part.task.curves))

    def validate(self) -> None:
        """Raises UserError for invalid parts."""
        names = [part.name for part in self.parts]
        if not names or len(set(names)) < len(names) or not all(names):
            raise UserError("MultiTask needs parts=(Part(...), ...), each with a name of its own.")
        for i, part in enumerate(self.parts):
            flag = f"--task.parts.{i}"
            if isinstance(part.weight, int | float) and not 0 <= part.weight < float("inf"):
                raise UserError(f"{flag}.weight must be 0 or more, not {part.weight}.")
            if part.target == "inputs" and not isinstance(part.task, Regress):
                raise UserError(f"{flag}.target inputs: only Regress can match inputs.")
            if part.groups and (not isinstance(part.task, Classify) or min(part.groups) < 0):
                raise UserError(f"{flag}.groups must be numbers from 0, for a part whose task is Classify.")
            if part.group_names and len(part.group_names) != max(part.groups, default=-1) + 1:
                raise UserError(f"{flag}.group-names must have one name for each group.")
            if getattr(part.task, "reweigh", False):
                raise UserError(f"{flag}.task.reweigh: only a Classify of its own can be reweighed by group.")
            try:
                part.task.validate()
            except UserError as e:
                raise UserError(str(e).replace("--task.", f"{flag}.task.")) from None

    def filled(self, experiment: Any) -> Any:
        """What the parts fill in of the data."""
        for part in self.parts:
            experiment = part.task.filled(experiment)
        return experiment

    def loss(self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array],
             rngs: Mapping[str, Array], train: bool) -> Loss:
        """`batch`: see the parts' tasks. Raises UserError if the model's outputs do not fit the parts."""
        outputs, model_state = forward(model, variables, batch, rngs, train)
        self._check(outputs)
        total, weight, metrics = 0.0, batch["weight"].astype(jnp.float32).sum(), {}
        for part in self.parts:
            own = part.of(batch)
            loss, _, found = part.task.score(outputs[part.name], own["targets"], own, train)
            total += part.weight * loss
            metrics |= part.named(found)
        return total, weight, {"loss": (total, weight)} | metrics, model_state

    def check(self, output: Any, data: Any) -> None:
        """`Classify.check` and `Regress.check` of every part."""
        self._check(output)
        for part in self.parts:
            splits = reports.read_some(data, "targets")
            if part.target == "inputs":
                continue
            if not part.groups:
                part.task.check(output[part.name], data)
                continue
            for split, targets in splits.items():
                if len(targets) and not 0 <= targets.min() <= targets.max() < len(part.groups):
                    raise UserError(f"The {split} split has targets from {targets.min()} to {targets.max()}, and part "
                                    f"{part.name} has groups for the classes 0 to {len(part.groups) - 1}.")

    def _check(self, outputs: Any) -> None:
        """Checks shapes and classes, because JAX would silently clamp an index or broadcast a shape."""
        has = sorted(outputs) if isinstance(outputs, Mapping) else []
        for i, part in enumerate(self.parts):
            if part.name not in has:
                raise UserError(f"--task.parts.{i}.name {part.name} is not an output of the model, which has "
                                f"{', '.join(has) or 'a single output without a name'}.")
            if part.groups and max(part.groups) >= outputs[part.name].shape[-1]:
                raise UserError(f"--task.parts.{i}.groups has group {max(part.groups)}, but the model's output "
                                f"{part.name} is for {outputs[part.name].shape[-1]} groups.")
        fine = [outputs[p.name].shape[-1] for p in self.parts if isinstance(p.task, Classify) and not p.groups]
        for i, part in enumerate(self.parts):
            if part.groups and fine and len(part.groups) != fine[0]:
                raise UserError(f"--task.parts.{i}.groups has {len(part.groups)} numbers for {fine[0]} classes.")

    def summary(self, means: Mapping[str, float], counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The summaries of the parts."""
        found: dict[str, float] = {}
        for part in self.parts:
            found |= part.named(part.task.summary(part.own(means), part.own(counts)))
        return found

    def predict(self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]) -> dict[str, Array]:
        """The predictions of the parts as <part>_<name>; for a reconstruction also its "target", in half precision."""
        outputs, _ = forward(model, variables, batch, {}, False)
        self._check(outputs)
        found: dict[str, Array] = {}
        for part in self.parts:
            own = part.of(batch)
            answer = part.task.answer(outputs[part.name], own)
            if part.target == "inputs":  # for plots only, and one per record
                answer = {"prediction": answer["prediction"].astype(jnp.float16),
                          "target": own["targets"].astype(jnp.float16)}
            found |= part.named(answer)
        return found

    def columns(self, predictions: Mapping[str, np.ndarray], data: Any) -> dict[str, list[Any]]:
        """<part>_prediction and so on; for a reconstruction <part>_error, the record's mean squared error."""
        found: dict[str, list[Any]] = {}
        for part in self.parts:
            own = part.own(predictions)
            if part.target == "inputs":
                found |= part.named({"error": _errors(own).tolist()})
            elif isinstance(part.task, Classify):
                found |= part.named(part.task.named(own, part.classes(data)))
            else:
                found |= part.named(part.task.columns(own, data))
        return found

    def artifacts(self, outcome: EvalResult) -> list[str]:
        """Writes each part's plots and tables to files <part>_...; returns lines to print."""
        lines = []
        for part in self.parts:
            own = replace(outcome, means=part.own(outcome.means), counts=part.own(outcome.counts),
                          predictions=lambda part=part: part.own(outcome.predict()))
            if part.target == "inputs":
                found = [_reconstructions(own, part.name)]
            elif isinstance(part.task, Classify):
                targets = reports.read(outcome.records, "targets")["targets"]
                targets = np.asarray(part.groups)[targets] if part.groups else targets
                found = part.task.report(own, targets, part.classes(outcome.data), f"{part.name}_")
            else:
                found = part.task.report(own, f"{part.name}_")
            lines += [f"{part.name}: {found[0]}", *found[1:]]
        return lines + reports.beside(outcome)


def _errors(predictions: Mapping[str, np.ndarray]) -> np.ndarray:
    """Mean squared error of each record, (n,)."""
    difference = predictions["prediction"].astype(np.float32) - predictions["target"]
    return np.square(difference).reshape(len(difference), -1).mean(-1)


def _reconstructions(outcome: EvalResult, name: str) -> str:
    """For images, draws plots/<name>.png: inputs and, below them, their reconstructions. Returns a line."""
    found = outcome.predict()
    errors = _errors(found)
    if found["target"].ndim == 4:
        spread = np.linspace(0, len(errors) - 1, min(PAIRS, len(errors))).astype(int)
        target, prediction = (found[key][spread].astype(np.float32) for key in ("target", "prediction"))
        titles = [f"record {i}" for i in spread] + [f"error {errors[i]:.3f}" for i in spread]
        limits = float(target.min()), float(target.max())
        plots.image_grid(np.concatenate([target, prediction]), outcome.folder / "plots" / f"{name}.png", titles,
                         columns=len(spread), limits=limits)
    return (f"{outcome.split.capitalize()} split, {len(errors):,} records: mean squared error {errors.mean():.4g} "
            f"(R2 {outcome.means.get('r2', float('nan')):.4f})")
