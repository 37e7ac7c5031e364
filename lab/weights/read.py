"""Reads a pretrained model: config.json to one of our models, its tensors to the model's parameters."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lab.compress.folder import Stored, is_stored
from lab.compress.folder import read as read_compressed
from lab.compress.model import reading
from lab.configuration.field_types import check_types
from lab.data.hugging_face import FittedHuggingFace
from lab.errors import UserError
from lab.weights.bert import BERT_FAMILY
from lab.weights.efficientnet import EFFICIENTNET_FAMILY
from lab.weights.gguf_files import GGUF, config_of
from lab.weights.gpt2 import GPT2
from lab.weights.gpt_neox import GPT_NEOX
from lab.weights.llama import LLAMA, LLAMA_GGUF
from lab.weights.location import locate, revision_of
from lab.weights.resnet import RESNET_FAMILY
from lab.weights.rules import TOKENS, Architecture, Config, Rule, Unused, applicable, matched
from lab.weights.tensors import SafeTensors, Tensors
from lab.weights.tokenizer import tokenizer_of
from lab.weights.vit import VIT_FAMILY

log = logging.getLogger(__name__)

ARCHITECTURES = {a.name: a for a in (GPT2, GPT_NEOX, *LLAMA, *LLAMA_GGUF, *BERT_FAMILY, *VIT_FAMILY, *RESNET_FAMILY,
                                     *EFFICIENTNET_FAMILY)}
STATE = "batch_stats"  # the only collection of our models beside their parameters


@dataclass(frozen=True)
class Found:
    """A pretrained model whose tensors fit; nothing is read yet but names and shapes."""

    location: str
    place: Path
    """The folder or file at the location."""
    model: Any
    architecture: Architecture
    tensors: Tensors | None
    """None in a folder that `quantize` wrote."""
    rules: tuple[Rule, ...]
    names: Mapping[str, str]
    """The name in the rules of every tensor -> its name in the file."""
    inputs: jax.ShapeDtypeStruct
    """An example of the model's inputs: the size of its images."""

    def arrays(self, put: Callable[[str, np.ndarray], Any] = lambda path, x: x) -> dict[str, Any]:
        """Our parameters by path, float32; those of other collections as batch_stats/... One tensor at a time is in
        memory, and `put` moves it to its devices. UserError for NaN, or for a copy that is none. Logs the
        time and the memory."""
        found, begin = {}, time.perf_counter()
        self._check_copies()
        for rule in self.rules:
            tensor = self.tensors.read(self.names[rule.theirs])
            for path, x in zip(rule.paths, rule.read(tensor, sizes(self.model)), strict=True):
                x = np.asarray(x, np.float32, order="C")
                if not np.isfinite(x).all():
                    raise UserError(f"{self.location}: {self.names[rule.theirs]} has values that are NaN or infinite.")
                found[path] = put(path, x)
        size = sum(x.size for x in jax.block_until_ready([x for x in found.values() if x is not None]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # bytes
        log.info("read %.1f M parameters in %.1f s; peak host memory %.2f GB", size / 1e6,
                 time.perf_counter() - begin, peak / 1e9)
        return found

    def _check_copies(self) -> None:
        """UserError if a tensor that should be a copy of another one is not."""
        for rule in self.architecture.rules:
            if isinstance(rule, Unused) and rule.same:
                for name in self._unused(rule):
                    one, other = (self.tensors.read(self.names[n]) for n in (name, rule.same))
                    if not np.array_equal(one, other):
                        raise UserError(f"{self.location}: {name} differs from {rule.same}, which it should equal "
                                        f"({rule.why}).")

    def _unused(self, rule: Unused) -> list[str]:
        taken = {r.theirs for r in self.rules}
        return [n for n in self.names if n not in taken and re.fullmatch(rule.theirs, n)]

    def report(self) -> dict[str, Any]:
        """For pretrained.json: where the weights came from, and which tensor became which parameter."""
        unused = {self.names[n]: r.why for r in self.architecture.rules if isinstance(r, Unused)
                  for n in self._unused(r)}
        return {"from": self.location, "revision": revision_of(self.place),
                "files": {file.name: _sha256(file) for file in self.tensors.files},
                "mapping": {self.names[r.theirs]: list(r.paths) for r in self.rules}, "unused": unused}


@dataclass(frozen=True)
class Compressed(Found):
    """A pretrained model in a folder that `quantize` wrote."""

    stored: Stored | None = None

    def arrays(self, put: Callable[[str, Any], Any] = lambda path, x: x) -> dict[str, Any]:
        """As `Found.arrays`; integer matrices are `Quantized`."""
        return {path: put(path, x) for path, x in self.stored.arrays.items()}

    def report(self) -> dict[str, Any]:
        """Where the weights came from."""
        return {"from": self.location, **self.stored.about}


def _compressed(location: str, place: Path, architecture: Architecture, model: Any, inputs: Any) -> Compressed:
    """Reads the arrays. UserError if they are not those of the model."""
    stored = read_compressed(place)
    arrays = {path.removeprefix("params/"): x for path, x in stored.arrays.items()}
    wanted = parameter_shapes(model, inputs)
    if wrong := [path for path in {**wanted, **arrays} if wanted.get(path) != getattr(arrays.get(path), "shape", None)]:
        raise UserError(f"{place} does not fit its own config: {wrong[0]} is not what the model has.")
    rules = tuple(applicable(architecture.rules, getattr(model, "depth", 1), wanted))
    return Compressed(location, place, reading(model), architecture, None, rules, {}, inputs,
                      Stored(arrays, stored.about))


def sizes(model: Any) -> dict[str, int]:
    """Lengths of the axes that patterns name: heads N, key/value heads G, head width K; y and x of a patch."""
    named = {"N": "heads", "G": "groups", "K": "head", "y": "patch", "x": "patch"}
    return {axis: getattr(model, name) for axis, name in named.items() if hasattr(model, name)} | {"two": 2}


def find(location: str) -> Found:
    """The pretrained model at a location (see `locate`).

    Raises:
      UserError: no such place; an architecture, field or tensor that is not known; shapes that do not fit.
    """
    place = locate(location)
    if place.is_dir():
        config, tensors = _config(place / "config.json"), None
    else:
        tensors = GGUF(place)
        config = Config(config_of(tensors), str(place))
    name = config.get("model_type", config.get("architecture"))
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(f"{config.title}: model_type {name!r} is not known here; known are "
                        f"{', '.join(ARCHITECTURES)}.")
    architecture = ARCHITECTURES[name]
    model, inputs = _model(architecture, config)
    if is_stored(place):
        return _compressed(location, place, architecture, model, inputs)
    tensors = tensors or SafeTensors(place)
    names = _present_names(architecture, tensors)
    theirs = {present: tensors.shapes[name] for present, name in names.items()}
    depth = getattr(model, "depth", 1)
    if depth > max(len(theirs), 1):  # a million layers would take hours to compare
        raise UserError(f"{config.title} describes {depth} layers, and {location} has only {len(theirs)} tensors.")
    rules = matched(architecture.rules, depth, theirs, parameter_shapes(model, inputs), sizes(model), location)
    for rule in rules:
        tensors.check(names[rule.theirs])
    return Found(location, place, model, architecture, tensors, tuple(rules), names, inputs)


def _model(architecture: Architecture, config: Config) -> tuple[Any, jax.ShapeDtypeStruct]:
    """(our model, an example of its inputs). UserError for fields that are wrong, or contradict each other."""
    try:
        model, inputs = architecture.model(config), architecture.inputs(config)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as e:  # of a field that is text, a list, null or 0
        raise UserError(f"{config.title}: a field has a value that cannot be used ({e}).") from None
    try:
        check_types(model, "model")
        model.validate()
        if getattr(model, "vocab", 0) is None:
            raise UserError("The size of the vocabulary is null.")
    except UserError as e:
        raise UserError(f"{config.title}: {str(e).replace('--model.', '')}") from None
    return model, inputs


def _present_names(architecture: Architecture, tensors: Tensors) -> dict[str, str]:
    """Name in the rules -> name in the file, which may lack the prefix or have an early form."""
    whole = any(n.startswith(architecture.prefix) for n in tensors.shapes)

    def present(name: str) -> str:
        for early, now in architecture.former:
            name = name.removesuffix(early) + now if name.endswith(early) else name
        return name if whole else architecture.prefix + name

    return {present(name): name for name in tensors.shapes}


def model_of(location: str) -> Any:
    """Our model of the config.json at a location, such as GPT(...); reads no weights. Raises as `find`."""
    return find(location).model


def read(location: str) -> tuple[Any, dict[str, Any], FittedHuggingFace | None]:
    """(model, variables, tokenizer): ``model.apply(variables, tokenizer.encode(text)[None], train=False)``.

    The tokenizer is None if the location has none. Raises as `find` and `tokenizer_of`.
    """
    found = find(location)
    tokens = ("tokenizer.ggml.model" in found.tensors.metadata if isinstance(found.tensors, GGUF)
              else (found.place / "tokenizer.json").exists())
    return found.model, variables_of(found.arrays()), tokenizer_of(location, found.model) if tokens else None


def variables_of(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The model's variables, collection by collection, of arrays by path (see `Found.arrays`)."""
    split = {path if path.startswith(f"{STATE}/") else f"params/{path}": x for path, x in arrays.items()}
    return unflatten_dict(split, sep="/")


def parameter_shapes(model: Any, inputs: jax.ShapeDtypeStruct = TOKENS) -> dict[str, tuple[int, ...]]:
    """Path (see `Found.arrays`) -> shape of the model's variables for an example of its inputs; computes nothing."""
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), inputs)
    return {path.removeprefix("params/"): x.shape for path, x in flatten_dict(variables, sep="/").items()}


def _config(path: Path) -> Config:
    try:
        values = json.loads(path.read_text("utf-8"))
    except OSError:
        raise UserError(f"{path.parent} has no config.json, so the model cannot be known.") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON ({e}).") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object.")
    return Config(values, str(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
