"""The web application around a service: models, health, the API key, errors in JSON."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import time
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import BaseRoute, Route

from lab.serve.fields import Problem
from lab.serve.metrics import Counted, Metrics
from lab.serve.requests import Json, Limits
from lab.serve.service import Service

OPEN = ("/", "/healthz", "/readyz")  # paths that need no key


class Guard:
    """ASGI middleware: the key, if there is one, else no requests by pages of other sites; and no work before all is
    compiled."""

    def __init__(self, app: Any, service: Service, key: str | None):
        self._app, self._service = app, service
        self._key = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["path"] not in OPEN:
            headers = dict(scope["headers"])
            given, origin = headers.get(b"authorization", b""), headers.get(b"origin")
            if self._key is not None and not hmac.compare_digest(given, self._key):
                problem = Problem(401, "This server needs its key: Authorization: Bearer LAB_API_KEY.")
                return await problem_response(problem)(scope, receive, send)
            if self._key is None and origin is not None and origin.partition(b"//")[2] != headers.get(b"host"):
                problem = Problem(403, "Pages of other sites may not use this server without a key.")
                return await problem_response(problem)(scope, receive, send)
            if scope["method"] == "POST" and not self._service.ready:
                problem = Problem(503, "The model is not compiled yet.", after=5)
                return await problem_response(problem)(scope, receive, send)
        await self._app(scope, receive, send)


def problem_response(problem: Problem) -> Json:
    """The response of a problem."""
    headers = {} if problem.after is None else {"Retry-After": str(problem.after)}
    headers |= {"WWW-Authenticate": "Bearer"} if problem.status == 401 else {}
    headers |= {"Connection": "close"} if problem.status == 408 else {}  # else its body would still come
    return Json(problem.body(), problem.status, headers)


async def _on_problem(request: Request, error: Problem) -> Json:
    return problem_response(error)


async def _on_http(request: Request, error: HTTPException) -> Json:
    said = {404: "There is nothing at this path.", 405: "This path has another method."}
    found = problem_response(Problem(error.status_code, said.get(error.status_code, str(error.detail))))
    found.headers.update(error.headers or {})
    return found


async def _on_bug(request: Request, error: Exception) -> Json:
    return problem_response(Problem(500, "The server failed at this request; it goes on."))


def page() -> tuple[str, dict[str, str]]:
    """The page at /, and headers that let a browser run its script and no other, and load nothing from elsewhere."""
    text = (Path(__file__).parent / "page.html").read_text("utf-8")
    script, = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (f"default-src 'none'; script-src 'sha256-{own}'; style-src 'unsafe-inline'; connect-src 'self'; "
              f"img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    return text, {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}


def build(service: Service, *, limits: Limits, key: str | None = None) -> Starlette:
    """The application. `key`: the API key that requests must have."""
    created = int(time.time())

    def described() -> dict[str, Any]:
        return {"id": service.name, "object": "model", "created": created, "owned_by": "lab", "kind": service.kind,
                **service.described()}

    async def models(request: Request) -> Json:
        return Json({"object": "list", "data": [described()]})

    async def model(request: Request) -> Json:
        service.check_name(request.path_params["name"])
        return Json(described())

    text, headers = page()

    async def shown(request: Request) -> HTMLResponse:
        return HTMLResponse(text, headers=headers)

    async def healthz(request: Request) -> Json:
        return Json({"status": "alive"})

    async def readyz(request: Request) -> Json:
        if not service.ready:
            raise Problem(503, "The model is not compiled yet.", after=5)
        return Json({"status": "ready"})

    routes: list[BaseRoute] = [Route("/", shown), Route("/healthz", healthz), Route("/readyz", readyz),
                               Route("/v1/models", models), Route("/v1/models/{name:path}", model), *service.routes()]
    service.metrics = Metrics((route.path for route in routes if isinstance(route, Route)), service.gauges(),
                              service.drift.gauges())
    routes.append(Route("/metrics", service.metrics.page))
    handlers: Any = {Problem: _on_problem, HTTPException: _on_http, Exception: _on_bug}
    app = Starlette(routes=routes, exception_handlers=handlers,
                    middleware=[Middleware(Counted, metrics=service.metrics),
                                Middleware(Guard, service=service, key=key)])
    app.state.limits = limits
    return app
