"""Knowledge distillation: a task around another, whose model also learns from the outputs of a trained teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from typing import Annotated, Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array

from lab.errors import UserError
from lab.tasks.base import EvalResult, Loss, Task
from lab.tasks.chunks import check_head, over_chunks
from lab.tasks.cross_entropy import token_weights
from lab.tasks.language import LanguageModel
from lab.tasks.masked import MaskedLM
from lab.tasks.supervised import Classify, each, mean_probability


@flax.struct.dataclass
class Taught:
    """A teacher as it was read: a pytree of its variables."""

    variables: Mapping[str, Any]
    model: nn.Module = flax.struct.field(pytree_node=False)


@dataclass(frozen=True)
class Distill(Task):
    """Distillation (Hinton, Vinyals & Dean 2015): a model, the student, learns a task and the outputs of a teacher.

    The loss of a record or token is weight T^2 KL(p_teacher || p_student) + (1 - weight) (the loss of `task`), p being
    the softmax of the logits divided by the temperature T. T^2 keeps the gradients of both at the same scale. The
    teacher is applied in evaluation mode to what the student sees (augmentation included). Of an `Ensemble` as teacher
    p is the mean over the members; as student, each member learns by itself. With `Classify.class_weights`, which this
    KL does not have, both sums are divided by the sum of the targets' weights.

    Metrics: those of `task` (loss, accuracy, ...), objective (what is optimised), distillation (the KL, in nats),
    agreement (share of records or tokens with the same most likely class), teacher_loss and teacher_accuracy. Without
    the teacher (see `lab.train.teacher`) an evaluation has those of `task` only.
    """

    task: Classify | LanguageModel | MaskedLM = Classify()
    """The task around which this is."""
    teacher: str | None = None
    """Run folder of the teacher (its last checkpoint), or a checkpoint RUN/checkpoints/STEP; or pretrained weights: a
    folder, hf:ORG/NAME or package:NAME/PATH, see lab/weights. None: the command names it."""
    temperature: float = 4.0
    """Temperature T of both softmaxes: above 1, classes that the teacher finds less likely count more."""
    weight: float = 0.5
    """Weight of the distillation; 1: the true targets are not used."""
    taught: Annotated[Taught | None, tyro.conf.Suppress] = dataclass_field(
        default=None, compare=False, metadata={"json": False})
    """The teacher, a `Taught`: read by `lab.train.teacher`, and an argument of the compiled step."""

    @property
    def fields(self) -> tuple[str, ...]:
        """What a record needs for `task`."""
        return self.task.fields

    @property
    def curves(self) -> tuple[str, ...]:
        """The curves of `task`, and of the distillation."""
        return (*self.task.curves, "distillation", "agreement")

    def validate(self) -> None:
        """Raises UserError for a value out of range, or a task that cannot be distilled."""
        if not isinstance(self.task, Classify | LanguageModel | MaskedLM):
            raise UserError(f"Distill is for tasks whose model gives logits (Classify, LanguageModel, MaskedLM), not "
                            f"for {type(self.task).__name__}.")
        if isinstance(self.temperature, int | float) and not 0 < self.temperature < float("inf"):
            raise UserError(f"--task.temperature must be above 0, not {self.temperature}.")
        if isinstance(self.weight, int | float) and not 0 <= self.weight <= 1:
            raise UserError(f"--task.weight must be in [0, 1], not {self.weight}: it is the share of the distillation.")
        try:
            self.task.validate()
        except UserError as e:
            raise UserError(str(e).replace("--task.", "--task.task.")) from None

    def filled(self, experiment: Any) -> Any:
        """What `task` fills in."""
        found = self.task.filled(replace(experiment, task=self.task))
        return replace(found, task=replace(self, task=found.task))

    def mixes_rows(self, model: nn.Module, data: Any, precision: str) -> bool:
        """Whether `task` does: a teacher treats each row by itself."""
        return self.task.mixes_rows(model, data, precision)

    def init(self, model: nn.Module, key: Array, batch: Mapping[str, Array]) -> dict[str, Any]:
        """The student's variables. Raises UserError for a student with a bootstrap."""
        self.check_bootstrap(model)
        return self.task.init(model, key, batch)

    def check(self, output: Any, data: Any) -> None:
        """See `task`."""
        self.task.check(output, data)

    def summary(self, means: Mapping[str, float], counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        """See `task`."""
        return self.task.summary(means, counts)

    def predict(self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]) -> dict[str, Array]:
        """See `task`."""
        return self.task.predict(model, variables, batch)

    def columns(self, predictions: Mapping[str, np.ndarray], data: Any) -> dict[str, list[Any]]:
        """See `task`."""
        return self.task.columns(predictions, data)

    def artifacts(self, outcome: EvalResult) -> list[str]:
        """See `task`."""
        return self.task.artifacts(outcome)

    def snapshot(self, outcome: EvalResult) -> None:
        """See `task`."""
        self.task.snapshot(outcome)

    def taught_by(self, model: nn.Module, variables: Mapping[str, Any]) -> Distill:
        """This task with its teacher."""
        return replace(self, taught=Taught(variables, model))

    def loss(self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array],
             rngs: Mapping[str, Array], train: bool) -> Loss:
        """`batch`: see `task`. Raises UserError if teacher and student differ in classes or vocabulary."""
        student = _Watched(model)
        own, weight, metrics, model_state = self.task.loss(student, variables, batch, rngs, train)
        if self.taught is None:
            if train:
                raise UserError("Distill has no teacher yet: lab.train.teacher.with_teacher reads it.")
            return own, weight, metrics, model_state
        teacher = _Watched(self.taught.model)
        check_head(teacher.model, getattr(self.task, "chunk", None))
        theirs = self.task.loss(teacher, self.taught.variables, batch, {}, False)[2]
        weights = _weights(self.task, model, batch)
        kl, agreed = self._compared(student, teacher, weights)
        objective = self.weight * self.temperature**2 * kl + (1 - self.weight) * own
        count = weights.sum()
        metrics = metrics | {"objective": (objective, weight), "distillation": (kl, count),
                             "agreement": (agreed, count)}
        metrics |= {f"teacher_{name}": theirs[name] for name in ("loss", "accuracy")}
        return objective, weight, metrics, model_state

    def _compared(self, student: _Watched, teacher: _Watched, weights: Array) -> tuple[Array, Array]:
        """Sums over records or positions of `compared`."""
        if getattr(self.task, "chunk", None) is None:
            self._same(student.output, teacher.output)
            return compared(student.output, teacher.output, weights, self.temperature)
        (x_BLD, kernel), (theirs_BLE, their_kernel) = student.output, teacher.output

        def sums(x: Array, kernel: Array, given: Any, numbers: Any) -> tuple[Array, Array]:
            logits = student.model.logits(x, kernel), teacher.model.logits(given[0], numbers[0])
            self._same(*logits)
            return compared(*logits, given[1], numbers[1])

        return over_chunks(sums, self.task.chunk, x_BLD, kernel, (theirs_BLE, weights),
                           (their_kernel, jnp.asarray(self.temperature, jnp.float32)))

    def _same(self, student: Any, teacher: Any) -> None:
        """Raises UserError for another number of classes or ids."""
        theirs, ours = (getattr(x, "values", x).shape[-1] for x in (teacher, student))
        if theirs != ours:
            what = "classes" if isinstance(self.task, Classify) else "ids in its vocabulary"
            raise UserError(f"The teacher {self.teacher} has {theirs:,} {what} and the model {ours:,}: a teacher needs "
                            f"the same ones.")


class _Watched:
    """A model that keeps what `apply` returned last."""

    def __init__(self, model: nn.Module):
        self.model, self.output = model, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        found = self.model.apply(*args, **kwargs)
        self.output = found[0] if "mutable" in kwargs else found
        return found


def compared(student: Any, teacher: Any, weights: Array, temperature: Any) -> tuple[Array, Array]:
    """(sum of KL(teacher || student) at this temperature in nats, number of equal most likely classes) over the records
    or positions of logits (..., V), each times its weight, float32 (...). Either may be `Members` (B, M, V)."""
    if weights.ndim == 1:
        student_BMV, teacher_BMV = each(student), each(teacher)
    else:  # positions; an ensemble of language models has no members' axis here
        student_BMV, teacher_BMV = (x.astype(jnp.float32)[..., None, :] for x in (student, teacher))
    log_p = mean_probability(jax.nn.log_softmax(teacher_BMV / temperature))[..., None, :]
    log_q = jax.nn.log_softmax(student_BMV / temperature)
    kl = (jnp.exp(log_p) * (log_p - log_q)).sum((-1, -2))
    return (kl * weights).sum(), ((_likely(student_BMV) == _likely(teacher_BMV)) * weights).sum()


def _likely(logits_BMV: Array) -> Array:
    """The most likely class of each record (...) by the mean over members."""
    alone = logits_BMV.shape[-2] == 1
    return (logits_BMV[..., 0, :] if alone else mean_probability(jax.nn.log_softmax(logits_BMV))).argmax(-1)


def _weights(task: Task, model: nn.Module, batch: Mapping[str, Array]) -> Array:
    """The weight of each record (B,) or position (B, L) of a task's logits."""
    if isinstance(task, MaskedLM):
        return task.hidden(model, batch)[2]
    if isinstance(task, LanguageModel):
        return token_weights(batch)
    return batch["weight"].astype(jnp.float32)
