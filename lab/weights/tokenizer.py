"""The tokenizer that comes with a pretrained model."""

from __future__ import annotations

from typing import Any

from lab.data.hugging_face import FittedHuggingFace, HuggingFaceTokenizer
from lab.errors import UserError


def tokenizer_of(location: str, model: Any = None) -> FittedHuggingFace:
    """The tokenizer at a location, which adds its special tokens: `encode(text)`, `decode(ids)`, `encode_pairs(...)`.

    Raises:
      UserError: there is none, it cannot be read, or it has more ids than `model` has rows in its vocabulary.
    """
    found = HuggingFaceTokenizer(location, special_tokens=True).fit(None, 0)
    if model is not None and found.size > model.vocab:
        raise UserError(f"The tokenizer of {location} has {found.size} tokens and the model {model.vocab}: they do not "
                        f"belong together.")
    return found
