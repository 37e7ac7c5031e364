"""The methods that the parts of an experiment must have. Optional ones: see lab/data/dataset.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class DataPart(Protocol):
    """Data such as Text(...). The required methods; for optional ones see lab/data/messages/messages.py."""

    def record_spec(self) -> Mapping[str, tuple[tuple[int, ...], Any]]:
        """name -> shape and type of one record."""

    def load(self) -> Any:
        """The loaded data; see lab/data/dataset.py."""


@runtime_checkable
class ModelPart(Protocol):
    """A Linen module such as GPT(...)."""

    def init(self, rngs: Any, *args: Any) -> Any:
        """Initial variables."""

    def apply(self, variables: Any, *args: Any) -> Any:
        """Forward pass."""


@runtime_checkable
class TaskPart(Protocol):
    """A task such as Classify(). See lab/tasks/base.py."""

    def loss(self, model: Any, variables: Any, batch: Any, rngs: Any, train: bool) -> tuple[Any, Any, Any, Any]:
        """(loss sum, weight, metrics, mutable collections) of a batch."""


@runtime_checkable
class OptimPart(Protocol):
    """An optimizer such as AdamW(...). See lab/optim/optimizers.py."""

    def build(self, steps: int) -> Any:
        """The optax transformation for a run of `steps` steps."""


@runtime_checkable
class StartPart(Protocol):
    """A beginning such as Pretrained(...). See lab/pretrained.py."""

    def frozen_rules(self) -> tuple[tuple[str, float], ...]:
        """Learning-rate multipliers (path regex, 0.0) of the frozen parameters."""


@runtime_checkable
class HarnessPart(Protocol):
    """What evaluates the model when a run ends, such as Harness(...). See lab/harness/value.py."""

    def metrics(self) -> list[str]:
        """Names of the numbers."""

    def check(self, model: Any, data: Any) -> None:
        """Raises UserError before training for what would fail after it."""

    def evaluate(self, model: Any, variables: Any, data: Any, run: Any, write_files: bool) -> dict[str, float]:
        """The numbers; `run` is the run folder."""
