"""Any optax transformation as an optimizer of an experiment."""

from dataclasses import dataclass, field

import optax

from lab.errors import UserError
from lab.optim.optax_source import source_of
from lab.optim.optimizers import Optimizer
from lab.optim.schedules import Schedule


@dataclass(frozen=True)
class Optax(Optimizer):
    """Any optax transformation with its own learning rate: ``Optax(optax.adam(1e-3))``. Clipping, average, decay and
    learning-rate groups go on top; decay and the metric learning_rate know of `lr` alone, which multiplies its steps.
    """

    lr: Schedule | float = field(default=1.0, kw_only=True)
    """Factor of the transformation's steps."""
    transformation: optax.GradientTransformation | None = field(default=None, metadata={"json": False})
    """The optax transformation."""
    source: str = field(default="", kw_only=True)
    """What tells transformations apart: a digest of the code and the values that it is made of; found by itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transformation is not None:
            object.__setattr__(self, "source", source_of(self.transformation))

    def direction(self) -> optax.GradientTransformation:
        return optax.chain(self.transformation, optax.scale(-1.0))  # its steps point downhill, a direction uphill

    def validate(self, steps: int) -> None:
        super().validate(steps)
        if self.transformation is None and self.source:
            raise UserError("optim: this run was trained by an optax transformation, which its folder does not hold. "
                            "Give the file of its experiment.")
        if not (hasattr(self.transformation, "init") and hasattr(self.transformation, "update")):
            raise UserError(f"Optax(...) takes an optax transformation, such as optax.adam(1e-3), not "
                            f"{self.transformation!r:.60}.")
