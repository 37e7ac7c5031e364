"""Adafactor: the second moment from row and column means, for little memory."""

from dataclasses import dataclass

import optax

from lab.optim.optimizers import Optimizer, off
from lab.optim.schedules import require


@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adam's second moment as an outer product of row and column means (Shazeer & Stern 2018), for little memory.

    Factors the two largest axes of a parameter when both reach `factored_from`. Clipping and relative step take the RMS
    of a whole array, which layers stacked by `nn.scan` share: scanned and unrolled models differ slightly."""

    exponent: float = 0.8
    """The second moment of update t decays by 1 - t^-exponent."""
    threshold: float = 1.0
    """Greatest RMS of a parameter's step."""
    relative: bool = True
    """Multiply the step by max(RMS of the parameter, 0.001): `lr` is then relative, near 0.01."""
    momentum: float = 0.0
    """Decay of a moving average of the steps, in [0, 1); 0 for none, which saves the memory."""
    factored_from: int = 128
    """Smallest axis length that is factored."""

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
