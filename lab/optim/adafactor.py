"""Adafactor: a factored second moment, which saves memory."""

from dataclasses import dataclass

import optax

from lab.optim.optimizers import Optimizer, off
from lab.optim.schedules import require


@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adam's second moment as an outer product of row and column means (Shazeer & Stern 2018), to save memory.

    Factors the two largest axes of a parameter if both reach `factored_from`. Clipping and the relative step use the
    RMS of a whole array, and `nn.scan` stacks layers in one array: scanned and unrolled models differ slightly."""

    exponent: float = 0.8
    """The decay of the second moment at step t is 1 - t^-exponent."""
    threshold: float = 1.0
    """Maximum RMS of a parameter's update."""
    relative: bool = True
    """Multiply the update by max(RMS of the parameter, 0.001). `lr` is then relative; start near 0.01."""
    momentum: float = 0.0
    """Decay of a moving average of the updates, in [0, 1); 0: no average, which saves memory."""
    factored_from: int = 128
    """Minimum axis length to factor."""

    def direction(self) -> optax.GradientTransformation:
        factored = optax.scale_by_factored_rms(decay_rate=self.exponent, min_dim_size_to_factor=self.factored_from)
        parts = [factored, optax.clip_by_block_rms(self.threshold)]
        if self.relative:
            parts += [optax.scale_by_param_block_rms(1e-3)]
        if not off(self.momentum):
            parts += [optax.ema(self.momentum, debias=False)]
        return optax.chain(*parts)

    def validate(self, steps: int) -> None:
        super().validate(steps)
        require("exponent", self.exponent, "in (0, 1]", lambda v: 0 < v <= 1)
        require("factored_from", self.factored_from, "at least 1", lambda v: v >= 1)
