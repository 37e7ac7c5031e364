"""`./launch.sh audit RUN`: how well a model's losses tell its training records from others (membership inference)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from scipy import stats

from lab.commands.arguments import call
from lab.errors import UserError, nearest
from lab.files import no_links
from lab.train.description import check_same
from lab.train.evaluation import by_record
from lab.train.json_files import write_json
from lab.train.restore import open_run

FALSE = 0.01  # the false-positive rate at which true positives are counted
RESAMPLES, LEVEL = 2000, 0.95


def main(args: Sequence[str]) -> int:
    """RUN [--records N]"""
    return call("audit", audit, args)


def audit(run: Annotated[Path, tyro.conf.Positional], records: int = 1000, metric: str = "loss",
          split: Literal["test", "validation"] | None = None, step: int | None = None, best: bool = False) -> None:
    """Attacks a run by the loss threshold (Yeom et al. 2018): whether a low loss gives a training record away.

    Prints the area under the ROC curve (0.5: no better than a coin) and the share of training records found at 1 %
    false alarms, with 95 % intervals, and writes audit.json to the run folder. Of a private run also the epsilon that
    the attack proves, which must not exceed the one that the run claims.

    Args:
      run: the run folder; its data must be there.
      records: training records, and as many others, evenly spaced; fewer if there are not as many.
      metric: a loss of single records.
      split: where the others are from; by default test, or validation if there is none.
      step: use the checkpoint of this step; by default the latest.
      best: use the checkpoint with the best validation metric.
    """
    if records < 100:
        raise UserError(f"--records {records}: 1 % of false alarms needs at least 100.")
    no_links(run)
    experiment, program, state = open_run(run, step, best)
    data = experiment.data.load()
    check_same(run, experiment, data.fingerprint)
    split = split or ("validation" if data.test is None else "test")
    inside, outside = (by_record(program, state, data, name, records) for name in ("train", split))
    if metric not in inside:
        there = f" There are {', '.join(inside)}."
        raise UserError(f"There is no metric {metric!r} of single records.{nearest(metric, inside, there)}")
    members, others = (sums / np.where(weights > 0, weights, 1) for sums, weights in (inside[metric], outside[metric]))
    found = attack(members, others)
    print(f"{len(members):,} training and {len(others):,} {split} records, {metric} of step {int(state.step)}")
    for name, what in (("auc", "area under the ROC curve"), ("found", f"found at {FALSE:.0%} false alarms")):
        print(f"  {what:<28} {found[name]:.4f}  (95 % interval {found[f'{name}_low']:.4f} to "
              f"{found[f'{name}_high']:.4f})")
    row = {"step": int(state.step), "split": split, "metric": metric, "members": len(members), "others": len(others),
           **found}
    if experiment.private is not None:
        claimed, delta = experiment.private.epsilon(int(state.step)), experiment.private.delta
        row |= {"epsilon_claimed": claimed, "epsilon_shown": shown_epsilon(members, others, delta)}
        verdict = "as it should be" if row["epsilon_shown"] <= claimed else "MORE THAN CLAIMED: something is wrong"
        print(f"  epsilon claimed {claimed:.4g}, shown by the attack at least {row['epsilon_shown']:.4g}: {verdict}")
    write_json(run / "audit.json", row)
    print(f"Written to {run / 'audit.json'}")


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
