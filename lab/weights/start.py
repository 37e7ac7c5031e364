"""`Weights(location)`: an experiment's start from somebody else's pretrained model."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from lab.errors import UserError
from lab.pretrained import Start, check_rules
from lab.weights.read import find

# Fields of a model that may differ from the pretrained one's: they change no parameter's meaning.
FREE = {"dropout", "attention", "remat", "parent", "name",
        "classes", "pool", "output", "mask_id"}  # these decide which parameters are on top of the same trunk


@dataclass(frozen=True)
class Weights(Start):
    """Starts from other people's weights, such as Weights("hf:openai-community/gpt2"): see lab/weights/README.md.

    Strict: the model's fields must be those of the weights, and every parameter is filled, but for those that `random`
    names. `model_of(location)` gives the model.
    """

    location: str
    """A folder, hf:ORG/NAME[@REVISION] or package:NAME/PATH, with config.json and safetensors."""
    random: tuple[str, ...] = ()
    """Path regexes of parameters that stay random, such as a new output layer (searched in the path)."""
    freeze: tuple[str, ...] = ()
    """Path regexes of parameters to freeze (searched in the path)."""

    def validate(self) -> None:
        """Raises UserError for an invalid regular expression."""
        check_rules(random=self.random, freeze=self.freeze)

    def check(self, model: Any) -> None:
        """Raises UserError for a model with another value of a field that the weights decide."""
        theirs = find(self.location).model
        if type(model) is not type(theirs):
            raise UserError(f"{self.location} is a {type(theirs).__name__}, and the experiment's model a "
                            f"{type(model).__name__}.")
        for field in dataclasses.fields(theirs):
            here, there = getattr(model, field.name), getattr(theirs, field.name)
            shorter = field.name == "context" and (model.position == "rotary" or here < there)
            if field.name not in FREE and not shorter and here != there:
                raise UserError(f"The model has {field.name}={here!r}, and {self.location} {there!r}. Use "
                                f"model=model_of({self.location!r}), from lab.weights.")

    def load(self, state: Any, data: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arrays by path, placed on the devices of this abstract state, and a report.

        Raises:
          UserError: weights that do not fit.
        """
        found, wanted = find(self.location), {
            path: x for part in (state.params, state.model_state) for path, x in flatten_dict(part, sep="/").items()}
        new = [path for path in wanted if any(re.search(rule, path) for rule in self.random)]

        def put(path: str, x: np.ndarray) -> Any:
            if path not in wanted or path in new:
                return None
            if path == "wpe/embedding":
                x = x[:len(wanted[path])]  # a shorter context
            if x.shape != wanted[path].shape:
                raise UserError(f"{path} is {x.shape} in {self.location} and {wanted[path].shape} here.")
            return jax.make_array_from_callback(x.shape, wanted[path].sharding, lambda index: x[index])

        given = {path: x for path, x in found.arrays(put).items() if x is not None}
        if missing := [path for path in wanted if path not in given and path not in new]:
            raise UserError(f"{self.location} has no {missing[0]}: begin at random there with --init-from.random "
                            f"{missing[0]}.")
        taken = {path for rule in found.rules for path in rule.paths}
        return given, found.report() | {"loaded": list(given), "random": new, "not taken": sorted(taken - given.keys())}
