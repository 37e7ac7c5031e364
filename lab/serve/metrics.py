"""/metrics, in Prometheus' text form: requests, queue, slots, times and lengths."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKENS = tuple(1 << n for n in range(15))
GONE = 499  # the status, in nginx's count, of a client that closed the connection before its answer


class Metrics:
    """The counts of one server, in a registry of its own.

    Args:
      paths: those with a label of their own; others are counted as "other", so that clients cannot invent labels.
      gauges: name without prefix -> (what it is, its value now).
      drift: (feature, its population stability index now) of each.
    """

    def __init__(self, paths: Iterable[str], gauges: Mapping[str, tuple[str, Callable[[], float]]],
                 drift: Iterable[tuple[str, Callable[[], float]]] = ()):
        self._paths, self._registry = set(paths), CollectorRegistry()
        own: Any = {"registry": self._registry, "namespace": "lab"}
        self._requests = Counter("requests", "Requests by path and status.", ("path", "status"), **own)
        self._seconds = Histogram("request_seconds", "Time to the end of the answer.", ("path",), buckets=SECONDS,
                                  **own)
        self._first = Histogram("first_token_seconds", "Time to the first token, waiting included.", buckets=SECONDS,
                                **own)
        self._each = Histogram("token_seconds", "Time per token after the first, mean of a request.", buckets=SECONDS,
                               **own)
        self._tokens = Counter("tokens", "Tokens: of prompts, of those taken from a slot, and generated.", ("kind",),
                               **own)
        self._length = Histogram("prompt_tokens", "Length of the prompts.", buckets=TOKENS, **own)
        for name, (what, value) in gauges.items():
            Gauge(name, what, **own).set_function(value)
        index = Gauge("drift", "Population stability index against the training data.", ("feature",), **own)
        for feature, value in drift:
            index.labels(feature).set_function(value)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Counts a request."""
        label = path if path in self._paths else "other"
        self._requests.labels(label, str(status)).inc()
        self._seconds.labels(label).observe(seconds)

    def generated(self, prompt: int, reused: int, made: int, began: float, first: float | None) -> None:
        """Counts a text that ended, however it ended. `began`, `first`: times of `time.monotonic`; None: no token."""
        self._length.observe(prompt)
        for kind, count in (("prompt", prompt), ("reused", reused), ("generated", made)):
            self._tokens.labels(kind).inc(count)
        if first is not None:
            self._first.observe(first - began)
            if made > 1:
                self._each.observe((time.monotonic() - first) / (made - 1))

    async def page(self, request: Request) -> Response:
        """The endpoint."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class Counted:
    """ASGI middleware that counts requests, outside of all others."""

    def __init__(self, app: Any, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.monotonic(), 500
        gone = False

        async def heard() -> Any:
            nonlocal gone
            message = await receive()
            gone = gone or message["type"] == "http.disconnect"
            return message

        async def sent(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = GONE if gone else message["status"]
            await send(message)

        try:
            await self._app(scope, heard, sent)
        finally:
            self._metrics.answered(scope["path"], GONE if gone else status, time.monotonic() - began)
