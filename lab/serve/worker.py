"""The thread that owns the device, for models that answer at once: one job after another."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from starlette.requests import Request

from lab.errors import UserError
from lab.serve.fields import Problem
from lab.serve.generation import while_connected

log = logging.getLogger(__name__)


class Worker:
    """Runs jobs in one thread.

    Args:
      compile: the first job, which compiles what the others call.
      queue: jobs that may wait.
      seconds: until a job's deadline; one that began is not interrupted.
    """

    def __init__(self, compile: Callable[[], Any], queue: int, seconds: float):
        self._compile, self._queue, self._seconds = compile, queue, seconds
        self._thread = ThreadPoolExecutor(1, "worker")
        self.ready = threading.Event()
        self.failed = False
        """Whether the model could not be compiled."""
        self.pending = 0
        """Jobs that wait or run. Changed on the event loop only."""

    def start(self) -> None:
        """Starts the thread; `ready` is set when all is compiled."""
        self._thread.submit(self._prepare)

    def _prepare(self) -> None:
        try:
            self._compile()
        except Exception:
            log.exception("the model could not be compiled")
            self.failed = True
            return
        self.ready.set()

    def gauges(self) -> dict[str, tuple[str, Callable[[], float]]]:
        """See `lab.serve.metrics.Metrics`."""
        return {"queue": ("Requests that wait or run.", lambda: self.pending)}

    async def run(self, request: Request, job: Callable[[], Any]) -> Any:
        """What a job returns. A client that goes away takes its waiting job along.

        Raises:
          Problem: the queue is full (429), the input does not fit (422), late (504), a failure (500).
        """
        if self.pending > self._queue:
            raise Problem(429, f"{self._queue} requests wait already.", after=1)
        try:
            future: Future[Any] = self._thread.submit(job)
        except RuntimeError:
            raise Problem(503, "The server is stopping.", after=5) from None
        self.pending += 1
        try:
            async with while_connected(request.receive, future.cancel), asyncio.timeout(self._seconds):
                return await asyncio.wrap_future(future)
        except UserError as e:
            raise Problem(422, str(e)) from None
        except TimeoutError:
            raise Problem(504, f"The request was not done within its {self._seconds:g} seconds.") from None
        except asyncio.CancelledError:
            if not future.cancelled():  # this task was cancelled, not the job
                raise
            raise Problem(503, "The request was given up.") from None
        finally:
            self.pending -= 1

    def close(self, seconds: float) -> bool:
        """Accepts no more jobs. Returns whether the thread has ended."""
        self._thread.shutdown(wait=False)
        threads = list(self._thread._threads)
        for thread in threads:
            thread.join(seconds if self.ready.is_set() else 0)
        return not any(thread.is_alive() for thread in threads)
