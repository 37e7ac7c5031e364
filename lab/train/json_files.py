"""JSON files of a run folder: atomic writes, and a UserError for damaged files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.errors import UserError
from lab.files import replace_file


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically, also across a power failure."""
    replace_file(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, shape: Mapping[str, Any] | None = None) -> Any:
    """Reads a JSON file; with `shape`, checks that it is an object with these fields.

    Raises:
      UserError: the file is damaged.
    """
    try:
        value = json.loads(path.read_bytes().decode())
        if shape is not None:
            check_shape(value, shape)
        return value
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}). Restore it, or start afresh with --run-dir.") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e}). Restore it, or start afresh with --run-dir.") from e


def check_shape(value: Any, shape: Mapping[str, Any]) -> None:
    """Raises ValueError unless a JSON value is an object with these fields of these types."""
    if not isinstance(value, dict):
        raise ValueError(f"it holds {str(value)[:40]!r} instead of named fields")
    for name, types in shape.items():
        types = types if isinstance(types, tuple) else (types,)
        if name not in value:
            raise ValueError(f"it has no {name!r}")
        if type(value[name]) not in types:
            raise ValueError(f"{name} is {str(value[name])[:40]!r}")
