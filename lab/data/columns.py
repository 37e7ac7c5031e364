"""Comma-separated files: what is in them, cell by cell, and what is wrong with them, by file, line and column."""

import csv
import difflib
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lab.data.reading import check_encoding, read_text
from lab.errors import UserError

MISSING = frozenset({"", "na", "n/a", "nan", "null", "?"})  # what counts as no value, in small letters
MOSTLY = 0.9  # a column where more than this part of the values are numbers is one of numbers, and the rest mistakes
LONGEST = 1 << 28  # characters in one field; the csv module's own limit of 131,072 is too small for e-mails


@dataclass(frozen=True)
class Csv:
    """A CSV file with a header line, gzip when named .gz; the separator is a comma, semicolon or tab, as in the header.

    Quoting as in RFC 4180: a field with a separator, a line end or a quotation mark in it stands in quotation marks.
    An empty field, NA, N/A, NaN, null or ? is a missing value.
    """

    path: str
    """The file, or the training part where `test` is given."""
    target: str
    """The column to predict."""
    text: str | None = None
    """The column that holds the message, where texts are classified; not for tables."""
    test: str | None = None
    """A second file with the same columns: the test split."""
    task: Literal["auto", "regression", "classification"] = "auto"
    """What the target is; auto: classes if it is text or has at most 20 different values, all whole; else a number."""
    drop: tuple[str, ...] = ()
    """Columns that are no features, such as row numbers and names."""
    encoding: str = "UTF-8"
    """How the file is encoded. A byte order mark of UTF-16 or UTF-32 is recognised."""

    def validate(self) -> None:
        """UserError for fields that contradict each other; nothing is read."""
        check_encoding(self.encoding)
        if not self.path.strip() or not self.target.strip():
            raise UserError("Csv needs path=, a file, and target=, the name of the column to predict.")
        for role, name in (("target", self.target), ("text", self.text)):
            if name in self.drop:
                raise UserError(f"Csv(drop=...) has the column {name!r}, which is its {role}: leave one of them out.")
        if self.text == self.target:
            raise UserError(f"Csv(target={self.target!r}, text={self.text!r}): these must be two columns.")

    def state(self) -> tuple[int, ...]:
        """Changes when the files change; UserError when one of them is not there."""
        found = []
        for path in (self.path, self.test):
            if path is not None:
                try:
                    stat = Path(path).expanduser().stat()
                except OSError as error:
                    raise UserError(f"Cannot read {path}: {error.strerror} (looked from {Path.cwd()}).") from None
                found += [stat.st_size, stat.st_mtime_ns]
        return tuple(found)

    def read(self) -> "tuple[Columns, Columns | None]":
        """The cells of `path` and of `test`, without the dropped columns. UserError; see `read_columns`."""
        self.validate()
        self.state()
        both = [read_columns(path) for path in (self.path, self.test) if path is not None]
        for table in both:
            for name in (self.target, *self.drop, *([self.text] if self.text is not None else [])):
                table.column(name)
        for table in both:
            for name in self.drop:
                table.cells.pop(name, None)
        return both[0], both[1] if len(both) == 2 else None


@dataclass(frozen=True, eq=False)
class Columns:
    """The cells of a table."""

    title: str
    """The file, for people."""
    cells: dict[str, list[str] | np.ndarray]
    """Name -> one value per row: texts as they are in the file, or float64 with NaN for a missing value."""
    lines: list[int]
    """The line of the file that each row begins in, from 1."""

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns, in the order of the file."""
        return tuple(self.cells)

    def column(self, name: str) -> list[str] | np.ndarray:
        """The cells of one column. UserError, with the nearest names, when there is none of this name."""
        if name in self.cells:
            return self.cells[name]
        near = difflib.get_close_matches(name.lower(), [n.lower() for n in self.names], n=3, cutoff=0.6)
        known = [n for lower in near for n in self.names if n.lower() == lower] or self.names
        some = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        raise UserError(f"{self.title} has no column {name!r}; {'near it are' if near else 'it has'} {some}.")

    def where(self, row: int, name: str) -> str:
        """A cell, for people."""
        return f"{self.title}, line {self.lines[row]}, column {name!r}"


def missing(value: str) -> bool:
    """Whether a cell counts as having no value."""
    return value.strip().lower() in MISSING


def read_columns(path: str | Path) -> Columns:
    """All cells of a CSV file; see `Csv` for the format.

    Raises:
      UserError: unreadable, not UTF-8, empty, no header, a column named twice or not at all, a broken quotation, a row
        with too few or too many fields. Empty lines are passed over.
    """
    where = Path(path).expanduser()
    if where.is_dir():
        raise UserError(f"{path} is a folder, where a CSV file is needed.")
    text = "".join(read_text(where)).removeprefix("\ufeff")  # Excel marks UTF-8 with it
    separator = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    limit = csv.field_size_limit(LONGEST)
    rows, lines, begin = [], [], 1
    try:
        for row in reader:
            if row:
                rows.append(row)
                lines.append(begin)
            begin = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {begin}: {error}; a quotation mark inside a quoted field is doubled.") from None
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise UserError(f"{path} is empty.")
    names = _header(path, rows[0])
    if len(rows) == 1:
        raise UserError(f"{path} has a header and no row.")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(names):
            raise UserError(f"{path}, line {line}: {len(row)} fields, but the header has {len(names)}; a field with "
                            f"{separator!r} in it stands in quotation marks.")
    cells = dict(zip(names, map(list, zip(*rows[1:], strict=True)), strict=True))
    return Columns(str(path), cells, lines[1:])


def _header(path: str | Path, row: list[str]) -> list[str]:
    names = [name.strip() for name in row]
    if all(_number(name) is not None for name in names):
        start = ", ".join(names[:4])
        raise UserError(f"{path}: the first line ({start}...) has only numbers in it; it must name the columns.")
    for i, name in enumerate(names, 1):
        if not name:
            raise UserError(f"{path}: column {i} of {len(names)} has no name in the header; give it one.")
        if name in names[: i - 1]:
            raise UserError(f"{path}: two columns are named {name!r} in the header; rename one.")
    return names


# ------------------------------------------------------------------------------------------------------ numbers


def _number(value: str) -> float | None:
    """The float in a cell; None if there is none. Python's own digit groups (1_000) are not for files."""
    try:
        return None if "_" in value else float(value)
    except ValueError:
        return None


def parse(values: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """float64 (n,), NaN where a cell is missing or no number; bool (n,), True for what is neither."""
    read = [np.nan if missing(value) else _number(value) for value in values]
    odd = np.array([value is None for value in read], bool)
    return np.array([np.nan if value is None else value for value in read], np.float64), odd


def is_numeric(values: Iterable[str]) -> bool:
    """Whether more than 90 % of the cells that have a value are numbers."""
    read, odd = parse(values)
    numeric = int((~np.isnan(read)).sum())
    return numeric > MOSTLY * (numeric + int(odd.sum()))


def numbers(table: Columns, name: str) -> np.ndarray:
    """A column of numbers: float64 (n,), NaN where a value is missing. UserError for text and for infinity."""
    cells = table.column(name)
    values, odd = (cells, np.isnan(cells) & False) if isinstance(cells, np.ndarray) else parse(cells)
    for row in np.flatnonzero(odd | np.isinf(values))[:1]:
        what = "is not a number" if odd[row] else "is not finite"
        raise UserError(f"{table.where(row, name)}: {str(cells[row])!r} {what}; correct it, or leave the field empty "
                        f"if the value is missing.")
    return values


def class_targets(tables: "list[Columns]", name: str) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """The classes in a column of one or more tables: their names, and for each table the class of each row, int32 (n,).

    The names are those in the first table, sorted, as numbers if they are; "3.0" is "3".

    Raises:
      UserError: a row without a class, or with one that the first table lacks; a column that cannot be classes.
    """
    labels = [_labels(table, name) for table in tables]
    first, numeric = tables[0], not parse(labels[0])[1].any()
    names = tuple(sorted(set(labels[0]), key=float if numeric else None))
    some = ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
    if len(names) < 2 or len(names) * 2 > max(len(first), 4):
        raise UserError(f"{first.title}, column {name!r}: {len(names)} different values in {len(first)} rows ({some}) "
                        f"are no classes; is it the right target, and is task= right?")
    place = {label: i for i, label in enumerate(names)}
    for table, own in zip(tables, labels, strict=True):
        for row, label in enumerate(own):
            if label not in place:
                raise UserError(f"{table.where(row, name)}: the class {label!r} does not occur in {first.title}, which "
                                f"has {some}.")
    return names, [np.array([place[label] for label in own], np.int32) for own in labels]


def _labels(table: Columns, name: str) -> list[str]:
    for row, value in enumerate(cells := [str(value) for value in table.column(name)]):
        if missing(value):
            raise UserError(f"{table.where(row, name)}: the target is missing; give it, or delete the row.")
    return [re.sub(r"^([+-]?\d+)\.0+$", r"\1", value.strip()) for value in cells]
