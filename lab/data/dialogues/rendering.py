"""Dialogues to token ids: by the chat template of a pretrained tokenizer, or by a plain form for all others."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lab.data.dialogues.sources import Message
from lab.errors import UserError

Encode = Callable[[Sequence[Message], bool], np.ndarray]
"""(messages, whether an answer follows) -> ids int32 (n,). If so, they end with what opens the assistant's turn."""


def form_of(fitted: Any, template: str, title: str) -> Encode:
    """How a tokenizer writes dialogues. `template`: "auto" or "plain", see `Dialogues`; `title`: names the tokenizer.

    Raises:
      UserError: "auto", and a pretrained tokenizer without a chat template.
    """
    if template == "plain" or not hasattr(fitted, "encode_prompt"):
        return _plain(fitted)
    if not fitted.config.get("chat_template"):
        raise UserError(f"{title} has no chat template: add a chat_template.jinja to its folder, or write dialogues in "
                        f"the plain form, --data.template plain.")
    return functools.partial(fitted.encode_messages, title=title)


def plain_text(messages: Sequence[Message]) -> str:
    """The plain form of a dialogue, without end-of-text."""
    return "".join(f"{message['role'].title()}:\n{message['content']}\n" for message in messages)


def _plain(fitted: Any) -> Encode:
    """A line with the role, then the text; behind each answer the end-of-text token, if there is one. The parts are
    encoded one by one, so no token crosses them."""
    head = functools.cache(lambda role: fitted.encode(f"{role.title()}:\n"))  # when asked: `Chars` may lack a role
    end, stop = fitted.encode("\n"), np.array([] if fitted.eot is None else [fitted.eot], np.int32)

    def encode(messages: Sequence[Message], answers: bool) -> np.ndarray:
        parts = [part for message in messages for part in (
            head(message["role"]), fitted.encode(message["content"]),
            *([stop] if message["role"] == "assistant" else []), end)]
        return np.concatenate([*parts, *([head("assistant")] if answers else [])])

    return encode


def encoded(encode: Encode, eot: int | None, name: str, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 (n,), learn uint8 (n,)) of a dialogue: 1 for the tokens of its answers and the end of their turns.

    An answer is what the dialogue up to it has more than the prompt that asks for it; behind its last end-of-text token
    `eot`, which ends generation, nothing counts.

    Raises:
      UserError: the form does not write a dialogue as the beginning of a longer one.
    """
    whole = encode(messages, False)
    learn = np.zeros(len(whole), np.uint8)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = encode(messages[:i], True), encode(messages[: i + 1], False)
        if not all(np.array_equal(part, whole[: len(part)]) for part in (before, after)):
            raise UserError(f"{name}: the tokenizer's chat template writes message {i + 1}, an answer, or what is "
                            f"before it otherwise when more follows, so its tokens cannot be told. Write dialogues in "
                            f"the plain form: --data.template plain.")
        ends = [] if eot is None else np.flatnonzero(after[len(before):] == eot)
        learn[len(before): len(before) + ends[-1] + 1 if len(ends) else len(after)] = 1
    return whole, learn
