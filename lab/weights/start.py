"""`Weights(location)`: an experiment's start from somebody else's pretrained model."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from lab.compress.folder import refuse
from lab.compress.model import reads
from lab.compress.quantized import is_quantized
from lab.errors import UserError
from lab.files import user_path
from lab.models.vit import ViT
from lab.pretrained import Start, check_rules
from lab.weights.peft import Merged
from lab.weights.read import Found, find
from lab.weights.rules import field_of
from lab.weights.vit import resized

# Fields of a model that may differ from the pretrained one's: they change no parameter's meaning.
FREE = {"dropout", "attention", "remat", "zero_init", "parent", "name",
        "classes", "pool", "output", "mask_id"}  # these decide which parameters are on top of the same trunk


@dataclass(frozen=True)
class Weights(Start):
    """Starts from other people's weights, such as Weights("hf:openai-community/gpt2"): see lab/weights/README.md.

    Strict: the model's fields must be those of the weights, and every parameter is filled, but for those that `random`
    names. `model_of(location)` gives the model.
    """

    location: str | None = None
    """A folder, hf:ORG/NAME[@REVISION] or package:NAME/PATH, with config.json and safetensors; None: all at random."""
    random: tuple[str, ...] = ()
    """Path regexes of parameters that stay random, such as a new output layer (searched in the path)."""
    adapter: str | None = dataclasses.field(default=None, metadata={"fingerprint": "if set"})
    """A folder with a LoRA adapter in PEFT's format, which is merged; None: the weights as they are."""
    freeze: tuple[str, ...] = ()
    """Path regexes of parameters to freeze (searched in the path)."""

    def validate(self) -> None:
        """Raises UserError for an invalid regular expression."""
        check_rules(random=self.random, freeze=self.freeze)

    def check(self, model: Any) -> None:
        """Raises UserError for a model with another value of a field that the weights decide."""
        if self.location is None:
            return
        theirs = find(self.location).model
        if reads(theirs) and not reads(model):
            refuse(find(self.location).place, "trained")
        if type(model) is not type(theirs):
            raise UserError(f"{self.location} is a {type(theirs).__name__}, and the experiment's model a "
                            f"{type(model).__name__}.")
        if getattr(model, "pool", None) == "mean" and isinstance(theirs, ViT):
            raise UserError(f"{self.location} has a class token. Use --model.pool token or token+mean.")
        for field in dataclasses.fields(theirs):
            here, there = (field_of(m, field.name) for m in (model, theirs))
            shorter = field.name == "context" and (model.position == "rotary" or here < there)
            if field.name not in FREE and not shorter and here != there:
                here, there = getattr(model, field.name), getattr(theirs, field.name)
                raise UserError(f"The model has {field.name}={here!r}, and {self.location} {there!r}. Use "
                                f"model=model_of({self.location!r}), from lab.weights.")

    def load(self, state: Any, data: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arrays by path, placed on the devices of this abstract state, and a report.

        Raises:
          UserError: weights that do not fit.
        """
        if self.location is None:
            return {}, {}
        found, wanted = find(self.location), {
            path: x for part in (state.params, state.model_state) for path, x in flatten_dict(part, sep="/").items()}
        if self.adapter is not None:
            found = dataclasses.replace(found, tensors=Merged(found.tensors, found.names, user_path(self.adapter)))
        grids = _grids(found, data)
        new = [path for path in wanted if any(re.search(rule, path) for rule in self.random)]

        def put(path: str, x: np.ndarray) -> Any:
            if path not in wanted or path in new:
                return None
            if path == "wpe/embedding":
                x = resized(x, *grids) if grids else x[:len(wanted[path])]  # a shorter context
            if x.shape != wanted[path].shape:
                raise UserError(f"{path} is {x.shape} in {self.location} and {wanted[path].shape} here.")
            if is_quantized(x):
                return jax.device_put(x)
            return jax.make_array_from_callback(x.shape, wanted[path].sharding, lambda index: x[index])

        given = {path: x for path, x in found.arrays(put).items() if x is not None}
        if missing := [path for path in wanted if path not in given and path not in new]:
            raise UserError(f"{self.location} has no {missing[0]}: begin at random there with --init-from.random "
                            f"{missing[0]}.")
        taken = {path for rule in found.rules for path in rule.paths}
        said = {"positions": "bicubic, from {}x{} to {}x{} patches".format(*grids[0], *grids[1])} if grids else {}
        return given, found.report() | said | {"loaded": list(given), "random": new,
                                               "not taken": sorted(taken - given.keys())}


def _grids(found: Found, data: Any) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Rows and columns of patches in pretraining and of this data's images; None if they are equal, or no images."""
    sides = [data.metadata.get(side) for side in ("height", "width")]
    if not isinstance(found.model, ViT) or None in sides:
        return None
    old, new = (tuple(n // found.model.patch for n in size) for size in (found.inputs.shape[1:3], sides))
    return None if old == new else (old, new)
