"""Rebuilds an experiment from its JSON. The JSON is untrusted: it names classes, but must not run arbitrary code.

A class must be a dataclass or Linen module of the lab packages in `ROOMS`, or of a user file that is already loaded.
Every class and plain value is checked against its field's annotation before any object is constructed.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lab.configuration.field_types import class_fits, describe, element, fields, fits, hints_of
from lab.errors import UserError
from lab.files import ROOT

ROOMS = ("data", "models", "tasks", "optim", "weights", "adapt", "harness", "private", "experiment", "pretrained")


def from_json(value: Any, kind: Any = Any) -> Any:
    """The inverse of `to_json`. `kind`: the annotation that the result must match.

    Raises:
      UserError: a class is not allowed in an experiment or no longer exists, or a class or value does not match its
        field's annotation.
    """
    _check(value, kind, "it")
    return _build(value)


def class_paths(value: Any) -> set[str]:
    """All class paths in a JSON value."""
    if isinstance(value, list):
        return set().union(*map(class_paths, value))
    if not isinstance(value, dict):
        return set()
    own = value.get("class")
    return class_paths(list(value.values())) | ({own} if isinstance(own, str) else set())


def _check(value: Any, hint: Any, place: str) -> None:
    """Raises UserError unless the JSON value matches the annotation. Constructs nothing."""
    if isinstance(value, list) and has_objects(value):
        for i, item in enumerate(value):
            if (inner := element(hint, i)) is None:
                raise UserError(f"{place} of this run's experiment must be {describe(hint)}, not a list of objects.")
            _check(item, inner, f"{place}[{i}]")
    elif isinstance(value, dict):
        cls = _class(value)
        if not class_fits(cls, hint):
            raise UserError(f"{place} of this run's experiment must be {describe(hint)}, not {value['class']}.")
        hints, known = hints_of(cls), {f.name for f in fields(cls)}
        if unknown := sorted(value.keys() - known - {"class"}):
            raise UserError(f"This run was made by other code: {value['class']} cannot be built again (it has no field "
                            f"{unknown[0]}).")
        for name in value.keys() & known:
            _check(value[name], hints.get(name, Any), name if place == "it" else f"{place}.{name}")
    elif not fits(_plain(value), hint):
        raise UserError(f"{place} of this run's experiment must be {describe(hint)}, not {str(value)[:80]!r}.")


def has_objects(value: Any) -> bool:
    """Whether a JSON value contains an object at any depth."""
    return isinstance(value, dict) or isinstance(value, list) and any(map(has_objects, value))


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, list) else value


def _build(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_build(v) for v in value)
    if not isinstance(value, dict):
        return value
    try:
        return _class(value)(**{k: _build(v) for k, v in value.items() if k != "class"})
    except (AttributeError, TypeError, ValueError) as e:
        raise UserError(f"This run was made by other code: {value['class']} cannot be built again ({e}).") from e


def _class(value: Mapping[str, Any]) -> type:
    """The class that a JSON object names. Raises UserError if an experiment may not have it."""
    path = value.get("class")
    if not isinstance(path, str):
        raise UserError("This run's experiment has a value without a class: its experiment.json is damaged.")
    if (found := find_class(path)) is not None:
        return found
    if path.startswith("lab."):
        raise UserError(f"This run was made by other code: {path} is not a class that an experiment may hold.")
    raise UserError(f"This run was made by other code: {path} is not a class of lab, and a run folder's own code is "
                    f"not run. If you trust the experiment's file, name it: --experiment FILE.")


def find_class(path: str) -> type | None:
    """A dataclass or Linen module of the packages in `ROOMS` or of a loaded user file; None if there is none."""
    module, _, name = path.rpartition(".")
    if path.startswith("lab."):
        if name not in _defined(module):
            return None
        found = getattr(importlib.import_module(module), name)
    else:
        module = module_of(path)
        if module is None or of_a_library(sys.modules[module]):
            return None
        found = sys.modules[module]
        for name in path.removeprefix(f"{module}.").split("."):
            found = getattr(found, name, None)
    good = isinstance(found, type) and dataclasses.is_dataclass(found)
    return found if good and f"{found.__module__}.{found.__qualname__}" == path else None


def module_of(path: str) -> str | None:
    """The loaded module of a class path; the class may be nested."""
    parts = path.split(".")
    return next((name for i in range(len(parts) - 1, 0, -1) if (name := ".".join(parts[:i])) in sys.modules), None)


def of_a_library(module: ModuleType) -> bool:
    """Whether a module is from the standard library, an installed package or lab, not a user file."""
    file = getattr(module, "__file__", None)
    if file is None:
        return module.__name__ != "__main__"  # a notebook
    path = Path(file).resolve()
    packages = {"site-packages", "dist-packages"} & set(path.parts)
    return bool(packages) or any(path.is_relative_to(p) for p in (Path(os.__file__).resolve().parent, ROOT / "lab"))


@functools.cache
def _defined(module: str) -> frozenset[str]:
    """The classes defined in a module of `ROOMS`, read without importing it."""
    parts = module.split(".")
    if len(parts) < 2 or not re.fullmatch(r"lab(\.[A-Za-z]\w*)+", module) or parts[1] not in ROOMS:
        return frozenset()
    inside = ROOT.joinpath(*parts)
    path = next((p for p in (inside.with_suffix(".py"), inside / "__init__.py") if p.is_file()), None)
    if path is None:
        return frozenset()
    return frozenset(node.name for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.ClassDef)
                     and (node.bases or node.decorator_list))
