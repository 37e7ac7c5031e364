"""What `./launch.sh serve` can offer: the service of a run or of pretrained weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from lab.commands.chat import prompt_of, run_language_model
from lab.commands.location import open_location
from lab.commands.sample_weights import check_flags, language_model
from lab.data.images.images import ImageData
from lab.data.messages.messages import MessageData
from lab.data.pipeline import eval_batches
from lab.data.statistics import statistics, values_of
from lab.data.tables.features import Category
from lab.data.tables.table_data import TableData
from lab.errors import UserError
from lab.experiment import Mesh
from lab.models.bert import BERT
from lab.models.gan import GAN
from lab.models.gpt import GPT
from lab.parallel.sharding import make_mesh, state_shardings
from lab.serve.drift import Drift
from lab.serve.embeddings import Embeddings, embedder
from lab.serve.engine import Engine
from lab.serve.language import Language
from lab.serve.records import Form, Predictions
from lab.serve.replicas import Replicas
from lab.serve.samples import Samples
from lab.serve.service import Service
from lab.serve.slots import Slots
from lab.serve.worker import Worker
from lab.tasks.adversarial import generate_images
from lab.tasks.reports import class_names
from lab.train.fitted import data_of, statistics_of
from lab.train.restore import open_run
from lab.train.step import eval_variables, make_predict_step
from lab.weights.location import is_location
from lab.weights.read import find, variables_of
from lab.weights.tokenizer import tokenizer_of

SIZES = (1, 16, 64)  # records of a batch, after padding


@dataclass(frozen=True)
class Options:
    """The flags of `serve` that say how a model is offered."""

    name: str
    slots: int
    context: int
    queue: int
    deadline: float
    precision: Literal["float32", "bfloat16"] = "float32"
    replicas: int = 1
    tensor: int = 1


def service_of(run: str, options: Options, step: int | None, best: bool, experiment: Path | None) -> Service:
    """The service of a run or of weights: text, predictions or embeddings, by the kind of the model.

    Raises:
      UserError: no such run or weights, or a model of another kind.
    """
    if is_location(run):
        weights = find(run)
        if isinstance(weights.model, GPT):
            check_flags(run, step, best, experiment)
            return _language(options, *language_model(run), None)
        if isinstance(weights.model, BERT) and experiment is None:
            check_flags(run, step, best, experiment)
            text = tokenizer_of(weights.location, weights.model)
            variables = variables_of(weights.arrays(lambda path, x: jax.device_put(x)))
            return _embeddings(options, weights.model, variables, text)
        found, data, program, state = open_location(Path(run), experiment, step=step, best=best)
        return _predictions(options, run, found, data, program, state)
    found, program, state = open_run(Path(run), step, best, file=experiment)
    if isinstance(found.model, GPT):
        model, variables, text, own = run_language_model(Path(run), found, state)
        return _language(options, model, variables, text, own)
    data, variables = data_of(Path(run), found), functools.partial(eval_variables, found, state)
    if isinstance(found.model, BERT) and found.model.classes is None and hasattr(data, "fitted"):
        return _embeddings(options, found.model, jax.device_get(variables()), data.fitted)
    if isinstance(found.model, GAN):
        return _samples(options, found.model, variables())
    return _predictions(options, run, found, data, program, state)


def _language(options: Options, model: GPT, variables: Any, text: Any, own: Any) -> Service:
    """`own`: how the run writes dialogues, or None."""
    if model.position == "rotary":  # the cache has a row for each position
        model = model.clone(context=min(options.context, model.context))
    engines = [Engine(Slots(model, params, slots=options.slots, vocab=text.size, precision=options.precision),
                      options.queue) for params in _replicas(options, variables["params"])]
    engine = engines[0] if len(engines) == 1 else Replicas(engines)
    return Language(options.name, engine, text, own or prompt_of(text, options.name), options.deadline)


def _replicas(options: Options, params: Any) -> Iterator[Any]:
    """The parameters, once for each replica, divided among its devices. Raises UserError for too few devices."""
    each, devices = options.tensor, jax.devices()
    if options.replicas * each > len(devices):
        raise UserError(f"--replicas {options.replicas} with --mesh.tensor {each} needs {options.replicas * each} "
                        f"devices; this machine has {len(devices)}.")
    for first in range(0, options.replicas * each, each):
        mesh = make_mesh(Mesh(data=1, tensor=each), devices[first:first + each])
        yield jax.device_put(params, state_shardings({"params": params}, mesh)["params"])


def _embeddings(options: Options, model: BERT, variables: Any, text: Any) -> Service:
    embed, compile_all = embedder(model.clone(output="embedding"), variables, text.pad)
    worker = Worker(compile_all, options.queue, options.deadline)
    return Embeddings(options.name, worker, text, embed, model.context)


def _samples(options: Options, model: GAN, variables: Any) -> Service:
    variables = jax.device_put(jax.device_get(variables), jax.devices()[0])

    @functools.partial(jax.jit, static_argnames=("f", "batch"))
    def compiled(f: Callable[..., Any], variables: Any, arrays: Any, batch: int) -> Any:
        return f(model, variables, *arrays, batch=batch)

    def make(number: int, seed: int) -> np.ndarray:
        return generate_images(lambda f, *arrays, batch: compiled(f, variables, arrays, batch), number, seed)

    return Samples(options.name, Worker(lambda: make(1, 0), options.queue, options.deadline), make)


def _predictions(options: Options, run: str, found: Any, data: Any, program: Any, state: Any) -> Service:
    if isinstance(data, TableData):
        form = Form("table", {f.name: f.values if isinstance(f, Category) else () for f in data.features},
                    data.classes, data.form.decimal, data.encoding)
    elif isinstance(data, MessageData):
        form = Form("messages", {data.column or "text": ()}, data.classes, encoding=data.encoding)
    elif isinstance(data, ImageData):
        form = Form("images", classes=data.classes)
    else:
        raise UserError(f"serve reads new records of tables, messages and images; {run} was trained on other data.")
    task, predict = found.task, _predictor(program, state)

    drift = Drift(statistics(data) if is_location(run) else statistics_of(Path(run)))

    def rows(path: Path) -> list[dict[str, Any]]:
        records = data.read(path, None, True).records
        given = predict(records)
        columns = {name: [_plain(x) for x in values] for name, values in task.columns(given, data).items()}
        if "probabilities" in given:
            names = class_names(data.classes, given["probabilities"].shape[1])
            columns = {"prediction": columns["prediction"], "probabilities": [
                dict(zip(names, map(_plain, row), strict=True)) for row in given["probabilities"].tolist()]}
        drift.saw({**values_of(data, records), "prediction": columns.get("prediction", [])})
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    spec = program.experiment.data.record_spec()
    record = {name: np.zeros((1, *shape), kind) for name, (shape, kind) in spec.items()}

    def compile_all() -> None:
        for size in SIZES:
            predict(_Same(record, size))

    task.columns(predict(_Same(record, 1)), data)  # UserError: the task makes no predictions
    service = Predictions(options.name, Worker(compile_all, options.queue, options.deadline), form, rows)
    service.drift = drift
    return service


def _plain(x: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(x, float) and not math.isfinite(x) else x


class _Same:
    """`count` times the same record."""

    def __init__(self, record: dict[str, np.ndarray], count: int):
        self._record, self._count = record, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.repeat(x, len(indices), axis=0) for name, x in self._record.items()}


def _predictor(program: Any, state: Any) -> Callable[[Any], dict[str, np.ndarray]]:
    """Records -> `Task.predict` of all of them, on the first device, in batches of a few sizes."""
    experiment = program.experiment
    state = jax.device_put(jax.device_get(state), jax.devices()[0])
    step = jax.jit(make_predict_step(experiment))

    def predict(records: Any) -> dict[str, np.ndarray]:
        size = next((size for size in SIZES if size >= len(records)), SIZES[-1])
        parts = [jax.device_get(step(state, batch)) for batch in eval_batches(records, size)]
        return {name: np.concatenate([part[name] for part in parts])[:len(records)] for name in parts[0]}

    return predict
