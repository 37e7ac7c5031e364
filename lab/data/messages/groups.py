"""Groups of messages: columns of their CSV file as fields of a record, see `lab.data.tables.groups`."""

import functools

from lab.data.messages.sources import Labelled, load
from lab.data.pipeline import Batch
from lab.data.tables.columns import Columns
from lab.data.tables.csv_files import Csv
from lab.data.tables.groups import group_fields
from lab.errors import UserError


def groups_of(found: Labelled, source: object, columns: tuple[str, ...]) -> dict[str, Batch]:
    """Split -> the fields of these columns of `source`, from which the messages were `found`.

    Raises:
      UserError: the source has no columns, or see `group_fields`.
    """
    fields: dict[str, Batch] = {split: {} for split in found.splits}
    for column in columns:
        if not isinstance(source, Csv):
            raise UserError(f"--task.groups {column}: groups are a column of a CSV file, and {found.title} has none.")
        tables = []
        for origin in (found.origins[split] for split in fields):
            cells = Columns(found.title, dict(origin.columns or {}), []).column(column)
            tables.append(Columns(found.title, {column: [cells[i] for i in origin.rows]}, [], source.form))
        for split, own in zip(fields, group_fields(tables, column), strict=True):
            fields[split] |= own
    return fields


def group_names(source: object, columns: tuple[str, ...]) -> list[str]:
    """The names of the fields; reads the file once."""
    return _read(source, columns, source.state() if isinstance(source, Csv) else ())


@functools.lru_cache(maxsize=4)
def _read(source: object, columns: tuple[str, ...], _state: tuple[int, ...]) -> list[str]:
    return list(groups_of(load(source), source, columns)["train"])
