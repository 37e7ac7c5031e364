"""Membership inference: scores of training records against those of others, and what they prove about epsilon."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

FALSE = 0.01  # the false-positive rate at which true positives are counted
RESAMPLES, LEVEL = 2000, 0.95
SHARES = (1 / 32, 1 / 8, 1 / 2)  # of the canaries: how many are guessed


def attack(members: np.ndarray, others: np.ndarray, seed: int = 0) -> dict[str, float]:
    """`auc` and `found` (true positives at 1 % false positives) of "a low loss is a member", with bootstrap intervals
    (percentiles, members and others resampled): NAME_low, NAME_high. Losses (n,), (m,)."""
    draw = np.random.default_rng(seed)
    numbers = [(_auc(members, others), _found(members, others))]
    for _ in range(RESAMPLES):
        a, b = (draw.choice(x, len(x)) for x in (members, others))
        numbers.append((_auc(a, b), _found(a, b)))
    ends = np.quantile(numbers[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {key: float(value) for i, name in enumerate(("auc", "found"))
            for key, value in ((name, numbers[0][i]), (f"{name}_low", ends[0, i]), (f"{name}_high", ends[1, i]))}


def _auc(members: np.ndarray, others: np.ndarray) -> float:
    """The probability that a member's loss is lower; ties count half (Mann & Whitney 1947)."""
    ranks = stats.rankdata(np.concatenate([members, others]))[len(members):]
    n, m = len(members), len(others)
    return float((ranks.sum() - m * (m + 1) / 2) / (n * m))


def _found(members: np.ndarray, others: np.ndarray) -> float:
    threshold = np.sort(others)[int(FALSE * len(others))]
    return float((members < threshold).mean())


def likelihood_ratio(target: np.ndarray, shadows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """LiRA (Carlini et al. 2022, online, with one variance for all records, which suits few shadows): log N(x; mean in,
    sd in) - log N(x; mean out, sd out) of each record, higher for members, (n,). NaN for a record that is in all
    shadows or in none. `target` (n,), `shadows` (S, n): log(p / (1 - p)) of the true class (`confidence`); `inside`
    (S, n): whether the record is in the shadow's training set.
    """
    scores = []
    for there in (inside, ~inside):
        count = there.sum(0)
        with np.errstate(invalid="ignore"):
            mean = np.where(there, shadows, 0).sum(0) / count
        residuals = (shadows - mean)[there & (count > 1)]
        spread = math.sqrt((residuals**2).sum() / max((count - 1)[count > 1].sum(), 1)) or 1.0
        scores.append(stats.norm.logpdf(target, mean, spread))
    return scores[0] - scores[1]


def confidence(losses: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)) of the true class from its cross-entropy -log p, up to p = 1 - 1e-7."""
    losses = np.maximum(losses, 1e-7)
    return -losses - np.log(-np.expm1(-losses))


def shown_epsilon(members: np.ndarray, others: np.ndarray, delta: float, seed: int = 0) -> float:
    """A lower bound on epsilon that holds with 95 % confidence: log((true positives - delta) / false positives), with
    Clopper and Pearson's ends of both rates (Jagielski et al. 2020). Half of the records choose the threshold, the
    others are counted. (Records of one run are not independent draws of the training set, so this is an estimate.)
    """
    order = np.random.default_rng(seed)
    (a, b), (c, d) = (np.array_split(order.permutation(x), 2) for x in (members, others))
    best, chosen = -math.inf, 0.0
    for threshold in np.quantile(np.concatenate([a, c]), np.linspace(0.01, 0.99, 99)):
        value = _bound((a < threshold).sum(), len(a), (c < threshold).sum(), len(c), delta)
        best, chosen = (value, threshold) if value > best else (best, chosen)
    return max(_bound((b < chosen).sum(), len(b), (d < chosen).sum(), len(d), delta), 0.0)


def _bound(hits: int, n: int, alarms: int, m: int, delta: float) -> float:
    low = stats.beta.ppf((1 - LEVEL) / 2, hits, n - hits + 1) if hits else 0.0
    high = stats.beta.ppf((1 + LEVEL) / 2, alarms + 1, m - alarms) if alarms < m else 1.0
    return math.log((low - delta) / high) if low > delta else -math.inf


def one_run_epsilon(losses: np.ndarray, inside: np.ndarray, delta: float) -> float:
    """A lower bound on epsilon of one run that holds with 95 % confidence, from canaries (n,) of which a coin decided
    each (Steinke, Nasr & Jagielski 2023, theorem 5.2). The lowest losses are guessed to be in training, as many highest
    to be out. How many is the best of SHARES, whose confidences are corrected for the choice (Bonferroni).
    """
    order, n = np.argsort(losses, kind="stable"), len(losses)
    found = 0.0
    for share in SHARES:
        half = max(int(share * n) // 2, 1)
        right = int(inside[order[:half]].sum() + (~inside[order[-half:]]).sum())
        low, high = 0.0, 30.0
        while high - low > 1e-4:  # the largest epsilon that is refuted
            middle = (low + high) / 2
            refuted = _chance(n, 2 * half, right, middle, delta) < (1 - LEVEL) / len(SHARES)
            low, high = (middle, high) if refuted else (low, middle)
        found = max(found, low)
    return found


def _chance(n: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """A bound on the probability of so many right guesses of n coins against an (epsilon, delta)-private run."""
    q = 1 / (1 + math.exp(-epsilon))
    fewer = np.arange(1, right + 1)
    excess = np.cumsum(stats.binom.pmf(right - fewer, guesses, q)) / fewer
    return stats.binom.sf(right - 1, guesses, q) + 2 * n * delta * max(excess.max(initial=0.0), 0.0)
