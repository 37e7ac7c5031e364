"""Pairs of texts for an encoder-decoder: source and target of fixed lengths, padded."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lab.data import digest
from lab.data.dataset import Data, Dataset, Incoming, Origin, restored
from lab.data.dialogues.dialogues import divided
from lab.data.new_texts import read_new_texts
from lab.data.pipeline import Arrays
from lab.data.saved import Saved, revived, saved_form
from lab.data.tokenizers import BPE, GPT2, Bytes, Chars, Fitted, with_padding
from lab.data.translations.sources import PairsFile, PythonSignatures, TextPair, TfdsPairs
from lab.errors import UserError

Source = PairsFile | TfdsPairs | PythonSignatures
Tokenizer = BPE | Bytes | Chars | GPT2 | Saved
RULE = "10 % validation and 10 % test, by a hash of each target"
BOUNDARY = 0  # the id that begins and ends a target, and pads; no text has it


@dataclass(frozen=True)
class Translations(Data):
    """Source texts and the target texts to write for them. One tokenizer, learned from the training split, for both.

    A record is one pair: `inputs` int32 (source_length,), the source's ids; `mask` uint8 (source_length,), 1 where they
    are real; `tokens` int32 (target_length + 1,): id 0, the target's ids, id 0; model inputs are [:-1] and targets
    [1:]; `learn` uint8 (target_length,), 1 for targets that are the text or what ends it. Padding is id 0. If the
    tokenizer can produce id 0, all its ids are shifted up by one. A longer text is cut at the end.

    If the source has no validation split, a hash of its target puts a pair into a split, so equal targets are in one.
    """

    source: Source
    """Where the pairs come from."""
    tokenizer: Tokenizer = BPE(4096)
    """Converts texts to token ids."""
    source_length: int = 64
    """Tokens of a source."""
    target_length: int = 64
    """Tokens of a target, with the one that ends it."""

    unit = "pairs"
    slow = True  # loading is slow, so --dry-run skips it

    def validate(self) -> None:
        """UserError for values out of range; nothing is read."""
        for name in ("source_length", "target_length"):
            if getattr(self, name) < 1:
                raise UserError(f"--data.{name.replace('_', '-')} must be at least 1 token, not {getattr(self, name)}.")
        self.source.validate()
        self.tokenizer.validate()

    def metadata(self) -> dict[str, int]:
        """The metadata known without reading data; a small corpus may have fewer ids than this vocab."""
        vocab = self.tokenizer.vocab_size_hint
        moved = not isinstance(self.tokenizer, BPE | Saved)
        return self._lengths() | ({} if vocab is None else {"vocab": vocab + moved})

    def _lengths(self) -> dict[str, int]:
        return {"source_length": self.source_length, "target_length": self.target_length}

    def record_spec(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Name -> (shape, type) of the arrays of one record, without reading anything."""
        S, L = self.source_length, self.target_length
        return {"inputs": ((S,), np.int32), "mask": ((S,), np.uint8), "tokens": ((L + 1,), np.int32),
                "learn": ((L,), np.uint8)}

    def describe(self) -> dict[str, Any]:
        """Lines about the settings; reads nothing."""
        return {"source": self.source.title, "tokenizer": repr(self.tokenizer), **self._lengths(),
                "pairs": "counted when the first run has read them"}

    def load(self) -> "TranslationData":
        """Read, split and encode all pairs, in memory.

        Raises:
          UserError: names the file and line, the language or the split that is wrong.
        """
        self.validate()
        parts, rule = _split(self.source.read(), self.source.title)
        prepare = getattr(self.source, "prepare", str)
        texts = {split: [text for pair in part for text in (prepare(pair.source), pair.target)]
                 for split, part in parts.items()}
        held_out = [text for split in parts if split != "train" for text in texts[split]]
        fitted = self.tokenizer.fit(lambda split: iter(texts["train"] if split == "train" else held_out),
                                    sum(map(len, texts["train"])))
        if isinstance(self.tokenizer, Saved) and not fitted.pads:
            raise UserError(f"The tokenizer of {self.tokenizer.path} has no id that is free for padding: train that "
                            f"run on Translations, or on Text with BPE().")
        fitted = with_padding(fitted)
        summary = {"source": self.source.title, "split": rule, "tokenizer": repr(self.tokenizer),
                   "vocabulary": fitted.size}
        known, records = {pair.target for pair in parts["train"]}, {}
        for split, part in parts.items():
            both = fitted.encode_batch(texts[split][0::2]), fitted.encode_batch(texts[split][1::2])
            records[split], lines = _records(*both, self.source_length, self.target_length)
            lines |= {} if split == "train" else {"targets also in training": sum(p.target in known for p in part)}
            summary |= {f"{split} {what}": value for what, value in lines.items()}
        return TranslationData(
            train=records["train"], validation=records["validation"], test=records.get("test"),
            fingerprint=digest("translations", [[split, [pair[1:3] for pair in part]] for split, part in parts.items()],
                               self.tokenizer.identity(), self._lengths()),
            metadata={"vocab": fitted.size, **self._lengths()}, unit=self.unit, summary=summary, pairs=parts,
            fitted=fitted, tokenizer_state=saved_form(self.tokenizer, fitted), columns=self.source.columns,
            encoding=getattr(self.source, "encoding", "UTF-8"), prepare=prepare,
            origins={split: Origin(np.array([pair.number for pair in part]),
                                   truth={pair.number: pair.target for pair in part})
                     for split, part in parts.items()},
        )

    def restored(self, saved: dict[str, Any], tokenizer: str) -> "TranslationData":
        """The result of a run's `load`, without records; see `Dataset.saved`."""
        return TranslationData(**restored(saved), pairs={}, fitted=with_padding(revived(tokenizer, "tokenizer.json")),
                               tokenizer_state=tokenizer, columns=tuple(saved["columns"]), encoding=saved["encoding"],
                               prepare=getattr(self.source, "prepare", str))


def _split(read: dict[str, list[TextPair]], title: str) -> tuple[dict[str, list[TextPair]], str]:
    """(split -> pairs, a sentence about it), from the splits of a source."""
    if "validation" in read:
        empty = [split for split, part in read.items() if not part]
        if empty:
            raise UserError(f"The {empty[0]} split of {title} has no pairs.")
        return read, "the source's own"
    parts = divided(read["train"], title, "pairs", RULE)
    if "test" not in read:
        return parts, RULE
    train = parts["train"] + parts.get("test", [])
    return {"train": train, "validation": parts["validation"], "test": read["test"]}, \
        "test is the source's own; 10 % validation, by a hash of each target"


def _records(sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], S: int,
             L: int) -> tuple[Arrays, dict[str, Any]]:
    """The records of a split, and lines to print, from the ids of its texts."""
    n, arrays = len(sources), _inputs(sources, S)
    tokens, learn = np.full((n, L + 1), BOUNDARY, np.int32), np.zeros((n, L), np.uint8)
    for row, ids in enumerate(targets):
        kept = ids[:L]
        tokens[row, 1 : 1 + len(kept)] = kept
        learn[row, : len(kept) + 1] = 1
    lines = {"pairs": n, "tokens per source": round(float(np.mean([*map(len, sources)])), 1),
             "tokens per target": round(float(np.mean([*map(len, targets)])), 1),
             "sources cut at the end": sum(len(ids) > S for ids in sources),
             "targets cut at the end": sum(len(ids) + 1 > L for ids in targets)}
    return Arrays(arrays | {"tokens": tokens, "learn": learn}), lines


def _inputs(sources: Sequence[np.ndarray], S: int) -> dict[str, np.ndarray]:
    inputs, mask = np.full((len(sources), S), BOUNDARY, np.int32), np.zeros((len(sources), S), np.uint8)
    for row, ids in enumerate(sources):
        kept = ids[:S]
        inputs[row, : len(kept)], mask[row, : len(kept)] = kept, 1
    return {"inputs": inputs, "mask": mask}


@dataclass(kw_only=True)
class TranslationData(Dataset):
    """The result of `Translations.load`."""

    pairs: dict[str, list[TextPair]] = field(repr=False)
    """Split -> pairs, in the order of the records."""
    fitted: Fitted
    """The tokenizer; its id 0 is padding."""
    tokenizer_state: str
    """The tokenizer as JSON, for `Saved`."""
    columns: tuple[str, str]
    """The columns or keys of source and target in a file."""
    encoding: str = "UTF-8"
    """Encoding of the files."""
    prepare: Callable[[str], str] = str
    """How a source is written before it is encoded."""

    def text(self, ids: np.ndarray) -> str:
        """Target ids, with or without the id that begins them -> text, up to what ends it."""
        ids = np.asarray(ids)
        ids = ids[1:] if len(ids) and ids[0] == BOUNDARY else ids
        ends = np.flatnonzero(ids == BOUNDARY)
        return self.fitted.decode(ids[: ends[0]] if len(ends) else ids)

    def pieces(self, ids: np.ndarray) -> list[str]:
        """The text of each id, for pictures; what begins, ends and pads is a sign."""
        return ["\u2205" if i == BOUNDARY else self.fitted.decode([i]) for i in np.asarray(ids).tolist()]

    def saved(self) -> dict[str, Any]:
        """See `Dataset.saved`; the tokenizer is `tokenizer_state`."""
        return super().saved() | {"columns": list(self.columns), "encoding": self.encoding}

    def most_frequent(self) -> str:
        """The most frequent target of the training split; of equally frequent ones the first."""
        return Counter(pair.target for pair in self.pairs["train"]).most_common(1)[0][0]

    def read(self, path: Path, id_column: str | None = None, strict: bool = False) -> Incoming:
        """New sources: the lines of a .txt file, or the source's column of a .csv or key of a .jsonl file. Blank ones
        are skipped.

        Raises:
          UserError: see `read_new_texts`; or a source is longer than the run's.
        """
        found = read_new_texts(Path(path), *self.columns, "source", self.encoding, id_column, strict)
        ids = self.fitted.encode_batch([self.prepare(text) for text in found.texts])
        most = self.metadata["source_length"]
        if long := [(len(row), name) for row, name in zip(ids, found.names, strict=True) if len(row) > most]:
            raise UserError(f"{path}, {long[0][1]} has {long[0][0]} tokens, and this run's sources at most {most}: "
                            f"shorten {'it' if len(long) == 1 else f'it and {len(long) - 1} more'}, or train with a "
                            f"larger --data.source-length.")
        return Incoming(Arrays(_inputs(ids, most)), found.numbers, found.names, found.beside, found.truth)
