"""Listens, and ends well: on SIGTERM it accepts nothing more, finishes what runs, and leaves with status 0."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lab import signals
from lab.errors import UserError
from lab.serve.requests import Limits
from lab.serve.service import Service
from lab.serve.switch import Switch

log = logging.getLogger(__name__)
HEAD = 64 << 10  # bytes of the head of a request
CONNECTIONS = 1000  # at a time
LEFT = 2.0  # seconds of those to drain, for telling the clients of what does not end


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises UserError if the address is taken or not of this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError) as e:
        raise UserError(f"Cannot listen at {host}, port {port}: {getattr(e, 'strerror', None) or e}. Choose another "
                        f"--port or --host.") from None
    return found


class Server(uvicorn.Server):
    """uvicorn, with lab's signals: SIGTERM, SIGINT, SIGHUP end it after what runs; a second one ends it at once."""

    def __init__(self, config: uvicorn.Config, service: Service | Switch):
        super().__init__(config)
        self._service = service
        self.asked: int | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn.Server."""
        if threading.current_thread() is not threading.main_thread():  # in a test
            yield
            return
        loop = asyncio.get_running_loop()
        heard = [n for n in signals.HEARD if signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores SIGHUP
        signals.release()
        for number in heard:
            loop.add_signal_handler(number, self.stop, number)
        yield  # and keep them: a signal during the end changes nothing

    def stop(self, number: int) -> None:
        """Begins to end."""
        if self.asked is None:
            log.info("%s: finishing what runs, within %g s; again to stop at once", signal.Signals(number).name,
                     self.config.timeout_graceful_shutdown)
            self.asked = number
            drain = self.config.timeout_graceful_shutdown
            threading.Thread(target=self._service.close, args=(max(drain - LEFT, drain / 2),), daemon=True).start()
        else:
            self.force_exit = True
        self.should_exit = True


def protocol_of(limits: Limits) -> type[H11Protocol]:
    """uvicorn's protocol, which also closes connections that send no whole head of a request in time."""

    class Protocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._active = time.monotonic()
            self._timer = self.loop.call_later(limits.seconds, self._check)

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            self._active = time.monotonic()
            super().on_response_complete()

        def _check(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._active = time.monotonic()
            left = self._active + limits.seconds - time.monotonic()
            if left <= 0:
                if self.conn.our_state is h11.IDLE and self.conn.their_state is h11.IDLE:
                    self.send_400_response("The request did not come in time.")
                self.transport.close()
            else:
                self._timer = self.loop.call_later(left, self._check)

    return Protocol


def serve(app: Any, service: Service | Switch, sock: socket.socket, *, limits: Limits, drain: float) -> int:
    """Serves until a signal; returns the exit status: 0, or 130 after Ctrl-C."""
    config = uvicorn.Config(app, http=protocol_of(limits), ws="none", lifespan="off", log_config=None,
                            access_log=False, server_header=False, h11_max_incomplete_event_size=HEAD,
                            limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=drain)
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # it would log what clients send wrong
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    service.start()
    began = time.monotonic()

    async def run(server: Server) -> None:
        async def say() -> None:
            while not server.started:
                await asyncio.sleep(0.02)
            address, number = sock.getsockname()[:2]
            shown = f"[{address}]" if ":" in address else address
            print(f"Serving {service.name} at http://{shown}:{number}", flush=True)
            while not service.ready:
                await asyncio.sleep(0.1)
            log.info("ready: compiled in %.1f s", time.monotonic() - began)

        saying = asyncio.create_task(say())
        try:
            await server.serve(sockets=[sock])
        finally:
            saying.cancel()

    server = Server(config, service)
    with asyncio.Runner() as runner:
        runner.run(run(server))
    status = 130 if server.asked == signal.SIGINT else 0
    if not service.close(0):  # in the compiler, say, which cannot be interrupted; the interpreter would wait for it
        log.info("stopped")
        sys.stdout.flush()
        os._exit(status)
    return status
