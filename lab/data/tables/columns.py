"""The cells of a table as numbers and classes; errors name file, line and column."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lab.data.tables.numbers import PLAIN, Fields, NumberFormat, doubt, flags
from lab.errors import UserError

HUGE = 1e37  # largest magnitude allowed
SEPARATORS = ",;\t|"  # of the fields in a file


@dataclass(frozen=True, eq=False)
class Columns:
    """The cells of a table."""

    title: str
    """Display name of the file."""
    cells: dict[str, list[str] | np.ndarray]
    """Name -> one value per row: the file's text, or float64 with NaN for a missing value."""
    lines: list[int]
    """The line at which each row begins, from 1."""
    form: NumberFormat = PLAIN
    """Number format of the texts."""
    encoding: str = "UTF-8"
    unnamed: tuple[str, ...] = ()
    """The `names` made up for columns without a name."""
    dropped: dict[str, list[str]] = field(default_factory=dict)
    """The cells of columns that are not features."""
    notes: dict[str, str] = field(default_factory=dict)
    """Notes to print about how the file was read."""

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns, in file order."""
        return tuple(self.cells)

    @property
    def width(self) -> int:
        """Number of columns in the file."""
        return len(self.cells)

    def named(self, name: str) -> str:
        """The column called `name`, or at this position (from 1). UserError if there is none."""
        place = int(name) - 1 if name.isascii() and name.isdecimal() else -1
        if name not in self.cells and 0 <= place < self.width:
            return self.names[place]
        self.column(name)
        return name

    def column(self, name: str) -> list[str] | np.ndarray:
        """The cells of one column. UserError, with similar names, if it does not exist."""
        if name in self.cells:
            return self.cells[name]
        near = difflib.get_close_matches(name.lower(), [n.lower() for n in self.names], n=3, cutoff=0.6)
        known = [n for lower in near for n in self.names if n.lower() == lower] or self.names
        some = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        hint = f" The separators known are {' '.join(map(repr, SEPARATORS))}." if self.width == 1 else ""
        raise UserError(f"{self.title} has no column {name!r}; {'near it are' if near else 'it has'} {some}.{hint}")

    def rows(self, rows: Sequence[int]) -> "Columns":
        """Some of the rows."""
        cells = {name: [column[row] for row in rows] for name, column in self.cells.items()}
        return replace(self, cells=cells, lines=[self.lines[row] for row in rows])

    def where(self, row: int, name: str) -> str:
        """Display name of a cell: file, line and column."""
        return f"{self.title}, line {self.lines[row]}, column {name!r}"


def is_numeric(table: Columns, name: str, rows: Sequence[int] | None = None) -> bool:
    """Whether more than 90 % of a column's values in `rows` (default: all) are numbers; missing values do not count."""
    cells = table.column(name)
    return isinstance(cells, np.ndarray) or table.form.is_numeric(cells if rows is None else [cells[i] for i in rows])


def refuse_doubts(table: Columns, names: Sequence[str], rows: Sequence[int] | None = None) -> None:
    """UserError if columns are not numeric in these `rows`, but would be in another number format."""
    wanted: Fields = {}
    doubtful = {}
    for name in names:
        cells = table.column(name)
        if not is_numeric(table, name, rows):
            own = cells if rows is None else [cells[row] for row in rows]
            for key, values in (found := doubt(own, table.form)).items():
                wanted.setdefault(key, set()).update(values)
            if found:
                odd = [cell for cell in own if table.form.number(cell) is None and not table.form.is_missing(cell)]
                doubtful[name] = min(odd, key=len)
    if doubtful:
        columns = [f"{name!r} ({cell!r})" for name, cell in doubtful.items()]
        shown = ", ".join(columns[:4]) + (f" and {len(columns) - 4} more" if len(columns) > 4 else "")
        way = f"Set {advice}" if (advice := flags(wanted)) else "Write them as 1200.5, or leave them out (" \
            "--data.source.drop): no setting makes numbers of all"
        raise UserError(f"{table.title}: what looks like numbers is not read as such in the column"
                        f"{'s' * (len(columns) > 1)} {shown}. {way}; or --data.source.categorical where "
                        f"the values are categories.")


def numbers(table: Columns, name: str) -> np.ndarray:
    """A column of numbers: float64 (n,), NaN for a missing value. UserError for text and infinity."""
    cells = table.column(name)
    values, odd = (cells, np.isnan(cells) & False) if isinstance(cells, np.ndarray) else table.form.parse(cells)
    if not isinstance(cells, np.ndarray) and (units := table.form.mixed(cells)):
        raise UserError(f"{table.title}, column {name!r}: numbers with and without {', '.join(units)} do not compare. "
                        f"Say what one is worth: --data.source.units {' '.join(f'{unit}=?' for unit in units)}, as in "
                        f"k=1e3.")
    for row in np.flatnonzero(odd | (np.abs(values) > HUGE))[:1]:
        if not odd[row]:
            what = "is not finite" if np.isinf(values[row]) else f"is beyond {HUGE:g}, more than float32 holds"
            raise UserError(f"{table.where(row, name)}: {str(cells[row])!r} {what}; correct it, or leave the field "
                            f"empty if the value is missing.")
        fields = doubt([cells[row]], table.form)
        fields = fields if flags(fields) else {"missing": {cells[row].strip()}}
        raise UserError(f"{table.where(row, name)}: {cells[row]!r} is not a number; correct it, leave the field empty "
                        f"if the value is missing, or set {flags(fields)}.")
    return values


def class_targets(tables: "list[Columns]", name: str) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """The classes in a column of one or more tables: their names, and for each table the class of each row, int32 (n,).

    The names are those in the first table, sorted (numerically if they are numbers); "3.0" becomes "3".

    Raises:
      UserError: a row without a class, or with one that the first table lacks; a column that cannot be classes.
    """
    labels = [_labels(table, name) for table in tables]
    first, numeric = tables[0], not tables[0].form.parse(labels[0])[1].any()
    names = tuple(sorted(set(labels[0]), key=first.form.number if numeric else None))
    shown = some(names)
    if len(names) < 2 or len(names) * 2 > max(len(first), 4):
        raise UserError(f"{first.title}, column {name!r}: {len(names)} different values in {len(first)} rows ({shown}) "
                        f"are not classes. Check the target, and task=.")
    place = {label: i for i, label in enumerate(names)}
    for table, own in zip(tables, labels, strict=True):
        for row, label in enumerate(own):
            if label not in place:
                raise UserError(f"{table.where(row, name)}: the class {label!r} does not occur in {first.title}, which "
                                f"has {shown}.")
    return names, [np.array([place[label] for label in own], np.int32) for own in labels]


def _labels(table: Columns, name: str) -> list[str]:
    for row, label in enumerate(found := labels(table, name)):
        if not label:
            raise UserError(f"{table.where(row, name)}: the target is missing; give it, or delete the row.")
    return found


def labels(table: Columns, name: str) -> list[str]:
    """A column of classes; "3.0" becomes "3", and a missing value ""."""
    return ["" if table.form.is_missing(value) else re.sub(r"^([+-]?\d+)\.0+$", r"\1", value.strip())
            for value in map(str, table.column(name))]


def some(values: Sequence[str]) -> str:
    """The first few values, to print."""
    return ", ".join(map(repr, values[:5])) + (", ..." if len(values) > 5 else "")
