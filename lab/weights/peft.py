"""LoRA adapters in PEFT's format: adapter_config.json, adapter_model.safetensors (lora_A (r, in), lora_B (out, r))."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lab.errors import UserError
from lab.files import make_folder, replace_file
from lab.weights.rules import applicable
from lab.weights.tensors import Tensors, opened
from lab.weights.write import architecture_of

CONFIG, FILE, OUTSIDE = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
TURNED = {"F D -> D F": False, None: True}  # patterns of plain matrices -> PEFT's fan_in_fan_out
# Fields that change what an adapter computes -> the values that can be read.
EXPECTED = {"peft_type": ("LORA",), "use_dora": (False,), "bias": ("none",), "modules_to_save": (None, []),
            "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "lora_bias": (False,),
            "layer_replication": (None,), "trainable_token_indices": (None,), "target_parameters": (None, []),
            "alora_invocation_tokens": (None,), "use_qalora": (False,), "use_bdlora": (None, False)}


def write_adapter(model: Any, ours: Collection[str], pairs: Mapping[str, tuple[Any, Any]], folder: Path,
                  settings: Mapping[str, Any]) -> dict[str, Any]:
    """Writes adapters to a folder and returns their adapter_config.json.

    `ours`: the paths of the model's parameters; `pairs`: path -> a (in, r), b (r, out); `settings`: r, lora_alpha,
    lora_dropout, use_rslora, base_model_name_or_path.

    Raises:
      UserError: no format of transformers holds the model, or PEFT's has no place for an adapter.
    """
    from safetensors.numpy import save

    architecture, tensors, modules, turned = architecture_of(model), {}, {}, set()
    for rule in applicable(architecture.rules, model.depth, ours):
        if (own := [path for path in rule.paths if path in pairs]) and len(rule.paths) > 1:
            raise UserError(f"--adapter: in {architecture.name} {', '.join(rule.paths)} are one matrix, {rule.theirs}, "
                            f"with one adapter in PEFT. Export the merged model: leave out --adapter.")
        if own:
            a, b = (np.asarray(x, np.float32) for x in pairs[own[0]])
            if rule.pattern not in TURNED or not rule.theirs.endswith(".weight") or own[0].endswith("embedding"):
                raise UserError(f"--adapter: {own[0]} is {rule.theirs} in {architecture.name}, of whose adapters PEFT "
                                f"has another form. Export the merged model: leave out --adapter.")
            module = modules[own[0]] = rule.theirs.removesuffix(".weight")
            turned.add(TURNED[rule.pattern])
            tensors[f"{OUTSIDE}{module}.lora_A.weight"] = np.ascontiguousarray(a.T)
            tensors[f"{OUTSIDE}{module}.lora_B.weight"] = np.ascontiguousarray(b.T)
    if missing := sorted(pairs.keys() - modules.keys()):
        raise UserError(f"--adapter: {architecture.name} has no matrix for {missing[0]}.")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM" if hasattr(model, "tied") else None, "bias": "none",
              "target_modules": sorted(modules.values()), "fan_in_fan_out": turned == {True}, "inference_mode": True,
              "modules_to_save": None, "use_dora": False, **settings}
    make_folder(folder)
    replace_file(folder / FILE, save(tensors, metadata={"format": "pt"}))
    replace_file(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return config


class Merged:
    """Tensors with the adapters of a folder added: W + factor B A, in their layout.

    Raises:
      UserError: no such files, a kind of adapter that is not read, or a tensor that does not fit the base.
    """

    def __init__(self, tensors: Tensors, names: Mapping[str, str], folder: Path):
        """`names`: the name of every tensor as transformers knows it -> its name in `tensors`."""
        self.inner, self.shapes, self.files, self.check = tensors, tensors.shapes, tensors.files, tensors.check
        config = _config(folder / CONFIG)
        self.turned, self.pairs = config.get("fan_in_fan_out", False), {}
        self.factor = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
        handle = opened(folder / FILE)
        theirs = set(handle.keys())
        for name in sorted(theirs):
            module = name.removeprefix(OUTSIDE)
            whole = re.sub(r"\.lora_[AB]\.weight$", ".weight", module)
            first, second = (f"{OUTSIDE}{whole.removesuffix('.weight')}.lora_{half}.weight" for half in "AB")
            if not {first, second} <= theirs or name not in (first, second) or whole not in names:
                raise UserError(f"{folder / FILE}: the tensor {name} has no place in the base.")
            a, b = (np.asarray(handle.get_tensor(half), np.float32) for half in (first, second))
            wanted = self.shapes[names[whole]]
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or self._turn(b, a).shape != wanted:
                raise UserError(f"{folder / FILE}: {module} is {a.shape} and {b.shape}, and {whole} in the base "
                                f"{wanted}.")
            self.pairs[names[whole]] = a, b

    def _turn(self, b: np.ndarray, a: np.ndarray) -> np.ndarray:
        return (b @ a).T if self.turned else b @ a

    def read(self, name: str) -> np.ndarray:
        """One tensor, merged in float32."""
        x = self.inner.read(name)
        if name not in self.pairs:
            return x
        a, b = self.pairs[name]
        return x.astype(np.float32) + np.float32(self.factor) * self._turn(b, a)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
        good = isinstance(config, dict) and config["r"] >= 1 and np.isfinite(config["lora_alpha"])
    except OSError:
        raise UserError(f"{path.parent} has no {CONFIG}, so it is no adapter of PEFT.") from None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is no configuration of a LoRA adapter ({type(e).__name__}: {e}).") from None
    if not good:
        raise UserError(f"{path} has no rank and lora_alpha.")
    for name, values in EXPECTED.items():
        if name in config and config[name] not in values:
            raise UserError(f"{path}: {name} is {config[name]!r}; only {values[0]!r} can be read.")
    return config
