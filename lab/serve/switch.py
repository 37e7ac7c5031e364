"""Serves what a link points to: when it is moved, the new model is compiled beside the old one, then takes over."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.serve.service import Service

log = logging.getLogger(__name__)
EVERY = 1.0  # seconds between looks at the link


class _Version:
    """A model with its application, and how many requests it has begun and not ended."""

    def __init__(self, place: Path, service: Service, app: Any):
        self.place, self.service, self.app, self.running = place, service, app, 0


class Switch:
    """An ASGI application and service whose model is the one that `link` points to.

    A request is answered by the model that was served when it came; the former model ends with its last request. While
    a new one compiles, both are in memory. One that cannot be opened or compiled is named in the log, and the former
    one stays.

    Args:
      link: a symbolic link to a run folder or to weights.
      open: the service of what the link points to.
      build: the application around a service.
    """

    def __init__(self, link: Path, open: Callable[[Path], Service], build: Callable[[Service], Any]):
        self._link, self._open, self._build = link, open, build
        self._stopping = threading.Event()
        self._now = self._version(self._target())
        self._tried = self._now.place
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _target(self) -> Path:
        return Path(os.path.realpath(self._link))

    def _version(self, place: Path) -> _Version:
        service = self._open(place)
        return _Version(place, service, self._build(service))

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self._now.service.name

    @property
    def ready(self) -> bool:
        """Whether everything is compiled."""
        return self._now.service.ready

    def start(self) -> None:
        """Starts the model, and the thread that watches the link."""
        self._now.service.start()
        self._thread.start()

    def close(self, seconds: float) -> bool:
        """See Service."""
        self._stopping.set()
        return self._now.service.close(seconds)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        version = self._now
        version.running += 1  # on the event loop only
        try:
            await version.app(scope, receive, send)
        finally:
            version.running -= 1

    def _watch(self) -> None:
        while not self._stopping.wait(EVERY):
            if (place := self._target()) != self._tried:
                self._tried = place
                self._replace(place)

    def _replace(self, place: Path) -> None:
        log.info("%s points to %s now: compiling it", self._link, place)
        try:
            new = self._version(place)
        except Exception as e:  # whatever the folder holds, the former model goes on
            log.warning("warning: %s is not served: %s %s stays", place, e, self._now.place)
            return
        new.service.start()
        while not (new.service.ready or new.service.failed or self._stopping.wait(0.1)):
            pass
        if not new.service.ready:
            new.service.close(0)
            return
        old, self._now = self._now, new
        log.info("serving %s", place)
        while not self._stopping.wait(0.1) and old.running:  # first wait: a request may have just looked at _now
            pass
        old.service.close(0)
