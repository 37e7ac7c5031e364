"""A trained model as a pure function: what the run's data gives -> logits, probabilities or numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lab.data.tables.table_data import TableData
from lab.errors import UserError
from lab.models.gan import GAN
from lab.models.gpt import GPT
from lab.tasks.base import apply
from lab.tasks.regress import Regress
from lab.tasks.supervised import Classify, forward
from lab.tasks.translate import Translate

Call = Callable[[Mapping[str, Any], Mapping[str, Array]], dict[str, Array]]
FIELDS = ("inputs", "mask", "segments")  # of a record: what a model may be given


class Input(NamedTuple):
    """The form of an input. Axes that may have any length are named: "B" batch, "L" length in tokens."""

    shape: tuple[int | str, ...]
    dtype: Any


class Function(NamedTuple):
    """A model's function, with what its file must say of it."""

    call: Call
    """(variables, inputs by name) -> outputs by name; pure."""
    inputs: Mapping[str, Input]
    variables: Mapping[str, Any]
    longest: int | None = None
    """The most tokens L that the model takes; None: any number."""
    most: int = 1 << 30
    """Ids of tokens are below this."""
    given: Call | None = None
    """`call` with the backends that training would choose, to compare with."""


def of_run(experiment: Any, data: Any, variables: Mapping[str, Any]) -> Function:
    """The function of a trained experiment. Of a GAN: its generator.

    Inputs are records as the data has them (uint8 images, token ids, encoded rows); normalisation is inside. Outputs:
    `Classify`: "logits" and "probabilities"; `Regress`: "prediction", in units of the target; language models: "logits"
    of each position; other tasks: the model's own outputs. `data`: without records is enough.

    Raises:
      UserError: the records have nothing that a model is given.
    """
    model, task, spec = experiment.model, experiment.task, experiment.data.record_spec()
    if isinstance(model, GAN):
        return _of_model(model, variables, {"latents": Input(("B", model.latent), np.float32)}, _generated)
    if isinstance(model, GPT):
        return of_weights(model, variables)
    if isinstance(task, Translate):
        raise UserError("An encoder-decoder is not exported, because its beam search is a program of its own: use "
                        "predict.")
    tokens = {} if "inputs" in spec or "tokens" not in spec else {"inputs": ((0,), np.int32)}
    fields = tokens or {name: spec[name] for name in FIELDS if name in spec}
    if "inputs" not in fields:
        raise UserError(f"The records have {', '.join(spec)}, and no inputs that a model could be given.")
    text = len(fields["inputs"][0]) == 1 and np.issubdtype(fields["inputs"][1], np.integer)
    inputs = {name: Input(("B", "L") if text else ("B", *shape), kind) for name, (shape, kind) in fields.items()}
    units = data.target.arrays(1) if isinstance(data, TableData) and not data.classes else {}

    def answer(model: nn.Module, variables: Mapping[str, Any], given: Mapping[str, Array]) -> dict[str, Array]:
        output, _ = forward(model, variables, experiment.data.transform(dict(given), False), {}, False)
        if isinstance(task, Classify):
            return {"logits": getattr(output, "values", output), **_floating(task.answer(output, {}))}
        if isinstance(task, Regress):
            prediction = task.answer(output, {})["prediction"]
            return {"prediction": prediction * units["scale"] + units["offset"].sum() if units else prediction}
        return _named(output, "logits" if hasattr(model, "vocab") else "output")

    return _of_model(model, variables, inputs, answer)


def of_weights(model: Any, variables: Mapping[str, Any], images: tuple[int, ...] = ()) -> Function:
    """The function of a pretrained model, without data: token ids, and but for GPT a mask; or images of a shape (H,
    W, C), float32 and normalised."""
    if isinstance(model, GPT):
        return _of_model(model, variables, {"tokens": Input(("B", "L"), np.int32)}, lambda model, variables, given: {
            "logits": apply(model, variables, given["tokens"], rngs={}, train=False)[0]})
    if hasattr(model, "vocab"):
        inputs = {"inputs": Input(("B", "L"), np.int32), "mask": Input(("B", "L"), np.uint8)}
    else:
        inputs = {"inputs": Input(("B", *images), np.float32)}
    return _of_model(model, variables, inputs, lambda model, variables, given: _named(
        forward(model, variables, given, {}, False)[0], getattr(model, "output", "logits")))


def _of_model(model: Any, variables: Mapping[str, Any], inputs: Mapping[str, Input], answer: Callable) -> Function:
    def calling(model: Any) -> Call:
        return lambda variables, given: answer(model, jax.tree.map(jnp.asarray, variables), given)

    longest = getattr(model, "context", None) if any("L" in form.shape for form in inputs.values()) else None
    return Function(calling(without_backends(model)), inputs, variables, longest,
                    getattr(model, "vocab", None) or 1 << 30, calling(model))


def without_backends(model: Any) -> Any:
    """The model with plain einsum attention, at any depth: what "auto" chooses here may not run elsewhere."""
    changed = {f.name: without_backends(value) for f in dataclasses.fields(model)
               if f.name != "parent" and isinstance(value := getattr(model, f.name), nn.Module)}
    if hasattr(model, "attention"):
        changed["attention"] = "einsum"
    return model.clone(**changed) if changed else model


def _generated(model: GAN, variables: Mapping[str, Any], given: Mapping[str, Array]) -> dict[str, Array]:
    return {"images": apply(model, variables, given["latents"], rngs={}, train=False, method="generate")[0]}


def _floating(answer: Mapping[str, Array]) -> dict[str, Array]:
    """Without the most likely class, which follows from the probabilities: a tie may fall either way."""
    return {name: x for name, x in answer.items() if jnp.issubdtype(x.dtype, jnp.floating)}


def _named(output: Any, name: str) -> dict[str, Array]:
    if isinstance(output, Mapping):
        return dict(output)
    parts = jax.tree.leaves(output)
    return {name: parts[0]} if len(parts) == 1 else {f"{name}_{i}": x for i, x in enumerate(parts)}


def example(function: Function, batch: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of a batch: uint8 images, token ids below the vocabulary, normal numbers; masks end at random."""
    rng, found = np.random.default_rng(seed), {}
    length = min(length, function.longest or length)
    for name, (shape, kind) in function.inputs.items():
        size = [{"B": batch, "L": length}.get(side, side) for side in shape]
        if name == "mask":
            found[name] = (np.arange(size[1]) < rng.integers(1, size[1] + 1, (batch, 1))).astype(kind)
        elif np.issubdtype(kind, np.integer):
            most = 2 if name == "segments" else min(function.most, 256 if np.dtype(kind).itemsize == 1 else 1 << 30)
            found[name] = rng.integers(0, most, size).astype(kind)
        else:
            found[name] = rng.standard_normal(size).astype(kind)
    return found


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> float:
    """The largest difference of any output, as a part of that output's largest number, if that is above 1."""
    pairs = [(np.asarray(found[name], np.float64), np.asarray(x, np.float64)) for name, x in wanted.items()]
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    worst = [np.abs(a - b).max() / max(1.0, np.abs(b).max()) for a, b in pairs]
    return float("inf") if not np.isfinite(worst).all() else float(max(worst))
