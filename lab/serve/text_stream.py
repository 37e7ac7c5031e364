"""Tokens to text as they come, cut at stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BEFORE = 8  # tokens of the prompt that decoding may look at
PENDING = 32  # tokens without a whole character, at most


class TextStream:
    """The text of a growing list of tokens. The parts that `add` and `end` return never take anything back.

    Args:
      text: a tokenizer with `continuation(before, ids)`.
      before: the ids of the prompt.
      stop: strings at which the text ends, without them.
    """

    def __init__(self, text: Any, before: Sequence[int], stop: Sequence[str] = ()):
        self._text, self._stop = text, tuple(stop)
        self._before, self._new = list(before[-BEFORE:]), []
        self._held = ""
        self.stopped = False
        """A stop string came."""

    def add(self, token: int) -> str:
        """What a token adds for certain: nothing within a character, or while a stop string may have begun."""
        self._new.append(token)
        return self._cut(self._decoded(last=len(self._new) > PENDING), last=False)

    def end(self) -> str:
        """What was held back."""
        return self._cut(self._decoded(last=True), last=True)

    def _decoded(self, last: bool) -> str:
        # A few tokens, and not the whole text, whose decoding would take a time quadratic in its length.
        part = self._text.continuation(self._before, self._new) if self._new else ""
        if part.endswith("\ufffd") and not last:
            return ""
        if self._new:
            self._before, self._new = self._new, []
        return part

    def _cut(self, part: str, last: bool) -> str:
        if self.stopped:
            return ""
        whole = self._held + part
        found = [at for stop in self._stop if (at := whole.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return whole[:min(found)]
        keep = 0 if last else max((_begun(whole, stop) for stop in self._stop), default=0)
        self._held = whole[len(whole) - keep:]
        return whole[:len(whole) - keep]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
