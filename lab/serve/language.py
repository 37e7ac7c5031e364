"""OpenAI's API for a language model: /v1/completions and /v1/chat/completions, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from lab.errors import UserError
from lab.serve.engine import Engine, Token
from lab.serve.fields import Fields, Problem, messages, parsed, seed_of
from lab.serve.forms import Chat, Completion
from lab.serve.generation import Generation, while_connected
from lab.serve.replicas import Replicas
from lab.serve.requests import Json, body_of
from lab.serve.sampling import TOP, Settings
from lab.serve.service import Service

TO_SEND = 30.0  # seconds beyond the deadline for a client to read its answer
# What would change an answer and is not here, with the values that ask for nothing.
IGNORED = {"n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logit_bias": ({},), "tools": ([],),
           "functions": ([],), "tool_choice": ("none", "auto"), "presence_penalty": (0,), "frequency_penalty": (0,),
           "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": ()}


class Language(Service):
    """The service of a language model.

    Args:
      name: what clients call the model.
      engine: started by `start`.
      text: its tokenizer, see `lab.data.tokenizers.Fitted`.
      chat: messages -> ids of the prompt.
      seconds: until a request's deadline.
    """

    kind = "language"

    def __init__(self, name: str, engine: Engine | Replicas, text: Any,
                 chat: Callable[[list[dict[str, str]]], Sequence[int]], seconds: float):
        super().__init__(name, engine)
        self.engine, self.text, self._chat, self.seconds = engine, text, chat, seconds
        self.stop = () if text.eot is None else (text.eot,)
        # One thread: long prompts must not hold up the event loop, and a tokenizer is one at a time.
        self._encoding = ThreadPoolExecutor(1, "tokenizer")

    def close(self, seconds: float) -> bool:
        """See `Service.close`."""
        self._encoding.shutdown(wait=False)
        return super().close(seconds)

    def described(self) -> dict[str, Any]:
        """What /v1/models says of it."""
        return {"context": self.engine.slots.context}

    def routes(self) -> list[Route]:
        """Its endpoints."""
        return [Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chats, methods=["POST"])]

    async def _completions(self, request: Request) -> Any:
        values = parsed(await body_of(request))
        fields = Fields(values)
        top = fields.integer("logprobs", None, 0, TOP)
        prompt = values.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]  # a batch of one
        ids = self._ids(prompt) if isinstance(prompt, list) else await self._encoded(
            lambda: self.text.encode(fields.text("prompt")), "prompt")
        return await self._answer(request, fields, ids or self.stop, 16, Completion(self.name, self.text, top))

    def _ids(self, prompt: list[Any]) -> list[int]:
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < self.text.size for i in prompt):
            raise Problem(422, f"prompt must be one string, or one array of token ids below {self.text.size}.",
                          "prompt")
        return prompt

    async def _chats(self, request: Request) -> Any:
        values = parsed(await body_of(request))
        fields = Fields(values)
        top = fields.integer("top_logprobs", 0, 0, TOP)
        if top and not fields.flag("logprobs"):
            raise Problem(422, "top_logprobs needs logprobs: true.", "top_logprobs")
        said = messages(values.get("messages"))
        ids = await self._encoded(lambda: self._chat(said), "messages")
        form = Chat(self.name, self.text, top if fields.flag("logprobs") else None)
        return await self._answer(request, fields, ids, None, form)

    async def _encoded(self, encode: Callable[[], Any], param: str) -> list[int]:
        """Ids of a prompt. Raises Problem (400) for text that the tokenizer or the template refuses."""
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._encoding, encode)
        except UserError as e:
            raise Problem(400, str(e), param) from None
        except RuntimeError:  # the executor was shut down
            raise Problem(503, "The server is stopping.", after=5) from None
        return [int(i) for i in found]

    async def _answer(self, request: Request, fields: Fields, ids: Sequence[int], new_tokens: int | None,
                      form: Completion) -> Any:
        """The response. `new_tokens`: at most, by default; None: what the context has room for."""
        fields.refuse(IGNORED)
        self.check_model(fields)
        settings = Settings(fields.number("temperature", 1.0, 0, 10), fields.number("top_p", 1.0, 1e-6, 1),
                            fields.integer("top_k", None, -1, 1 << 30), seed_of(fields), form.logprobs(()) is not None)
        new_tokens = self._room(fields, len(ids), new_tokens)
        stream, counted = fields.flag("stream"), _wants_usage(fields)
        made = Generation(self.engine, self.text, ids, new_tokens, settings, (self.stop, fields.texts("stop", 16)),
                          self.seconds, self.metrics)
        made.submit()
        if stream:
            return Events(made, form, counted)
        answer, tokens = "", []
        async with while_connected(request.receive, made.cancel), contextlib.aclosing(made.parts()) as parts:
            async for part, token in parts:
                answer += part
                tokens += [] if token is None else [token]
        return Json(form.whole(answer, tokens, made.finish, made.usage(len(tokens))))

    def _room(self, fields: Fields, prompt: int, default: int | None) -> int:
        """The number of new tokens. Raises Problem (400) if they or the prompt do not fit."""
        context, huge = self.engine.slots.context, 1 << 31
        if not prompt:
            raise Problem(400, "The prompt is empty, and the tokenizer has no token that begins a text.", "prompt")
        if prompt >= context:
            raise Problem(400, f"The prompt has {prompt} tokens, and the model's context is {context}.", "prompt")
        wanted = fields.integer("max_completion_tokens", fields.integer("max_tokens", None, 1, huge), 1, huge)
        if wanted is None:
            return context - prompt if default is None else min(default, context - prompt)
        if prompt + wanted > context:
            raise Problem(400, f"The prompt has {prompt} tokens and max_tokens is {wanted}: together {prompt + wanted},"
                               f" and the model's context is {context}.", "max_tokens")
        return wanted


class Events:
    """The response that sends parts as they come. Until there is one, an error has its own HTTP status."""

    def __init__(self, made: Generation, form: Completion, counted: bool):
        self._made, self._form, self._counted = made, form, counted

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        began = False
        try:
            async with asyncio.timeout(self._made.seconds + TO_SEND), while_connected(receive, self._made.cancel), \
                    contextlib.aclosing(self._lines()) as lines:
                async for line in lines:
                    if not began:
                        await send({"type": "http.response.start", "status": 200, "headers": headers})
                    began = True
                    await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
        except Problem as e:
            if not began:
                raise
            await send({"type": "http.response.body", "body": _line(e.body()).encode(), "more_body": True})
        except TimeoutError:  # the client does not read
            self._made.cancel()
        await send({"type": "http.response.body", "body": b""})

    async def _lines(self) -> AsyncIterator[str]:
        made, form, count, began = self._made, self._form, 0, False
        async with contextlib.aclosing(made.parts()) as parts:
            async for part, token in parts:
                if not began and (first := form.first()):
                    yield _line(first)
                began, count = True, count + (token is not None)
                tokens: list[Token] = [] if token is None else [token]
                if part or form.logprobs(()) is not None or made.finish:
                    yield _line(form.part(part, tokens, made.finish or None))
        if self._counted:
            yield _line(form.counted(made.usage(count)))
        yield "data: [DONE]\n\n"


def _line(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _wants_usage(fields: Fields) -> bool:
    options = fields.any("stream_options")
    if options is not None and not isinstance(options, dict):
        raise Problem(422, "stream_options must be an object.", "stream_options")
    return Fields(options or {}).flag("include_usage")
