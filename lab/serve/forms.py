"""The JSON of OpenAI's answers: for completions and for chats, whole and in parts."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from lab.serve.engine import Token

LEAST = -9999.0  # stands for the logarithm of 0, which JSON does not have


def _bytes(text: Any, token: int) -> bytes:
    return text.pieces[token] if token < len(text.pieces) else b""


def _word(text: Any, token: int) -> str:
    return _bytes(text, token).decode(errors="replace")


class Completion:
    """The answers of /v1/completions. `top`: alternatives per token; None: no log-probabilities."""

    kind, prefix = "text_completion", "cmpl"

    def __init__(self, model: str, text: Any, top: int | None):
        self._text, self._top, self._offset = text, top, 0
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, answer: str, tokens: Sequence[Token], finish: str, usage: dict[str, Any]) -> dict[str, Any]:
        """The answer that is not streamed."""
        choice = {"index": 0, "text": answer, "logprobs": self.logprobs(tokens), "finish_reason": finish}
        return {**self._head, "object": self.kind, "choices": [choice], "usage": usage}

    def first(self) -> dict[str, Any] | None:
        """What a stream begins with."""
        return None

    def part(self, answer: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        """A part of a stream; `finish` in the last one."""
        choice = {"index": 0, "text": answer, "logprobs": self.logprobs(tokens), "finish_reason": finish}
        return {**self._head, "object": self.kind, "choices": [choice]}

    def counted(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The part of a stream with the counts."""
        return {**self.part("", (), None), "choices": [], "usage": usage}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Log-probabilities of tokens, if they were asked for."""
        if self._top is None:
            return None
        words = [_word(self._text, token.id) for token in tokens]
        starts = []
        for word in words:
            starts.append(self._offset)
            self._offset += len(word)
        tops = [{_word(self._text, i): max(logp, LEAST) for i, logp in token.top[:self._top]} for token in tokens]
        return {"tokens": words, "token_logprobs": [max(token.logp, LEAST) for token in tokens],
                "top_logprobs": tops, "text_offset": starts}


class Chat(Completion):
    """The answers of /v1/chat/completions."""

    kind, prefix = "chat.completion", "chatcmpl"

    def whole(self, answer: str, tokens: Sequence[Token], finish: str, usage: dict[str, Any]) -> dict[str, Any]:
        """See `Completion.whole`."""
        choice = {"index": 0, "message": {"role": "assistant", "content": answer, "refusal": None},
                  "logprobs": self.logprobs(tokens), "finish_reason": finish}
        return {**self._head, "object": self.kind, "choices": [choice], "usage": usage}

    def first(self) -> dict[str, Any] | None:
        """See `Completion.first`."""
        return self._delta({"role": "assistant", "content": ""}, None, None)

    def part(self, answer: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        """See `Completion.part`."""
        return self._delta({"content": answer} if answer else {}, self.logprobs(tokens), finish)

    def _delta(self, delta: dict[str, str], logprobs: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "object": f"{self.kind}.chunk", "choices": [choice]}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """See `Completion.logprobs`."""
        if self._top is None:
            return None
        return {"content": [self._one(token.id, token.logp) | {
            "top_logprobs": [self._one(*pair) for pair in token.top[:self._top]]} for token in tokens],
            "refusal": None}

    def _one(self, token: int, logp: float) -> dict[str, Any]:
        return {"token": _word(self._text, token), "logprob": max(logp, LEAST),
                "bytes": list(_bytes(self._text, token))}
