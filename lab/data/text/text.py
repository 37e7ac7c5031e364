"""Text for language models: a corpus is tokenised once into a cached file, and training reads windows of it.

First start on 1.0 GB of English text (2-core CPU VM, busy, 2026-11-22), in processor time and resident memory at its
peak: `Bytes()` 9 s, 89 MB; `BPE(4096)` 53 s (survey 4, merges 15, encoding and writing 34: 29 MB/s), 200 MB.
"""

import json
import mmap
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lab.data import cache_folder, digest, log
from lab.data.building import built
from lab.data.dataset import Dataset, restored
from lab.data.pipeline import epoch_offsets
from lab.data.saved import Saved, revived, saved_form
from lab.data.text.sources import Corpus, Documents, PythonStdlib, Survey, TextFiles, TfdsText, pieces
from lab.data.tokenizers import BPE, GPT2, Bytes, Chars, Fitted
from lab.errors import UserError

Source = PythonStdlib | TextFiles | TfdsText
Tokenizer = Bytes | Chars | BPE | GPT2 | Saved

FORMAT = 2  # of the token folder and its tokens; a new number makes every corpus be tokenised again
SPLITS = ("train", "validation")
AT_ONCE = 1 << 20  # characters encoded at once: few calls, and tens of megabytes of arrays
FULL_CHECK = 64 << 20  # files up to this many bytes are checked whole at each start (0.05 s), larger ones at both ends
END = 1 << 20
SURVEYED = 64 << 20  # bytes up to which `describe` reads the text to find its tokens (0.2 s)


@dataclass(frozen=True)
class Text:
    """Windows of a tokenised text for a language model.

    A record is one window: `tokens` int32 (length + 1,), whose inputs are [:-1] and targets [1:], and `bytes`, the
    number of UTF-8 bytes of its targets. Consecutive windows share one token, so each token is a target once; what is
    left of a split after its last whole window is not used. No window crosses the split.

    In training all windows move along the text by some tokens in each epoch but the first, drawn by (seed, epoch): the
    model sees what was at the end of one window in the middle of another. Evaluation's windows never move.
    """

    source: Source
    """Where the text comes from."""
    tokenizer: Tokenizer
    """How it becomes ids."""
    length: int = 1024
    """Tokens per window: the context of the model in training."""

    def validate(self) -> None:
        """Check what can be checked without reading anything; UserError."""
        if self.length < 1:
            raise UserError(f"Text(length={self.length}) must be at least 1 token.")
        self.source.validate()
        self.tokenizer.validate()

    @property
    def units_per_record(self) -> int:
        """Tokens that a record trains on."""
        return self.length

    unit = "tokens"  # what throughput counts
    slow = True  # to load: --dry-run leaves that out

    def record_spec(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Name -> (shape, type) of the arrays of one record, without reading anything."""
        return {"tokens": ((self.length + 1,), np.int32), "bytes": ((), np.int32)}

    def metadata(self) -> dict[str, int]:
        """What is known of `TextData.metadata` without reading anything; a vocabulary that is not known counts as 0."""
        return {"vocab": self.tokenizer.vocab_size_hint or 0, "length": self.length}

    def transform(self, batch: dict[str, Any], train: bool) -> dict[str, Any]:
        """Nothing: windows are read as they are trained on."""
        return batch

    def describe(self) -> dict[str, str | int | float]:
        """The sizes, for people, without tokenising; all of them when that was done before. UserError as `load`."""
        corpus = self.source.open()
        size = corpus.stored_bytes()
        if size <= SURVEYED and _checked(_folder(corpus, corpus.survey(), self.tokenizer)):
            return self.load().summary
        return {"source": corpus.title, "bytes on disk": size, "tokenizer": repr(self.tokenizer),
                "tokens": "known when the first run has tokenised them"}

    def load(self) -> "TextData":
        """Tokenise, or find the tokens in the cache. UserError for unreadable text or a split shorter than a window."""
        self.validate()
        corpus = self.source.open()
        folder, meta = token_files(corpus, self.tokenizer)
        fitted = self.tokenizer.restore((folder / "tokenizer.json").read_bytes().decode())
        splits = {split: _mapped(folder / f"{split}.bin", meta["dtype"]) for split in SPLITS}
        shortest = min(map(len, splits.values())) - 1
        if self.length > shortest:
            counts = " and ".join(f"{len(splits[split])} {split} tokens" for split in SPLITS)
            fix = f"the largest length that works is {shortest}" if shortest > 0 else "give more text"
            raise UserError(f"A window of {self.length} tokens does not fit {corpus.title}, which has {counts}: {fix}.")
        train, validation = (Windows(splits[split], self.length, fitted.byte_counts) for split in SPLITS)
        return TextData(
            train=train,
            validation=validation,
            test=None,
            fitted=fitted,
            tokenizer_state=saved_form(self.tokenizer, fitted),
            fingerprint=digest(folder.name, self.length),
            metadata={"vocab": fitted.size, "length": self.length},
            unit=self.unit,
            units_per_record=self.length,
            summary=_summary(corpus.title, meta, self.tokenizer, train, validation),
        )

    def restored(self, saved: dict[str, Any], tokenizer: str) -> "TextData":
        """What `load` gave to a run, without records; see `Dataset.saved`."""
        return TextData(**restored(saved), fitted=revived(tokenizer, "tokenizer.json"), tokenizer_state=tokenizer)


class Windows:
    """Records of overlapping windows of one split; see `Text`. One gather per batch, from the memory-mapped file."""

    def __init__(self, tokens: np.ndarray, length: int, byte_counts: np.ndarray):
        self.tokens = tokens  # the whole split, uint16 or uint32
        held = getattr(tokens.base, "obj", None)  # small files were read whole when they were checked
        self._map = held if isinstance(held, mmap.mmap) and tokens.nbytes > FULL_CHECK else None
        self._length, self._from = length, np.lib.stride_tricks.sliding_window_view(tokens, length + 1)
        self._byte_counts = byte_counts

    def __len__(self) -> int:
        return -(-len(self._from) // self._length)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """indices int (n,) -> {"tokens": int32 (n, length + 1), "bytes": int32 (n,)}."""
        return self._at(indices * self._length)

    def in_epoch(self, indices: np.ndarray, epochs: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """The same, each moved along by what `epoch_offsets` gives its epoch, (n,); a last window that would move
        beyond the end shows the beginning, which the others have left."""
        begins = indices * self._length + epoch_offsets(epochs, seed, self._length)
        return self._at(np.where(begins < len(self._from), begins, 0))

    def _at(self, begins: np.ndarray) -> dict[str, np.ndarray]:
        """The windows that begin with these tokens."""
        if self._map is not None:
            self._announce(begins, self._map)
        tokens = self._from[begins]
        sizes = self._byte_counts.take(tokens[:, 1:]).sum(1)
        return {"tokens": tokens.astype(np.int32), "bytes": sizes.astype(np.int32)}

    def _announce(self, begins: np.ndarray, file: mmap.mmap) -> None:
        """Have the file's pages of these windows read at once and alone.

        Else a file that is not in memory is read a page fault at a time, each with all that the kernel reads ahead:
        the first batch of gpt_small's size read 558 MB (0.4-107 s), and now 3 MB (0.01-0.06 s); 0.6 ms more when warm.
        """
        bytes_before = np.clip(begins, 0, len(self._from) - 1) * self.tokens.itemsize
        pages = bytes_before // mmap.PAGESIZE * mmap.PAGESIZE
        lengths = bytes_before + self._from.shape[1] * self.tokens.itemsize - pages
        for page, length in zip(pages.tolist(), lengths.tolist(), strict=True):
            file.madvise(mmap.MADV_WILLNEED, page, length)


@dataclass(kw_only=True)
class TextData(Dataset):
    """What `Text.load` gives; its records are `Windows`."""

    fitted: Fitted
    tokenizer_state: str
    """What `lab.data.saved.Saved` reads."""

    @property
    def eot(self) -> int | None:
        """The id of end-of-text, where the tokenizer has one."""
        return self.fitted.eot

    def encode(self, text: str) -> np.ndarray:
        """Text -> ids, int32 (n,); UserError for text the tokenizer has no ids for."""
        return self.fitted.encode(text)

    def decode(self, ids: np.ndarray) -> str:
        """Ids -> text; always works, see `Fitted.decode`."""
        return self.fitted.decode(ids)

    def validation_bytes(self, limit: int | None = None) -> bytes:
        """The first `limit` bytes of the validation text (all by default), without separators: what gzip would get."""
        tokens, found, done = self.validation.tokens, [], 0
        for start in range(0, len(tokens), END):
            ids = tokens[start : start + END]
            found.append(self.fitted.decode_bytes(ids if self.eot is None else ids[ids != self.eot]))
            done += len(found[-1])
            if limit is not None and done >= limit:
                break
        return b"".join(found)[:limit]


def _summary(title: str, meta: dict[str, Any], tokenizer: Tokenizer, train: Windows, validation: Windows) -> dict:
    lines: dict[str, str | int | float] = {"source": title, "split": meta["rule"], "tokenizer": repr(tokenizer)}
    lines |= {"vocabulary": meta["vocab"], "skipped documents": meta["skipped"]}
    lines |= {"encodings": meta["encodings"]} if "encodings" in meta else {}
    for split, windows in zip(SPLITS, (train, validation), strict=True):
        lines |= {f"{split} {what}": meta[split][what] for what in ("documents", "bytes", "tokens")}
        lines[f"{split} windows"] = len(windows)
    tokens = sum(meta[split]["tokens"] for split in SPLITS)
    lines["bytes per token"] = round(sum(meta[split]["bytes"] for split in SPLITS) / tokens, 3)
    return lines


# ------------------------------------------------------------------------------------------------- token files


def token_files(corpus: Corpus, tokenizer: Tokenizer) -> tuple[Path, dict[str, Any]]:
    """The folder with train.bin, validation.bin, tokenizer.json and meta.json, and the latter's content.

    The folder's name is a fingerprint of the text, the split and the tokenizer. It appears whole or not at all; a
    damaged one is made again. UserError when the disk is full or the text changes while it is read.
    """
    survey = corpus.survey()
    folder = _folder(corpus, survey, tokenizer)
    return folder, built(folder, _checked, lambda where: _build(corpus, survey, tokenizer, where),
                         "tokenising the same text")


def _folder(corpus: Corpus, survey: Survey, tokenizer: Tokenizer) -> Path:
    return cache_folder("tokens") / digest(FORMAT, survey.fingerprint, corpus.rule(survey), tokenizer.identity())


def _checked(folder: Path) -> dict[str, Any] | None:
    """The folder's meta.json if all is there and undamaged; None, with one line that says what is not, if not."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        check = meta.pop("check")
        bad = [] if check == digest(meta) else ["meta.json"]
        bad += [name for name, want in meta["files"].items() if _sums(folder / name) != want]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        bad = ["meta.json"] if folder.exists() else []
        meta = None
    if bad:
        log.warning("the token cache %s is damaged: %s", folder, ", ".join(bad))
        return None
    return meta


def _sums(path: Path) -> list[int]:
    """Size and checksums: of the whole file when small, else of its first and last megabyte."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > FULL_CHECK:
                first = zlib.crc32(file.read(END))
                file.seek(-END, os.SEEK_END)
                return [size, first, zlib.crc32(file.read(END))]
            crc = 0
            while block := file.read(END):
                crc = zlib.crc32(block, crc)
            return [size, crc]
    except FileNotFoundError:
        return []


def _build(corpus: Corpus, survey: Survey, tokenizer: Tokenizer, folder: Path) -> None:
    """Fill a folder. UserError when the text changes meanwhile."""
    log.info("tokenising %s with %r (once; kept in %s)", corpus.title, tokenizer, folder.parent)
    begin, before = time.perf_counter(), corpus.identity()
    meta = _write(corpus, survey, tokenizer, folder)
    if corpus.identity() != before:
        raise UserError(f"{corpus.title} changed while it was read: run again when it is complete.")
    tokens, seconds = sum(meta[split]["tokens"] for split in SPLITS), time.perf_counter() - begin
    log.info("tokenised %d tokens in %.1f s", tokens, seconds)


def _write(corpus: Corpus, survey: Survey, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    def texts(split: str) -> Iterator[str]:
        return (piece for document in corpus.documents(split, survey) for piece in pieces(document))

    fitted = tokenizer.fit(texts, survey.bytes)
    dtype = "uint16" if fitted.size <= 1 << 16 else "uint32"
    meta: dict[str, Any] = {"title": corpus.title, "rule": corpus.rule(survey), "source": survey.fingerprint}
    meta |= {"tokenizer": tokenizer.identity(), "vocab": fitted.size, "dtype": dtype, "skipped": len(survey.skipped)}
    meta |= {"encodings": ", ".join(survey.encodings)} if survey.encodings else {}
    with (folder / "tokenizer.json").open("wb") as file:
        file.write(fitted.state.encode())
    for split in SPLITS:
        with (folder / f"{split}.bin").open("wb") as file:
            meta[split] = {"documents": 0, "bytes": 0, "tokens": 0}
            for documents, ids in _encoded(corpus.documents(split, survey), fitted):
                file.write(ids.astype(dtype).data)  # not ndarray.tofile, which hides that a disk is full
                meta[split]["documents"] += documents
                meta[split]["tokens"] += len(ids)
                meta[split]["bytes"] += int(fitted.byte_counts.take(ids).sum())
            file.flush()
            os.fsync(file.fileno())
    meta["files"] = {name: _sums(folder / name) for name in ("train.bin", "validation.bin", "tokenizer.json")}
    meta["check"] = digest(meta)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
    return meta


def _encoded(documents: Documents, fitted: Fitted) -> Iterator[tuple[int, np.ndarray]]:
    """(number of documents begun, ids) for some megabytes of text at a time, end-of-text ids between documents."""
    separator = np.array([] if fitted.eot is None else [fitted.eot], np.int32)
    texts: list[str] = []
    begins: set[int] = set()  # which of `texts` begin a document that needs a separator in front
    count = size = 0
    started = False

    def flush() -> tuple[int, np.ndarray]:
        parts = []
        for i, ids in enumerate(fitted.encode_batch(texts)):
            parts += [separator, ids] if i in begins else [ids]
        return count, np.concatenate(parts)

    for document in documents:
        for i, piece in enumerate(pieces(document)):
            if i == 0:
                count += 1
                if started:
                    begins.add(len(texts))
                started = True
            texts.append(piece)
            size += len(piece)
            if size >= AT_ONCE:
                yield flush()
                texts, begins, count, size = [], set(), 0, 0
    if texts:
        yield flush()


def _mapped(path: Path, dtype: str) -> np.ndarray:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return np.empty(0, dtype)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)
