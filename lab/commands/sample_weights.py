"""`./launch.sh sample LOCATION`: continue a text, or answer, with somebody else's pretrained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from lab.errors import UserError


def sample_weights(location: str, prompts: Sequence[str], *, chat: bool, system: str | None, new_tokens: int,
                   **how: Any) -> list[str]:
    """The continuation of each prompt, or with `chat` the answer to it. `how`: see `sample_texts`.

    Raises:
      UserError: no such weights, no tokenizer or chat template, or a model that continues no text.
    """
    import jax

    from lab.models.generate import sample_texts
    from lab.models.gpt import GPT
    from lab.weights.read import find, variables_of
    from lab.weights.tokenizer import tokenizer_of

    found = find(location)
    if not isinstance(found.model, GPT):
        raise UserError(f"{location} is a {type(found.model).__name__}, which continues no text.")
    fitted = tokenizer_of(location, found.model)
    encode: Callable[[str], Any] = fitted.encode
    if chat:
        prompts, encode = _conversations(location, fitted.config, prompts, system), fitted.encode_prompt
    ids = [encode(prompt) for prompt in prompts]
    context = found.model.context
    if found.model.position == "rotary":  # the key/value cache has as many rows as the context
        longest = max(map(len, ids), default=1)
        context = max(2, min(context, (1 << (longest - 1).bit_length() if longest else 1) + new_tokens))
    model = found.model.clone(context=context)
    variables = variables_of(found.arrays(lambda path, x: jax.device_put(x)))
    text = SimpleNamespace(encode=encode, decode=fitted.decode, continuation=fitted.continuation, eot=fitted.eot,
                           metadata={"vocab": fitted.size})

    def compute(function: Callable[..., Any], *inputs: Any, **static: Any) -> Any:
        return function(model, variables, *inputs, **static)

    return sample_texts(compute, context, text, list(prompts), new_tokens=new_tokens, **how)


def _conversations(location: str, config: dict[str, str], prompts: Sequence[str], system: str | None) -> list[str]:
    """Each prompt as a conversation of one user message, by the tokenizer's template."""
    from lab.weights.chat import render

    if "chat_template" not in config:
        raise UserError(f"{location} has no chat template: leave out --chat to continue a text.")
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [render(config["chat_template"], [*opening, {"role": "user", "content": prompt}], special=config,
                   title=location) for prompt in prompts]
