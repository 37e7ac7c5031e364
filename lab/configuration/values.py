"""An experiment's fields as plain values: JSON, dotted paths, overrides and differences."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lab.configuration.field_types import fields
from lab.errors import UserError, nearest


def digest(value: Any) -> str:
    """Hash of a JSON value, 12 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def to_json(value: Any, *, identity: bool = False) -> Any:
    """The JSON form of `value`, which `from_json` inverts; objects contain their class path.

    With `identity`, omits fields that do not affect the result.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {f.name: to_json(getattr(value, f.name), identity=identity) for f in fields(value)
               if f.metadata.get("json", True) and not (identity and _omitted(f, getattr(value, f.name)))}
        return {"class": f"{type(value).__module__}.{type(value).__qualname__}", **own}
    if isinstance(value, list | tuple):
        return [to_json(v, identity=identity) for v in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(f"An experiment holds plain values and dataclasses; {value!r} is a {type(value).__name__}.")


def _omitted(field: dataclasses.Field, value: Any) -> bool:
    """Whether a field is no part of the identity: `fingerprint` is False, or "if set" and it is None or False."""
    marked = field.metadata.get("fingerprint")
    return marked is False or marked == "if set" and (value is None or value is False)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Flattens a JSON value: dotted path -> plain value."""
    if not isinstance(value, dict):
        return {path: value}
    return {name: item for key, inner in value.items()
            for name, item in flat(inner, f"{path}.{key}" if path else key).items()}


def override(experiment: Any, changes: Mapping[str, Any]) -> Any:
    """The experiment with (dotted) fields of its dataclasses and Linen modules replaced. Values may be traced.

    Raises:
      UserError: no such field; suggests the nearest name.
    """
    for path, value in changes.items():
        experiment = _set(experiment, path, path.split("."), value, experiment)
    return experiment


def _set(part: Any, path: str, names: list[str], value: Any, whole: Any) -> Any:
    head, *rest = names
    if not dataclasses.is_dataclass(part) or head not in {f.name for f in fields(part)}:
        raise UserError(f"the experiment has no field {path}.{nearest(path, _paths(whole), cutoff=0.5)}")
    before = getattr(part, head)
    if rest:
        value = _set(before, path, rest, value, whole)
    elif isinstance(before, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)  # 1 and 1.0 must give the same fingerprint
    return part.clone(**{head: value}) if hasattr(part, "clone") else dataclasses.replace(part, **{head: value})


def _paths(value: Any, prefix: str = "") -> Iterator[str]:
    """All dotted field paths of an experiment."""
    for f in fields(value):
        yield prefix + f.name
        if dataclasses.is_dataclass(inner := getattr(value, f.name)):
            yield from _paths(inner, f"{prefix}{f.name}.")


def value_at(experiment: Any, path: str) -> Any:
    """The value of a (dotted) field."""
    return functools.reduce(getattr, path.split("."), experiment)


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Differences between two JSON values: (dotted path, value in a, value in b)."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif a != b:
        yield path, a, b
