"""Labelled messages: one text per row of token ids, for classification and masked language models."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lab.data import digest, log
from lab.data.dataset import Dataset, Incoming, Origin, class_names, restored
from lab.data.hugging_face import HuggingFaceTokenizer
from lab.data.messages.groups import group_names, groups_of
from lab.data.messages.sources import SPLITS, Labelled, PythonPackages, TextFolder, TfdsMessages, check_classes, load
from lab.data.new_texts import read_new_texts
from lab.data.order import fixed_order
from lab.data.pipeline import Arrays
from lab.data.saved import Saved, revived, saved_form
from lab.data.tables.bundled import Sklearn
from lab.data.tables.csv_files import Csv
from lab.data.tables.groups import counted
from lab.data.tokenizers import BPE, GPT2, Bytes, Chars, Fitted, with_padding
from lab.data.word_tokenizer import FittedWords, Words
from lab.errors import UserError

Source = PythonPackages | TextFolder | Csv | Sklearn | TfdsMessages
Tokenizer = Words | Saved | BPE | GPT2 | Bytes | Chars | HuggingFaceTokenizer

Lines = dict[str, str | int | float]

FORMAT = 1  # version of the records, part of the fingerprint
AT_ONCE = 1 << 22  # characters per encoding call: enough for all cores; takes about 200 MB of tokenizer objects
FEW = 1000  # below this many training messages, the baseline keeps words that occur in one message only


@dataclass(frozen=True)
class Messages:
    """Messages and their classes.

    A record is one message: `inputs` int32 (length,), the token ids, padded with id 0; `mask` uint8 (length,), 1 for
    tokens; `targets` int32 (), the class. If the tokenizer can produce id 0, all its ids are shifted up by one, except
    those of a `HuggingFaceTokenizer`, which has its own padding. A message without tokens becomes one unknown word with
    `Words`, and one padding token with mask 1 with other tokenizers, so that a mean over tokens is always defined.

    The tokenizer learns from the training split only. If the source has no validation split, a fixed part of each
    class's training messages is held out; copies of a text stay in one split.
    """

    source: Source
    """Where the messages come from."""
    tokenizer: Tokenizer = Words(10_000)
    """Converts messages to token ids."""
    length: int = 100
    """Tokens in a record; longer messages are cut."""
    truncate: Literal["end", "start"] = "end"
    """The side at which a longer message is cut."""
    validation: float = 0.1
    """Fraction of the training messages held out for validation, if the source has no such split."""
    test: float = 0.0
    """Fraction of the training messages held out for test, if the source has no such split; 0: no test split."""
    groups: tuple[str, ...] | None = field(default=None, metadata={"fingerprint": "if set"})
    """Columns whose values are fields of a record, too, such as sex=female. Set by the `groups` of a task."""

    unit = "messages"
    slow = True  # loading is slow, so --dry-run skips it
    units_per_record = 1

    def validate(self) -> None:
        """UserError for values out of range; nothing is read."""
        if self.length < 1:
            raise UserError(f"Messages(length={self.length}) must be at least 1 token.")
        if not 0 < self.validation < 1 or not 0 <= self.test < 1 or self.validation + self.test >= 1:
            raise UserError(f"Messages(validation={self.validation}, test={self.test}) must be parts of 1 that leave "
                            f"something to train on, and some validation.")
        self.source.validate()
        self.tokenizer.validate()
        if isinstance(self.source, Csv) and (self.source.text is None or self.source.task == "regression"):
            raise UserError("Messages needs a Csv with text=, the column of the messages, and classes as its target.")
        if isinstance(self.source, Sklearn) and self.source.name != "20newsgroups":
            raise UserError(f'Sklearn({self.source.name!r}) holds no messages; Sklearn("20newsgroups") does.')

    def metadata(self) -> dict[str, Any]:
        """The metadata known without reading data; a small corpus may have fewer ids than this vocab."""
        vocab = self.tokenizer.vocab_size_hint
        moved = not isinstance(self.tokenizer, Words | BPE | Saved | HuggingFaceTokenizer)
        return {"length": self.length} | ({} if vocab is None else {"vocab": vocab + moved})

    def record_spec(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Name -> (shape, type) of the arrays of one record, without reading anything but the columns of groups."""
        names = group_names(self.source, self.groups) if self.groups else ()
        return {"inputs": ((self.length,), np.int32), "mask": ((self.length,), np.uint8),
                "targets": ((), np.int32)} | {name: ((), np.uint8) for name in names}

    def transform(self, batch: dict[str, Any], train: bool) -> dict[str, Any]:
        """The batch as it is."""
        return batch

    def describe(self) -> dict[str, str | int | float]:
        """Lines about the settings; reads nothing."""
        return {"source": repr(self.source), "tokenizer": repr(self.tokenizer), "length": self.length,
                "messages": "counted when the first run has read them"}

    def load(self) -> "MessageData":
        """Read, split and encode all messages, in memory.

        The 25,000 + 5,000 reviews of IMDB (39 MB) took 8 s on one core with Words(20_000), and 18 s with BPE(8_000),
        half of it to learn the merges (2-core CPU VM, busy, 2026-11-22).

        Raises:
          UserError: names the file, class, column or field that is wrong.
        """
        self.validate()
        begin = time.perf_counter()
        found = _divide(load(self.source), self.validation, self.test)
        texts = {split: texts for split, (texts, _) in found.splits.items()}
        fitted = self._fit(found.title, texts["train"])
        records: dict[str, Arrays] = {}
        groups = groups_of(found, self.source, self.groups or ())
        summary = {"source": found.title, "split": found.rule, "tokenizer": repr(self.tokenizer),
                   "vocabulary": fitted.size, "classes": len(found.classes), **class_names(found.classes)}
        for split, (own, targets) in found.splits.items():
            arrays, lines = encode_rows(fitted, own, self.length, self.truncate)
            records[split] = Arrays(arrays | {"targets": targets} | groups[split])
            summary |= {f"{split} {what}": value for what, value in lines.items()}
        known = set(texts["train"])
        summary |= {f"{split} also in training": sum(text in known for text in own)
                    for split, own in texts.items() if split != "train"}
        summary |= {key: line for name in self.groups or () for key, line in counted(groups["train"], name).items()}
        log.info("encoded %d messages in %.1f s", sum(map(len, texts.values())), time.perf_counter() - begin)
        return MessageData(
            train=records["train"], validation=records["validation"], test=records.get("test"),
            fingerprint=digest("messages", FORMAT, found.fingerprint(), self.tokenizer.identity(), self.length,
                               self.truncate, *[[name, values.tobytes().hex()] for own in groups.values()
                                                for name, values in own.items()]),
            metadata={"vocab": fitted.size, "length": self.length, "classes": len(found.classes)},
            unit=self.unit, units_per_record=self.units_per_record, summary=summary, classes=found.classes,
            texts=texts, fitted=fitted, tokenizer_state=saved_form(self.tokenizer, fitted), column=found.column,
            truncate=self.truncate, target=getattr(self.source, "target", ""),
            encoding=getattr(self.source, "encoding", "UTF-8"), origins=found.origins,
        )

    def restored(self, saved: dict[str, Any], tokenizer: str) -> "MessageData":
        """The result of a run's `load`, without records; see `Dataset.saved`."""
        fitted = with_padding(revived(tokenizer, "tokenizer.json"))
        return MessageData(**restored(saved), texts={}, fitted=fitted, tokenizer_state=tokenizer,
                           truncate=self.truncate, **{name: saved[name] for name in ("column", "target", "encoding")})

    def _fit(self, title: str, texts: list[str]) -> Fitted:
        """The tokenizer, fitted on the training texts only, with an id for padding."""
        size = sum(map(len, texts))
        fitted = self.tokenizer.fit(lambda split: iter(texts if split == "train" else []), size)
        if isinstance(self.tokenizer, Saved) and not fitted.pads:
            raise UserError(f"The tokenizer of {self.tokenizer.path} has no id that is free for padding, which {title} "
                            f"needs: train that run on Messages, or on Text with BPE().")
        return with_padding(fitted)


def encode_rows(fitted: Fitted, texts: list[str], length: int, truncate: str) -> tuple[dict[str, np.ndarray], Lines]:
    """Texts -> {"inputs" int32 (n, length), "mask" uint8 (n, length)}, and lines to print.

    `fitted` must have an id for padding (`pads`). Errors of the tokenizer (`Chars`) propagate.
    """
    inputs, mask = np.full((len(texts), length), fitted.pad, np.int32), np.zeros((len(texts), length), np.uint8)
    by_words = isinstance(fitted, FittedWords)
    tokens = unknown = cut = empty = 0
    for row, ids in enumerate(_encoded(fitted, texts)):
        tokens, cut, empty = tokens + len(ids), cut + (len(ids) > length), empty + (not len(ids))
        unknown += int((ids == 1).sum()) if by_words else 0
        kept = fitted.cut(ids, length, truncate)
        kept = kept if len(kept) else [1 if by_words else fitted.pad]
        inputs[row, : len(kept)] = kept
        mask[row, : len(kept)] = 1
    lines: Lines = {"messages": len(texts), "tokens per message": round(tokens / max(len(texts), 1), 1)}
    lines["cut off"] = f"{cut / max(len(texts), 1):.1%} of the messages"
    if by_words:
        lines["unknown words"] = f"{unknown / max(tokens, 1):.1%}"
    if empty:
        lines["messages without a token"] = empty
    return {"inputs": inputs, "mask": mask}, lines


def _encoded(fitted: Fitted, texts: list[str]) -> Iterator[np.ndarray]:
    """The ids of each text, encoded in blocks of a few megabytes."""
    waiting, size = [], 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if size >= AT_ONCE:
            yield from fitted.encode_batch(waiting)
            waiting, size = [], 0
    if waiting:
        yield from fitted.encode_batch(waiting)


# -------------------------------------------------------------------------------------------------------- split


def _divide(found: Labelled, validation: float, test: float) -> Labelled:
    """Holds out validation, and test if configured, from training if the source has none."""
    shares = {"validation": 0.0 if "validation" in found.splits else validation,
              "test": 0.0 if "test" in found.splits else test}
    shares = {split: share for split, share in shares.items() if share}
    if not shares:
        return found
    texts, labels = found.splits["train"]
    where = put_aside(texts, labels, tuple(shares.values()))
    splits, origins = dict(found.splits), dict(found.origins)
    whole = origins.get("train") or Origin(np.arange(len(texts)))
    for i, split in enumerate(("train", *shares)):
        rows = np.flatnonzero(where == i)
        if not len(rows):
            raise UserError(f"{found.title}: {len(set(texts))} different training messages are too few to put some "
                            f"aside for {split}.")
        splits[split], origins[split] = ([texts[row] for row in rows], labels[rows]), whole.at(rows)
    check_classes(f"{found.title}, after some were put aside", found.classes, splits["train"][1])
    own = [f"{split} is {share:.0%} of the training messages of each class, by a fixed shuffle"
           for split, share in shares.items()]
    splits = {split: splits[split] for split in SPLITS if split in splits}
    return replace(found, splits=splits, origins=origins, rule="; ".join([found.rule, *own] if found.rule else own))


def put_aside(texts: list[str], labels: np.ndarray, shares: tuple[float, ...]) -> np.ndarray:
    """The split of each of n messages, int (n,): 0 for training, i + 1 for the split with shares[i].

    A fixed shuffle picks the same share of each class's distinct texts: at least one, if one is left for training.
    Copies of a text follow the first one.
    """
    first: dict[str, int] = {}
    original = np.array([first.setdefault(text, i) for i, text in enumerate(texts)])
    order = np.argsort(fixed_order(len(texts)))
    order = order[original[order] == order]
    where = np.zeros(len(texts), np.int64)
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        left = len(rows)
        for i, share in enumerate(shares, 1):
            count = max(min(max(round(share * len(rows)), 1), left - 1), 0)
            where[rows[left - count : left]] = i
            left -= count
    return where[original]


# ------------------------------------------------------------------------------------------------------- loaded


@dataclass(kw_only=True)
class MessageData(Dataset):
    """The result of `Messages.load`."""

    texts: dict[str, list[str]]
    """Split -> messages, in the order of the records."""
    fitted: Fitted
    """The tokenizer; its id `pad` is padding."""
    tokenizer_state: str
    """The tokenizer as JSON, for `Saved`."""
    column: str
    """The CSV column from which `read` takes messages."""
    truncate: str
    """The side at which a longer message is cut."""
    target: str = ""
    """The CSV column from which `read` takes classes, if present."""
    encoding: str = "UTF-8"
    """Encoding of the files."""

    def encode(self, text: str) -> np.ndarray:
        """Text -> ids, int32 (n,), not truncated or padded."""
        return self.fitted.encode(text)

    def decode(self, ids: np.ndarray) -> str:
        """Ids -> readable text, without padding; `Words` gives lower-case words joined by spaces."""
        ids = np.asarray(ids)
        return self.fitted.decode(ids[ids != self.fitted.pad])

    @property
    def vocabulary(self) -> list[str]:
        """For `Words`, the words in the order of their ids, starting with "" (padding); else []."""
        return [piece.decode() for piece in self.fitted.pieces] if isinstance(self.fitted, FittedWords) else []

    def saved(self) -> dict[str, Any]:
        """See `Dataset.saved`; the tokenizer is `tokenizer_state`."""
        return super().saved() | {"column": self.column, "target": self.target, "encoding": self.encoding}

    def read(self, path: Path, id_column: str | None = None, strict: bool = False) -> Incoming:
        """New messages: the lines of a .txt file, or the text column of a .csv or key of a .jsonl file (others are
        ignored). Blank messages are skipped. Raises UserError."""
        found = read_new_texts(Path(path), self.column, self.target, "message", self.encoding, id_column, strict)
        arrays, _ = encode_rows(self.fitted, found.texts, self.metadata["length"], self.truncate)
        return Incoming(Arrays(arrays), found.numbers, found.names, found.beside, found.truth)

    def reference(self) -> list[str]:
        """The usual baseline, TF-IDF and logistic regression, on the whole messages of the same split.

        Uses single words only: on 20 Newsgroups, adding word pairs is 5 times slower and not better (83.4 % v. 84.7).
        """
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import f1_score

        split = "test" if self.test is not None else "validation"
        vectors = TfidfVectorizer(sublinear_tf=True, min_df=1 if len(self.texts["train"]) < FEW else 2,
                                  max_features=100_000, token_pattern=r"(?u)\b\w+\b", dtype=np.float32)
        model = LogisticRegression(C=10.0, tol=1e-3, max_iter=200)
        model.fit(vectors.fit_transform(self.texts["train"]), self.train.arrays["targets"])
        guess, truth = model.predict(vectors.transform(self.texts[split])), getattr(self, split).arrays["targets"]
        f1 = f1_score(truth, guess, labels=np.arange(len(self.classes)), average="macro", zero_division=0)
        return [f"TF-IDF + logistic regression (whole messages): {split} accuracy {np.mean(guess == truth):.4f}, "
                f"macro F1 {f1:.4f}"]
