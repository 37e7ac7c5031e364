"""What `./launch.sh explain` can explain: a question about a record of a run or of pretrained weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lab.commands.explain_text import next_token, similarity, text_subject
from lab.commands.location import open_location
from lab.commands.sample_weights import check_flags, language_model
from lab.data.images.images import ImageData
from lab.data.messages.messages import MessageData, encode_rows
from lab.data.pipeline import Arrays, eval_batches
from lab.data.tables.features import Category
from lab.data.tables.table_data import TableData
from lab.errors import UserError
from lab.explain.asked import Asked, baseline_of, class_number, text_or_none
from lab.explain.attention import attention_maps
from lab.explain.explanation import Subject
from lab.explain.question import Question, each_unit, squares
from lab.explain.sanity import top_modules
from lab.harness.value import text_of
from lab.models.bert import BERT
from lab.models.gpt import GPT
from lab.models.vit import ViT
from lab.tasks.regress import Regress
from lab.tasks.reports import class_names
from lab.tasks.supervised import Classify, described, each, forward
from lab.train.fitted import data_of
from lab.train.restore import open_run
from lab.train.step import eval_variables, prepare
from lab.weights.location import is_location
from lab.weights.read import find


def subject_of(run: str, asked: Asked, step: int | None, best: bool, experiment: Path | None) -> Subject:
    """The question about a record of a run or of weights, by the kind of model and data.

    Raises:
      UserError: no such run or weights, a model that has no such answers, or a record, class or baseline that does not
        fit.
    """
    if is_location(run):
        weights = find(run)
        if isinstance(weights.model, GPT):
            check_flags(run, step, best, experiment)
            model, variables, fitted = language_model(run)
            return next_token(f"GPT of {run}", model, _float32(variables), fitted, asked)
        if isinstance(weights.model, BERT) and experiment is None and weights.model.classes is None:
            check_flags(run, step, best, experiment)
            return similarity(run, weights, asked)
        found, data, program, state = open_location(Path(run), experiment, step=step, best=best)
    else:
        found, program, state = open_run(Path(run), step, best, file=experiment)
        data = data_of(Path(run), found)
    # In float32: in a shorter type the attributions would not add up.
    opened = replace(program.experiment, precision="float32")
    state = jax.device_put(jax.device_get(state), jax.devices()[0])
    variables, title = eval_variables(opened, state), f"{type(found.model).__name__} of {run}, step {int(state.step)}"
    if isinstance(found.model, GPT):
        return next_token(title, found.model, variables, text_of(found.model, data), asked)
    if not isinstance(found.task, Classify | Regress):
        raise UserError(f"explain is for models that classify, regress or continue a text; the task of {run} is "
                        f"{type(found.task).__name__}.")
    return _of_data(title, opened, variables, data, asked)


def _float32(variables: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), variables)


def _of_data(title: str, experiment: Any, variables: Any, data: Any, asked: Asked) -> Subject:
    """A record of images, tables or messages."""
    batch = _batch(experiment, _record(data, asked.input, asked.record or 0, "--input"))
    more = {name: batch[name] for name in ("mask", "segments") if name in batch}

    def run(variables: Any, inputs: Any) -> Any:
        rows = {name: jnp.broadcast_to(x, (len(inputs), *x.shape[1:])) for name, x in more.items()}
        return forward(experiment.model, variables, {"inputs": inputs, **rows}, {}, False)[0]

    output = jax.jit(run)(variables, batch["inputs"])
    number = _number(experiment.task, output, batch, data, asked)
    kind = _image if isinstance(data, ImageData) else _table if isinstance(data, TableData) else _messages
    subject = kind(experiment, variables, data, batch, asked, run, number[0])
    return replace(subject, title=title, asked=number[1], answers=number[2], offset=number[3],
                   modules=top_modules(lambda v: run(v, batch["inputs"]), variables))


def _record(data: Any, given: str, number: int, flag: str) -> dict[str, np.ndarray]:
    """One record, with an axis of length 1. Messages may also be given as a text."""
    if not isinstance(data, ImageData | TableData | MessageData):
        raise UserError("The run's data is none that explain can read new records of: tables, messages or images.")
    if isinstance(data, MessageData) and (text := text_or_none(given)) is not None:
        return encode_rows(data.fitted, [text], data.metadata["length"], data.truncate)[0]
    path = Path(given)
    if not path.exists():
        raise UserError(f"{flag} {given} does not exist.")
    found = data.read(path)
    if number not in found.numbers:
        last = max(found.numbers)
        raise UserError(f"{path} has no record {number}: " + (
            "it is blank." if 0 <= number <= last else f"there are 0 to {last}." if last else "there is only 0."))
    return found.records[np.array([found.numbers.index(number)])]


def _batch(experiment: Any, record: dict[str, np.ndarray]) -> dict[str, Any]:
    """The record as the model sees it."""
    return prepare(experiment, next(eval_batches(Arrays(record), 1)), False)


def _number(task: Any, output: Any, batch: Any, data: Any, asked: Asked
            ) -> tuple[Callable[[Any], Any], str, str, float]:
    """(model output -> the number (B,), its name, the model's answer, what to add to show the number)."""
    if isinstance(task, Regress):
        if asked.target is not None or asked.against is not None:
            raise UserError("--target and --against are for classes; this run predicts a number.")
        if output_shape(output) != (1,):
            raise UserError(f"explain needs one number for each record, and the model's output is "
                            f"{described(output)}.")
        scale = float(np.asarray(batch.get("scale", [1.0]))[0])
        offset = float(np.asarray(batch.get("offset", [0.0]), np.float64)[0].sum())
        name = getattr(getattr(data, "target", None), "column", "") or "the target"
        answer = float(each(output).mean(1)[0]) * scale + offset
        return lambda out: each(out).mean(1) * scale, f"the predicted {name}", f"{name} {answer:.5g}", offset
    shares = np.asarray(task.answer(output, batch)["probabilities"])[0]
    names = [str(name) for name in class_names(data.classes, len(shares))]
    first = int(shares.argmax())
    target = first if asked.target is None else class_number(asked.target, names, "--target")
    other = None if asked.against is None else class_number(asked.against, names, "--against")
    if target == other:
        raise UserError(f"--against is the explained class itself, {names[target]!r}: name another one.")
    rest = [i for i in range(len(names)) if i != target] if other is None else [other]
    what = f"log-odds of {names[target]} against {names[rest[0]] if len(rest) == 1 else 'all other classes'}"

    def of(out: Any) -> Any:
        logits_BC = each(out).mean(1)  # a logit alone says nothing: softmax sees differences only
        return logits_BC[:, target] - jax.nn.logsumexp(logits_BC[:, jnp.array(rest)], axis=1)

    return of, what, f"{names[first]} (probability {shares[first]:.4f})", 0.0


def output_shape(output: Any) -> tuple[int, ...]:
    """The shape of a model's output without members."""
    return tuple(each(output).mean(1).shape)


def _image(experiment: Any, variables: Any, data: Any, batch: Any, asked: Asked, run: Any, of: Any) -> Subject:
    inputs, model = np.asarray(batch["inputs"]), experiment.model
    height, width, channels = inputs.shape[1:]
    name, words = baseline_of(asked.baseline, ("zero", "mean"), file=True), {"zero": "a black image"}
    if name == "mean":
        base, words[name] = np.zeros_like(inputs[0]), "an image of the data's mean pixel"
    else:
        shape = (1, *experiment.data.record_spec()["inputs"][0])
        record = {"inputs": np.zeros(shape, np.uint8)} if name == "zero" else _record(data, name, 0, "--baseline")
        base = np.asarray(_batch(experiment, record)["inputs"])[0]
    side = max(2, max(height, width) // 7)
    units = np.broadcast_to(np.arange(height * width).reshape(height, width, 1), inputs.shape[1:])
    question = Question(lambda variables, x: of(run(variables, x)), variables, inputs[0], base, units,
                        squares(height, width, side))
    pixels = inputs[0] * np.array(experiment.data.std) + np.array(experiment.data.mean)
    vit = isinstance(model, ViT)
    return Subject(question, "image", "", "", "", words.get(name, name), f"squares of {side} x {side} pixels", (), (),
                   image=np.clip(pixels, 0, 1), attention=attention_maps(model, variables, inputs),
                   reader=0 if vit and model.pool != "mean" else None,
                   grid=(height // model.patch, width // model.patch) if vit else None)


def _table(experiment: Any, variables: Any, data: Any, batch: Any, asked: Asked, run: Any, of: Any) -> Subject:
    inputs = np.asarray(batch["inputs"])
    name = baseline_of(asked.baseline, ("mean", "zero"), file=True)
    words = {"mean": "a typical record (numbers at their training mean, categories at the most frequent one)",
             "zero": "a record whose encoded inputs are all 0"}
    base = np.zeros_like(inputs[0])
    if name == "mean":
        base = np.concatenate([_typical(feature, data.standardised) for feature in data.features]).astype(np.float32)
    elif name != "zero":
        base = np.asarray(_batch(experiment, _record(data, name, 0, "--baseline"))["inputs"])[0]
    units = np.repeat(np.arange(len(data.features)), [feature.width for feature in data.features])
    question = Question(lambda variables, x: of(run(variables, x)), variables, inputs[0], base, units,
                        each_unit(len(data.features)))
    cells = [f"{column[0]:.6g}" if isinstance(column[0], float) else column[0]
             for column in data.in_units(inputs).values()]
    return Subject(question, "table", "", "", "", words.get(name, name), "one column",
                   [feature.name for feature in data.features], (), cells=cells)


def _typical(feature: Any, standardised: bool) -> np.ndarray:
    """A column's inputs in a typical record; of a column that is not standardised, its median."""
    if isinstance(feature, Category):
        return np.array([value == feature.fill for value in feature.values], np.float64)
    return np.array([0.0 if standardised else feature.fill])


def _messages(experiment: Any, variables: Any, data: Any, batch: Any, asked: Asked, run: Any, of: Any) -> Subject:
    tokens, mask = np.asarray(batch["inputs"])[0], np.asarray(batch["mask"])[0].astype(bool)
    count, model, notes = int(mask.sum()), experiment.model, ()
    if mask.all():
        side = "behind them" if data.truncate == "end" else "before them"
        notes = (f"The model reads {count} tokens of a message; what comes {side} is cut off, as in training.",)
    first = isinstance(model, BERT) and model.pool != "mean"
    return text_subject(run, of, variables, tokens, count, data.fitted, asked.baseline, "pad",
                        attention=attention_maps(model, variables, tokens[None], mask=mask[None]),
                        reader=0 if first else None, notes=notes)
