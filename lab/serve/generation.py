"""One request between the event loop and the engine's thread: its events, as text, on the loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from lab.serve.engine import Busy, Closed, Engine, Reason, Request, Token
from lab.serve.fields import Problem
from lab.serve.metrics import Metrics
from lab.serve.replicas import Replicas
from lab.serve.sampling import Settings
from lab.serve.text_stream import TextStream

ENDS = {"deadline": (504, "The request was not done within its {:g} seconds."),
        "cancelled": (503, "The server is stopping."), "failed": (500, "The model failed; the server goes on.")}


class Generation:
    """A text that the engine continues.

    Args:
      text: the tokenizer.
      stop: (ids that end the text, strings that end it).
      seconds: until its deadline.
      metrics: counts it when it ends.
    """

    def __init__(self, engine: Engine | Replicas, text: Any, ids: Sequence[int], new_tokens: int, settings: Settings,
                 stop: tuple[Sequence[int], Sequence[str]], seconds: float, metrics: Metrics):
        self._loop, self._events, self._engine = asyncio.get_running_loop(), asyncio.Queue(), engine
        self._text, self._stream = text, TextStream(text, ids, stop[1])
        self.seconds, self.finish, self._metrics = seconds, "", metrics
        self._first: float | None = None
        self.request = Request(ids, new_tokens, settings, stop[0], self._emit)
        self.request.deadline = self.request.began + seconds

    def _emit(self, event: Token | Reason) -> None:
        if self._first is None and isinstance(event, Token):
            self._first = time.monotonic()
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def submit(self) -> None:
        """Queues it. Raises Problem: 429 if the queue is full, 503 if the server is stopping."""
        try:
            self._engine.submit(self.request)
        except Busy as e:
            raise Problem(429, f"All slots are taken, and {self._engine.limit} requests wait already.",
                          after=e.seconds) from None
        except Closed:
            raise Problem(503, "The server is stopping.", after=5) from None

    def cancel(self) -> None:
        """Frees its slot at the next step."""
        self._engine.cancel(self.request)

    async def parts(self) -> AsyncIterator[tuple[str, Token | None]]:
        """(certain text, the token that brought it) until the end, whose reason is then in `finish`.

        Raises:
          Problem: it ended otherwise (500, 503, 504).
        """
        try:
            while not self.finish:
                event = await self._events.get()
                if isinstance(event, Token):
                    part, token = self._stream.add(event.id), event
                elif event in ENDS:
                    status, sentence = ENDS[event]
                    raise Problem(status, sentence.format(self.seconds))
                else:
                    part, token, self.finish = self._stream.end(), None, event
                if self._stream.stopped:
                    self.finish = "stop"
                yield part, token
        finally:
            self.cancel()
            request = self.request
            self._metrics.generated(len(request.ids), request.reused, request.made, request.began, self._first)

    def usage(self, made: int) -> dict[str, Any]:
        """Counts of tokens: of the prompt, and `made`."""
        prompt = len(self.request.ids)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
                "prompt_tokens_details": {"cached_tokens": self.request.reused}}


@contextlib.asynccontextmanager
async def while_connected(receive: Callable[[], Any], gone: Callable[[], None]) -> AsyncIterator[None]:
    """Inside, `gone` is called when the client has closed the connection. `receive`: ASGI's, after the body."""
    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
