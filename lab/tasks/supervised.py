"""Supervised learning: the base class `Supervised`, and `Classify` with its reports.

`score(output, targets, batch, train)` is the loss without the model, a pure function that `MultiTask` also calls. All
metrics are (sum, weight) or additive counts: exact over ragged batches, microbatches, devices and hosts.

The output of an `Ensemble` is `Members`, with the member axis after the batch axis. Its loss is the sum of the members'
losses, so each member trains exactly as it would alone; with a bootstrap each weighs the records in its own way. Its
predictions are the mean over the members.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array

from lab.errors import UserError
from lab.files import replace_file
from lab.models.members import WEIGHT, Members, weighted
from lab.tasks import group_report, groups, reports
from lab.tasks.base import EvalResult, Loss, Metrics, Task, apply
from lab.train import plots

Score = tuple[Array, Array, Metrics]
BINS = 1 << 16  # of the histogram of margins
STEEP, LARGEST = 1e3, 1e5  # bins are uniform in log(1 + STEEP |margin|), up to |margin| = LARGEST


def forward(model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array], rngs: Mapping[str, Array],
            train: bool) -> tuple[Any, dict[str, Any]]:
    """(model output for a batch, mutable collections); passes on the mask and segments of texts."""
    more = {name: batch[name] for name in ("mask", "segments") if name in batch}
    return apply(model, variables, batch["inputs"], rngs=rngs, train=train, **more)


@dataclass(frozen=True)
class Supervised(Task):
    """Base class of tasks with "targets"."""

    groups: str | None = field(default=None, kw_only=True, metadata={"fingerprint": "if set"})
    """Column of the data for metrics by group, such as sex; it may be an input or not. See lab/tasks/groups.py."""

    fields: ClassVar[tuple[str, ...]] = ("targets",)

    def filled(self, experiment: Any) -> Any:
        """See `Task.filled`: the data makes fields of the column `groups`, where it has columns."""
        data = experiment.data
        if self.groups is None or not hasattr(data, "groups") or self.groups in (data.groups or ()):
            return experiment
        return replace(experiment, data=replace(data, groups=(*(data.groups or ()), self.groups)))

    def check(self, output: Any, data: Any) -> None:
        """See `Task.check`. Raises UserError if the records have no field of `groups`."""
        if self.groups is not None:
            groups.fields_of(data.train[np.arange(1)], self.groups)

    def score(self, output: Any, targets: Array, batch: Mapping[str, Array], train: bool) -> Score:
        """(sum of losses, sum of weights, metrics) of a model's output. `batch`: "weight" (B,), maybe "scale" (B,); in
        evaluation the fields of `groups`, whose metrics are then there, too."""
        def of(weight_B: Array) -> Score:
            return self._score(output, targets, {**batch, "weight": weight_B}, train)

        loss, weight, metrics = of(batch["weight"])
        if not train and self.groups is not None:
            metrics |= groups.by_group(self.groups, batch, lambda weight_B: of(weight_B)[2])
        return loss, weight, metrics

    def _score(self, output: Any, targets: Array, batch: Mapping[str, Array], train: bool) -> Score:
        """`score` of all records."""
        raise NotImplementedError

    def summary(self, means: Mapping[str, float], counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        """See `Task.summary`: of all records, and with `groups` of each group."""
        found = self._summary(means, counts)
        return found if self.groups is None else found | groups.summary(means, counts, self._summary)

    def _summary(self, means: Mapping[str, float], counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        """`summary` of all records."""
        return {}

    def answer(self, output: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        """A model's output as predictions: name -> (B, ...)."""
        raise NotImplementedError

    def loss(self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array],
             rngs: Mapping[str, Array], train: bool) -> Loss:
        """`batch`: "inputs", "targets", "weight" (B,) 1 real and 0 padding; see `score`."""
        output, model_state = forward(model, variables, batch, rngs, train)
        return *self.score(output, batch["targets"], batch, train), model_state

    def predict(self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]) -> dict[str, Array]:
        """See `answer`."""
        return self.answer(forward(model, variables, batch, {}, False)[0], batch)


@dataclass(frozen=True)
class Classify(Supervised):
    """Classification by cross-entropy. Logits (B, C), or `Members` of them; targets int (B,) or soft (B, C).

    Metrics: loss (plain cross-entropy of the prediction, in nats), objective (the optimised loss, if class weights,
    `reweigh`, smoothing or members make it differ), accuracy, top5_accuracy (with more than 5 classes), and
    member_accuracy, the mean over the members. With soft targets (mixup), accuracy is the target's probability of the
    predicted class. Evaluation adds precision, recall and f1, macro averages over the classes that occur as target or
    prediction (scikit-learn's default with zero_division=0), and for two classes auc, the area under the ROC curve.

    auc comes from a histogram of margins log p1 - log p0; pairs within a bin count as ties. A bin is 6e-7 wide at 0,
    and 0.06 % of the margin beyond 0.01. Unless all margins lie within a few bins, the error is below 2e-4 (tested,
    also for overconfident models whose probabilities round to 0 and 1).
    """

    label_smoothing: float = 0.0
    """Mix the target with the uniform distribution (Szegedy et al. 2016): (1-e) target + e / classes."""
    class_weights: tuple[float, ...] = ()
    """A weight per class. The objective is the weighted mean, as in torch: sum w_y ce / sum w_y. A soft target has the
    expected weight of its classes (torch divides by the number of records instead). (): equal weights."""
    reweigh: bool = field(default=False, kw_only=True, metadata={"fingerprint": "if set"})
    """Weigh the training records so that group and class are independent (Kamiran & Calders 2012). Needs `groups`."""
    weights: Annotated[tuple[tuple[float, ...], ...] | None, tyro.conf.Suppress] = field(
        default=None, kw_only=True, metadata={"fingerprint": "if set"})
    """The weight of each group and class, computed from the training records with `reweigh`."""

    curves: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    bootstraps: ClassVar[bool] = True

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        if isinstance(self.label_smoothing, int | float) and not 0 <= self.label_smoothing < 1:
            raise UserError(f"--task.label-smoothing must be in [0, 1), not {self.label_smoothing}.")
        bad = any(not 0 <= w < float("inf") for w in self.class_weights)
        if bad or (self.class_weights and not any(self.class_weights)):
            raise UserError("--task.class-weights must be numbers of 0 or more, not all 0.")
        if self.reweigh and self.groups is None:
            raise UserError("--task.reweigh needs --task.groups, the column of the groups.")

    def filled(self, experiment: Any) -> Any:
        """See `Supervised.filled`; computes `weights`, for which it loads the data."""
        experiment = super().filled(experiment)
        if not self.reweigh:
            return experiment
        if experiment.private is not None:
            raise UserError("--task.reweigh counts the groups and classes of the training records, which is not "
                            "private, and DPSGD clips records one by one, without weights: use one of the two.")
        weights = groups.training_weights(experiment.data.load(), self.groups)
        return replace(experiment, task=replace(self, weights=weights))

    def init(self, model: nn.Module, key: Array, batch: Mapping[str, Array]) -> dict[str, Any]:
        """See `Task.init`. Raises UserError for a model without classes, whose outputs are not logits."""
        if getattr(model, "classes", 0) is None:
            raise UserError("Classification needs a model with classes: set --model.classes.")
        return super().init(model, key, batch)

    def _score(self, output: Any, targets: Array, batch: Mapping[str, Array], train: bool) -> Score:
        """See `Supervised.score`. Raises UserError for a wrong number of class weights, or a wrong shape or type of
        logits or targets. An int target outside [0, C) makes the loss NaN."""
        logits_BMC = self._logits(output)
        M, C = logits_BMC.shape[1:]
        if self.class_weights and len(self.class_weights) != C:
            raise UserError(f"--task.class-weights has {len(self.class_weights)} numbers, but there are {C} classes.")
        target_BC = _one_hot(targets, C)
        weight_B = batch["weight"].astype(jnp.float32)
        weight = weight_B.sum()
        logp_BMC = jax.nn.log_softmax(logits_BMC)
        logp_BC = mean_probability(logp_BMC)

        def total(value_B: Array) -> tuple[Array, Array]:
            return (value_B * weight_B).sum(), weight

        def right(logp: Array, k: int = 1) -> Array:
            """The target's total probability of the k most likely classes: (B,)."""
            best = jax.lax.top_k(logp, k)[1] if k > 1 else jnp.argmax(logp, -1, keepdims=True)
            return jnp.take_along_axis(target_BC, best, axis=-1).sum(-1)

        metrics: Metrics = {"loss": total(-(target_BC * logp_BC).sum(-1)), "accuracy": total(right(logp_BC))}
        if C > 5:
            metrics["top5_accuracy"] = total(right(logp_BC, 5))
        if M > 1:
            metrics["member_accuracy"] = total(jax.vmap(right, in_axes=1, out_axes=1)(logp_BMC).mean(-1))
        if not train:
            metrics |= _counts(logits_BMC[:, 0] if M == 1 else logp_BC, target_BC, weight_B)  # logits, for precision
        smoothed = not isinstance(self.label_smoothing, int | float) or self.label_smoothing > 0  # or traced
        if M == 1 and not self.class_weights and not smoothed and not self.reweigh and WEIGHT not in batch:
            return *metrics["loss"], metrics
        if self.reweigh:
            weight_B = weight_B * groups.record_weights(self.weights, self.groups, batch, target_BC)
        objective = self._objective(weighted(logp_BMC, batch), target_BC, weight_B)
        return *objective, metrics | {"objective": objective}

    def _logits(self, output: Any) -> Array:
        """float32 (B, M, C)."""
        logits_BMC = each(output)
        if logits_BMC.ndim != 3:
            raise UserError(f"Classify needs logits of shape (records, classes), and the model's output is "
                            f"{described(output)}.")
        return logits_BMC

    def _objective(self, logp_BMC: Array, target_BC: Array, weight_B: Array) -> tuple[Array, Array]:
        """(sum, weight) of the optimised loss: class weights and smoothing as in torch, summed over the members."""
        C = target_BC.shape[-1]
        weight_C = jnp.asarray(self.class_weights or (1.0,) * C, jnp.float32)
        smooth_BC = (1 - self.label_smoothing) * target_BC + self.label_smoothing / C
        each_B = -((weight_C * smooth_BC)[:, None] * logp_BMC).sum((1, 2))
        return (each_B * weight_B).sum(), ((target_BC * weight_C).sum(-1) * weight_B).sum()

    def check(self, output: Any, data: Any) -> None:
        """Raises UserError if the model's number of classes differs from the data's, or a target is not a class; see
        also `Supervised.check`."""
        super().check(output, data)
        self.check_targets(output, reports.read_some(data, "targets"), data.metadata.get("classes"))

    def check_targets(self, output: Any, splits: Mapping[str, np.ndarray], classes: int | None) -> None:
        """`check` for the targets of each split; `classes`: the data's number of classes (None: unknown)."""
        C = jax.eval_shape(self._logits, output).shape[-1]
        if classes is not None and classes != C:
            raise UserError(f"The data has {classes} classes and the model's output is {described(output)}, {C} "
                            f"classes. Make them equal.")
        for split, targets in splits.items():
            jax.eval_shape(functools.partial(_one_hot, C=C), targets)
            if targets.ndim == 1 and len(targets) and not 0 <= targets.min() <= targets.max() < C:
                raise UserError(f"The {split} split has targets from {targets.min()} to {targets.max()}, and the model "
                                f"has the {C} classes 0 to {C - 1}. Number the classes from 0, or give the model more.")

    def _summary(self, means: Mapping[str, float], counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Macro precision, recall and f1, and auc for two classes."""
        found = reports.macro(counts["confusion"])
        return found | ({"auc": reports.area(counts["scores"])} if "scores" in counts else {})

    def answer(self, output: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        """"probabilities" (B, C), the mean over members, and "prediction" int32 (B,)."""
        logp_BC = mean_probability(jax.nn.log_softmax(self._logits(output)))
        return {"probabilities": jnp.exp(logp_BC), "prediction": jnp.argmax(logp_BC, -1).astype(jnp.int32)}

    def columns(self, predictions: Mapping[str, np.ndarray], data: Any) -> dict[str, list[Any]]:
        """The name of the predicted class, and the probability of each class as p_<name>."""
        return self.named(predictions, data.classes)

    def named(self, predictions: Mapping[str, np.ndarray], classes: Sequence[str]) -> dict[str, list[Any]]:
        """`columns` for the class names `classes`; (): use class numbers."""
        probabilities = predictions["probabilities"]
        names = reports.class_names(classes, probabilities.shape[1])
        return {"prediction": [names[i] for i in predictions["prediction"]],
                **{name: probabilities[:, i].tolist() for i, name in enumerate(reports.column_names("p", names))}}

    def artifacts(self, outcome: EvalResult) -> list[str]:
        """Writes plots/confusion.png, report.txt and the worst mistakes; returns a table to print."""
        targets = reports.read(outcome.records, "targets")["targets"]
        return self.report(outcome, targets, outcome.data.classes) + reports.beside(outcome)

    def report(self, outcome: EvalResult, targets: np.ndarray, classes: Sequence[str], prefix: str = "") -> list[str]:
        """`artifacts` for these targets, int (n,), and class names; `prefix`: of the file names."""
        predictions = outcome.predict()
        predicted, probabilities = predictions["prediction"], predictions["probabilities"]
        names = reports.class_names(classes, probabilities.shape[1])
        confusion = reports.confusion(targets, predicted, len(names))
        title = f"{outcome.split.capitalize()} split, {len(targets):,} records"
        plots.confusion(confusion, names, outcome.folder / "plots" / f"{prefix}confusion.png", title)
        head = reports.headline(title, confusion)
        table = reports.class_table(confusion, names)
        replace_file(outcome.folder / f"{prefix}report.txt", "\n".join([head, "", *table]) + "\n")
        confidence = np.where(predicted == targets, -1.0, probabilities[np.arange(len(predicted)), predicted])
        worst = np.argsort(-confidence, kind="stable")[:reports.MOST]
        worst = worst[confidence[worst] >= 0]
        reports.write_worst(outcome, worst, {"true": [names[i] for i in targets[worst]],
                                             "predicted": [names[i] for i in predicted[worst]],
                                             "probability": [f"{p:.4f}" for p in confidence[worst]]}, prefix)
        return [head, *(f"  {line}" for line in reports.shortened(confusion, names)),
                *group_report.of_classes(outcome, self.groups, targets, probabilities, names, prefix)]


def in_units(values: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Standardised numbers (n, ...) in units of the target: values * scale + offset, in float64, since float32 cannot
    resolve targets of 1.7e9 +- 0.06. "scale" (n,); "offset" (n,), or (n, 2) float32 parts to sum."""
    found = np.asarray(values[name], np.float64)
    if "scale" not in values:
        return found
    scale, offset = (np.asarray(values[unit], np.float64) for unit in ("scale", "offset"))
    offset = offset.sum(-1) if offset.ndim > 1 else offset
    return (found.T * scale + offset).T


def each(output: Any) -> Array:
    """A model's output with the members as second axis, float32 (B, M, ...); M = 1 for a single model.

    Raises:
      UserError: the output is not an array of real numbers with an axis of records.
    """
    values = output.values if isinstance(output, Members) else output
    if not hasattr(values, "shape"):
        raise UserError(f"The model's output must be an array, and is {described(output)}: is it a model for another "
                        f"task?")
    if not values.ndim:
        raise UserError("The model's output must have an axis of records, and is one number.")
    return (values if isinstance(output, Members) else values[:, None]).astype(jnp.float32)


def described(output: Any) -> str:
    """A readable description of a model's output."""
    if isinstance(output, Members):
        return f"that of {output.values.shape[1]} members, {output.values.shape}"
    if isinstance(output, Mapping):
        return f"a dict of {', '.join(map(str, output))}"
    return f"of shape {output.shape}" if hasattr(output, "shape") else f"a {type(output).__name__}"


def _one_hot(targets: Any, C: int) -> Array:
    """float32 (B, C); NaN for an int target outside [0, C), which would otherwise have a loss of 0."""
    if targets.ndim == 2 and targets.shape[1] == C and jnp.issubdtype(targets.dtype, jnp.floating):
        return jnp.asarray(targets, jnp.float32)
    if targets.ndim != 1 or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise UserError(f"Classify needs targets that are whole numbers, one for each record, or probabilities of the "
                        f"{C} classes; these are {targets.dtype} {targets.shape}. For numbers use Regress.")
    known_B = (targets >= 0) & (targets < C)
    return jnp.where(known_B[:, None], jax.nn.one_hot(targets, C, dtype=jnp.float32), jnp.nan)


def mean_probability(logp_BMC: Array) -> Array:
    """Log of the members' mean probability: (..., C) of (..., M, C)."""
    M = logp_BMC.shape[-2]
    return logp_BMC[..., 0, :] if M == 1 else jax.nn.logsumexp(logp_BMC, axis=-2) - np.log(M)


def _counts(logits_BC: Array, target_BC: Array, weight_B: Array) -> dict[str, Array]:
    """"confusion" float32 (C, C) [true, predicted], for two classes "scores" (2, BINS): histogram of margins by truth.

    float32 counts are exact up to 2^24 per cell.
    """
    C = target_BC.shape[-1]
    truth_BC = target_BC * weight_B[:, None]
    counts = {"confusion": jnp.zeros((C, C)).at[:, jnp.argmax(logits_BC, -1)].add(truth_BC.T)}
    if C == 2:
        margin_B = logits_BC[:, 1] - logits_BC[:, 0]
        place_B = jnp.sign(margin_B) * jnp.log1p(STEEP * jnp.abs(margin_B)) / np.log1p(STEEP * LARGEST)  # -1 to 1
        bin_B = jnp.clip(jnp.round((place_B + 1) / 2 * (BINS - 1)), 0, BINS - 1).astype(jnp.int32)
        counts["scores"] = jnp.zeros((2, BINS)).at[:, bin_B].add(truth_BC.T)
    return counts
