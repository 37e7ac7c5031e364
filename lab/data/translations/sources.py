"""Sources of pairs: a source text, and the target text to write for it.

A *source* is a frozen dataclass in an experiment: `title` (display name), `columns` (the names of source and target, in
files of new texts), `validate()` (UserError for wrong fields; reads nothing) and `read()`, split -> pairs; "train" only
if there are no splits. Optional: `prepare(text)`, how a source is written before it is encoded. A new source here also
joins `Source` in translations.py and the package's `__init__.py`.
"""

import ast
import contextlib
import functools
import gc
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lab.data.dialogues.sources import json_lines
from lab.data.reading import check_encoding
from lab.data.tables.csv_files import read_columns
from lab.data.text.sources import PythonStdlib, TfdsText
from lab.errors import UserError

AT_ONCE = 1024  # TFDS records per read
LEAST = 3  # words of a docstring's line
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\w\s.]|[^\W_a-zA-Z\d]+")  # of identifiers, and signs


class TextPair(NamedTuple):
    """A source and its target. The hash of the target, `lab.data.dialogues.dialogues.divided`'s second entry, puts a
    pair into a split."""

    name: str
    """For error messages."""
    target: str
    source: str
    number: int
    """Of the pair in its file, from 0."""


def checked(name: str, source: object, target: object, number: int) -> TextPair:
    """The pair. UserError for an empty text, or none."""
    for what, text in (("source", source), ("target", target)):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{name}: the {what} is {'empty' if isinstance(text, str) else 'no text'}; write it, or "
                            f"leave the pair out.")
    return TextPair(name, target.strip(), source.strip(), number)


@dataclass(frozen=True)
class PairsFile:
    """A file of pairs: CSV (see `lab.data.tables.csv_files.Csv`), or a JSON object per line, if named .jsonl."""

    path: str
    """The file, or the training split if others are given; gzip if named .gz."""
    source: str = "source"
    """The column or key of the source."""
    target: str = "target"
    """The column or key of the target."""
    validation: str | None = None
    """A file of the same kind: the validation split."""
    test: str | None = None
    """A file of the same kind: the test split."""
    encoding: str = "UTF-8"
    """Encoding of the files."""

    @property
    def title(self) -> str:
        return self.path

    @property
    def columns(self) -> tuple[str, str]:
        return self.source, self.target

    def validate(self) -> None:
        """UserError without a path, for an unknown encoding, or if both columns are one."""
        check_encoding(self.encoding)
        if not self.path.strip():
            raise UserError("PairsFile needs path=, a .csv or .jsonl file.")
        if self.source == self.target:
            raise UserError(f"PairsFile needs two columns or keys; source= and target= are both {self.source!r}.")

    def read(self) -> dict[str, list[TextPair]]:
        """All pairs. UserError, naming the line, for one that is no pair; or for an empty file."""
        files = {"train": self.path, "validation": self.validation, "test": self.test}
        return {split: list(self._pairs(path)) for split, path in files.items() if path is not None}

    def _pairs(self, path: str) -> Iterator[TextPair]:
        if Path(path.removesuffix(".gz")).suffix == ".jsonl":
            for i, (name, row) in enumerate(json_lines(path, self.encoding, "a source and a target")):
                for flag, key in (("source", self.source), ("target", self.target)):
                    if key not in row:
                        raise UserError(f"{name} has no {key!r}, but {', '.join(map(repr, row)) or 'no keys'}: "
                                        f"--data.source.{flag} names the key.")
                yield checked(name, row[self.source], row[self.target], i)
        else:
            table = read_columns(path, encoding=self.encoding)
            both = table.column(self.source), table.column(self.target)
            for i, (line, source, target) in enumerate(zip(table.lines, *both, strict=True)):
                yield checked(f"{path}:{line}", str(source), str(target), i)


@dataclass(frozen=True)
class TfdsPairs:
    """A translation data set prepared by TFDS as ArrayRecord, such as TfdsPairs("ted_hrlr_translate/pt_to_en"), with
    its own splits. `./launch.sh prepare NAME` prepares it once. Pairs with a blank text are left out."""

    name: str
    """TFDS name, with configuration and version if needed."""
    source: str | None = None
    """Language of the source; None: as the configuration's name says, X_to_Y."""
    target: str | None = None
    """Language of the target; None: as the configuration's name says."""
    data_dir: str | None = None
    """Folder of prepared data sets; default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""

    @property
    def title(self) -> str:
        return f"TFDS {self.name}"

    @property
    def columns(self) -> tuple[str, str]:
        """The languages. UserError if neither the fields nor the name says them."""
        said = re.search(r"(?:/|^)([a-zA-Z-]+)_to_([a-zA-Z-]+)(?::|$)", self.name)
        found = tuple(own or (said and said[i]) for i, own in ((1, self.source), (2, self.target)))
        if not all(found) or found[0] == found[1]:
            raise UserError(f"{self.name} does not say two languages, as X_to_Y would: name them, --data.source.source "
                            f"and --data.source.target.")
        return found

    def validate(self) -> None:
        """UserError if the name is not a valid TFDS name, or the languages are not known."""
        TfdsText(self.name, self.data_dir).validate()
        _ = self.columns

    def read(self) -> dict[str, list[TextPair]]:
        """All pairs of the splits. UserError if the data set is not prepared, or lacks a language or a split."""
        corpora = [TfdsText(self.name, self.data_dir, feature=language).open() for language in self.columns]
        if "train" not in corpora[0].splits:
            raise UserError(f"{self.name} has no split train; it has {', '.join(corpora[0].splits)}.")
        found: dict[str, list[TextPair]] = {}
        for split in (s for s in ("train", "validation", "test") if s in corpora[0].splits):
            records = corpora[0]._records(split)
            numbers = [list(range(i, min(i + AT_ONCE, len(records)))) for i in range(0, len(records), AT_ONCE)]
            rows = (row for some in numbers for row in zip(some, records.__getitems__(some), strict=True))
            texts = ((i, *(corpus._text(row[corpus.source.feature], split, i) for corpus in corpora))
                     for i, row in rows)
            found[split] = [checked(f"{self.name} {split} {i}", source, target, i) for i, source, target in texts
                            if source.strip() and target.strip()]
        return found


@dataclass(frozen=True)
class PythonSignatures:
    """Pairs that every machine has: the signature of a function of Python's standard library, and the first line of its
    docstring (of at least three words). They depend on the Python version."""

    title = "signatures and docstrings of Python's standard library"
    columns = "source", "target"

    def prepare(self, text: str) -> str:
        """A signature in lower-case words, which are then tokens of docstrings, too: "shutil.copyFile(src_dir)" ->
        "shutil copy file ( src dir )"."""
        return " ".join(_WORD.findall(text)).lower()

    def validate(self) -> None:
        """Nothing can be checked without reading."""

    def read(self) -> dict[str, list[TextPair]]:
        """One pair per documented function or method, in the order of the files. UserError without the files."""
        return {"train": list(_documented())}


@functools.cache
def _documented() -> tuple[TextPair, ...]:
    """Parses 10 MB in about 4 s."""
    found: list[TextPair] = []
    for name, path in PythonStdlib().open().paths.items():
        try:
            with _without_gc():
                tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, ValueError):  # a module for tests of the parser
            continue
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for signature, line in _functions(tree.body, module):
            found.append(TextPair(f"{name}, {signature}", line, signature, len(found)))
    return tuple(found)


def _functions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
    """(signature, first line of its docstring) of functions and methods, not of those inside functions."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{prefix}.{node.name}")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            line = (ast.get_docstring(node) or "").strip().partition("\n")[0].strip()
            if line[:1].isalpha() and len(line.split()) >= LEAST:
                yield f"{prefix}.{node.name}({ast.unparse(node.args)})", line


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Garbage collection can break ast.parse on Python 3.11 (gh-106905)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
