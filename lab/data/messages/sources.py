"""Sources of labelled messages: texts, their classes, and the source's own splits.

A *source* is part of an experiment's config: `TextFolder`, `TfdsMessages` and `PythonPackages` are defined here; `load`
also takes `Csv` and `Sklearn`, which serve tables too. The result is a `Labelled`, checked: every class has training
messages, and no split has a class that training lacks.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lab.data import digest
from lab.data.dataset import Origin
from lab.data.folders import Splits, below, labelled, printable, split_folders, tree
from lab.data.reading import check_encoding, encoding_of, lines_of, read_text
from lab.data.tables.bundled import Sklearn
from lab.data.tables.columns import class_targets
from lab.data.tables.csv_files import Csv
from lab.data.text import sources
from lab.data.text.sources import PythonStdlib
from lab.errors import UserError
from lab.files import user_path

SPLITS = ("train", "validation", "test")
AT_ONCE = 1024  # TFDS records per read
# Packages in every Python from 3.11 on, with at least 180 messages in at least 5 files.
PACKAGES = ("asyncio", "email", "http", "importlib", "multiprocessing", "unittest", "urllib", "xml")
LINES = 20
_IMPORT = re.compile(r"\s*(import\s|from\s+\S+\s+import\b)")


@dataclass(frozen=True, eq=False)
class Labelled:
    """Messages with their classes."""

    title: str
    classes: tuple[str, ...]
    splits: dict[str, tuple[list[str], np.ndarray]]
    """"train", and "validation" and "test" if the source has them -> (n texts, int32 (n,) classes)."""
    rule: str
    """A sentence about how the source splits the messages."""
    column: str = "text"
    """The column of a CSV file that holds new messages."""
    origins: dict[str, Origin] = field(default_factory=dict)
    """See `Dataset.origins`."""

    def fingerprint(self) -> str:
        """Hash of the classes and of each split's messages, in order."""
        total = hashlib.sha256()
        for texts, labels in (self.splits[split] for split in SPLITS if split in self.splits):
            for text, label in zip(texts, labels.tolist(), strict=True):
                raw = text.encode(errors="surrogatepass")
                total.update(b"%d %d\n%b" % (label, len(raw), raw))
            total.update(b"end of split\n")
        return digest("labelled", self.classes, list(self.splits), total.hexdigest())


def check_classes(title: str, names: Sequence[str], labels: np.ndarray) -> None:
    """UserError that names a class without training messages. `labels`: the training labels, int (n,)."""
    if len(names) < 2:
        raise UserError(f"{title} has {len(names)} class(es); a classifier needs 2.")
    for name, count in zip(names, np.bincount(labels, minlength=len(names)), strict=True):
        if not count:
            raise UserError(f"{title}: the class {name!r} has no training message; add some, or leave the class out.")


def load(source: "TextFolder | TfdsMessages | PythonPackages | Csv | Sklearn") -> Labelled:
    """The messages of any source. UserError if unreadable or not message classification."""
    source.validate()
    found = _from_csv(source) if isinstance(source, Csv) else None
    found = _from_sklearn(source) if isinstance(source, Sklearn) else found or source.load()
    check_classes(found.title, found.classes, found.splits["train"][1])
    return found


def _from_csv(source: Csv) -> Labelled:
    if source.text is None:
        raise UserError(f"Csv({source.path!r}) needs text=, the name of the column that holds the messages.")
    tables = [table for table in source.read() if table is not None]
    names, targets = class_targets(tables, source.target)
    texts = [[str(cell) for cell in table.column(source.text)] for table in tables]
    splits = dict(zip(("train", "test"), zip(texts, targets, strict=True), strict=False))
    title = f"{source.path}, {source.text} -> {source.target}"
    rule = ([f"test is {source.test}"] if source.test else []) + [f"{k}: {v}" for k, v in tables[0].notes.items()]
    origins = {split: Origin(np.arange(len(table)), table.cells | table.dropped)
               for split, table in zip(splits, tables, strict=True)}
    return Labelled(title, names, splits, ", ".join(rule), source.text, origins)


def _from_sklearn(source: Sklearn) -> Labelled:
    bunch = source.load()
    if not bunch.class_names or isinstance(bunch.inputs, np.ndarray):
        raise UserError(f'Sklearn({source.name!r}) holds no messages; Sklearn("20newsgroups") does.')
    parts = {"train": bunch} | ({"test": bunch.test} if bunch.test else {})
    splits = {name: (list(part.inputs), part.targets) for name, part in parts.items()}
    return Labelled(bunch.title, bunch.class_names, splits, "test is the data set's own" if bunch.test else "")


# ------------------------------------------------------------------------------------------------------ folders


@dataclass(frozen=True)
class TextFolder:
    """One file per message, with any name, in one folder per class: `path/spam/1.txt`.

    The class folders may be inside split folders. Split names are case-insensitive: train or Training, test, validation
    or dev, also as part of a name, as in 20news-bydate-train. Files and folders whose names begin with a dot, and links
    to files listed already, are ignored.
    """

    path: str
    encoding: str = "utf-8"
    """Encoding of the files; latin-1 reads anything."""
    splits: Splits = "auto"
    """auto: folders with split names are splits, and an ambiguous layout is an error; folders: use the folders with
    split names and leave out the rest; none: every folder is a class."""

    def validate(self) -> None:
        """UserError without a path or for an unknown encoding."""
        if not self.path.strip():
            raise UserError("TextFolder needs path=, a folder with one folder of messages per class.")
        check_encoding(self.encoding)

    def load(self) -> Labelled:
        """Read all files.

        Raises:
          UserError: names the folder without messages, the file that is not text in this encoding, or the class that
            training lacks; an ambiguous layout.
        """
        root = user_path(self.path)
        found = tree(root)
        if not found.folders[root]:
            raise UserError(f"TextFolder finds no folder of messages in {root.absolute()}.")
        chosen, left_out = split_folders(found, self.splits)
        rule = [f"{split} is {chosen[split].name}" for split in SPLITS if split in chosen and chosen[split] != root]
        rule += [f"{', '.join(left_out)} left out"] if left_out else []
        rule += [f"{what}: {n}" for what, n in found.notes().items()]
        names = found.folders[chosen["train"]]
        if not names:
            raise UserError(f"{chosen['train']} has no folder of messages in it.")
        splits, origins, encodings = {}, {}, Counter()
        for split in (split for split in SPLITS if split in chosen):
            paths, labels, _ = labelled(found, chosen[split], names, bool, "message")
            splits[split] = [self._text(path) for path in paths], labels
            origins[split] = Origin(np.arange(len(paths)), file=below(root, paths))
            encodings.update(encoding_of(path, self.encoding) for path in paths)
        rule += [f"{n} files are {name}" for name, n in sorted(encodings.items()) if name != self.encoding]
        return Labelled(f"folder {self.path}", tuple(map(printable, names)), splits, ", ".join(rule), origins=origins)

    def _text(self, file: Path) -> str:
        return "".join(read_text(file, self.encoding))


# --------------------------------------------------------------------------------------------------------- TFDS


@dataclass(frozen=True)
class TfdsMessages(sources.TfdsText):
    """Labelled messages prepared by TFDS as ArrayRecord, such as TfdsMessages("imdb_reviews/plain_text").

    Read without TensorFlow and never downloaded here: `./launch.sh prepare NAME` does that once. Uses the data set's
    splits "validation" and "test" if it has them.
    """

    test: str | None = None
    """TFDS split expression for the test split; default "test" if there is one."""
    label: str = "label"
    """The record field with the class."""

    def load(self) -> Labelled:
        """Read all records. UserError if the data set is not prepared or lacks these fields or splits."""
        corpus = self.open()
        features = json.loads((corpus.folder / "features.json").read_bytes())["featuresDict"]["features"]
        if self.label not in features:
            raise UserError(f"{self.name} has no field {self.label!r}; it has {', '.join(sorted(features))}.")
        wanted = {"train": self.train, "validation": corpus.source.validation,
                  "test": self.test or ("test" if "test" in corpus.splits else None)}
        wanted = {split: expression for split, expression in wanted.items() if expression}
        splits = {split: self._read(corpus, expression) for split, expression in wanted.items()}
        file = corpus.folder / f"{self.label}.labels.txt"
        names = tuple(name for text in read_text(file) for name in text.split("\n") if name) if file.is_file() else ()
        names = names or tuple(str(i) for i in range(1 + max(int(labels.max()) for _, labels in splits.values())))
        for split, (_, labels) in splits.items():
            if odd := [label for label in labels.tolist() if not 0 <= label < len(names)]:
                raise UserError(f"{self.name} {wanted[split]} has the label {odd[0]}, which is none of its "
                                f"{len(names)} classes: choose other splits.")
        rule = ", ".join(f"{split} is {expression}" for split, expression in wanted.items())
        return Labelled(corpus.title, names, splits, rule, self.feature)

    def _read(self, corpus: sources.TfdsCorpus, expression: str) -> tuple[list[str], np.ndarray]:
        records = corpus._records(expression)
        texts: list[str] = []
        labels: list[int] = []
        for start in range(0, len(records), AT_ONCE):
            for record in records.__getitems__(list(range(start, min(start + AT_ONCE, len(records))))):
                texts.append(corpus._text(record[self.feature], expression, len(texts)))
                labels.append(record[self.label])
        try:
            return texts, np.array([int(label) for label in labels], np.int32)
        except (TypeError, ValueError):
            raise UserError(f"The field {self.label!r} of {self.name} holds {labels[0]!r}: no class.") from None


# ---------------------------------------------------------------------------------------------- standard library


@dataclass(frozen=True)
class PythonPackages:
    """Pieces of source code from eight packages of the running Python's standard library; the class is the package.

    Available on every machine. A piece is LINES consecutive lines, without blank lines and import statements (which
    often name the package). The rest of a file is used if it is at least half a piece. Each file is in one split only.
    The messages depend on the Python version: compare results only if the fingerprint is equal.
    """

    def validate(self) -> None:
        """Nothing can be checked without reading."""

    def load(self) -> Labelled:
        """Read and cut the files. UserError if Python was installed without its library's source."""
        corpus = PythonStdlib().open()
        splits: dict[str, tuple[list[str], list[int]]] = {split: ([], []) for split in SPLITS}
        for label, package in enumerate(PACKAGES):
            files = {name: cut_code(path) for name, path in corpus.paths.items() if name.startswith(f"{package}/")}
            files = {name: pieces for name, pieces in files.items() if pieces}
            if len(files) < len(SPLITS):
                raise UserError(f"The {corpus.title} came without most of the source text of {package}: give another "
                                f"source of messages, or another Python.")
            for name, split in _assign(files).items():
                splits[split][0].extend(files[name])
                splits[split][1].extend([label] * len(files[name]))
        found = {split: (texts, np.array(labels, np.int32)) for split, (texts, labels) in splits.items()}
        rule = "whole files, picked by a hash of their names: about 15 % of each package are test, 10 % validation"
        return Labelled(f"packages of the {corpus.title}", PACKAGES, found, rule)


def cut_code(path: Path) -> list[str]:
    """The messages of one Python source file; see `PythonPackages`. [] if it is not UTF-8."""
    try:
        lines = lines_of("".join(read_text(path)))
    except UserError:
        return []
    lines = [line.rstrip() for line in lines if line.strip() and not _IMPORT.match(line)]
    pieces = [lines[start : start + LINES] for start in range(0, len(lines), LINES)]
    return ["\n".join(piece) for piece in pieces if 2 * len(piece) >= LINES]


def _assign(files: dict[str, list[str]]) -> dict[str, str]:
    """File -> split. In the order of their names' hashes, files that fit go to test (up to 15 % of the messages), then
    to validation (10 %); if none fits, the smallest file goes."""
    left = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
    total, found = sum(map(len, files.values())), {}
    for split, share in (("test", 0.15), ("validation", 0.1)):
        chosen, done = [], 0
        for name in left:
            if done + len(files[name]) <= share * total:
                chosen.append(name)
                done += len(files[name])
        for name in chosen or [min(left, key=lambda name: len(files[name]))]:
            found[name] = split
            left.remove(name)
    return found | dict.fromkeys(left, "train")
