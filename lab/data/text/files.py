"""Text files as documents, read in pieces, with a held-out part."""

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lab.data import cache_folder, digest
from lab.data.reading import encoding_of, read_text
from lab.data.word_memory import SPACES
from lab.errors import UserError
from lab.files import replace_file

MANY = 20  # from this many documents on, hold out whole documents; below it, the end of the text
PIECE = 1 << 16  # maximum characters per piece for the tokenizer
Documents = Iterator[Iterator[str]]


@dataclass(frozen=True)
class Survey:
    """The result of one pass over a corpus. `fingerprint` depends on names and content only, not on path or time."""

    fingerprint: str
    documents: int
    characters: int  # of all documents; 0 if the split does not need it
    bytes: int  # UTF-8 bytes; for TfdsText approximated by the prepared size
    skipped: tuple[str, ...] = ()
    encodings: tuple[str, ...] = ()  # one sentence each, if not all files are UTF-8


class Corpus(Protocol):
    """An opened source; see `lab.data.text.sources`."""

    title: str

    def identity(self) -> str: ...
    def stored_bytes(self) -> int: ...
    def survey(self) -> Survey: ...
    def rule(self, survey: Survey) -> str: ...
    def documents(self, split: str, survey: Survey) -> Documents: ...


def cached_survey(corpus: Corpus, take: Callable[[], Survey], newest: float) -> Survey:
    """`take()`, cached by the corpus' identity. `newest`: time of the latest file change, in seconds."""
    path = cache_folder("sources") / f"{corpus.identity()}.json"
    try:
        found = Survey(**json.loads(path.read_bytes()))
        return dataclasses.replace(found, skipped=tuple(found.skipped), encodings=tuple(found.encodings))
    except (OSError, ValueError, TypeError):
        survey = take()
    # A file just changed may change again within the clock's resolution, so recent changes are not cached.
    if time.time() - newest > 2:
        replace_file(path, json.dumps(dataclasses.asdict(survey)))
    return survey


def pieces(chunks: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """Cut text into pieces of at most `size` characters, independent of the chunk boundaries.

    If possible, cuts are before a space that follows a non-space. GPT-2's pattern always starts a token there, so
    byte-level BPE gives the same tokens as on the whole text.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > size:
            end = _seam(rest, start + size // 2, start + size)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def _seam(text: str, low: int, high: int) -> int:
    for at in range(high - 1, low, -1):
        if text[at] in SPACES and text[at - 1] not in SPACES:
            return at
    return high


def between(documents: Documents, start: int, stop: int) -> Documents:
    """The characters [start, stop) of the concatenated documents, as documents (some may be empty)."""
    position = 0

    def inside(document: Iterator[str]) -> Iterator[str]:
        nonlocal position
        for text in document:
            part = text[max(start - position, 0) : max(stop - position, 0)]
            position += len(text)
            if part:
                yield part
            if position >= stop:
                return

    for document in documents:
        if position >= stop:
            return
        yield inside(document)


@dataclass(frozen=True)
class Files:
    """A corpus of files. `paths`: document name -> path, in reading order. `skip`: skip files that are not text."""

    title: str
    paths: dict[str, Path]
    skip: bool = False
    encoding: str = "UTF-8"

    def _stats(self) -> list[os.stat_result]:
        try:
            return [path.stat() for path in self.paths.values()]
        except OSError as error:
            raise UserError(f"Cannot read {error.filename}: {error.strerror}.") from None

    def stored_bytes(self) -> int:
        return sum(s.st_size for s in self._stats())

    def read(self, path: Path) -> Iterator[str]:
        """The text of one file, in pieces."""
        return read_text(path, self.encoding)

    def identity(self) -> str:
        stats = [(s.st_size, s.st_mtime_ns) for s in self._stats()]
        encoding = () if self.encoding == "UTF-8" else (self.encoding,)
        return digest("files", sys.version_info[:3], [str(p) for p in self.paths.values()], stats, *encoding)

    def survey(self) -> Survey:
        return cached_survey(self, self._survey, max(s.st_mtime for s in self._stats()))

    def _survey(self) -> Survey:
        total, documents, characters, size, skipped, encodings = hashlib.sha256(), 0, 0, 0, [], Counter()
        for name, path in self.paths.items():
            content, length, count = hashlib.sha256(), 0, 0
            try:
                encodings[encoding_of(path, self.encoding)] += 1
                for text in self.read(path):
                    raw = text.encode()
                    content.update(raw)
                    length, count = length + len(raw), count + len(text)
            except UserError:
                if not self.skip:
                    raise
                length = 0
            if not length:  # empty, or not text
                skipped.append(name)
                continue
            total.update(f"{name}\0{length}\0{content.hexdigest()}\n".encode())
            documents, characters, size = documents + 1, characters + count, size + length
        if not documents:
            raise UserError(f"{self.title} holds no text: {', '.join(list(self.paths)[:3])} is empty.")
        notes = tuple(f"{n} of the files {'is' if n == 1 else 'are'} {name}" for name, n in sorted(encodings.items()))
        notes = () if set(encodings) == {"UTF-8"} else notes
        return Survey(total.hexdigest(), documents, characters, size, tuple(skipped), notes)

    def rule(self, survey: Survey) -> str:
        if survey.documents < MANY:
            return "validation is the last 10 % of the characters"
        return "validation is the 10 % of the files that a hash of their names picks"

    def documents(self, split: str, survey: Survey) -> Documents:
        skipped = set(survey.skipped)
        names = [name for name in self.paths if name not in skipped]
        if survey.documents < MANY:
            everything = (self.read(self.paths[name]) for name in names)
            cut = survey.characters * 9 // 10
            return between(everything, 0, cut) if split == "train" else between(everything, cut, survey.characters)
        held = held_out(names)
        return (self.read(self.paths[name]) for name in names if (name in held) == (split == "validation"))


def held_out(names: list[str]) -> set[str]:
    """About a tenth of the names, at least one, chosen by their hash: adding a file does not move the rest."""
    place = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64 for name in names}
    return {name for name in names if place[name] < 0.1} or {min(names, key=place.__getitem__)}
