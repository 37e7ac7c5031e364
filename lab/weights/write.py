"""Writes a model in the format of Hugging Face's transformers: config.json, model.safetensors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lab.errors import UserError
from lab.files import make_folder, replace_file
from lab.models.gpt import GPT
from lab.weights.gpt2 import GPT2
from lab.weights.gpt_neox import GPT_NEOX
from lab.weights.llama import LLAMA
from lab.weights.read import parameter_shapes, sizes
from lab.weights.rules import Architecture, applicable, matched

WRITTEN = (GPT2, GPT_NEOX, LLAMA[0])
# Fields that every one of these formats holds, or that do not matter to a finished model.
FREE = {"depth", "width", "heads", "head_width", "hidden_multiple", "context", "norm_epsilon", "vocab", "dropout",
        "attention", "remat", "scan", "parent", "name"}
OWN = {"gpt2": {"mlp"}, "gpt_neox": {"mlp", "rope_base", "tied"},
       "llama": {"kv_heads", "rope_base", "rope_scaling", "tied"}}


def architecture_of(model: Any) -> Architecture:
    """The format that holds this model.

    Raises:
      UserError: no format does; names the fields that keep it from the nearest one.
    """
    if type(model) is not GPT:
        raise UserError(f"A {type(model).__name__} cannot be exported; only GPT can.")
    against = {a.name: _misfits(model, a) for a in WRITTEN}
    name = min(against, key=lambda name: len(against[name]))
    if against[name]:
        raise UserError(f"No class of transformers holds this model: {name} would need {', '.join(against[name])}.")
    return next(a for a in WRITTEN if a.name == name)


def _misfits(model: GPT, architecture: Architecture) -> list[str]:
    def value(m: GPT, name: str) -> Any:
        if name == "kv_heads":
            return None if m.groups == m.heads else m.groups
        return m.bias if name.endswith("_bias") and getattr(m, name) is None else getattr(m, name)

    free = FREE | OWN[architecture.name]
    found = [f"{f.name}={value(architecture.like, f.name)!r}" for f in dataclasses.fields(GPT) if f.name not in free
             and value(model, f.name) != value(architecture.like, f.name)]
    if architecture.name != "llama":
        found += ["mlp='gelu'"] if model.mlp not in ("gelu", "gelu_exact") else []
        found += ["head_width=None"] if model.head * model.heads != model.width else []
    return found


def write(model: GPT, params: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Writes config.json and model.safetensors (float32) to a folder; returns the config.

    `params`: arrays by path. Raises UserError if no format holds the model.
    """
    from safetensors.numpy import save

    architecture = architecture_of(model)
    ours, tensors = parameter_shapes(model), {}
    if missing := sorted(ours.keys() - params.keys()):  # scanned layers have other paths
        raise UserError(f"The run has no parameter {missing[0]}: train with --model.scan False to export.")
    for rule in applicable(architecture.rules, model.depth, ours):
        arrays = [np.asarray(params[path], np.float32) for path in rule.paths]
        tensors[rule.theirs] = np.ascontiguousarray(rule.write(arrays, sizes(model)))
    shapes = {name: x.shape for name, x in tensors.items()}
    matched(architecture.rules, model.depth, shapes, ours, sizes(model), str(folder))  # complete, and reads back
    config = architecture.config(model) | {"torch_dtype": "float32"}
    make_folder(folder)
    replace_file(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    replace_file(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return config
