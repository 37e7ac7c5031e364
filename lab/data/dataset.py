"""Data that has been loaded: the splits, what there is to know about them, and how new records are read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lab.data.pipeline import Records
from lab.errors import UserError

NAMED = 20  # class names that are shown


@dataclass
class Dataset:
    """What `load()` of a data ingredient returns."""

    train: Records
    validation: Records
    test: Records | None
    fingerprint: str
    """Depends on content, split and preprocessing only, never on where the files are."""
    facts: dict[str, int]
    """What a model must fit: classes, features, vocab, length."""
    unit: str
    units_per_record: int
    summary: dict[str, str | int | float]
    """Lines for a person; what begins with "train ", "validation " or "test " stands together."""
    classes: tuple[str, ...] = field(default=(), kw_only=True)
    """Names of the classes, where there are any."""

    def reference(self) -> list[str]:
        """Lines: what a simple, well-known method reaches on the same split."""
        return []

    def read(self, path: Path) -> tuple[list[str], Records]:
        """New records to predict: a name for each, and the records, without targets. Raises UserError."""
        raise UserError("This data has no reader for new records.")


def class_names(names: Sequence[str]) -> dict[str, str]:
    """A line for people that shows the first classes by their names, where they have any."""
    return {"class names": ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")} if names else {}
