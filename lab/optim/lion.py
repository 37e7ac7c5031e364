"""Lion: the sign of a momentum."""

from dataclasses import dataclass

import optax

from lab.optim.optimizers import Optimizer


@dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """u = sign(b1 m + (1 - b1) g), then m <- b2 m + (1 - b2) g (Chen et al. 2023, algorithm 2). Use a learning rate 3
    to 10 times lower than for AdamW, and a weight decay higher by the same factor."""

    b1: float = 0.9
    """Weight of the momentum in u."""
    b2: float = 0.99
    """Decay of the momentum."""
    weight_decay: float = 0.3
    """Decoupled weight decay, multiplied by the learning rate."""

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.b1, self.b2)
