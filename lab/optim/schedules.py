"""Learning-rate schedules: values with `.build(steps)`, and the range checks that optimizers share with them.

`peak` and `end` may be traced JAX scalars: optax's own warm-up and cosine schedule branches on their values, so these
are plain formulas. Counts of updates (`warmup`, `decay`) are ints. `lab.optim.optimizers` re-exports the schedules.
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
    """UserError unless the number is finite and `holds`; anything but a Python number (a tracer, None) passes."""
    if isinstance(value, Real) and not (math.isfinite(value) and holds(value)):
        raise UserError(f"optim.{name} is {value:g}, but must be {must}.")


def require_regex(name: str, pattern: str) -> None:
    """UserError unless `pattern` is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"optim.{name}: {pattern!r} is not a regular expression ({error}).") from None


@dataclass(frozen=True)
class Schedule:
    """Learning rate for update number count + 1, where count is the number of completed updates (0-based).

    With W = max(warmup, 1) and N = steps: rate(count) = peak min(1, (count + 1) / W) shape(count). So the first update
    has peak / W (none is wasted at rate 0), update number W (count W - 1) has `peak`, and `shape` is 1 until then.
    """

    peak: float
    """Highest learning rate."""
    warmup: int = 0
    """Number of updates over which the rate rises linearly to `peak`; 0 and 1 both start at `peak`."""

    def build(self, steps: int) -> optax.Schedule:
        """The rate as a function of the number of completed updates (an int or an array), in a run of `steps`."""

        def rate(count: Any) -> jax.Array:
            count = jnp.asarray(count, jnp.float32)
            return self.peak * jnp.minimum(1.0, (count + 1) / max(self.warmup, 1)) * self.shape(count, steps)

        return rate

    def shape(self, count: jax.Array, steps: int) -> Any:
        """Fraction of `peak` apart from warm-up."""
        return 1.0

    def progress(self, count: jax.Array, steps: int) -> jax.Array:
        """0 up to the end of warm-up, rising linearly to 1 at the last update (count steps - 1)."""
        start = max(self.warmup - 1, 0)
        return jnp.clip((count - start) / max(steps - 1 - start, 1), 0.0, 1.0)

    def tail(self, steps: int) -> int:
        """Completed updates up to which the rate is decided by `peak` and `warmup` alone."""
        return min(max(self.warmup, 1), steps)

    def validate(self, steps: int) -> None:
        """UserError for a rate or a number of updates that makes no sense in a run of `steps` updates."""
        require("lr.peak", self.peak, "0 or more", lambda v: v >= 0)
        require("lr.warmup", self.warmup, "0 or more updates", lambda v: v >= 0)
        require("lr.end", getattr(self, "end", None), "a fraction of the peak in [0, 1]", lambda v: 0 <= v <= 1)
        if self.warmup > steps:
            raise UserError(f"optim.lr.warmup is {self.warmup} updates, more than the run's {steps}. Lower "
                            f"--optim.lr.warmup or raise --steps.")


class Constant(Schedule):
    """Warm-up, then `peak` until the end."""

    def tail(self, steps: int) -> int:
        return steps


@dataclass(frozen=True)
class _Decaying(Schedule):
    end: float = 0.0
    """Rate of the last update as a fraction of `peak`."""

    def validate(self, steps: int) -> None:
        super().validate(steps)
        if steps > 1 and self.warmup >= steps:
            raise UserError(f"optim.lr.warmup is {self.warmup} updates: none of the run's {steps} are left to "
                            f"decay. Lower --optim.lr.warmup or raise --steps.")


class LinearDecay(_Decaying):
    """shape = 1 - (1 - end) t, with t = `progress`: peak at the end of warm-up, end * peak at the last update."""

    def shape(self, count: jax.Array, steps: int) -> jax.Array:
        return 1 - (1 - self.end) * self.progress(count, steps)


@dataclass(frozen=True)
class Cosine(_Decaying):
    """shape = end + (1 - end) (1 + cos(pi t)) / 2, t = `progress` (Loshchilov & Hutter 2017, one cycle)."""

    end: float = 0.1
    """Rate of the last update as a fraction of `peak`."""

    def shape(self, count: jax.Array, steps: int) -> jax.Array:
        return self.end + (1 - self.end) * 0.5 * (1 + jnp.cos(jnp.pi * self.progress(count, steps)))


class InverseSqrt(Schedule):
    """shape = min(1, sqrt(W / (count + 1))) (Vaswani et al. 2017): peak sqrt(W / N) at the last update."""

    def shape(self, count: jax.Array, steps: int) -> jax.Array:
        return jnp.minimum(1.0, jnp.sqrt(max(self.warmup, 1) / (count + 1)))

    def validate(self, steps: int) -> None:
        super().validate(steps)
        require("lr.warmup", self.warmup, "at least 1 update: it sets how fast the rate falls", lambda v: v >= 1)


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """Warm-up, then `peak`, then linearly down over the last `decay` updates (Hu et al. 2024; Hägele et al. 2024).

    shape = 1 up to count N - 1 - decay, then 1 - (1 - end) k / decay for the k-th of the last updates: end at N - 1.
    """

    decay: int = 0
    """Number of updates of the final decay, at least 1."""
    end: float = 0.0
    """Rate of the last update as a fraction of `peak`."""

    def shape(self, count: jax.Array, steps: int) -> jax.Array:
        return 1 - (1 - self.end) * jnp.clip((count - (steps - 1 - self.decay)) / max(self.decay, 1), 0.0, 1.0)

    def tail(self, steps: int) -> int:
        return steps - self.decay

    def validate(self, steps: int) -> None:
        super().validate(steps)
        require("lr.decay", self.decay, "at least 1 update", lambda v: v >= 1)
        if self.warmup + self.decay > steps:
            raise UserError(f"optim.lr: warmup {self.warmup} and decay {self.decay} updates exceed the run's {steps}.")
