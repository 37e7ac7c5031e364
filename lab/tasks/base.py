"""The task interface: batch -> (loss sum, weight, metrics, model_state). Models, tasks and the train loop are separate.

A task is a frozen dataclass. Losses and metrics are (sum, weight), never means, so that microbatches, devices and hosts
are summed first and divided once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr

from lab.errors import UserError, where

Metrics = dict[str, Any]
"""name -> (sum, weight); in evaluation also name -> additive counts (a confusion matrix)."""
Loss = tuple[Array, Array, Metrics, dict[str, Any]]


def apply(model: nn.Module, variables: Mapping[str, Any], *inputs: Array, rngs: Mapping[str, Array], train: bool,
          **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """`model.apply`; returns the output and the mutable collections (changed only in training).

    Floating-point inputs are cast to the type of the parameters (the compute type).
    """
    kinds = (x.dtype for x in jax.tree.leaves(variables["params"]))
    dtype = next((kind for kind in kinds if jnp.issubdtype(kind, jnp.floating)), None)
    inputs = tuple(x.astype(dtype or x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in inputs)
    model_state = {name: value for name, value in variables.items() if name != "params"}
    if not train or not model_state:
        output = model.apply(variables, *inputs, train=train, rngs=rngs, **kwargs)
    else:
        output, model_state = model.apply(
            variables, *inputs, train=train, rngs=rngs, mutable=list(model_state), **kwargs
        )
    if output is None:
        raise UserError(f"{where(type(model))}{type(model).__name__} returns None; it must return its output.")
    return output, model_state


@dataclass(frozen=True)
class EvalResult:
    """An evaluated model, and what a task needs to write reports about it."""

    model: Any
    compute: Callable[..., Any]
    """``compute(f, *arrays, **static)`` is ``f(model, variables, *arrays, **static)`` as NumPy arrays, computed on the
    run's mesh with the evaluation parameters, in the compute type. `f` is a module-level function and `static` values
    are hashable. Every process must call it. Apply the model through this only: a plain `jax.jit` has no mesh, and TPU
    kernels cannot be sharded without one."""
    data: Any
    records: Any
    """The records of the evaluated split."""
    split: str
    means: Mapping[str, float]
    counts: Mapping[str, np.ndarray]
    predictions: Callable[..., dict[str, np.ndarray]]
    """`Task.predict` of every record of the split, or of the records that are its argument."""
    step: int
    seed: int
    folder: Path
    """Existing folder for plots and tables."""

    @functools.cached_property
    def _predicted(self) -> dict[str, np.ndarray]:
        return self.predictions()

    def predict(self, records: Any = None) -> dict[str, np.ndarray]:
        """`Task.predict` of every record of the split, computed once: name -> (number of records, ...). Or of other
        `records`."""
        return self._predicted if records is None else self.predictions(records)


@dataclass(frozen=True)
class Task:
    """Base class of all tasks, with defaults."""

    curves: ClassVar[tuple[str, ...]] = ("loss",)
    """Metrics to plot as curves."""

    fields: ClassVar[tuple[str, ...]] = ()
    """A record must have at least one of these fields."""

    reference: ClassVar[Mapping[str, str]] = {}
    """Field of a record -> the prediction that it holds, of the model as the run begins. Training and evaluation
    compute it once: see `lab.train.reference`. The data has zeros there."""

    whole_batch: ClassVar[bool] = False
    """Whether a record's loss depends on the other records of its batch. If so, a batch is never divided: the compiler
    partitions the whole, and options that compute the loss of a part of a batch are refused."""

    bootstraps: ClassVar[bool] = False
    """Whether the loss weighs records for each member: `lab.models.members.weighted`."""

    def validate(self) -> None:
        """Raises UserError for a value out of range."""

    def filled(self, experiment: Any) -> Any:
        """The `experiment`, whose task this is, with the fields set that follow from the task. May load the data."""
        return experiment

    def mixes_rows(self, model: nn.Module, data: Any, precision: str) -> bool:
        """See `mixes_rows` below. If true, how a batch is split into microbatches is part of the fingerprint."""
        return self.whole_batch or mixes_rows(self, model, data, precision)

    def init(self, model: nn.Module, key: Array, batch: Mapping[str, Array]) -> dict[str, Any]:
        """Parameters and mutable collections of the model for this kind of batch. UserError: see `check_bootstrap`."""
        self.check_bootstrap(model)
        mask = {"mask": batch["mask"][:1]} if "mask" in batch else {}
        inputs = batch["inputs"][:1]
        return model.init(key, inputs, train=False, **mask)

    def check_bootstrap(self, model: nn.Module) -> None:
        """Raises UserError for a model with a bootstrap that the loss would not use."""
        if getattr(model, "bootstrap", False) and not self.bootstraps:
            raise UserError(f"{type(self).__name__} has no weights of records for each member: --model.no-bootstrap.")

    def check(self, output: Any, data: Any) -> None:
        """Raises UserError if the model or the task does not fit the loaded data. Called once, before any computation.
        `output`: the model's output for one record, as `jax.ShapeDtypeStruct`s.
        """

    def loss(self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array],
             rngs: Mapping[str, Array], train: bool) -> Loss:
        """(sum of losses, sum of weights, metrics, mutable collections) of a batch."""
        raise NotImplementedError

    def summary(self, means: Mapping[str, float], counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Metrics that are not means, computed from the final means and counts."""
        return {}

    def predict(self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]) -> dict[str, Array]:
        """Predictions for each record: name -> (B, ...). Raises UserError if the task makes none."""
        raise UserError(f"{type(self).__name__} makes no predictions.")

    def columns(self, predictions: Mapping[str, np.ndarray], data: Any) -> dict[str, list[Any]]:
        """The table of predictions: column -> one value per record."""
        raise UserError(f"{type(self).__name__} makes no predictions.")

    def artifacts(self, outcome: EvalResult) -> list[str]:
        """Writes reports and plots when a run ends; returns lines to print."""
        return []

    def snapshot(self, outcome: EvalResult) -> None:
        """Writes plots after each evaluation of a run."""


def transform_batch(data: Any, batch: Mapping[str, Array], keys: Array, train: bool) -> Mapping[str, Array]:
    """Applies the data's transform to a batch. `keys` (B,): a random key for each record."""
    vocab = data.metadata().get("vocab")  # the tokenizer's; the model's may be padded
    known = {"vocab": jnp.full(keys.shape, vocab, jnp.int32)} if vocab else {}
    return data.transform({**batch, **known, "key": keys}, train)


def draws(f: Callable[..., Any], *args: Any) -> bool:
    """Whether the trace of a function draws random numbers (dropout)."""
    def drawn(jaxpr: Jaxpr | ClosedJaxpr) -> bool:
        eqns = (jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr).eqns
        inner = (p for eqn in eqns for p in jax.tree.leaves(eqn.params) if isinstance(p, Jaxpr | ClosedJaxpr))
        return any(eqn.primitive.name == "random_bits" for eqn in eqns) or any(map(drawn, inner))

    return drawn(jax.make_jaxpr(f)(*args))


def mixes_rows(task: Any, model: Any, data: Any, precision: str) -> bool:
    """Whether a row's result depends on the other rows of its (micro)batch: through batch statistics, or through random
    numbers drawn for the whole batch at once (dropout). Traced with abstract arrays. True if tracing fails; building
    the model then raises the error.
    """
    try:
        return _mixes_rows(task, model, data, precision)
    except TypeError:  # unhashable: a field is traced or a list
        return _mixes_rows.__wrapped__(task, model, data, precision)


@functools.lru_cache(64)
def _mixes_rows(task: Any, model: Any, data: Any, precision: str) -> bool:
    def loss(params: Any, model_state: Any, batch: Any) -> Array:
        params = jax.tree.map(lambda x: x.astype(precision) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)
        return task.loss(model, {"params": params, **model_state}, batch, {"dropout": jax.random.key(0)}, train=True)[0]

    def ready(batch: Any, train: bool) -> Any:
        return transform_batch(data, batch, jax.random.split(jax.random.key(0), 2), train)

    try:
        batch = {name: jax.ShapeDtypeStruct((2, *shape), dtype) for name, (shape, dtype) in data.record_spec().items()}
        batch |= {"weight": jax.ShapeDtypeStruct((2,), jnp.float32), "index": jax.ShapeDtypeStruct((2,), jnp.int32)}
        variables = jax.eval_shape(lambda batch: task.init(model, jax.random.key(0), ready(batch, False)), batch)
        model_state = {name: value for name, value in variables.items() if name != "params"}
        batch = jax.eval_shape(lambda batch: ready(batch, True), batch)
        return bool(jax.tree.leaves(model_state)) or draws(jax.grad(loss), variables["params"], model_state, batch)
    except Exception:  # the model cannot be built
        return True
