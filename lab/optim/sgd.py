"""Stochastic gradient descent, with momentum."""

from dataclasses import dataclass

import optax

from lab.errors import UserError
from lab.optim.optimizers import Optimizer, off


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Gradient descent. With momentum, m <- momentum m + g and u = m (Polyak 1964), or u = g + momentum m with
    `nesterov` (Nesterov 1983; Sutskever et al. 2013). `l2` is coupled weight decay."""

    momentum: float = 0.0
    """Decay of the accumulated gradient, in [0, 1); 0: no momentum."""
    nesterov: bool = False
    """Use Nesterov momentum."""

    def direction(self) -> optax.GradientTransformation:
        return optax.identity() if off(self.momentum) else optax.trace(self.momentum, nesterov=self.nesterov)

    def validate(self, steps: int) -> None:
        super().validate(steps)
        if self.nesterov and off(self.momentum):
            raise UserError("optim.nesterov needs optim.momentum above 0.")
