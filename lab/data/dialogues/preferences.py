"""Pairs of answers for learning from preferences: see `lab.tasks.prefer`."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lab.data.dialogues.dialogues import DialogueData, Rendered, divided, pieces
from lab.data.dialogues.packing import Encoded
from lab.data.dialogues.pairs import JsonlPairs, Pair, PythonDocsPairs
from lab.data.dialogues.rendering import Encode, encoded, plain_text
from lab.data.dialogues.sources import Message
from lab.data.pipeline import Arrays
from lab.data.saved import saved_form
from lab.data.tokenizers import Fitted
from lab.errors import UserError

Source = JsonlPairs | PythonDocsPairs
RULE = "10 % validation and 10 % test, by a hash of each prompt"


@dataclass(frozen=True)
class Preferences(Rendered):
    """Pairs of answers to one prompt, of which the first was preferred.

    A record is one pair, of two windows, chosen and rejected: `pair` int32 (2, length + 1), inputs [:, :-1] and targets
    [:, 1:]; `learn` uint8 (2, length), 1 for targets that are the answer or the token that ends it; `reference` float32
    (2,), zeros until a run sets them to the answers' log-probabilities under the model that it begins with.

    A hash of its prompt puts a pair into a split, so all answers to one prompt are in one split. A pair of which one
    dialogue is longer than a window is left out: cut, an answer would be another one.
    """

    source: Source
    """Where the pairs come from."""
    template: Literal["auto", "plain"] = "auto"
    """How messages are written; see `Dialogues`."""

    @property
    def units_per_record(self) -> int:
        """Target tokens per record."""
        return 2 * self.length

    def record_spec(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Name -> (shape, type) of the arrays of one record, without reading anything."""
        return {"pair": ((2, self.length + 1), np.int32), "learn": ((2, self.length), np.uint8),
                "reference": ((2,), np.float32)}

    def load(self) -> "PreferenceData":
        """Read, split and encode all pairs, in memory.

        Raises:
          UserError: names the file and line that is wrong, or the split that is empty.
        """
        self.validate()
        parts = divided(self.source.read(), self.source.title, "pairs", RULE)
        fitted, encode = self.fit({split: [plain_text(messages) for pair in part for messages in pair.dialogues]
                                   for split, part in parts.items()})
        summary = {"source": self.source.title, "split": RULE, "tokenizer": repr(self.tokenizer)}
        records = {}
        for split, part in parts.items():
            records[split], lines = self._records(split, part, encode, fitted)
            summary |= {f"{split} {what}": value for what, value in lines.items()}
        return PreferenceData(
            train=records["train"], validation=records["validation"], test=records.get("test"), fitted=fitted,
            tokenizer_state=saved_form(self.tokenizer, fitted), metadata={"vocab": fitted.size, "length": self.length},
            unit=self.unit, units_per_record=self.units_per_record, summary=summary, encode_messages=encode,
        )

    def _records(self, split: str, pairs: list[Pair], encode: Encode, fitted: Fitted) -> tuple[Arrays, dict[str, Any]]:
        """The records of a split, and lines to print."""
        both = [[_answer(encode, fitted.eot, pair.name, messages) for messages in pair.dialogues] for pair in pairs]
        sizes = [max(len(ids) for ids, _ in two) for two in both]
        kept = [two for two, size in zip(both, sizes, strict=True) if size <= self.length + 1]
        if not kept:
            least = int(np.argmin(sizes))
            raise UserError(f"No {split} pair fits --data.length {self.length}: the shortest, {pairs[least].name}, "
                            f"needs {sizes[least] - 1}.")
        tokens = np.full((len(kept), 2, self.length + 1), fitted.pad, np.int32)
        learn = np.zeros(tokens.shape, np.uint8)
        for i, two in enumerate(kept):
            for j, (ids, own) in enumerate(two):
                tokens[i, j, : len(ids)], learn[i, j, : len(ids)] = ids, own
        answers = learn.sum(-1, dtype=np.int64).mean(0)
        lines = {"pairs": len(kept), "tokens per chosen answer": round(float(answers[0]), 1),
                 "tokens per rejected answer": round(float(answers[1]), 1),
                 "dropped, longer than a window": len(pairs) - len(kept)}
        return Arrays({"pair": tokens, "learn": learn[..., 1:],
                       "reference": np.zeros((len(kept), 2), np.float32)}), lines


def _answer(encode: Encode, eot: int | None, name: str, messages: list[Message]) -> Encoded:
    """`encoded`, in which only the last answer counts."""
    ids, learn = encoded(encode, eot, name, messages)
    learn[: len(encode(messages[:-1], True))] = 0
    return ids, learn


class PreferenceData(DialogueData):
    """The result of `Preferences.load`."""

    def example(self) -> list[tuple[str, bool]]:
        """The first training pair as (text, whether it is learned) pieces."""
        row = {name: x[0] for name, x in self.train[np.arange(1)].items()}
        chosen, rejected = (pieces(self.fitted, *both) for both in zip(row["pair"], row["learn"], strict=True))
        return [*chosen, ("\n... and rejected ...\n", False), *rejected]
