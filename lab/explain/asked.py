"""The flags of `./launch.sh explain` as a value, checked as far as that needs no model."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.errors import UserError


@dataclass(frozen=True)
class Asked:
    """The flags that say what is explained."""

    input: str
    record: int | None = None
    target: str | None = None
    against: str | None = None
    baseline: str | None = None


def text_or_none(given: str) -> str | None:
    """The text itself; None if it names a file. Raises UserError for an empty text."""
    if not given.strip():
        raise UserError("--input is empty: give a text or a file.")
    if given.endswith((".txt", ".csv")) and not any(map(str.isspace, given)):
        return None
    try:
        return None if Path(given).is_file() else given
    except (OSError, ValueError):  # too long for a name, or with a NUL
        return given


def baseline_of(given: str | None, allowed: Sequence[str], file: bool = False) -> str:
    """The baseline, by default the first allowed one. Raises UserError for another word, unless `file` and it is
    one."""
    if given is None or given in allowed or file and Path(given).is_file():
        return given or allowed[0]
    raise UserError(f"--baseline {given}: give {', '.join(allowed)}{' or a file with one record' if file else ''}.")


def class_number(wanted: str, names: Sequence[str], flag: str) -> int:
    """The number of a class. Raises UserError with the nearest name."""
    if wanted in names:
        return names.index(wanted)
    lower = [name.lower() for name in names]
    near = difflib.get_close_matches(wanted.lower(), lower, n=1)
    some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    raise UserError(f"{flag}: there is no class {wanted!r}. " + (f"Perhaps you meant {names[lower.index(near[0])]!r}."
                                                                if near else f"There are {some}."))
