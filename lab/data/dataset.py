"""The data interface: `Data`, a config of where records come from, and `Dataset`, the loaded splits with metadata."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lab.configuration.protocols import DataPart
from lab.data import digest, log
from lab.data.pipeline import Arrays, Batch, Records
from lab.errors import UserError, where

NAMED = 20  # class names to show


class Data:
    """Base class of data configs: a frozen dataclass with `load`. Everything else has a default, read from the records.

    A record is a dict of arrays: "inputs", "targets" (`Classify`: int32 class; `Regress`: float32) and optionally
    "mask"; or "tokens" and "bytes" for a language model.
    """

    unit = "records"
    """Unit of throughput."""
    units_per_record = 1

    def load(self) -> "Dataset":
        """The splits. Must return the same content each time: a run resumes only if the fingerprint is equal."""
        raise NotImplementedError(f"{type(self).__name__} has no load().")

    def validate(self) -> None:
        """Raises UserError for a field out of range; reads nothing."""

    def metadata(self) -> dict[str, int]:
        """The part of `Dataset.metadata` that is known without reading."""
        return {}

    def record_spec(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Name -> (shape, type) of the arrays of one record."""
        return _record_spec(self)

    def transform(self, batch: dict[str, Any], train: bool) -> dict[str, Any]:
        """Augmentation and normalisation, at the start of the compiled step. "key" (B,): a random key per record."""
        return batch

    def describe(self) -> dict[str, Any]:
        """Lines for --dry-run."""
        return self.load().summary


@dataclass(frozen=True)
class Around(Data):
    """Base class of data that has the records of other data, chosen or divided in another way by `load`."""

    data: DataPart
    """The whole data set."""

    @property
    def unit(self) -> str:
        """See `Data`."""
        return self.data.unit

    @property
    def units_per_record(self) -> int:
        """See `Data`."""
        return self.data.units_per_record

    def validate(self) -> None:
        """See `Data`."""
        self.data.validate()

    def metadata(self) -> dict[str, int]:
        """See `Data`."""
        return self.data.metadata()

    def record_spec(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """See `Data`."""
        return self.data.record_spec()

    def transform(self, batch: dict[str, Any], train: bool) -> dict[str, Any]:
        """See `Data`."""
        return self.data.transform(batch, train)


class Part:
    """Some of other records, in this order."""

    def __init__(self, records: Records, rows: np.ndarray):
        self.records, self.rows = records, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: np.ndarray) -> Batch:
        return self.records[self.rows[indices]]


def part(records: Records, rows: np.ndarray) -> Records:
    """`Part`, in memory if the records are."""
    return Arrays(records[rows]) if isinstance(records, Arrays) else Part(records, rows)


@functools.lru_cache(maxsize=4)
def _record_spec(data: Data) -> dict[str, tuple[tuple[int, ...], Any]]:
    found = data.load()
    records = getattr(found, "train", None)
    if records is None or not len(records):
        raise UserError(f"{type(data).__name__}.load() must return a Dataset (lab.data.dataset) with training records, "
                        f"not {'an empty one' if records is not None else type(found).__name__}.")
    for name, array in getattr(records, "arrays", {}).items():
        if not hasattr(array, "dtype"):
            raise UserError(f"{where(type(data).load)}{type(data).__name__}.load(): {name!r} is a "
                            f"{type(array).__name__}; it must be a NumPy array.")
    record = {name: np.asarray(x) for name, x in records[np.arange(1)].items()}
    return {name: (x.shape[1:], x.dtype.type) for name, x in record.items()}


@dataclass(frozen=True)
class Origin:
    """Where the records of a split are in their file or folder, to join predictions on."""

    rows: np.ndarray
    """The number of each record there, from 0; the index into everything below."""
    columns: Mapping[str, Sequence[Any]] | None = None
    """Columns for --id, if the source has columns."""
    truth: Sequence[Any] | Mapping[int, Any] | None = None
    """Targets in the source's own digits; else they are decoded from the records."""
    file: Callable[[int], str] | None = None
    """The name of a record's file, if each has one."""

    def at(self, records: np.ndarray) -> "Origin":
        """The origin of some of the records."""
        return replace(self, rows=self.rows[records])

    def beside(self, id_column: str | None) -> dict[str, list[Any]]:
        """The columns to write beside the predictions. UserError if there is no such column."""
        files = {} if self.file is None else {"file": [self.file(i) for i in self.rows.tolist()]}
        if id_column is None:
            return files
        if self.columns is None:
            raise no_ids(id_column)
        if id_column not in self.columns:
            raise UserError(f"--id {id_column} is not a column left out by --data.source.drop; those are "
                            f"{', '.join(self.columns) or 'none'}.")
        return files | {id_column: [self.columns[id_column][i] for i in self.rows.tolist()]}


@dataclass
class Dataset:
    """The result of `Data.load`."""

    train: Records
    validation: Records
    test: Records | None = None
    fingerprint: str = ""
    """Hash of content, split and preprocessing, independent of file paths. "": hash the arrays in memory."""
    metadata: dict[str, int] = field(default_factory=dict)
    """What the model is checked against: classes, features, vocab, length."""
    unit: str = "records"
    units_per_record: int = 1
    summary: dict[str, str | int | float] = field(default_factory=dict)
    """Lines to print; those that start with "train ", "validation " or "test " are grouped."""
    classes: tuple[str, ...] = field(default=(), kw_only=True)
    """Names of the classes, if any."""
    origins: dict[str, Origin] = field(default_factory=dict, kw_only=True)
    """Split -> where its records come from; by default numbered within the split."""

    def __post_init__(self) -> None:
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        if not self.fingerprint:
            self.fingerprint = digest(*(_content(name, records) for name, records in splits.items() if records))
        if self.classes and "classes" not in self.metadata:
            self.metadata = {**self.metadata, "classes": len(self.classes)}
        if not self.summary:
            self.summary = {f"{name} records": len(records) for name, records in splits.items() if records}

    def some(self, split: str, rows: np.ndarray) -> Records:
        """The records `rows` of a split, in this order."""
        return part(getattr(self, split), rows)

    def reference(self) -> list[str]:
        """Lines to print: the result of a standard baseline on the same split."""
        return []

    def saved(self) -> dict[str, Any]:
        """A JSON value from which `restored` of the data component rebuilds this without records."""
        return {"fingerprint": self.fingerprint, "metadata": self.metadata, "unit": self.unit,
                "units_per_record": self.units_per_record, "classes": list(self.classes)}

    def read(self, path: Path, id_column: str | None = None, strict: bool = False) -> "Incoming":
        """New records to predict. `id_column`: a column to keep; `strict`: a blank record raises UserError."""
        raise UserError("This data has no reader for new records.")

    def own(self, split: str, id_column: str | None = None) -> "Incoming":
        """The records of a split, to predict. UserError if there is no such split or column."""
        records = getattr(self, split)
        if records is None:
            raise UserError(f"This data has no {split} split.")
        origin = self.origins.get(split) or Origin(np.arange(len(records)))
        beside, numbers = origin.beside(id_column), origin.rows.tolist()
        targets = records.arrays.get("targets") if isinstance(records, Arrays) else None
        truth = None if targets is None or targets.ndim != 1 else self.in_words(targets)
        if origin.truth is not None:
            truth = [origin.truth[i] for i in numbers]
        return Incoming(records, numbers, [f"record {i}" for i in numbers], beside, truth)

    def in_words(self, targets: np.ndarray) -> list[Any]:
        """Targets (n,) in readable form: class names, or numbers."""
        return [self.classes[i] for i in targets] if self.classes else targets.tolist()


def restored(saved: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a `Dataset` without records, from `Dataset.saved`."""
    known = {name: saved[name] for name in ("fingerprint", "metadata", "unit", "units_per_record")}
    return known | {"train": None, "validation": None, "test": None, "summary": {}, "classes": tuple(saved["classes"])}


@dataclass(frozen=True)
class Incoming:
    """Records to predict, with the columns to join their predictions on."""

    records: Records
    numbers: list[int]
    """The number of each record in the input, from 0, counting skipped records."""
    names: list[str]
    """A display name for each record: "line 3"."""
    beside: dict[str, list[Any]] = field(default_factory=dict)
    """Further columns, such as an id or the file."""
    truth: list[Any] | None = None
    """The true targets, if the input has them; "" for a missing one."""


def no_ids(column: str) -> UserError:
    """The error for an id column in an input without columns."""
    return UserError(f"--id {column} is for tables and messages in CSV files: there are no columns here.")


def without_blanks(path: Path, blank: Sequence[str], total: int, strict: bool) -> None:
    """Logs which records are blank and skipped. UserError if all are, or with `strict`."""
    if not blank:
        return
    some = ", ".join(blank[:5]) + (", ..." if len(blank) > 5 else "")
    if strict or len(blank) == total:
        one = len(blank) == 1
        raise UserError(f"{path}, {some} {'has' if one else 'have'} no text or value; write one, or remove "
                        f"{'the line' if one else 'the lines'}.")
    log.warning("%s: %d of %d records have no text or value and are skipped: %s (--strict makes that an error)",
                path, len(blank), total, some)


def _content(split: str, records: Records) -> list[Any]:
    if not hasattr(records, "arrays"):
        raise UserError("A Dataset whose records are not Arrays needs a fingerprint=, which tells when its content "
                        "changes.")
    arrays = {name: np.asarray(x) for name, x in sorted(records.arrays.items())}
    return [split, *([name, str(x.dtype), x.shape, hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()]
                     for name, x in arrays.items())]


def class_names(names: Sequence[str]) -> dict[str, str]:
    """A line that shows the first class names, if any."""
    return {"class names": ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")} if names else {}
