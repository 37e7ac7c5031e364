"""A tiny random language model behind the web application, for the tests of lab/serve."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from lab.data.tokenizers import Bytes
from lab.models.gpt import GPT
from tests.launching import wait_for
from tests.test_generate import random_params

MODEL = {"depth": 1, "width": 16, "heads": 2, "vocab": 256, "context": 96, "tied": False}


def language(slots: int = 3, queue: int = 8, seconds: float = 60.0, start: bool = True) -> Any:
    """The service, compiled."""
    from lab.serve.engine import Engine
    from lab.serve.language import Language
    from lab.serve.slots import Slots

    model, text = GPT(**MODEL), Bytes().restore("")
    engine = Engine(Slots(model, random_params(model), slots=slots, vocab=256), queue)
    found = Language("tiny", engine, text, lambda said: text.encode("".join(m["content"] for m in said)), seconds)
    if start:
        found.start()
        assert engine.ready.wait(120)
    return found


def idle(service: Any, seconds: float = 20.0) -> bool:
    """Whether all slots become free."""
    end = time.monotonic() + seconds
    while service.engine.running or service.engine.waiting:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@contextlib.contextmanager
def live(service: Any, application: Any = None, **how: Any) -> Iterator[int]:
    """Serves on a free port of this machine, in a thread; gives the port. `application`, `how`: see
    `lab.serve.app.build`."""
    import uvicorn

    from lab.serve import app, server
    from lab.serve.requests import Limits

    limits = how.pop("limits", Limits())
    sock = server.listen("127.0.0.1", 0)
    application = application or app.build(service, limits=limits, **how)
    config = uvicorn.Config(application, http=server.protocol_of(limits), lifespan="off",
                            ws="none", log_config=None, h11_max_incomplete_event_size=server.HEAD,
                            timeout_graceful_shutdown=5)
    running = server.Server(config, service)
    thread = threading.Thread(target=lambda: asyncio.run(running.serve(sockets=[sock])))
    thread.start()
    try:
        wait_for(lambda: running.started, 20, "the start of the server")
        yield sock.getsockname()[1]
    finally:
        running.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
