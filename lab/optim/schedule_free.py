"""Schedule-free AdamW: averaged iterates instead of a decayed learning rate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lab.errors import UserError
from lab.optim.averages import find
from lab.optim.matrices import Matrix
from lab.optim.optimizers import AdamW, Params
from lab.optim.schedules import require


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeAdamW(AdamW):
    """AdamW with averaged iterates instead of a decaying learning rate (Defazio et al. 2024). z takes the AdamW steps
    (gradient and weight decay at y), x is the mean of z weighted by lr^2, and the parameters are y = b1 x + (1 - b1) z.

    Evaluate at x = `eval_params`. Use a `Constant` learning rate with warm-up."""

    b1: float = 0.9
    """Weight of the average x in the trained parameters y, in (0, 1). Replaces momentum."""
    b2: float = 0.999
    """Decay of the second moment."""

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_rms(self.b2, self.eps, eps_in_sqrt=False, bias_correction=True)

    def wrap(self, step: optax.GradientTransformation, rate: optax.Schedule) -> optax.GradientTransformation:
        # Optax's wrapper counts from 1, schedules from 0. Without the shift, x would be weighted by the next step's lr.
        return optax.contrib.schedule_free(step, lambda count: rate(count - 1), b1=self.b1)

    def eval_params(self, opt_state: Any, params: Params) -> Params:
        state = find(opt_state, optax.contrib.ScheduleFreeState)

        def masked(node: Any) -> bool:  # a frozen parameter
            return isinstance(node, optax.MaskedNode)

        def mean(z: Any, y: jax.Array) -> jax.Array:
            if masked(z):
                return y
            b1 = jnp.expand_dims(state.b1, range(state.b1.ndim, y.ndim))  # `Several`: one b1 per member
            return (y - (1 - b1) * z) / b1

        return jax.tree.map(mean, state.z, params, is_leaf=masked)

    def check(self, params: Params, matrices: Mapping[str, Matrix], model_state: Any) -> None:
        super().check(params, matrices, model_state)
        if jax.tree.leaves(model_state):
            raise UserError("optim: schedule-free AdamW evaluates averaged weights, whose batch statistics are not "
                            "those of the trained ones. Use AdamW with optim.ema, which averages both.")

    def validate(self, steps: int) -> None:
        super().validate(steps)
        require("b1", self.b1, "in (0, 1)", lambda v: v > 0)
        if self.ema is not None:
            raise UserError("optim.ema must be None: schedule-free AdamW already averages its parameters.")
