"""Checks the parts of an experiment. Errors name the author's file and line."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from lab.errors import UserError, where

# part -> (its base class, required attributes, an example)
PARTS = {
    "data": (
        "lab.data.dataset.Data",
        ("load", "record_spec", "metadata", "transform", "validate", "unit", "units_per_record"),
        'Table(Sklearn("iris"))',
    ),
    "model": ("flax.linen.Module", ("init", "apply"), "MLP(classes=10)"),
    "task": (
        "lab.tasks.base.Task",
        ("loss", "init", "check", "validate", "summary", "artifacts", "snapshot", "curves"),
        "Classify()",
    ),
    "optim": (
        "lab.optim.optimizers.Optimizer",
        ("build", "direction", "validate", "lr", "freezing"),
        "AdamW(lr=1e-3)",
    ),
}

# part -> method -> its (positional, keyword) arguments
CALLS: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "task": {"loss": (("model", "variables", "batch", "rngs"), ("train",))},
    "data": {"load": ((), ()), "transform": (("batch", "train"), ())},
}


def check_parts(experiment: Any) -> None:
    """Raises UserError for a part that is missing, is a class or string instead of an object, lacks a required
    attribute, or has a method with an incompatible signature.
    """
    for name, (base, needed, example) in PARTS.items():
        part = getattr(experiment, name)
        if isinstance(part, type):
            raise UserError(f"{name} is the class {part.__name__}; give an object, {name}={part.__name__}(...).")
        if name == "optim" and hasattr(part, "init") and hasattr(part, "update"):
            raise UserError("optim is an optax transformation; wrap it, so that a run can be told from others: "
                            "optim=Optax(optax.adam(1e-3)), from lab.optim.")
        if not dataclasses.is_dataclass(part):
            what = "None" if part is None else f"{part!r:.40}, a {type(part).__name__}"
            raise UserError(f"{name} is {what}; give a dataclass such as {name}={example}.")
        if type(part).__hash__ is None:
            raise UserError(f"{where(type(part))}{type(part).__name__}, the {name}, can be changed: write "
                            f"@dataclass(frozen=True).")
        if missing := [attribute for attribute in needed if not hasattr(part, attribute)]:
            some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise UserError(f"{where(type(part))}{type(part).__name__} cannot be the {name}: it has no {some}. Derive "
                            f"it from {base}.")
        for method, (places, names) in CALLS.get(name, {}).items():
            _check_call(part, method, places, names)


def _check_call(part: Any, method: str, places: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Raises UserError if `part.method` cannot be called with these arguments, or only later returns its result."""
    if inspect.iscoroutinefunction(getattr(part, method)) or inspect.isgeneratorfunction(getattr(part, method)):
        raise UserError(f"{where(getattr(type(part), method))}{type(part).__name__}.{method} is async or has yield in "
                        f"it; it must return its result.")
    try:
        inspect.signature(getattr(part, method)).bind(*places, **dict.fromkeys(names))
    except TypeError as e:
        given = ", ".join(["self", *places, *(f"{name}=..." for name in names)])
        raise UserError(f"{where(getattr(type(part), method))}{type(part).__name__}.{method} cannot be called as "
                        f"{method}({given}): {e}.") from None


def check_loss(task: Any, result: Any, train: bool) -> tuple[Any, Any, dict[str, Any], Any]:
    """Checks and returns the result of `Task.loss`: (sum of losses, sum of weights, metrics, mutable collections).

    Raises:
      UserError: the result has another form; names the author's class and line.
    """
    here = f"{where(type(task).loss)}{type(task).__name__}.loss"
    if not isinstance(result, tuple) or len(result) != 4:
        what = "an array" if hasattr(result, "shape") else f"a {type(result).__name__}"
        what = f"{len(result)} values" if isinstance(result, tuple) else what
        raise UserError(f"{here} returns {what}. It must return four: the sum of losses, the sum of weights, the "
                        f"metrics as name -> (sum, weight), and the model's mutable collections ({{}} for none).")
    total, weight, metrics, model_state = result
    for name, x in (("sum of losses", total), ("sum of weights", weight)):
        if getattr(x, "shape", ()) != () or isinstance(x, str) or x is None:
            raise UserError(f"{here}: the {name} must be one number, not {getattr(x, 'shape', x)}.")
    if train and "float" not in str(getattr(total, "dtype", "")):
        raise UserError(f"{here}: the sum of losses is {getattr(total, 'dtype', f'the number {total}')}, which has no "
                        f"gradient; compute it from the model's output, as a floating-point array.")
    if not isinstance(metrics, Mapping) or "loss" not in metrics:
        raise UserError(f"{here}: the metrics must be a dict, with at least \"loss\": (sum, weight).")
    for name, value in metrics.items():
        if not isinstance(value, tuple) and (train or name == "loss") or isinstance(value, tuple) and len(value) != 2:
            raise UserError(f"{here}: the metric {name!r} must be (sum, weight), so that batches add.")
    if not isinstance(model_state, Mapping):
        raise UserError(f"{here}: the mutable collections must be a dict, not a {type(model_state).__name__}.")
    return result
