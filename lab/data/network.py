"""Calls that may hang, such as the lookup of a name without a network."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_time(call: Callable[[], T], seconds: float) -> T:
    """What `call` returns or raises; TimeoutError after `seconds`. The call cannot be stopped: its thread goes on."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=run, name="network", daemon=True).start()
    return result.result(seconds)
