"""Bodies of requests within limits of size and time, and answers in JSON."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from lab.serve.fields import Problem


@dataclass(frozen=True)
class Limits:
    """What one client may take."""

    body: int = 1 << 20
    """Bytes of a request's body."""
    seconds: float = 30.0
    """Seconds for a client to send a body, or the head of a request."""


class Json(Response):
    """JSON in ASCII: a client's lone surrogates have no UTF-8 form."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """See starlette's Response."""
        return json.dumps(content, allow_nan=False).encode()


async def body_of(request: Request) -> bytes:
    """The body of a request.

    Raises:
      Problem: it is too large (413), too slow (408), or the client has gone.
    """
    limits: Limits = request.app.state.limits
    too_large = Problem(413, f"The body is larger than {limits.body} bytes.")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > limits.body:
        raise too_large
    found = bytearray()
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                found += part
                if len(found) > limits.body:
                    raise too_large
    except TimeoutError:
        raise Problem(408, f"The body did not come within {limits.seconds:g} seconds.") from None
    except ClientDisconnect:
        raise Problem(400, "The connection was closed within the body.") from None
    return bytes(found)
