"""Sources of text. Documents are streamed in pieces, so a corpus may be larger than memory.

A *source* is a frozen dataclass in an experiment. `validate()` raises UserError for wrong fields. `open()` reads names
and sizes only and returns a *corpus* (`Corpus` in files.py):

    title                 display name
    stored_bytes()        size of the files on disk
    identity()            cheap key of the files on disk (paths, sizes, times)
    survey()              one pass over the content: fingerprint and data for the split; cached by `identity`
    rule(survey)          a sentence about how train and validation are split
    documents(split, survey)   documents in a fixed order, each an iterator of pieces of text

For a source of files, return a `Files`; where their text is changed, derive from `Files` and override `read` and
`identity`. A new source here also joins `Source` in text.py and the package's `__init__.py`; one in your experiment's
file needs neither.

If a source has no splits: with 20 documents or more, a hash of each document's *name* puts about 10 % of them into
validation; with fewer, the last 10 % of all characters are validation (on tiny Shakespeare, nanoGPT's split).
"""

import dataclasses
import glob
import hashlib
import os
import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.data import digest
from lab.data.prepared import described
from lab.data.reading import check_encoding
from lab.data.text.files import MANY, Documents, Files, Survey, between, cached_survey
from lab.errors import Absent, UserError
from lab.files import user_path

# Left out of PythonStdlib: installed packages; test suites (60 % of all bytes, many of them tables of cases);
# `encodings`, 120 similar generated tables, which would leak from training into validation; and `pydoc_data`, one
# generated file of English, which would be half of the validation text.
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class PythonStdlib:
    """The source code of the running Python's standard library: real text, available on every machine.

    Files are sorted by name, without installed packages, tests and generated tables (`encodings`, `pydoc_data`). Files
    that are empty or not UTF-8 are skipped and counted. Whole files are split by a hash of their names (about 10 %
    validation). The corpus depends on the Python version: compare bits per byte only if the fingerprint is equal.
    """

    def validate(self) -> None:
        """Nothing can be checked without reading."""

    def open(self) -> Files:
        """List the files. UserError if Python was installed without its library's source."""
        root = Path(sysconfig.get_path("stdlib"))
        found = []
        for folder, folders, files in os.walk(root):
            # `config-*` and `_sysconfigdata*` hold the paths of this machine.
            folders[:] = [f for f in folders if f not in _NOT_STDLIB and not f.startswith("config-")]
            here = Path(folder).relative_to(root)
            found += [
                (here / f).as_posix() for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata")
            ]
        if len(found) < MANY:
            raise UserError(f"No source text of Python's standard library in {root}: give TextFiles or another Python.")
        version = ".".join(map(str, sys.version_info[:3]))
        return Files(f"Python {version} standard library", {name: root / name for name in sorted(found)}, skip=True)


@dataclass(frozen=True)
class TextFiles:
    """Text files on disk, one document each, sorted by name; `.gz` files are decompressed while reading.

    With 20 files or more a hash of the file names picks about 10 % of them for validation; with fewer, the last 10 % of
    all characters are validation. Empty files are skipped and counted.
    """

    pattern: str
    """A file, a folder (all *.txt and *.txt.gz in it), or a pattern such as "~/books/**/*.txt"."""
    encoding: str = "UTF-8"
    """Encoding of the files. With UTF-8, files with a UTF-16 or UTF-32 byte order mark are read as those."""

    def validate(self) -> None:
        """UserError if the pattern is empty or the encoding unknown."""
        if not self.pattern.strip():
            raise UserError('TextFiles needs a file, a folder or a pattern such as "~/books/*.txt".')
        check_encoding(self.encoding)

    def open(self) -> Files:
        """Find the files. UserError if there are none."""
        where = user_path(self.pattern)
        if where.is_file():
            found = [where]
        elif where.is_dir():
            found = [p for p in where.iterdir() if p.name.endswith((".txt", ".txt.gz")) and p.is_file()]
        else:
            found = [Path(p) for p in glob.glob(str(where), recursive=True) if os.path.isfile(p)]
        if not found:
            what = "has no *.txt file in it" if where.is_dir() else "does not exist, nor does it match a file"
            raise Absent(f"{self.pattern} {what} (looked from {Path.cwd()}).")
        found = sorted({p.absolute() for p in found})
        base = os.path.commonpath([p.parent for p in found])
        return Files(f"files {self.pattern}", {p.relative_to(base).as_posix(): p for p in found},
                     encoding=self.encoding)


# --------------------------------------------------------------------------------------------------------- TFDS


@dataclass(frozen=True)
class TfdsText:
    """A text data set prepared by TFDS as ArrayRecord, read without TensorFlow; one record is one document.

    Nothing is downloaded here: `./launch.sh prepare NAME` does that once, in a separate environment. If the data set
    has no validation split (and `validation` is not given), validation is the last 10 % of the training records, or of
    the characters if there are fewer than 20 records.
    """

    name: str
    """TFDS name, with configuration and version if needed: "lm1b", "imdb_reviews/plain_text:1.0.0"."""
    data_dir: str | None = None
    """Folder of prepared data sets; default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    train: str = "train"
    """TFDS split expression for training, such as "train[:50%]"."""
    validation: str | None = None
    """TFDS split expression for validation, such as "validation+test"; default "validation" if there is one."""
    feature: str = "text"
    """The record field with the text."""

    def validate(self) -> None:
        """UserError if the name is not a valid TFDS name."""
        if not re.fullmatch(r"\w+(/[\w.+-]+)?(:\d+\.\d+\.\d+)?", self.name):
            raise UserError(f'{self.name!r} is not a TFDS name: write "name", "name/config" or "name/config:1.0.0".')

    def open(self) -> "TfdsCorpus":
        """Find the prepared folder and read its descriptions (no TFDS import, no network). UserError if absent."""
        self.validate()
        folder, splits, features = described(self.name, self.data_dir)
        if self.feature not in features:
            raise UserError(f"{self.name} has no field {self.feature!r}; it has {', '.join(sorted(features))}.")
        validation = self.validation or ("validation" if "validation" in splits else None)
        chosen = dataclasses.replace(self, validation=validation)
        return TfdsCorpus(f"TFDS {self.name}", chosen, folder, splits)


@dataclass(frozen=True)
class TfdsCorpus:
    """A corpus of TFDS records; `source.validation` is resolved, `splits` comes from dataset_info.json."""

    title: str
    source: TfdsText
    folder: Path
    splits: dict[str, dict[str, Any]]

    def stored_bytes(self) -> int:
        return sum(p.stat().st_size for p in self.folder.iterdir())

    def identity(self) -> str:
        files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(self.folder.iterdir())]
        return digest("tfds", str(self.folder), files, self.source.train, self.source.validation, self.source.feature)

    def survey(self) -> Survey:
        return cached_survey(self, self._survey, max(p.stat().st_mtime for p in self.folder.iterdir()))

    def _survey(self) -> Survey:
        # Hash the shards' bytes: much faster than decoding every record, and equal wherever the same data was prepared.
        source = self.source
        total = hashlib.sha256(digest(source.train, source.validation, source.feature).encode())
        for path in sorted(self.folder.glob("*.array_record*")):
            with path.open("rb") as file:
                total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        records = len(self._records(source.train))
        if source.validation:
            self._records(source.validation)  # raise for a wrong expression now, not after reading the training split
        small = not source.validation and records < MANY
        characters = sum(len(t) for d in self._read(source.train) for t in d) if small else 0
        size = sum(int(split.get("numBytes", 0)) for split in self.splits.values())
        return Survey(total.hexdigest(), records, characters, size)

    def rule(self, survey: Survey) -> str:
        if self.source.validation:
            return f"train is {self.source.train}, validation is {self.source.validation}"
        what = "characters" if survey.documents < MANY else "records"
        return f"validation is the last 10 % of the {what} of {self.source.train}"

    def documents(self, split: str, survey: Survey) -> Documents:
        train, validation = self.source.train, self.source.validation
        if validation:
            return self._read(train if split == "train" else validation)
        if survey.documents < MANY:
            cut = survey.characters * 9 // 10
            first, last = (0, cut) if split == "train" else (cut, survey.characters)
            return between(self._read(train), first, last)
        cut = survey.documents * 9 // 10
        return self._read(train, 0, cut) if split == "train" else self._read(train, cut)

    def _records(self, expression: str) -> Any:
        import tensorflow_datasets as tfds  # takes 1.5 s; import it only to read records

        try:
            return tfds.builder_from_directory(str(self.folder)).as_data_source(split=expression)
        except ValueError:  # invalid expression, unknown split, or empty selection
            raise UserError(
                f"The split {expression!r} of {self.source.name} is unknown, badly written or empty; its splits are "
                f"{', '.join(self.splits)}."
            ) from None

    def _read(self, expression: str, start: int = 0, stop: int | None = None) -> Documents:
        records = self._records(expression)
        stop = len(records) if stop is None else stop
        # ArrayRecord is fast at reading many records at once; about 16 MB at a time bounds memory.
        size = sum(int(split.get("numBytes", 0)) for split in self.splits.values())
        count = sum(int(n) for split in self.splits.values() for n in split.get("shardLengths", []))
        batch = min(max(int(2**24 * count / max(size, 1)), 1), 1024)
        for first in range(start, stop, batch):
            for at, record in enumerate(records.__getitems__(list(range(first, min(first + batch, stop)))), first):
                yield iter((self._text(record[self.source.feature], expression, at),))

    def _text(self, value: bytes | str, expression: str, at: int) -> str:
        if isinstance(value, str):
            return value
        try:
            return value.decode()
        except (UnicodeDecodeError, AttributeError) as error:
            raise UserError(
                f"Record {at} of {self.source.name} {expression} is not UTF-8 text in {self.source.feature!r}: {error}."
            ) from None
