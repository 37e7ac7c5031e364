"""Adapter that makes any optax transformation an optimizer of an experiment."""

from dataclasses import dataclass, field

import optax

from lab.errors import UserError
from lab.optim.optax_source import source_of
from lab.optim.optimizers import Optimizer
from lab.optim.schedules import Schedule


@dataclass(frozen=True)
class Optax(Optimizer):
    """Any optax transformation with its own learning rate: ``Optax(optax.adam(1e-3))``. Clipping, EMA, weight decay and
    `lr_multipliers` also apply. `lr` multiplies its updates; weight decay and the metric learning_rate use only `lr`.
    """

    lr: Schedule | float = field(default=1.0, kw_only=True)
    """Factor of the transformation's updates."""
    transformation: optax.GradientTransformation | None = field(default=None, metadata={"json": False})
    """The optax transformation."""
    source: str = field(default="", kw_only=True)
    """Digest of the transformation's code and values, for the fingerprint; set automatically."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transformation is not None:
            object.__setattr__(self, "source", source_of(self.transformation))

    def direction(self) -> optax.GradientTransformation:
        return optax.chain(self.transformation, optax.scale(-1.0))  # optax updates point downhill, a direction uphill

    def validate(self, steps: int) -> None:
        super().validate(steps)
        if self.transformation is None and self.source:
            raise UserError("optim: this run was trained by an optax transformation, which its folder does not hold. "
                            "Give the file of its experiment.")
        if not (hasattr(self.transformation, "init") and hasattr(self.transformation, "update")):
            raise UserError(f"Optax(...) takes an optax transformation, such as optax.adam(1e-3), not "
                            f"{self.transformation!r:.60}.")
