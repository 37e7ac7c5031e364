"""The table of `./launch.sh quantize`: two forms of one model on the same records."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lab.compress.quantized import bytes_of
from lab.data.pipeline import eval_batches
from lab.errors import UserError
from lab.experiment import Experiment
from lab.models.gpt import GPT
from lab.models.session import Session
from lab.parallel.sharding import constrained
from lab.tasks.base import apply
from lab.tasks.language import LanguageModel
from lab.train import metrics
from lab.train.program import Program
from lab.train.step import State, eval_variables, prepare

TIMED = 7  # batches that are timed
TOKENS = 24  # tokens that are timed
CONTEXT = 256  # rows of the key/value cache meanwhile, if the model can have fewer than its own


class Side(NamedTuple):
    """One form of the model."""

    program: Program
    state: State
    disk: int
    """Bytes of its parameters on disk."""


def compare(a: Side, b: Side, data: Any, records: int | None) -> dict[str, Any]:
    """Sizes, times and validation metrics of both forms; how far b's outputs are from a's.

    Raises:
      UserError: the data has no validation split.
    """
    if data.validation is None:
        raise UserError("This data has no validation split to compare on.")
    columns = []
    for side in (a, b):
        found = side.program.evaluate(side.state, _batches(side, data, records))[0]
        memory = bytes_of((side.state.params, side.state.model_state))
        columns.append({"disk_bytes": side.disk, "memory_bytes": memory, "metrics": found})
    names = ["ms_per_batch", *(["ms_per_token"] if isinstance(a.program.experiment.model, GPT) else [])]
    for name, times in zip(names, (_batch_times(a, b, data), *_token_times(a, b, data)), strict=True):
        for column, each in zip(columns, times, strict=True):
            column[name] = each
    size = len(data.validation)
    return {"original": columns[0], "quantized": columns[1], "records": min(records or size, size),
            "records_per_batch": a.program.eval_batch, "device": jax.devices()[0].device_kind,
            **_distance(a, b, data, records)}


def _batches(side: Side, data: Any, records: int | None) -> Iterator[dict[str, np.ndarray]]:
    return eval_batches(data.validation, side.program.eval_batch, records, side.program.eval_rows)


def _batch_times(a: Side, b: Side, data: Any) -> list[float]:
    """Milliseconds of the evaluation of one batch; medians of alternating runs, as the machine's speed may drift."""
    rows, times = next(_batches(a, data, a.program.eval_batch)), ([], [])
    for _ in range(TIMED):
        for side, own in zip((a, b), times, strict=True):
            start = time.perf_counter()
            side.program.evaluate(side.state, iter([rows]))
            own.append(time.perf_counter() - start)
    return [1000 * float(np.median(own)) for own in times]


def _token_times(a: Side, b: Side, data: Any) -> Iterator[list[float]]:
    """The same of one token of one text, with the key/value cache; nothing for other models than language models."""
    model = a.program.experiment.model
    if not isinstance(model, GPT) or not hasattr(data, "fitted"):
        return
    context = min(CONTEXT, model.context) if model.position == "rotary" else model.context
    texts, prompt = [], min(8, max(1, context // 4))
    for program, state, _ in (a, b):
        variables = jax.jit(lambda state, own=program.experiment: eval_variables(own, state))(state)
        session = Session(program.experiment.model.clone(context=context), variables["params"], vocab=data.fitted.size,
                          temperature=0.0)
        texts.append(session.tokens([1] * prompt))
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(max(1, min(TOKENS, context - prompt - 3)) + 2):  # the first two compile
        for text, own in zip(texts, times, strict=True):
            start = time.perf_counter()
            next(text)
            own += [time.perf_counter() - start] * (i > 1)
    yield [1000 * float(np.median(own)) for own in times]


def _distance(a: Side, b: Side, data: Any, records: int | None) -> dict[str, float]:
    """"kl", the mean Kullback-Leibler divergence of b's distributions from a's, in nats, and "changed", the share of
    outputs whose most likely class or token is another one; nothing for tasks without distributions."""
    def step(one: State, other: State, batch: Any) -> dict[str, Any]:
        with constrained(a.program.mesh):
            log_a, weight = _log_probabilities(a.program.experiment, one, batch)
            log_b, _ = _log_probabilities(b.program.experiment, other, batch)
        divergence = (jnp.exp(log_a) * (log_a - log_b)).sum(-1)
        changed = jnp.argmax(log_a, -1) != jnp.argmax(log_b, -1)
        return {"kl": ((divergence * weight).sum(), weight.sum()), "changed": ((changed * weight).sum(), weight.sum())}

    first = next(_batches(a, data, 1))
    try:
        jax.eval_shape(lambda state, batch: _log_probabilities(a.program.experiment, state, batch), a.state, first)
    except (UserError, KeyError):  # it makes no predictions, or no probabilities
        return {}
    total, jitted = None, jax.jit(step)
    for rows in _batches(a, data, records):
        total = metrics.add(total, jitted(a.state, b.state, rows))
    return metrics.means(total)


def _log_probabilities(experiment: Experiment, state: State, batch: Any) -> tuple[Array, Array]:
    """Log-probabilities (..., classes) and weights (...). KeyError, UserError for a task without them."""
    batch, variables = prepare(experiment, batch, False), eval_variables(experiment, state)
    if not isinstance(experiment.task, LanguageModel):
        found = experiment.task.predict(experiment.model, variables, batch)["probabilities"]
        return jnp.log(jnp.maximum(found, jnp.finfo(found.dtype).tiny)), batch["weight"]
    inputs_BL = batch["tokens"][:, :-1]
    given = {name: batch[name] for name in ("positions", "documents") if name in batch}
    logits_BLV, _ = apply(experiment.model, variables, inputs_BL, rngs={}, train=False, **given)
    weight_BL = jnp.broadcast_to(batch["weight"][:, None], inputs_BL.shape)
    return jax.nn.log_softmax(logits_BLV), weight_BL * batch.get("learn", 1.0)


def show(table: Mapping[str, Any], title: str) -> list[str]:
    """The lines to print."""
    a, b = table["original"], table["quantized"]
    rows = [("", "original", title, "")]
    for name in ("disk", "memory"):
        one, other = (x[f"{name}_bytes"] for x in (a, b))
        rows.append((f"MB {'on' if name == 'disk' else 'in'} {name}", f"{one / 1e6:.3f}", f"{other / 1e6:.3f}",
                     f"{one / other:.2f} x {'smaller' if one >= other else '(larger)'}"))
    for name in ("ms_per_batch", "ms_per_token"):
        if name in a:
            one, other = a[name], b[name]
            how = f"{one / other:.2f} x faster" if other <= one else f"{other / one:.2f} x slower"
            rows.append((name.replace("_", " "), f"{one:.2f}", f"{other:.2f}", how))
    for name, value in a["metrics"].items():
        change = b["metrics"][name] - value
        rows.append((name, f"{value:.5f}", f"{b['metrics'][name]:.5f}",
                     f"{change:+.5f}" + (f" ({change / abs(value):+.2%})" if value else "")))
    if "kl" in table:
        rows += [("KL to the original", "", f"{table['kl']:.6f}", "nats per output"),
                 ("changed answers", "", f"{table['changed']:.3%}", "")]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{row[0]:>{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows]
    return [f"{table['records']:,} validation records, batches of {table['records_per_batch']}, on {table['device']}",
            *lines]
