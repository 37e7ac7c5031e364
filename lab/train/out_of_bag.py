"""The out-of-bag estimate of an ensemble with a bootstrap: training records, each predicted by the members whose sample
does not have it (Breiman 1996, "Out-of-bag estimation")."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lab.data.pipeline import eval_batches
from lab.experiment import Experiment
from lab.models.members import WEIGHT, bootstrap
from lab.models.members import out_of_bag as mean_of_others
from lab.train.program import Program
from lab.train.step import Batch, Metrics, State, eval_variables, prepare


class _Others:
    """A model whose output for a record is the log of the mean probability of the members that did not learn it."""

    def __init__(self, model: Any, weight_BM: jax.Array):
        self.model, self.weight_BM = model, weight_BM

    def apply(self, *args: Any, **kwargs: Any) -> jax.Array:
        logits_BMC = self.model.apply(*args, **kwargs).values.astype(jnp.float32)
        return mean_of_others(jax.nn.log_softmax(logits_BMC), self.weight_BM)[0]


def bags(experiment: Experiment) -> bool:
    """Whether a run ends with the estimate. Not a private one, since the estimate is of training records."""
    return getattr(experiment.model, "bootstrap", False) and experiment.private is None


def out_of_bag(program: Program, state: State, records: Any, stop: Callable[[], bool]) -> Mapping[str, float] | None:
    """The task's metrics on the training `records`, as the others predict them, and "records", how many some member did
    not learn (of M members, all but a share of (1 - 1/e)^M). None if `stop` returned True before the end."""
    other = copy.copy(program)
    other._evaluate = program._with_numbers(_make_step)
    batches = eval_batches(records, program.eval_batch, rows=program.eval_rows)
    found = other.evaluate(state, batches, stop)
    return found and {"records": int(found[1]["records"]), **found[0]}


def _make_step(experiment: Experiment) -> Callable[[State, Batch], Metrics]:
    def step(state: State, batch: Batch) -> Metrics:
        weight_BM = bootstrap(experiment.model, experiment.seed, batch["index"])[WEIGHT]
        there_B = batch["weight"] * (weight_BM == 0).any(1)
        prepared = {**prepare(experiment, batch, False), "weight": there_B}
        found = experiment.task.loss(_Others(experiment.model, weight_BM), eval_variables(experiment, state), prepared,
                                     {}, train=False)
        return {**found[2], "records": (there_B > 0).sum()}

    return step
