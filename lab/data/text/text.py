"""Text for language models: a corpus is tokenised once into a cached file, and training reads windows of it.

First start on 1.0 GB of English text (2-core CPU VM, busy, 2026-11-22), in processor time and resident memory at its
peak: `Bytes()` 9 s, 89 MB; `BPE(4096)` 53 s (survey 4, merges 15, encoding and writing 34: 29 MB/s), 200 MB.
"""

import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np

from lab.data import digest
from lab.data.dataset import Dataset, restored
from lab.data.pipeline import epoch_offsets
from lab.data.saved import Saved, revived, saved_form
from lab.data.text.sources import PythonStdlib, TextFiles, TfdsText
from lab.data.text.token_files import END, FULL_CHECK, SPLITS, _checked, _folder, _mapped, token_files
from lab.data.tokenizers import BPE, GPT2, Bytes, Chars, Fitted
from lab.errors import UserError

Source = PythonStdlib | TextFiles | TfdsText
Tokenizer = Bytes | Chars | BPE | GPT2 | Saved

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
