"""Text for language models: a corpus is tokenised once into a cached file, from which training reads windows.

First start on 1.0 GB of English text (2-core CPU VM, busy, 2026-11-22), CPU time and peak resident memory: `Bytes()`
9 s, 89 MB; `BPE(4096)` 53 s (survey 4, merges 15, encoding and writing 34: 29 MB/s), 200 MB.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lab.data import digest
from lab.data.dataset import Dataset, restored
from lab.data.hugging_face import HuggingFaceTokenizer
from lab.data.pipeline import epoch_offsets
from lab.data.saved import Saved, revived, saved_form
from lab.data.text.sources import PythonStdlib, TextFiles, TfdsText
from lab.data.text.token_files import SPLITS, _checked, _folder, _mapped, corpus_sizes, decoded, read_ahead, token_files
from lab.data.tokenizers import BPE, GPT2, Bytes, Chars, Fitted
from lab.errors import UserError

Source = PythonStdlib | TextFiles | TfdsText
Tokenizer = Bytes | Chars | BPE | GPT2 | Saved | HuggingFaceTokenizer

SURVEYED = 64 << 20  # `describe` reads texts of up to this many bytes, to find their tokens (0.2 s)


@dataclass(frozen=True)
class Text:
    """Windows of a tokenised text for a language model.

    A record is one window: `tokens` int32 (length + 1,), inputs [:-1] and targets [1:], and `bytes`, the number of
    UTF-8 bytes of its targets. Consecutive windows share one token, so each token is a target once. An incomplete last
    window is dropped. Windows do not cross splits.

    In training, each epoch except the first shifts all windows by an offset drawn from (seed, epoch), so that tokens
    at window ends appear inside other windows later. Evaluation windows are fixed.
    """

    source: Source
    """Where the text comes from."""
    tokenizer: Tokenizer
    """Converts text to token ids."""
    length: int = 1024
    """Tokens per window, the model's context length in training."""

    def validate(self) -> None:
        """UserError for invalid fields; reads nothing."""
        if self.length < 1:
            raise UserError(f"{type(self).__name__}(length={self.length}) must be at least 1 token.")
        if getattr(self.tokenizer, "special_tokens", False):
            raise UserError("Text has no place for special tokens inside a document: --data.tokenizer.special-tokens "
                            "False.")
        self.source.validate()
        self.tokenizer.validate()

    @property
    def units_per_record(self) -> int:
        """Target tokens per record."""
        return self.length

    unit = "tokens"  # of throughput
    slow = True  # loading is slow, so --dry-run skips it

    def record_spec(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Name -> (shape, type) of the arrays of one record, without reading anything."""
        return {"tokens": ((self.length + 1,), np.int32), "bytes": ((), np.int32)}

    def metadata(self) -> dict[str, int]:
        """The part of `TextData.metadata` that is known without reading; an unknown vocabulary is 0."""
        return {"vocab": self.tokenizer.vocab_size_hint or 0, "length": self.length}

    def transform(self, batch: dict[str, Any], train: bool) -> dict[str, Any]:
        """The batch as it is."""
        return batch

    def describe(self) -> dict[str, str | int | float]:
        """Sizes to print, without tokenising; complete if the tokens are cached. Raises as `load`."""
        corpus = self.source.open()
        size = corpus.stored_bytes()
        if size <= SURVEYED and _checked(_folder(corpus, corpus.survey(), self.tokenizer)):
            return self.load().summary
        return {"source": corpus.title, "bytes on disk": size, "tokenizer": repr(self.tokenizer),
                "tokens": "known when the first run has tokenised them"}

    def load(self) -> "TextData":
        """Tokenise, or read the cached tokens. UserError for unreadable text or a split shorter than a window."""
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
            summary={"source": corpus.title, "split": meta["rule"], "tokenizer": repr(self.tokenizer)}
            | corpus_sizes(meta) | {"train windows": len(train), "validation windows": len(validation)},
        )

    def restored(self, saved: dict[str, Any], tokenizer: str) -> "TextData":
        """The result of a run's `load`, without records; see `Dataset.saved`."""
        return TextData(**restored(saved), fitted=revived(tokenizer, "tokenizer.json"), tokenizer_state=tokenizer)


class Windows:
    """Overlapping windows of one split; see `Text`. Reads a batch with one gather from the memory-mapped file."""

    def __init__(self, tokens: np.ndarray, length: int, byte_counts: np.ndarray):
        self.tokens = tokens  # the whole split, uint16 or uint32
        self._length, self._from = length, np.lib.stride_tricks.sliding_window_view(tokens, length + 1)
        self._byte_counts = byte_counts

    def __len__(self) -> int:
        return -(-len(self._from) // self._length)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """indices int (n,) -> {"tokens": int32 (n, length + 1), "bytes": int32 (n,)}."""
        return self._at(indices * self._length)

    def in_epoch(self, indices: np.ndarray, epochs: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        """The windows, each shifted by the `epoch_offsets` of its epoch, (n,). A window shifted beyond the end is
        replaced by the first window, which the shift leaves uncovered."""
        begins = indices * self._length + epoch_offsets(epochs, seed, self._length)
        return self._at(np.where(begins < len(self._from), begins, 0))

    def _at(self, begins: np.ndarray) -> dict[str, np.ndarray]:
        """The windows that start at these token offsets."""
        read_ahead(self.tokens, begins, self._length + 1)
        tokens = self._from[begins]
        sizes = self._byte_counts.take(tokens[:, 1:]).sum(1)
        return {"tokens": tokens.astype(np.int32), "bytes": sizes.astype(np.int32)}


@dataclass(kw_only=True)
class TextData(Dataset):
    """The result of `Text.load`; its records are `Windows`."""

    fitted: Fitted
    tokenizer_state: str
    """The tokenizer as JSON, for `lab.data.saved.Saved`."""

    @property
    def eot(self) -> int | None:
        """The end-of-text id, if the tokenizer has one."""
        return self.fitted.eot

    def encode(self, text: str) -> np.ndarray:
        """Text -> ids, int32 (n,); UserError for text that the tokenizer cannot encode."""
        return self.fitted.encode(text)

    def decode(self, ids: np.ndarray) -> str:
        """Ids -> text; never raises, see `Fitted.decode`."""
        return self.fitted.decode(ids)

    def continuation(self, before: np.ndarray, ids: np.ndarray) -> str:
        """The text that `ids` add to the ids before."""
        return self.fitted.continuation(before, ids)

    def validation_bytes(self, limit: int | None = None) -> bytes:
        """The first `limit` bytes of the validation text (all by default), without separators, to compare with gzip."""
        return decoded(self.validation.tokens, self.fitted, limit)
