"""A word-level tokenizer."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lab.data.tokenizers import _WORD, UNKNOWN, Fitted, Texts
from lab.errors import UserError


def words(text: str) -> list[str]:
    """The lower-cased words of a text; typographic apostrophes are replaced by plain ones."""
    return _WORD.findall(text.lower().replace("\u2019", "'"))


class FittedWords(Fitted):
    """A word-level tokenizer. `decode` joins words by spaces, so spacing and punctuation are lost."""

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The words of the ids, joined by spaces, without padding."""
        return b" ".join([super(FittedWords, self).decode_bytes([i]) for i in np.asarray(ids).tolist() if i])


@dataclass(frozen=True)
class Words:
    """The most frequent lower-cased words of the training text; ties are broken alphabetically.

    Id 0 is padding, id 1 an unknown word. A small corpus may give fewer ids than `vocab`.
    """

    vocab: int = 10_000
    """Number of ids: padding, the unknown word, and the words."""

    @property
    def vocab_size_hint(self) -> int:
        return self.vocab

    def validate(self) -> None:
        """UserError if `vocab` leaves no id for words."""
        if self.vocab < 3:
            raise UserError(f"Words(vocab={self.vocab}) is too small: padding, the unknown word and one word need 3.")

    def identity(self) -> str:
        return f"words {self.vocab}"

    def fit(self, texts: Texts, size: int) -> Fitted:
        """UserError for a text without words."""
        counts: Counter[str] = Counter()
        for text in texts("train"):
            counts.update(words(text))
        if not counts:
            raise UserError("The training text has no word in it: use Bytes() or BPE().")
        kept = sorted(counts, key=lambda word: (-counts[word], word))[: self.vocab - 2]
        return self.restore(json.dumps(kept))

    def restore(self, state: str) -> Fitted:
        known = json.loads(state)
        table = {word: i for i, word in enumerate(known, 2)}

        def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
            return [np.array([table.get(word, 1) for word in words(text)], np.int32) for text in texts]

        return FittedWords([b"", UNKNOWN.encode(), *(word.encode() for word in known)], encode_batch, state=state)
