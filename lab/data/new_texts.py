"""Texts to predict: the lines of a .txt file, a column of a .csv file, or a key of a .jsonl file."""

from dataclasses import dataclass, field
from pathlib import Path

from lab.data.dataset import no_ids, without_blanks
from lab.data.dialogues.sources import json_lines
from lab.data.reading import lines_of, read_text
from lab.data.tables.columns import labels
from lab.data.tables.csv_files import read_columns
from lab.errors import UserError


@dataclass
class NewTexts:
    """The texts of a file that are not blank."""

    texts: list[str]
    numbers: list[int]
    """The number of each in the file, from 0, counting blank ones."""
    names: list[str]
    """A display name for each: "line 3"."""
    beside: dict[str, list[str]] = field(default_factory=dict)
    """The column to keep."""
    truth: list[str] | None = None
    """The column with the true targets, if the file has it."""


def read_new_texts(path: Path, column: str, target: str, what: str, encoding: str = "UTF-8",
                   id_column: str | None = None, strict: bool = False) -> NewTexts:
    """Reads a file. `column`, `target`: of a .csv or .jsonl file; `what`: a text is, for messages.

    Raises:
      UserError: another kind of file, an empty one, no such column, or only blank texts; with `strict` any blank one.
    """
    beside: dict[str, list[str]] = {}
    truth = None
    if path.suffix == ".csv":
        table = read_columns(path, encoding=encoding)
        texts, lines = list(map(str, table.column(column))), table.lines
        beside = {} if id_column is None else {id_column: table.column(id_column)}
        truth = labels(table, target) if target in table.cells else None
    elif path.suffix == ".jsonl":
        texts, lines, beside, truth = _json_texts(path, column, target, encoding, id_column)
    elif path.suffix == ".txt":
        if id_column is not None:
            raise no_ids(id_column)
        texts = lines_of("".join(read_text(path, encoding)).removeprefix("\ufeff"))
        lines = list(range(1, len(texts) + 1))
        if not texts:
            raise UserError(f"{path} is empty: it needs one {what} a line.")
    else:
        raise UserError(f"{path} is no file of {what}s: give a .txt file with one {what} a line, or a .csv or .jsonl "
                        f"file with {column!r}.")
    kept = [i for i, text in enumerate(texts) if text.strip()]
    without_blanks(path, [f"line {n}" for n, text in zip(lines, texts, strict=True) if not text.strip()], len(texts),
                   strict)
    return NewTexts([texts[i] for i in kept], kept, [f"line {lines[i]}" for i in kept],
                    {name: [values[i] for i in kept] for name, values in beside.items()},
                    None if truth is None else [truth[i] for i in kept])


def _json_texts(path: Path, column: str, target: str, encoding: str, id_column: str | None) -> tuple:
    """(texts, lines, columns to keep, true targets or None)."""
    found = json_lines(str(path), encoding, f"{column!r}")
    rows = [(int(place.rpartition(":")[2]), place, row) for place, row in found]
    for _, place, row in rows:
        for key in (column, *([] if id_column is None else [id_column])):
            if not isinstance(row.get(key), str | int):
                raise UserError(f"{place} has no text {key!r}, but {', '.join(map(repr, row)) or 'no keys'}.")
    beside = {} if id_column is None else {id_column: [str(row[id_column]) for _, _, row in rows]}
    truth = [str(row.get(target, "")) for _, _, row in rows]
    return [str(row[column]) for _, _, row in rows], [n for n, _, _ in rows], beside, truth if any(truth) else None
