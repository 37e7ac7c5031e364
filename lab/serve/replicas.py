"""Several engines, each with a copy of the model on devices of its own, behind the interface of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from lab.serve.engine import Engine, Request


class Replicas:
    """Sends a request to the engine that knows its beginning, if a slot is free there, else to the least busy one."""

    def __init__(self, engines: Sequence[Engine]):
        self._engines = engines
        self.slots, self.ready = engines[0].slots, _All(engines)
        self.limit = sum(engine.limit for engine in engines)

    def start(self) -> None:
        """See `Engine.start`."""
        for engine in self._engines:
            engine.start()

    def gauges(self) -> dict[str, tuple[str, Callable[[], float]]]:
        """Sums over the engines; see `Engine.gauges`."""
        each = [engine.gauges() for engine in self._engines]
        return {name: (what, lambda name=name: sum(gauges[name][1]() for gauges in each))
                for name, (what, _) in each[0].items()}

    def submit(self, request: Request) -> None:
        """See `Engine.submit`."""
        def cost(engine: Engine) -> tuple[bool, int, int]:
            load = len(engine.running) + len(engine.waiting)
            full = load >= len(engine.slots.ids)
            return full, 0 if full else -engine.known(request.ids), load

        min(self._engines, key=cost).submit(request)

    def cancel(self, request: Request) -> None:
        """See `Engine.cancel`."""
        for engine in self._engines:
            engine.cancel(request)

    def close(self, seconds: float) -> bool:
        """See `Engine.close`; `seconds` for all of them together."""
        for engine in self._engines:
            engine.refuse()
        end = time.monotonic() + seconds
        return all([engine.close(max(end - time.monotonic(), 0)) for engine in self._engines])


class _All:
    """What of `threading.Event` is used, for the events of all engines."""

    def __init__(self, engines: Sequence[Engine]):
        self._engines = engines

    def is_set(self) -> bool:
        return all(engine.ready.is_set() for engine in self._engines)

    def wait(self, seconds: float) -> bool:
        return all(engine.ready.wait(seconds) for engine in self._engines)
