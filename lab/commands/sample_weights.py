"""`./launch.sh sample LOCATION`: continue a text, or answer, with somebody else's pretrained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lab.data.hugging_face import FittedHuggingFace
from lab.errors import UserError
from lab.models import generate
from lab.models.gpt import GPT


def check_flags(location: str, step: int | None, best: bool, experiment: Path | None) -> None:
    """Raises UserError for a flag that makes sense for a run only."""
    if best or step is not None or experiment is not None:
        raise UserError(f"--step, --best and --experiment are for run folders; {location} names pretrained weights.")


def language_model(location: str, chat: bool = False) -> tuple[GPT, dict[str, Any], FittedHuggingFace]:
    """(model, variables on the first device, tokenizer) of pretrained weights; one tensor at a time is in host memory.

    Raises:
      UserError: no such weights, no tokenizer, with `chat` no chat template, or a model that continues no text.
    """
    import jax

    from lab.weights.read import find, variables_of
    from lab.weights.tokenizer import tokenizer_of

    found = find(location)
    if not isinstance(found.model, GPT):
        raise UserError(f"{location} is a {type(found.model).__name__}, which continues no text.")
    fitted = tokenizer_of(location, found.model)
    if chat and "chat_template" not in fitted.config:
        raise UserError(f"{location} has no chat template: leave out --chat to continue a text.")
    return found.model, variables_of(found.arrays(lambda path, x: jax.device_put(x))), fitted


def questions(fitted: FittedHuggingFace, location: str, system: str | None) -> Callable[[str], Sequence[int]]:
    """Question -> its token ids, as the chat template puts it. `system`: how the model should answer."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    return lambda prompt: fitted.encode_messages([*opening, {"role": "user", "content": prompt}], True, location)


def sample_weights(location: str, prompts: Sequence[str], *, chat: bool, system: str | None, new_tokens: int,
                   **how: Any) -> list[str]:
    """The continuation of each prompt, or with `chat` the answer to it. `how`: see `sample_texts`.

    Raises:
      UserError: as `language_model`.
    """
    model, variables, fitted = language_model(location, chat)
    encode: Callable[[str], Any] = questions(fitted, location, system) if chat else fitted.encode
    context = model.context
    if model.position == "rotary":  # the key/value cache has as many rows as the context
        longest = max((len(encode(prompt)) for prompt in prompts), default=1)
        context = max(2, min(context, (1 << (longest - 1).bit_length() if longest else 1) + new_tokens))
    model = model.clone(context=context)
    text = SimpleNamespace(encode=encode, decode=fitted.decode, continuation=fitted.continuation, eot=fitted.eot,
                           metadata={"vocab": fitted.size})

    def compute(function: Callable[..., Any], *inputs: Any, **static: Any) -> Any:
        return function(model, variables, *inputs, **static)

    return generate.sample_texts(compute, context, text, list(prompts), new_tokens=new_tokens, **how)
