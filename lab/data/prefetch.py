"""Prefetches batches in a background thread."""

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterate over make(start), ..., make(stop - 1), computed ahead by one background thread.

    `depth`: queue size. An exception in `make` is raised in the consumer, in place of the result. `wait_seconds`: time
    the consumer was blocked so far. Use it in a `with` block or call `close`; both are safe at any time.
    """

    def __init__(self, make: Callable[[int], T], start: int, stop: int, depth: int = 2):
        self.wait_seconds = 0.0
        self._make, self._range, self._depth = make, range(start, stop), max(1, depth)
        self._ready: deque[T] = deque()
        self._change = threading.Condition()
        self._finished = self._closed = False
        self._error: BaseException | None = None
        # A daemon thread, so that a `make` that never returns does not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        error = None
        try:
            for step in self._range:
                with self._change:
                    self._change.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                    if self._closed:
                        return
                result = self._make(step)
                with self._change:
                    self._ready.append(result)
                    self._change.notify_all()
        except BaseException as caught:  # re-raised in the consumer's thread
            error = caught
        finally:
            with self._change:
                self._error, self._finished = error, True
                self._change.notify_all()

    def __iter__(self) -> "Prefetch[T]":
        return self

    def __next__(self) -> T:
        begin = time.perf_counter()
        with self._change:
            self._change.wait_for(lambda: self._ready or self._finished or self._closed)
            self.wait_seconds += time.perf_counter() - begin
            if self._closed:
                raise StopIteration
            if self._ready:
                self._change.notify_all()
                return self._ready.popleft()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self) -> None:
        """Stop the thread and drop its results; waits at most a second for a `make` in progress."""
        with self._change:
            self._closed = True
            self._ready.clear()
            self._change.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
