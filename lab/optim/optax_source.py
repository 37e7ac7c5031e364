"""A digest of functions and their closures, to identify an optax transformation in a fingerprint."""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


def source_of(value: Any) -> str:
    """12 hex digits: a hash of the source of all functions in `value` and of the values they hold (closures, defaults,
    bound arguments). Equal in every process; changes with the code and with any value.
    """
    total = hashlib.sha256()
    for part in _parts(value, set()):
        total.update(part.encode() + b"\0")
    return total.hexdigest()[:12]


def _parts(value: Any, seen: set[int]) -> Iterator[str]:
    if isinstance(value, functools.partial):
        yield from _parts((value.func, value.args, value.keywords), seen)
    elif isinstance(value, types.MethodType):
        yield from _parts((value.__func__, value.__self__), seen)
    elif isinstance(value, types.FunctionType):
        yield f"{value.__module__}.{value.__qualname__}"
        if id(value) in seen:  # a recursive function
            return
        seen.add(id(value))
        try:
            yield inspect.getsource(value)
        except (OSError, TypeError):  # no source file, such as in an interpreter
            yield value.__code__.co_code.hex() + repr(value.__code__.co_consts)
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        yield from _parts((cells, value.__defaults__, value.__kwdefaults__), seen)
    elif isinstance(value, Mapping):
        yield f"{{{len(value)}"
        for key, item in value.items():
            yield repr(key)
            yield from _parts(item, seen)
    elif isinstance(value, list | tuple):
        yield f"({len(value)}"
        for item in value:
            yield from _parts(item, seen)
    elif isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
        yield f"{getattr(value, '__module__', '')}.{value.__name__}"
    elif hasattr(value, "shape") and hasattr(value, "dtype"):
        yield f"{value.dtype} {value.shape} {np.asarray(value).tobytes().hex()}"
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield repr(value)
    else:  # an object: its class and its fields
        yield f"{type(value).__module__}.{type(value).__qualname__}"
        if id(value) not in seen:
            seen.add(id(value))
            yield from _parts(getattr(value, "__dict__", {}), seen)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
