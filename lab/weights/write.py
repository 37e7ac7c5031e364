"""Writes a model in the format of Hugging Face's transformers: config.json, model.safetensors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab.errors import UserError
from lab.files import make_folder, replace_file
from lab.weights.read import ARCHITECTURES, sizes
from lab.weights.rules import Architecture, applicable, field_of, matched

WRITTEN = tuple(a for a in ARCHITECTURES.values() if a.like is not None)
# Fields that every one of these formats holds, or that do not matter to a finished model.
FREE = {"depth", "width", "heads", "hidden_multiple", "context", "norm_epsilon", "vocab", "dropout", "attention",
        "remat", "scan", "parent", "name"}


def architecture_of(model: Any) -> Architecture:
    """The format that holds this model.

    Raises:
      UserError: no format does; names the fields that keep it from the nearest one.
    """
    against = {a.name: _misfits(model, a) for a in WRITTEN if type(a.like) is type(model)}
    if not against:
        kinds = ", ".join(dict.fromkeys(type(a.like).__name__ for a in WRITTEN))
        raise UserError(f"{type(model).__name__} has no format of weights to export to; {kinds} have. Of other models "
                        f"`--to stablehlo FILE` and `--to onnx FILE` write a function (lab/exported).")
    name = min(against, key=lambda name: len(against[name]))
    if against[name]:
        raise UserError(f"No class of transformers holds this model: {name} would need {', '.join(against[name])}.")
    return next(a for a in WRITTEN if a.name == name)


def _misfits(model: Any, architecture: Architecture) -> list[str]:
    """The fields that would have to differ, as name=value."""
    found = []
    for name in (f.name for f in dataclasses.fields(model) if f.name not in FREE):
        like = field_of(architecture.like, name)
        possible = architecture.holds.get(name, (like,))
        if possible is not None and field_of(model, name) not in possible:
            found.append(f"{name}={like!r}")
    return found


def write(model: Any, arrays: Mapping[str, Any], folder: Path, classes: Sequence[str] = ()) -> dict[str, Any]:
    """Writes config.json and model.safetensors (float32) to a folder; returns the config.

    `arrays`: the model's variables by path, as `Found.arrays`; `classes`: their names, if known. Raises UserError if no
    format holds the model.
    """
    from safetensors.numpy import save

    architecture = architecture_of(model)
    if getattr(model, "scan", False):
        raise UserError("The layers of this model are stacked: train with --model.scan False to export.")
    ours, tensors = {path: x.shape for path, x in arrays.items()}, {}
    for rule in applicable(architecture.rules, model.depth, ours):
        parts = [np.asarray(arrays[path], np.float32) for path in rule.paths]
        tensors[rule.theirs] = np.ascontiguousarray(rule.write(parts, sizes(model)))
    shapes = {name: x.shape for name, x in tensors.items()}
    matched(architecture.rules, model.depth, shapes, ours, sizes(model), str(folder))  # complete, and reads back
    config = {**architecture.config(model), **architecture.image_fields(model, ours), "torch_dtype": "float32"}
    numbers = [f"LABEL_{i}" for i in range(getattr(model, "classes", None) or 0)]
    config |= _labels(classes if len(classes) == len(numbers) else numbers, config)
    make_folder(folder)
    replace_file(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    replace_file(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return config


def _labels(names: Sequence[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """The classes' names, as transformers and timm write them."""
    if "model_type" not in config:
        return {"label_names": list(names)}
    return {"id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)}} if names else {}
