"""Mapping between other people's tensors and our parameters: rules as data, read in both directions, strictly."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from einops import rearrange

from lab.errors import UserError

TOKENS = jax.ShapeDtypeStruct((1, 1), np.int32)


@dataclass(frozen=True)
class Rule:
    """One of their tensors, and one or several of our parameters."""

    theirs: str
    """Their name; {i} stands for every block."""
    ours: str | tuple[str, ...]
    """Our path, or the paths of the parts along the first axis after `pattern`, called `parts` there."""
    pattern: str | None = None
    """einops pattern from their axes to ours, such as "F D -> D F"; None: the same axes. Reversed for writing."""
    skip: int = 0
    """Leading rows of theirs that no input reaches; written as zeros."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Our paths."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def at(self, block: int) -> Rule:
        """The rule for one block."""
        return Rule(self.theirs.replace("{i}", str(block)), tuple(p.replace("{i}", str(block)) for p in self.paths),
                    self.pattern, self.skip)

    def read(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> list[np.ndarray]:
        """Our arrays, in the order of `paths`. `sizes`: lengths of the axes that the pattern names."""
        tensor = tensor[self.skip:] if self.skip else tensor
        if self.pattern is not None:
            tensor = rearrange(tensor, self.pattern, **self._sizes(sizes))
        return list(tensor) if len(self.paths) > 1 else [tensor]

    def write(self, arrays: list[np.ndarray], sizes: Mapping[str, int]) -> np.ndarray:
        """Their tensor, of our arrays in the order of `paths`."""
        tensor = np.stack(arrays) if len(self.paths) > 1 else arrays[0]
        if self.pattern is not None:
            tensor = rearrange(tensor, " -> ".join(reversed(self.pattern.split(" -> "))), **self._sizes(sizes))
        return np.pad(tensor, [(self.skip, 0)] + [(0, 0)] * (tensor.ndim - 1)) if self.skip else tensor

    def _sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        known = {**sizes, "parts": len(self.paths)}
        return {name: known[name] for name in re.findall(r"\w+", self.pattern.split(" -> ")[0]) if name in known}


@dataclass(frozen=True)
class Unused:
    """A tensor of theirs that our model does not need."""

    theirs: str
    """Regular expression of the whole name."""
    why: str
    """The reason, for pretrained.json."""
    same: str | None = None
    """The tensor that it must equal."""


Rules = tuple[Rule | Unused, ...]
# The names of activations in a config.json -> ours; and ours -> how they are written.
ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
NAMES = {"gelu_exact": "gelu", "gelu": "gelu_new"}


def dense(theirs: str, ours: str, pattern: str | None = "F D -> D F") -> tuple[Rule, Rule]:
    """A linear layer's kernel, with the outputs first in PyTorch, and bias."""
    return Rule(f"{theirs}.weight", f"{ours}/kernel", pattern), Rule(f"{theirs}.bias", f"{ours}/bias")


def norm(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """A LayerNorm's scale and bias."""
    return Rule(f"{theirs}.weight", f"{ours}/scale"), Rule(f"{theirs}.bias", f"{ours}/bias")


def applicable(rules: Rules, depth: int, ours: Collection[str]) -> list[Rule]:
    """The rules for the parameters `ours`, by path, of a model with `depth` blocks."""
    found: list[Rule] = []
    for rule in rules:
        if isinstance(rule, Rule):
            blocks = range(depth) if "{i}" in rule.theirs else (0,)
            found += [one for i in blocks if set((one := rule.at(i)).paths) <= set(ours)]
    return found


def matched(rules: Rules, depth: int, theirs: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]],
            sizes: Mapping[str, int], title: str) -> list[Rule]:
    """The rules for the parameters that the model has. `theirs`, `ours`: name -> shape.

    Raises:
      UserError: a tensor that no rule uses, a parameter that no tensor fills, or shapes that differ; the first five of
        each kind.
    """
    found = applicable(rules, depth, ours)
    spare = [rule.theirs for rule in rules if isinstance(rule, Unused)]
    used = {rule.theirs for rule in found}
    unknown = [n for n in theirs if n not in used and not any(re.fullmatch(pattern, n) for pattern in spare)]
    filled = {path for rule in found if rule.theirs in theirs for path in rule.paths}
    problems = {"tensors without a place in the model": unknown,
                "parameters without a tensor": [path for path in ours if path not in filled]}
    if not any(problems.values()):
        problems["shapes that differ"] = list(_misfits(found, theirs, ours, sizes))
    said = [f"{len(names)} {what} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
            for what, names in problems.items() if names]
    if said:
        raise UserError(f"{title} does not fit its own config: {'; '.join(said)}.")
    return found


def _misfits(rules: Iterable[Rule], theirs: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]],
             sizes: Mapping[str, int]) -> Iterable[str]:
    for rule in rules:
        empty = np.broadcast_to(np.float32(0), theirs[rule.theirs])  # takes no memory
        try:
            shapes = [x.shape for x in rule.read(empty, sizes)]
        except Exception as e:  # einops raises an EinopsError for a wrong rank or size
            yield f"{rule.theirs} {theirs[rule.theirs]}: {str(e).splitlines()[-1].strip()[:80]}"
            continue
        for path, shape in zip(rule.paths, shapes, strict=True):
            if shape != ours[path]:
                yield f"{rule.theirs} gives {path} {shape}, the model has {ours[path]}"


class Config(dict):
    """A config.json of which every field is read, has an expected value, or is known to make no difference."""

    def __init__(self, values: Mapping[str, Any], title: str):
        super().__init__(values)
        self.title, self._seen = title, set()

    def take(self, name: str, *default: Any) -> Any:
        """A field's value, or the default. UserError if it is missing without a default."""
        self._seen.add(name)
        if name not in self and not default:
            raise UserError(f"{self.title} has no {name!r}.")
        return self.get(name, *default)

    def expect(self, **values: Any) -> None:
        """UserError if a field is there with another value."""
        for name, value in values.items():
            if self.take(name, value) != value:
                raise UserError(f"{self.title}: {name} is {self[name]!r}; only {value!r} can be read.")

    def require(self, **values: Any) -> None:
        """UserError if a field has another value, or is missing: transformers has another default."""
        for name in values:
            self.take(name)
        self.expect(**values)

    def classes(self) -> int:
        """Number of classes, from their names or num_labels. UserError unless each record has one of them."""
        self.choose("problem_type", dict.fromkeys(("single_label_classification", None)), None)
        return len(self.take("id2label", None) or range(self.take("num_labels", 2)))

    def choose(self, name: str, choices: Mapping[Any, Any], *default: Any) -> Any:
        """Our value for a field's value. UserError for a value that `choices` lacks."""
        value = self.take(name, *default)
        if not isinstance(value, Hashable) or value not in choices:
            raise UserError(f"{self.title}: {name} is {value!r}; only {', '.join(map(repr, choices))} can be read.")
        return choices[value]

    def finish(self, *ignored: str) -> None:
        """UserError for a field that was not read, and is not known to make no difference in evaluation."""
        if unknown := sorted(self.keys() - self._seen - IGNORED - set(ignored)):
            raise UserError(f"{self.title} has {unknown[0]!r}, which is not known here; it may change the model.")


# Fields of every config.json that do not change what the model computes in evaluation.
IGNORED = {"_name_or_path", "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache",
           "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "task_specific_params", "id2label",
           "label2id", "num_labels", "output_past", "output_attentions", "output_hidden_states", "return_dict",
           "torchscript", "finetuning_task", "gradient_checkpointing", "chunk_size_feed_forward"}


@dataclass(frozen=True)
class Architecture:
    """How one family of models is read and written."""

    name: str
    """`model_type` in config.json."""
    prefix: str
    """First part of the names of the trunk's tensors, which some files leave out."""
    model: Callable[[Config], Any]
    """config.json -> our model."""
    rules: Rules
    like: Any = None
    """A model that the format holds; others may differ in `holds` and in write.FREE. None: reading only."""
    holds: Mapping[str, Collection[Any] | None] = field(default_factory=dict)
    """Fields of our model that the format holds -> the values that it can have; None: any value."""
    config: Callable[[Any], dict[str, Any]] | None = None
    """Our model -> config.json."""
    former: tuple[tuple[str, str], ...] = ()
    """Endings of names in early files -> their present form."""
    inputs: Callable[[Config], jax.ShapeDtypeStruct] = lambda config: TOKENS
    """config.json -> an example of the model's inputs."""
    image_fields: Callable[[Any, Mapping[str, tuple[int, ...]]], dict[str, Any]] = lambda model, shapes: {}
    """Our model and the shapes of its parameters by path -> the fields of config.json that only the shapes decide."""


def field_of(model: Any, name: str) -> Any:
    """A field of a model; of values with the same meaning, such as None and the default that it stands for, one."""
    if name == "kv_heads":
        return None if model.groups == model.heads else model.groups
    if name == "head_width":
        return None if model.head * model.heads == model.width else model.head
    if name == "hidden_multiple":
        return round(model.hidden_multiple * model.width)
    return model.bias if name.endswith("_bias") and getattr(model, name) is None else getattr(model, name)
