"""Checks the fields of an experiment's parts against their annotations: typeguard, plus rules for numbers and parts.

Without the checks, a string in place of a tuple would go unnoticed: Python iterates over its characters.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from numbers import Real
from typing import Any, Literal

import typeguard

from lab.errors import UserError


def fields(value: Any) -> list[dataclasses.Field]:
    """The configuration fields of a dataclass or Linen module, or of such a class."""
    of_linen = {"parent", "name"} if hasattr(value, "parent") else set()
    return [f for f in dataclasses.fields(value) if f.init and f.name not in of_linen]


def is_part(value: Any) -> bool:
    """Whether a value is an instance of a dataclass or Linen module."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def hints_of(cls: type) -> dict[str, Any]:
    """The annotations of a class; empty if they cannot be evaluated (a user's class inside a function)."""
    try:
        return typing.get_type_hints(cls)
    except (NameError, AttributeError, TypeError, SyntaxError):
        return {}


def check_types(value: Any, flag: str = "") -> None:
    """Checks the fields of nested dataclasses and Linen modules against their annotations. Traced numbers count as
    floats.

    Raises:
      UserError: names the field and its valid values.
    """
    hints = hints_of(type(value))
    for f in fields(value):
        item, name = getattr(value, f.name), f"{flag}.{f.name}" if flag else f.name
        if not fits(item, hints.get(f.name, Any)):
            raise UserError(f"--{name.replace('_', '-')} must be {describe(hints[f.name])}, not {_shown(item)}.")
        for place, part in _parts(item, name):
            check_types(part, place)


def _parts(item: Any, name: str) -> Iterator[tuple[str, Any]]:
    if is_part(item):
        yield name, item
    elif isinstance(item, tuple | list):
        for i, inner in enumerate(item):
            yield from _parts(inner, f"{name}.{i}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value matches an annotation. A user's dataclass matches in place of lab's classes if it has all the
    methods that these have in common.
    """
    options = _options(hint)
    if is_part(value):
        return class_fits(type(value), hint)
    options = [o for o in options if not _is_protocol(o)]
    if not options:
        return False
    return _is(value, typing.Union[tuple(map(_strict, options))])  # noqa: UP007 (any number of options)


def class_fits(cls: type, hint: Any) -> bool:
    """Whether instances of a dataclass or Linen module match an annotation; see `fits`."""
    options = _options(hint)
    if Any in options:
        return True
    if any(all(hasattr(cls, m) for m in _methods(o)) if _is_protocol(o) else issubclass(cls, o)
           for o in options if isinstance(o, type)):
        return True
    ours = [o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)]
    common = set.intersection(*map(_methods, ours)) if ours else set()
    return cls.__module__.split(".")[0] != "lab" and bool(common) and all(hasattr(cls, m) for m in common)


def element(hint: Any, i: int) -> Any:
    """The annotation of item i of a tuple with annotation `hint`; None if it allows no tuple or no such item."""
    for option in _options(hint):
        if option is Any:
            return Any
        if typing.get_origin(option) in (tuple, list):
            args = typing.get_args(option)
            if len(args) == 1 or args[-1] is Ellipsis:
                return args[0]
            return args[i] if i < len(args) else None
    return None


class _Whole(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)


class _Number(type):
    def __instancecheck__(cls, value: Any) -> bool:
        traced = getattr(value, "shape", None) == () and hasattr(value, "dtype")
        return traced or isinstance(value, Real) and not isinstance(value, bool)


class Whole(metaclass=_Whole):
    """An int, but not a bool."""


class Number(metaclass=_Number):
    """A real number, but not a bool, or a traced scalar."""


def _options(hint: Any) -> list[Any]:
    """The members of a union, or the annotation itself."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [option for arg in typing.get_args(hint) for option in _options(arg)]
    return [hint]


def _is_protocol(option: Any) -> bool:
    return getattr(option, "_is_protocol", False)


def _methods(cls: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_") and callable(getattr(cls, name))}


def _strict(hint: Any) -> Any:
    """Maps int to `Whole` and float to `Number`: typeguard's int accepts True, its float rejects traced scalars."""
    if hint in (int, float):
        return Whole if hint is int else Number
    args = typing.get_args(hint)
    if not args or typing.get_origin(hint) is Literal:
        return hint
    if len(options := _options(hint)) > 1:
        return typing.Union[tuple(map(_strict, options))]  # noqa: UP007
    origin = typing.get_origin(hint)
    return origin[tuple(arg if arg is Ellipsis else _strict(arg) for arg in args)] if origin else hint


def _is(value: Any, hint: Any) -> bool:
    try:
        typeguard.check_type(value, hint, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
    except typeguard.TypeCheckError:
        return False
    return True


def describe(hint: Any) -> str:
    """An annotation in words."""
    return " or ".join(map(_describe, _options(hint)))


def _describe(option: Any) -> str:
    origin, args = typing.get_origin(option), typing.get_args(option)
    if origin is Literal:
        return ", ".join(map(repr, args))
    if origin is tuple and args[-1] is Ellipsis:
        return f"a tuple of {describe(args[0])}, such as ({_example(args[0])},)"
    if origin is tuple:
        return f"({', '.join(map(describe, args))})"
    if _is_protocol(option):
        what = (option.__doc__ or option.__name__).partition(". ")[0].rstrip(".")
        return f"{what[0].lower()}{what[1:]} with {' and '.join(f'{m}()' for m in sorted(_methods(option)))}"
    if option is types.NoneType:
        return "None"
    return getattr(option, "__name__", str(option)) if not args else str(option)


def _example(hint: Any) -> str:
    first = _options(hint)[0]
    if typing.get_origin(first) is tuple:
        inner = [a for a in typing.get_args(first) if a is not Ellipsis]
        return f"({', '.join(map(_example, inner))}{',' * (len(inner) == 1)})"
    return {str: '"a"', int: "1", float: "0.5"}.get(first, "...")


def _shown(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__} itself (write {value.__name__}(...))"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
