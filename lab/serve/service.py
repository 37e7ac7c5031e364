"""What every kind of served model has in common: a name, and the thread that computes its answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from starlette.routing import Route

from lab.serve.drift import Drift
from lab.serve.engine import Engine
from lab.serve.fields import Fields, Problem
from lab.serve.metrics import Metrics
from lab.serve.replicas import Replicas
from lab.serve.worker import Worker


class Service:
    """Base class: a subclass defines `kind`, `described` and `routes`.

    Args:
      name: what clients call the model.
      runner: the thread that compiles, then computes; started by `start`.
    """

    kind: ClassVar[str]

    def __init__(self, name: str, runner: Engine | Replicas | Worker):
        self.name, self._runner = name, runner
        self.metrics = Metrics((), {})
        self.drift = Drift({})

    def start(self) -> None:
        """Starts the thread that compiles and computes."""
        self._runner.start()

    @property
    def ready(self) -> bool:
        """Whether everything is compiled."""
        return self._runner.ready.is_set()

    @property
    def failed(self) -> bool:
        """Whether it could not be compiled."""
        return self._runner.failed

    def close(self, seconds: float) -> bool:
        """Accepts no more requests and waits for those that run. Returns whether the thread has ended."""
        return self._runner.close(seconds)

    def gauges(self) -> dict[str, tuple[str, Callable[[], float]]]:
        """See `Metrics`."""
        return self._runner.gauges()

    def check_name(self, name: str) -> None:
        """Raises Problem (404) if clients call another model."""
        if name != self.name:
            raise Problem(404, f"There is no model of this name here; there is {self.name}.", "model")

    def check_model(self, fields: Fields) -> None:
        """`check_name` of a request's model, if it names one."""
        self.check_name(fields.text("model", self.name))

    def described(self) -> dict[str, Any]:
        """What /v1/models says of it."""
        raise NotImplementedError

    def routes(self) -> list[Route]:
        """Its endpoints."""
        raise NotImplementedError
