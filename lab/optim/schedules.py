"""Learning-rate schedules: dataclasses with `.build(steps)`, and range checks shared with the optimizers.

`peak` and `end` may be traced JAX scalars. Optax's warm-up and cosine schedule branches on their values, so the
schedules here are plain formulas. Step counts (`warmup`, `decay`) are ints.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lab.errors import UserError


def require(name: str, value: Any, must: str, holds: Callable[[float], bool]) -> None:
    """Raises UserError unless `value` is finite and `holds(value)`. None and traced values pass."""
    if isinstance(value, Real) and not (math.isfinite(value) and holds(value)):
        raise UserError(f"optim.{name} is {value:g}, but must be {must}.")


def require_regex(name: str, pattern: str) -> None:
    """Raises UserError unless `pattern` is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"optim.{name}: {pattern!r} is not a regular expression ({error}).") from None


@dataclass(frozen=True)
class Schedule:
    """Learning rate of step count + 1, where count is the number of completed steps.

    With W = max(warmup, 1) and N = steps: rate(count) = peak min(1, (count + 1) / W) shape(count). The first step has
    rate peak / W, not 0; step W (count W - 1) has rate `peak`; `shape` is 1 until then.
    """

    peak: float
    """Highest learning rate."""
    warmup: int = 0
    """Steps of linear warm-up to `peak`; 0 and 1 both start at `peak`."""

    def build(self, steps: int) -> optax.Schedule:
        """The rate as a function of the completed steps (an int or an array), in a run of `steps` steps."""

        def rate(count: Any) -> jax.Array:
            count = jnp.asarray(count, jnp.float32)
            return self.peak * jnp.minimum(1.0, (count + 1) / max(self.warmup, 1)) * self.shape(count, steps)

        return rate

    def shape(self, count: jax.Array, steps: int) -> Any:
        """Fraction of `peak`, without the warm-up factor."""
        return 1.0

    def progress(self, count: jax.Array, steps: int) -> jax.Array:
        """0 until the end of warm-up, then linear to 1 at the last step (count = steps - 1)."""
        start = max(self.warmup - 1, 0)
        return jnp.clip((count - start) / max(steps - 1 - start, 1), 0.0, 1.0)

    def tail(self, steps: int) -> int:
        """Number of leading steps whose rate depends only on `peak` and `warmup`."""
        return min(max(self.warmup, 1), steps)

    def validate(self, steps: int) -> None:
        """Raises UserError for a rate or step count that is invalid in a run of `steps` steps."""
        require("lr.peak", self.peak, "0 or more", lambda v: v >= 0)
        require("lr.warmup", self.warmup, "0 or more steps", lambda v: v >= 0)
        require("lr.end", getattr(self, "end", None), "a fraction of the peak in [0, 1]", lambda v: 0 <= v <= 1)
        if self.warmup > steps:
            raise UserError(f"optim.lr.warmup is {self.warmup} steps, more than the run's {steps}. Lower "
                            f"--optim.lr.warmup or raise --steps.")


class Constant(Schedule):
    """Warm-up, then `peak` until the end."""

    def tail(self, steps: int) -> int:
        return steps


@dataclass(frozen=True)
class _Decaying(Schedule):
    end: float = 0.0
    """Rate of the last step as a fraction of `peak`."""

    def validate(self, steps: int) -> None:
        super().validate(steps)
        if steps > 1 and self.warmup >= steps:
            raise UserError(f"optim.lr.warmup is {self.warmup} steps: none of the run's {steps} are left to "
                            f"decay. Lower --optim.lr.warmup or raise --steps.")


class LinearDecay(_Decaying):
    """shape = 1 - (1 - end) t, t = `progress`: peak at the end of warm-up, end * peak at the last step."""

    def shape(self, count: jax.Array, steps: int) -> jax.Array:
        return 1 - (1 - self.end) * self.progress(count, steps)


@dataclass(frozen=True)
class Cosine(_Decaying):
    """shape = end + (1 - end) (1 + cos(pi t)) / 2, t = `progress` (Loshchilov & Hutter 2017, one cycle)."""

    end: float = 0.1
    """Rate of the last step as a fraction of `peak`."""

    def shape(self, count: jax.Array, steps: int) -> jax.Array:
        return self.end + (1 - self.end) * 0.5 * (1 + jnp.cos(jnp.pi * self.progress(count, steps)))


class InverseSqrt(Schedule):
    """shape = min(1, sqrt(W / (count + 1))) (Vaswani et al. 2017): peak sqrt(W / N) at the last step."""

    def shape(self, count: jax.Array, steps: int) -> jax.Array:
        return jnp.minimum(1.0, jnp.sqrt(max(self.warmup, 1) / (count + 1)))

    def validate(self, steps: int) -> None:
        super().validate(steps)
        require("lr.warmup", self.warmup, "at least 1 step: it sets how fast the rate falls", lambda v: v >= 1)


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """Warm-up, then `peak`, then linear decay over the last `decay` steps (Hu et al. 2024; Hägele et al. 2024).

    shape = 1 up to count N - 1 - decay, then 1 - (1 - end) k / decay at the k-th of the last steps: `end` at N - 1.
    """

    decay: int = 0
    """Steps of the final decay, at least 1."""
    end: float = 0.0
    """Rate of the last step as a fraction of `peak`."""

    def shape(self, count: jax.Array, steps: int) -> jax.Array:
        return 1 - (1 - self.end) * jnp.clip((count - (steps - 1 - self.decay)) / max(self.decay, 1), 0.0, 1.0)

    def tail(self, steps: int) -> int:
        return steps - self.decay

    def validate(self, steps: int) -> None:
        super().validate(steps)
        require("lr.decay", self.decay, "at least 1 step", lambda v: v >= 1)
        if self.warmup + self.decay > steps:
            raise UserError(f"optim.lr: warmup {self.warmup} and decay {self.decay} steps exceed the run's {steps}.")
