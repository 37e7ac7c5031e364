"""The privacy that noise buys: Rényi differential privacy (RDP) of the sampled Gaussian mechanism, and epsilon of it.

Sources: Mironov, "Rényi differential privacy" (2017); Mironov, Talwar & Zhang, "Rényi differential privacy of the
sampled Gaussian mechanism" (2019); Balle et al., "Hypothesis testing interpretations and Rényi differential privacy"
(2020), for the conversion to epsilon. Neighbours differ in one record, which one of them lacks. The values are those of
Google's dp-accounting to 1e-6 (tests/test_private.py).
"""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy import optimize, special, stats

ORDERS = np.array([1 + x / 10 for x in range(1, 100)] + list(range(11, 64)) + [128, 256, 512, 1024])
"""Rényi orders: those of dp-accounting."""
TERMS = 1000  # of the series at fractional orders
LARGEST_NOISE = 1e4


@functools.lru_cache(maxsize=64)
def rdp(rate: float, noise: float) -> np.ndarray:
    """RDP of one step at `ORDERS`. `rate`: the probability of each record to be in the batch; `noise`: the noise
    multiplier, its standard deviation in units of the clip norm."""
    if rate == 0:
        return np.zeros_like(ORDERS)
    if noise == 0:
        return np.full_like(ORDERS, np.inf)
    if rate == 1:
        return ORDERS / (2 * noise**2)
    return np.array([(_integer if a == int(a) else _fractional)(rate, noise, a) / (a - 1) for a in ORDERS.tolist()])


def _integer(q: float, sigma: float, alpha: float) -> float:
    """log of A(alpha) for an integer alpha: Mironov, Talwar & Zhang, section 3.3."""
    k = np.arange(int(alpha) + 1)
    logs = _log_binomial(alpha, k) + k * math.log(q) + (alpha - k) * math.log1p(-q) + (k * k - k) / (2 * sigma**2)
    return float(special.logsumexp(logs))


def _fractional(q: float, sigma: float, alpha: float) -> float:
    """An upper bound of log of A(alpha) for a fractional alpha: Mironov, Talwar & Zhang, section 3.3, with the absolute
    values of the two series' terms, as in dp-accounting. Infinite where they have not become small."""
    i = np.arange(TERMS)
    j = alpha - i
    split = sigma**2 * math.log(1 / q - 1) + 0.5
    first = (i * math.log(q) + j * math.log1p(-q) + (i * i - i) / (2 * sigma**2)
             + special.log_ndtr((split - i) / sigma))
    second = (j * math.log(q) + i * math.log1p(-q) + (j * j - j) / (2 * sigma**2)
              + special.log_ndtr((j - split) / sigma))
    terms = _log_binomial(alpha, i) + np.stack([first, second])
    total = float(special.logsumexp(terms))
    return total if terms[:, -1].max() < total - 30 else math.inf


def _log_binomial(n: float, k: np.ndarray) -> np.ndarray:
    """log of the absolute values of the generalised binomial coefficients."""
    return special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)


def epsilon(rate: float, noise: float, steps: int, delta: float) -> float:
    """The smallest epsilon that `steps` steps satisfy at `delta`, over `ORDERS`."""
    if steps == 0:
        return 0.0
    total = steps * rdp(rate, noise)
    found = total + np.log1p(-1 / ORDERS) - np.log(delta * ORDERS) / (ORDERS - 1)
    found[delta**2 + np.expm1(-total) > 0] = 0  # the total variation distance alone is below delta
    return float(max(found.min(), 0.0))


def noise_for(target: float, rate: float, steps: int, delta: float) -> float:
    """The smallest noise multiplier, rounded up to 4 decimals, with which `steps` steps stay within epsilon `target`.

    Raises:
      ValueError: not even the largest noise does.
    """
    excess = lambda log_noise: epsilon(rate, math.exp(log_noise), steps, delta) - target
    low, high = math.log(1e-2), math.log(LARGEST_NOISE)
    if excess(high) > 0:
        raise ValueError(f"no noise multiplier up to {LARGEST_NOISE:g} reaches epsilon {target:g}")
    noise = math.ceil(math.exp(optimize.brentq(excess, low, high, xtol=1e-7)) * 1e4) / 1e4
    return noise if epsilon(rate, noise, steps, delta) <= target else noise + 1e-4


def steps_within(target: float, rate: float, noise: float, delta: float, most: int) -> int:
    """The largest number of steps, up to `most`, that stay within epsilon `target`."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if epsilon(rate, noise, middle, delta) <= target else (low, middle - 1)
    return low


def overflow(records: int, expected: int, batch: int) -> float:
    """The probability that Poisson sampling of `expected` records on average draws more than `batch`."""
    return float(stats.binom.sf(batch, records, expected / records))


def largest_expected(records: int, batch: int, probability: float) -> int:
    """The largest average number of records whose `overflow` is at most `probability`; at least 1."""
    low, high = 1, min(batch, records)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if overflow(records, middle, batch) <= probability else (low, middle - 1)
    return low
