"""Reads a pretrained model: config.json to one of our models, its tensors to the model's parameters."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lab.errors import UserError
from lab.weights.gguf_files import GGUF, config_of
from lab.weights.gpt2 import GPT2
from lab.weights.gpt_neox import GPT_NEOX
from lab.weights.llama import LLAMA, LLAMA_GGUF
from lab.weights.location import locate
from lab.weights.rules import Architecture, Config, Rule, Unused, matched
from lab.weights.tensors import SafeTensors, Tensors

ARCHITECTURES = {a.name: a for a in (GPT2, GPT_NEOX, *LLAMA, *LLAMA_GGUF)}


@dataclass(frozen=True)
class Found:
    """A pretrained model whose tensors fit; nothing is read yet but names and shapes."""

    location: str
    model: Any
    architecture: Architecture
    tensors: Tensors
    rules: tuple[Rule, ...]
    prefix: str
    """What their names lack in front of those of the rules."""

    def arrays(self, put: Callable[[str, np.ndarray], Any] = lambda path, x: x) -> dict[str, Any]:
        """Our parameters by path, float32. One tensor at a time is in memory, and `put` moves it to its devices."""
        found = {}
        self._check_copies()
        for rule in self.rules:
            tensor = self.tensors.read(self._in_file(rule.theirs))
            for path, x in zip(rule.paths, rule.read(tensor, sizes(self.model)), strict=True):
                found[path] = put(path, np.ascontiguousarray(x, np.float32))
        return found

    def _check_copies(self) -> None:
        """UserError if a tensor that should be a copy of another one is not."""
        for rule in self.architecture.rules:
            if isinstance(rule, Unused) and rule.same:
                for name in self._unused(rule):
                    if not np.array_equal(self.tensors.read(name), self.tensors.read(self._in_file(rule.same))):
                        raise UserError(f"{self.location}: {name} differs from {rule.same}, which it should equal "
                                        f"({rule.why}).")

    def _in_file(self, name: str) -> str:
        return name.removeprefix(self.prefix)

    def _unused(self, rule: Unused) -> list[str]:
        taken = {r.theirs for r in self.rules}
        return [n for n in self.tensors.shapes
                if re.fullmatch(rule.theirs, self.prefix + n) and self.prefix + n not in taken]

    def report(self) -> dict[str, Any]:
        """For pretrained.json: where the weights came from, and which tensor became which parameter."""
        unused = {n: r.why for r in self.architecture.rules if isinstance(r, Unused) for n in self._unused(r)}
        return {"from": self.location, "files": {file.name: _sha256(file) for file in self.tensors.files},
                "mapping": {self._in_file(r.theirs): list(r.paths) for r in self.rules}, "unused": unused}


def sizes(model: Any) -> dict[str, int]:
    """Lengths of the axes that patterns name: heads N, key/value heads G, head width K."""
    return {"N": model.heads, "G": model.groups, "K": model.head, "two": 2}


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
        config = Config(config_of(tensors.metadata) | {"tied": "output.weight" not in tensors.shapes}, str(place))
    name = config.get("model_type")
    if name not in ARCHITECTURES:
        raise UserError(f"{config.title}: model_type {name!r} is not known here; known are "
                        f"{', '.join(ARCHITECTURES)}.")
    architecture = ARCHITECTURES[name]
    model, tensors = architecture.model(config), tensors or SafeTensors(place)
    whole = any(n.startswith(architecture.prefix) for n in tensors.shapes)
    prefix = "" if whole else architecture.prefix
    theirs = {prefix + n: shape for n, shape in tensors.shapes.items()}
    rules = matched(architecture.rules, model.depth, theirs, parameter_shapes(model), sizes(model), location)
    return Found(location, model, architecture, tensors, tuple(rules), prefix)


def model_of(location: str) -> Any:
    """Our model of the config.json at a location, such as GPT(...); reads no weights. Raises as `find`."""
    return find(location).model


def read(location: str) -> tuple[Any, dict[str, Any]]:
    """(model, parameters): ``model.apply({"params": parameters}, ids, train=False)``. Raises as `find`."""
    found = find(location)
    return found.model, unflatten_dict(found.arrays(), sep="/")


def parameter_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the model's parameters; computes nothing."""
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 1), np.int32), train=False))
    return {path: x.shape for path, x in flatten_dict(variables["params"], sep="/").items()}


def _config(path: Path) -> Config:
    try:
        values = json.loads(path.read_text("utf-8"))
    except OSError:
        raise UserError(f"{path.parent} has no config.json, so the model cannot be known.") from None
    except ValueError as e:
        raise UserError(f"{path} is not JSON ({e}).") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object.")
    return Config(values, str(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
