"""Dialogues for supervised fine-tuning: a language model learns the assistant's answers."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from lab.data.dataset import restored
from lab.data.dialogues.packing import Encoded, windows_of
from lab.data.dialogues.rendering import Encode, encoded, form_of, plain_text
from lab.data.dialogues.sources import Jsonl, Message, PythonDocs, QuestionsAnswers, Taskmaster
from lab.data.pipeline import Arrays
from lab.data.saved import revived, saved_form
from lab.data.text.text import Text, TextData
from lab.data.tokenizers import Fitted
from lab.errors import UserError

Source = Jsonl | QuestionsAnswers | Taskmaster | PythonDocs
Item = TypeVar("Item", bound=tuple)
SPLITS = ("train", "validation", "test")
RULE = "10 % validation and 10 % test, by a hash of each dialogue"
EXAMPLE = "example"  # the key of `describe` with the pieces of one dialogue


class Rendered(Text):
    """What `Dialogues` and `Preferences` share: a tokenizer writes messages by the field `template`."""

    def validate(self) -> None:
        """UserError for invalid fields; reads nothing."""
        if getattr(self.tokenizer, "special_tokens", False):
            raise UserError(f"The template of {type(self).__name__} writes all special tokens: "
                            f"--data.tokenizer.special-tokens False.")
        super().validate()

    def describe(self) -> dict[str, Any]:
        """Sizes to print, and one record as (text, whether it is learned) pieces. Reads and encodes everything."""
        data = self.load()
        return data.summary | {EXAMPLE: data.example()}

    def fit(self, texts: dict[str, list[str]]) -> tuple[Fitted, Encode]:
        """The tokenizer, learned from the texts of the training split, and how it writes messages.

        Raises:
          UserError: see `form_of`.
        """
        held_out = texts["validation"] + texts.get("test", [])
        fitted = self.tokenizer.fit(lambda split: iter(texts["train"] if split == "train" else held_out),
                                    sum(map(len, texts["train"])))
        return fitted, form_of(fitted, self.template, repr(self.tokenizer))

    def restored(self, saved: dict[str, Any], tokenizer: str) -> "DialogueData":
        """The result of a run's `load`, without records; see `Dataset.saved`."""
        fitted = revived(tokenizer, "tokenizer.json")
        return DialogueData(**restored(saved), fitted=fitted, tokenizer_state=tokenizer,
                            encode_messages=form_of(fitted, self.template, repr(self.tokenizer)))


@dataclass(frozen=True)
class Dialogues(Rendered):
    """Dialogues of which the assistant's turns are learned.

    A record is one window: `tokens` int32 (length + 1,), inputs [:-1] and targets [1:]; `learn` uint8 (length,), 1 for
    targets that are an answer or the token that ends it; `bytes`, the number of UTF-8 bytes of those. With `packing`
    also `documents` int32 (length,), the number of an input's dialogue in the window, from 1 (0: padding), and
    `positions` int32 (length,), which restart at 0 in each. Without, the padding needs neither: causal attention does
    not see what follows.

    A hash of its messages puts a dialogue into a split, so copies are in one split, and gives the order of packing.
    What follows the last answer is left out. Dialogues longer than a window are cut at the end.
    """

    source: Source
    """Where the dialogues come from."""
    packing: bool = True
    """Several dialogues per window; attention stays within each. False: one dialogue per window."""
    template: Literal["auto", "plain"] = "auto"
    """auto: the chat template of a pretrained tokenizer, plain for others; plain: each message is a line with its role,
    "User:", and its text, and end-of-text follows each answer if the tokenizer has it."""

    def record_spec(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Name -> (shape, type) of the arrays of one record, without reading anything."""
        apart = {name: ((self.length,), np.int32) for name in ("positions", "documents") if self.packing}
        return super().record_spec() | {"learn": ((self.length,), np.uint8)} | apart

    def load(self) -> "DialogueData":
        """Read, split, encode and pack all dialogues, in memory.

        Raises:
          UserError: names the file and line that is wrong, or the split that is empty.
        """
        self.validate()
        parts = divided(self.source.read(), self.source.title)
        texts = {split: [plain_text(messages) for _, messages in part] for split, part in parts.items()}
        fitted, encode = self.fit(texts)
        summary = {"source": self.source.title, "split": RULE, "tokenizer": repr(self.tokenizer)}
        records = {}
        for split, part in parts.items():
            pairs = [encoded(encode, fitted.eot, name, messages) for name, messages in part]
            records[split], lines = self._windows(split, pairs, fitted)
            summary |= {f"{split} {what}": value for what, value in lines.items()}
        return DialogueData(
            train=records["train"], validation=records["validation"], test=records.get("test"), fitted=fitted,
            tokenizer_state=saved_form(self.tokenizer, fitted), metadata={"vocab": fitted.size, "length": self.length},
            unit=self.unit, units_per_record=self.length, summary=summary, encode_messages=encode,
            held_out=[messages for _, messages in parts.get("test", parts["validation"])],
        )

    def _windows(self, split: str, pairs: list[Encoded], fitted: Fitted) -> tuple[Arrays, dict[str, Any]]:
        """The records of a split, and lines to print."""
        room = self.length + 1
        kept = [(ids[:room], learn[:room]) for ids, learn in pairs if learn[1:room].any()]
        if not kept:
            shortest = min(int(learn[1:].argmax()) + 1 for _, learn in pairs)
            raise UserError(f"No {split} dialogue has an answer within --data.length {self.length}: the first token of "
                            f"an answer is target {shortest} at the earliest.")
        arrays = windows_of(kept, self.length, self.packing, fitted.pad, fitted.byte_counts)
        tokens, windows = sum(len(ids) for ids, _ in kept), len(arrays["tokens"])
        lines = {"dialogues": len(pairs),
                 "tokens per dialogue": round(sum(len(ids) for ids, _ in pairs) / len(pairs), 1),
                 "of the tokens learned": f"{arrays['learn'].sum() / tokens:.1%}", "windows": windows,
                 "of the windows filled": f"{tokens / (windows * room):.1%}",
                 "cut at the end": sum(len(ids) > room for ids, learn in pairs if learn[1:room].any()),
                 "dropped, without an answer in the window": len(pairs) - len(kept)}
        return Arrays(arrays), lines


def divided(items: Sequence[Item], title: str, what: str = "dialogues", rule: str = RULE) -> dict[str, list[Item]]:
    """Split -> its items, in the order of the hashes; without test if it would be empty. The hash is of an item's
    second entry, messages; items with the same messages are sorted by their other entries.

    Raises:
      UserError: there are too few items.
    """
    keys = [hashlib.sha256(json.dumps(messages).encode()).digest() for _, messages, *_ in items]
    parts: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for i in sorted(range(len(items)), key=lambda i: (keys[i], items[i][2:])):
        # Other bytes than those that decide the order.
        share = int.from_bytes(keys[i][8:12]) / 2**32
        parts["validation" if share < 0.1 else "test" if share < 0.2 else "train"].append(items[i])
    for split in ("train", "validation"):
        if not parts[split]:
            raise UserError(f"{title} has {len(items)} {what}, and none falls into {split} ({rule}): give more.")
    return {split: part for split, part in parts.items() if part}


def pieces(fitted: Fitted, tokens: np.ndarray, learn: np.ndarray) -> list[tuple[str, bool]]:
    """A window up to what is learned last, as (text, whether it is learned) pieces. `tokens` (L+1,), `learn` (L,)."""
    learn = np.trim_zeros(np.concatenate([[0], learn]), "b")
    cuts = [0, *(np.flatnonzero(np.diff(learn)) + 1).tolist(), len(learn)]
    return [(fitted.continuation(tokens[:a], tokens[a:b]), bool(learn[a]))
            for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


@dataclass(kw_only=True)
class DialogueData(TextData):
    """The result of `Dialogues.load`."""

    encode_messages: Encode = field(repr=False)
    """Messages -> ids, see `lab.data.dialogues.rendering`."""
    held_out: list[list[Message]] = field(default_factory=list, repr=False)
    """The dialogues of the test split, or without one of the validation split."""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a dialogue that the assistant is to answer."""
        return self.encode_messages(messages, True).tolist()

    def encode(self, text: str) -> np.ndarray:
        """Text -> ids, int32 (n,). Spelled special tokens of a chat template are special."""
        return getattr(self.fitted, "encode_prompt", self.fitted.encode)(text)

    def example(self) -> list[tuple[str, bool]]:
        """The first training dialogue as (text, whether it is learned) pieces."""
        row = {name: x[0] for name, x in self.train[np.arange(1)].items()}
        own = row["documents"] == 1 if "documents" in row else 1
        return pieces(self.fitted, row["tokens"], row["learn"] * own)

    def validation_bytes(self, limit: int | None = None) -> bytes:
        """The first `limit` bytes of what is learned in the validation split (all by default)."""
        arrays = self.validation.arrays
        counted = arrays["tokens"][:, 1:][arrays["learn"] == 1]
        return self.fitted.decode_bytes(counted[self.fitted.byte_counts[counted] > 0])[:limit]
