"""Chat templates: messages to the text of a prompt, by the Jinja template that comes with a tokenizer.

A template is code of other people: it runs in Jinja's sandbox, without files and imports, for at most `SECONDS`.
"""

from __future__ import annotations

import datetime
import functools
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from lab.errors import UserError

SECONDS = 10.0
SIZE = 1 << 20  # of texts and lists that a template makes by "*", and bits of numbers
Message = Mapping[str, Any]  # {"role": "user", "content": "..."}


def render(template: str, messages: Sequence[Message], *, add_generation_prompt: bool = True,
           special: Mapping[str, str] | None = None, title: str = "The tokenizer") -> str:
    """The text of a conversation, as transformers' `apply_chat_template` gives it.

    `add_generation_prompt`: ends with what opens the assistant's turn. `special`: values of `bos_token`, `eos_token`,
    ... for the template.

    Raises:
      UserError: the package jinja2 is missing; the template is wrong, refuses the messages, leaves the sandbox or does
        not end.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise UserError("Chat templates need the package jinja2: LAB_EXTRAS=chat ./launch.sh ...") from None
    values = json.loads(json.dumps({**(special or {}), "messages": list(messages)}))  # plain copies
    done: list[str | BaseException] = []

    def work() -> None:
        try:
            done.append(_compiled(template).render(
                **values, tools=None, documents=None, add_generation_prompt=add_generation_prompt))
        except Exception as e:  # whatever a template does wrong
            done.append(e)

    thread = threading.Thread(target=work, daemon=True)  # one that does not end is left behind
    thread.start()
    thread.join(SECONDS)
    if not done:
        raise UserError(f"{title}: its chat template does not end within {SECONDS:.0f} s.")
    if isinstance(done[0], BaseException):
        reason = (str(done[0]).strip().splitlines() or [""])[0][:200]
        raise UserError(f"{title}: its chat template fails: {type(done[0]).__name__}: {reason}")
    return done[0]


@functools.lru_cache(4)
def _compiled(template: str) -> Any:
    """A Jinja template; a data set renders one many thousand times."""
    return _environment().from_string(template)


def _environment() -> Any:
    """Jinja's sandbox with what transformers offers to templates."""
    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _too_large(operator, left, right):
                raise SecurityError(f"the result of {operator} is too large")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
               sort_keys: bool = False) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    found = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation()])
    found.filters["tojson"] = tojson
    found.globals |= {"raise_exception": raise_exception,
                      "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    return found


def _too_large(operator: str, left: Any, right: Any) -> bool:
    """Whether a product or power would hold up Python for long, in which no other thread could interrupt it."""
    numbers = [x for x in (left, right) if isinstance(x, int | float)]
    if len(numbers) == 2:
        long = any(isinstance(x, int) and x.bit_length() > SIZE for x in numbers)
        return long or (operator == "**" and abs(right) > 64)
    texts = [x for x in (left, right) if isinstance(x, str | list | tuple)]
    return len(texts) == len(numbers) == 1 and len(texts[0]) * numbers[0] > SIZE


def _generation() -> type:
    """{% generation %} ... {% endgeneration %}, which marks what an assistant says in training, as plain text."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    return Generation
