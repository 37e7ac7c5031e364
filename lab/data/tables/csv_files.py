"""Reads CSV files cell by cell."""

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lab.data.reading import check_encoding, encoding_of, read_text
from lab.data.tables.columns import SEPARATORS, Columns, some
from lab.data.tables.numbers import PLAIN, NumberFormat
from lab.errors import UserError
from lab.files import user_path

# Why not pandas.read_csv (3.1.1): it fills short rows in silence, its errors count rows (a quoted line break makes them
# differ from lines), it renames a second column "a", and takes text after a closing quotation mark. It would replace
# `_rows` (20 lines) and bring 46 MB and 1.7 s of import. It is faster: 100 MB in 3.9 s of CPU time and 0.9 GB, against
# 12.2 s and 1.5 GB (2026-11-26).

LONGEST = 1 << 28  # characters in one field; the csv module's own limit of 131,072 is too small for e-mails
LOOK = 1 << 16  # characters to tell the separator from
# Begin of a file, in lower case -> what it is, and the remedy.
_OTHER = {"<!doctype html": "a web page: the download has failed", "<html": "a web page: the download has failed",
          "version https://git-lfs": "a pointer of Git LFS: fetch the file itself with `git lfs pull`",
          '{"': "JSON: convert it", '[{"': "JSON: convert it", "<?xml": "XML: convert it"}


@dataclass(frozen=True)
class Csv:
    """A CSV file with a header line, gzip if named .gz. The separator (comma, semicolon, tab or |) is detected from
    the header, or given by a line such as sep=; before it.

    Quoting as in RFC 4180: fields with a separator, line end or quotation mark are in quotation marks. An empty field,
    NA, N/A, NaN, null or ? is a missing value. Numbers are written as in 1200.5 and -3e4. A column that seems to have
    numbers in another format is an error that names the field to set. A column without a name is called by its
    position, "column 1", and must be dropped unless it is empty.
    """

    path: str
    """The file, or the training split if `test` is given."""
    target: str
    """The column to predict."""
    text: str | None = None
    """The column with the message, for text classification; not for tables."""
    test: str | None = None
    """A file with the same columns: the test split."""
    task: Literal["auto", "regression", "classification"] = "auto"
    """Type of the target. auto: classes if it is text or at most 20 distinct integers; else a number."""
    drop: tuple[str, ...] = ()
    """Columns that are not features, such as row numbers and names; "column 1" is an unnamed one, by position."""
    encoding: str = "UTF-8"
    """Encoding of the file. A UTF-16 or UTF-32 byte order mark is recognised."""
    decimal: str = "."
    """The decimal mark: a point or a comma."""
    thousands: str = ""
    """The thousands separator: a comma, a point, a space (of any kind) or an apostrophe."""
    units: tuple[str, ...] = ()
    """Signs before or after a number to ignore: "$", "%" (45% is 45), "kg", "<" (<0.5 is 0.5). With a factor they
    multiply: "k=1e3", "M=1e6", "%=0.01". Units of one column that differ need it."""
    brackets: bool = False
    """Numbers in brackets are negative, as in accounting: (1,200) is -1200."""
    missing: tuple[str, ...] = ()
    """Additional words for a missing value, such as "-", "#N/A" or "None"."""
    categorical: tuple[str, ...] = ()
    """Columns whose values are categories, even if they look like numbers."""

    def validate(self) -> None:
        """UserError for fields that contradict each other; nothing is read."""
        check_encoding(self.encoding)
        self.form.validate()
        if not self.path.strip() or not self.target.strip():
            raise UserError("Csv needs path=, a file, and target=, the name of the column to predict.")
        for role, name in (("target", self.target), ("text", self.text)):
            if name in self.drop:
                raise UserError(f"Csv(drop=...) has the column {name!r}, which is its {role}: leave one of them out.")
        if self.text == self.target:
            raise UserError(f"Csv(target={self.target!r}, text={self.text!r}): these must be two columns.")

    @property
    def form(self) -> NumberFormat:
        """The file's number format."""
        return NumberFormat(self.decimal, self.thousands, self.units, self.brackets, self.missing)

    def state(self) -> tuple[int, ...]:
        """Changes when the files change; UserError if one does not exist."""
        found = []
        for path in (self.path, self.test):
            if path is not None:
                try:
                    stat = user_path(path).stat()
                except OSError as error:
                    raise UserError(f"Cannot read {path}: {error.strerror} (looked from {Path.cwd()}).") from None
                found += [stat.st_size, stat.st_mtime_ns]
        return tuple(found)

    def read(self) -> "tuple[Columns, Columns | None]":
        """The cells of `path` and `test`, without the dropped columns. UserError: see `read_columns`."""
        self.validate()
        self.state()
        both = [read_columns(path, self.form, self.encoding) for path in (self.path, self.test) if path is not None]
        for table in both:
            drop = [table.named(name) for name in self.drop]
            for name in (self.target, *self.categorical, *([self.text] if self.text is not None else [])):
                table.column(name)
            for name in drop:
                if name in table.cells:
                    table.dropped[name] = table.cells.pop(name)
            for name in table.unnamed:
                if name in table.cells:
                    begin = some(table.cells[name][:3])
                    raise UserError(f"{table.title}: {name} of {table.width} has no name in the header (its values "
                                    f"begin with {begin}); give it one, or leave it out: --data.source.drop '{name}'.")
        return both[0], both[1] if len(both) == 2 else None


def read_columns(path: str | Path, form: NumberFormat = PLAIN, encoding: str = "UTF-8") -> Columns:
    """All cells of a CSV file; see `Csv` for the format.

    Raises:
      UserError: unreadable, not in this encoding, empty, no header, a column named twice, a broken quotation, a row
        with too few or too many fields. Empty lines are skipped.
    """
    where = user_path(path)
    if where.is_dir():
        raise UserError(f"{path} is a folder, where a CSV file is needed.")
    text = "".join(read_text(where, encoding)).lstrip("\ufeff")  # Excel's UTF-8 byte order mark
    if what := next((what for sign, what in _OTHER.items() if text.lstrip()[:60].lower().startswith(sign)), None):
        raise UserError(f"{path} is no CSV file but {what}.")
    declared = re.match(r'"?sep=(.)"?\r?\n', text)  # Excel's way to name the separator
    text, skipped = (text[declared.end():], 1) if declared else (text, 0)
    separator = declared[1] if declared else _separator(text)
    rows, lines = _rows(path, text, separator, skipped)
    if not rows:
        raise UserError(f"{path} is empty.")
    names = _header(path, rows[0])
    if len(rows) == 1:
        raise UserError(f"{path} has a header and no row.")
    for row, line in zip(rows[1:], lines[1:], strict=True):
        if len(row) != len(names):
            raise UserError(f"{path}, line {line}: {len(row)} fields, but the header has {len(names)}; a field with "
                            f"{separator!r} in it stands in quotation marks, with no space before them. (The header, "
                            f"line {lines[0]}, is {some(rows[0])}.)")
        if row == rows[0]:
            raise UserError(f"{path}, line {line} is the header again: delete it (files put together need only one).")
    cells = dict(zip(names, map(list, zip(*rows[1:], strict=True)), strict=True))
    found = encoding_of(where, encoding)
    unnamed = [name for name, own in zip(names, rows[0], strict=True) if not own.strip()]
    empty = [name for name in unnamed if not any(cell.strip() for cell in cells[name])]
    notes = {"encoding": found} if found != "UTF-8" else {}
    notes |= {"left out, empty and without a name": ", ".join(empty)} if empty else {}
    cells = {name: column for name, column in cells.items() if name not in empty}
    if not cells:
        raise UserError(f"{path} has no column with a name or a value.")
    return Columns(str(path), cells, lines[1:], form, found, tuple(n for n in unnamed if n not in empty),
                   notes=notes | form.lines())


def _separator(text: str) -> str:
    """The separator that gives the first lines as many fields as the header; else the most frequent in the header."""
    head = text.partition("\n")[0]
    likely = sorted((mark for mark in SEPARATORS if mark in head), key=head.count, reverse=True)
    start = text[:LOOK].rpartition("\n")[0] if len(text) > LOOK else text
    for mark in likely:
        try:
            rows = [row for row in csv.reader(io.StringIO(start, newline=""), delimiter=mark) if row]
        except csv.Error:  # said by `_rows`
            continue
        if len(rows[0]) > 1 and all(len(row) == len(rows[0]) for row in rows):
            return mark
    return next(iter(likely), ",")


def _rows(path: str | Path, text: str, separator: str, skipped: int) -> tuple[list[list[str]], list[int]]:
    """The non-empty rows, and the line at which each begins."""
    if separator in '"\r\n':
        raise UserError(f"{path} says sep={separator!r} in its first line, which cannot separate fields.")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    limit = csv.field_size_limit(LONGEST)
    rows, lines, begin = [], [], 1 + skipped
    try:
        for row in reader:
            if row and (len(row) > 1 or row[0].strip() or rows and len(rows[0]) == 1):  # one field may be missing
                rows.append(row)
                lines.append(begin)
            begin = reader.line_num + 1 + skipped
    except csv.Error as error:
        raise UserError(f"{path}, line {begin}: {error}; a quotation mark inside a quoted field is doubled.") from None
    finally:
        csv.field_size_limit(limit)
    return rows, lines


def _header(path: str | Path, row: list[str]) -> list[str]:
    """The column names; an empty name is replaced by the column's position."""
    names = [name.strip() or f"column {i}" for i, name in enumerate(row, 1)]
    if all(PLAIN.number(name) is not None for name in names):
        start = ", ".join(names[:4])
        raise UserError(f"{path}: the first line ({start}...) has only numbers in it; it must name the columns.")
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"{path}: two columns are named {name!r} in the header; rename one.")
    return names
