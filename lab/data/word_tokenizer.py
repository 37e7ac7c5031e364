"""A word-level tokenizer."""

import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lab.data.tokenizers import _WORD, UNKNOWN, Fitted, Texts
from lab.errors import UserError


def words(text: str, lower: bool = True) -> list[str]:
    """The words of a text, lower-cased; typographic apostrophes are replaced by plain ones."""
    return _WORD.findall((text.lower() if lower else text).replace("\u2019", "'"))


@functools.cache
def _stop_words() -> frozenset[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return ENGLISH_STOP_WORDS


class FittedWords(Fitted):
    """A word-level tokenizer. `decode` joins words by spaces, so spacing and punctuation are lost."""

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The words of the ids, joined by spaces, without padding."""
        return b" ".join([super(FittedWords, self).decode_bytes([i]) for i in np.asarray(ids).tolist() if i])


@dataclass(frozen=True)
class Words:
    """The most frequent words of the training text; ties are broken alphabetically.

    Id 0 is padding, id 1 an unknown word. A small corpus may give fewer ids than `vocab`.
    """

    vocab: int = 10_000
    """Number of ids: padding, the unknown word, and the words."""
    lower: bool = True
    """Lower-case the text."""
    remove_stop_words: bool = False
    """Leave out the words of scikit-learn's English stop list, such as "the"."""

    @property
    def vocab_size_hint(self) -> int:
        return self.vocab

    def validate(self) -> None:
        """UserError if `vocab` leaves no id for words."""
        if self.vocab < 3:
            raise UserError(f"Words(vocab={self.vocab}) is too small: padding, the unknown word and one word need 3.")

    def identity(self) -> str:
        return f"words {self.vocab}" + " cased" * (not self.lower) + " without stop words" * self.remove_stop_words

    def _words(self, text: str) -> list[str]:
        found = words(text, self.lower)
        return [word for word in found if word.lower() not in _stop_words()] if self.remove_stop_words else found

    def fit(self, texts: Texts, size: int) -> Fitted:
        """UserError for a text without words."""
        counts: Counter[str] = Counter()
        for text in texts("train"):
            counts.update(self._words(text))
        if not counts:
            raise UserError("The training text has no word in it: use Bytes() or BPE().")
        kept = sorted(counts, key=lambda word: (-counts[word], word))[: self.vocab - 2]
        return self.restore(json.dumps(kept))

    def restore(self, state: str) -> Fitted:
        known = json.loads(state)
        table = {word: i for i, word in enumerate(known, 2)}

        def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
            return [np.array([table.get(word, 1) for word in self._words(text)], np.int32) for text in texts]

        return FittedWords([b"", UNKNOWN.encode(), *(word.encode() for word in known)], encode_batch, state=state)
