"""`./launch.sh audit RUN`: how well a model's losses tell its training records from others (membership inference)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from lab.commands.arguments import call
from lab.errors import UserError, nearest
from lab.experiment import Experiment
from lab.files import no_links
from lab.private.attacks import FALSE, attack, confidence, likelihood_ratio, one_run_epsilon, shown_epsilon
from lab.private.canaries import Canaries
from lab.train.description import check_same
from lab.train.evaluation import by_record
from lab.train.json_files import write_json
from lab.train.restore import open_run


def main(args: Sequence[str]) -> int:
    """RUN [--records N] [--shadows FOLDER]"""
    return call("audit", audit, args)


def audit(run: Annotated[Path, tyro.conf.Positional], records: int = 1000, metric: str = "loss",
          split: Literal["test", "validation"] | None = None, step: int | None = None, best: bool = False,
          shadows: Path | None = None) -> None:
    """Attacks a run by the loss threshold (Yeom et al. 2018): whether a low loss gives a training record away.

    Prints the area under the ROC curve (0.5: no better than a coin) and the share of training records found at 1 %
    false alarms, with 95 % intervals, and writes audit.json to the run folder. Of a private run also the epsilon that
    the attack proves, which must not exceed the one that the run claims. If the run's data has canaries, these are the
    records, and the bound is that of Steinke et al. 2023.

    Args:
      run: the run folder; its data must be there.
      records: training records, and as many others, evenly spaced; fewer if there are not as many.
      metric: a loss of single records.
      split: where the others are from; by default test, or validation if there is none.
      step: use the checkpoint of this step; by default the latest.
      best: use the checkpoint with the best validation metric.
      shadows: a study, or a folder of runs, that differ from RUN in --data.seed of its canaries and train as it did:
        the attack is then LiRA, the likelihood ratio of each record (Carlini et al. 2022).
    """
    if records < 100:
        raise UserError(f"--records {records}: 1 % of false alarms needs at least 100.")
    no_links(run)
    experiment, program, state = open_run(run, step, best)
    data = experiment.data.load()
    check_same(run, experiment, data.fingerprint)
    if shadows is not None and not (isinstance(experiment.data, Canaries) and metric == "loss"):
        raise UserError("--shadows is for the loss of a run whose data has canaries (lab.private.Canaries).")
    row, canaries = {"step": int(state.step), "metric": metric}, isinstance(experiment.data, Canaries)
    if canaries:
        losses, inside = _of_canaries(experiment, program, state, metric)
        attacked = metric
        if shadows is not None:
            losses, inside, row["shadows"] = _by_likelihood(experiment, run, shadows, losses, inside)
            attacked = f"likelihood ratio from {row['shadows']} shadow runs"
        members, others = losses[inside], losses[~inside]
        print(f"{len(members):,} canaries in training and {len(others):,} left out, {attacked} of step {row['step']}")
    else:
        split = row["split"] = split or ("validation" if data.test is None else "test")
        members, others = (_losses(program, state, data, name, records, metric) for name in ("train", split))
        print(f"{len(members):,} training and {len(others):,} {split} records, {metric} of step {row['step']}")
    if min(len(members), len(others)) < 2:
        raise UserError("There are too few records on one side to attack.")
    row |= {"members": len(members), "others": len(others), **attack(members, others)}
    for name, what in (("auc", "area under the ROC curve"), ("found", f"found at {FALSE:.0%} false alarms")):
        print(f"  {what:<28} {row[name]:.4f}  (95 % interval {row[f'{name}_low']:.4f} to {row[f'{name}_high']:.4f})")
    if canaries:
        row["epsilon_shown"] = one_run_epsilon(losses, inside, experiment.private.delta if experiment.private else 0.0)
    elif experiment.private is not None:
        row["epsilon_shown"] = shown_epsilon(members, others, experiment.private.delta)
    _say_epsilon(experiment, row)
    write_json(run / "audit.json", row)
    print(f"Written to {run / 'audit.json'}")


def _say_epsilon(experiment: Experiment, row: dict[str, Any]) -> None:
    """Prints the epsilon shown beside the claimed one, which it adds to the row."""
    if experiment.private is not None:
        row["epsilon_claimed"] = claimed = experiment.private.epsilon(row["step"])
        verdict = "as it should be" if row["epsilon_shown"] <= claimed else "MORE THAN CLAIMED: something is wrong"
        print(f"  epsilon claimed {claimed:.4g}, shown by the attack at least {row['epsilon_shown']:.4g}: {verdict}")
    elif "epsilon_shown" in row:
        print(f"  epsilon shown by the attack: at least {row['epsilon_shown']:.4g}; the run claims none")


def _of_canaries(experiment: Experiment, program: Any, state: Any, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(metric of each canary, whether it is in training)."""
    records, inside = experiment.data.canaries()
    return _losses(program, state, SimpleNamespace(canaries=records), "canaries", None, metric), inside


def _losses(program: Any, state: Any, data: Any, split: str, records: int | None, metric: str) -> np.ndarray:
    """The metric of each record (n,). Raises UserError if there is none of this name."""
    found = by_record(program, state, data, split, records)
    if metric not in found:
        there = f" There are {', '.join(found)}."
        raise UserError(f"There is no metric {metric!r} of single records.{nearest(metric, found, there)}")
    sums, weights = found[metric]
    return sums / np.where(weights > 0, weights, 1)


def _by_likelihood(experiment: Experiment, run: Path, shadows: Path, losses: np.ndarray, inside: np.ndarray
                   ) -> tuple[np.ndarray, np.ndarray, int]:
    """(minus the log likelihood ratio of each canary that is inside some shadow and outside another, whether it is
    inside the run, the number of shadows). Raises UserError for runs that train differently, or too few."""
    values, there = [], []
    for folder in sorted(path.parent for path in shadows.rglob("result.json")):
        if folder.resolve() == run.resolve() or not (folder / "checkpoints").exists():
            continue
        other, program, state = open_run(folder)
        if _plain(other) != _plain(experiment):
            raise UserError(f"{folder} differs from {run} in more than its seeds, so it is no shadow run of it.")
        if other.data.seed != experiment.data.seed:  # the same seed would be the same records
            found, chosen = _of_canaries(other, program, state, "loss")
            values.append(confidence(found))
            there.append(chosen)
    if len(values) < 2:
        raise UserError(f"LiRA needs two shadow runs or more, of other canaries than {run}'s; {shadows} has "
                        f"{len(values)}. A study makes them: --vary data.seed=1,2,3,4,5,6,7,8.")
    ratio = likelihood_ratio(confidence(losses), np.stack(values), np.stack(there))
    known = ~np.isnan(ratio)
    return -ratio[known], inside[known], len(values)


def _plain(experiment: Experiment) -> Experiment:
    """Without what a shadow run may have of its own: seeds, and the numbers of privacy that follow from its records."""
    data, private = experiment.data, experiment.private
    return replace(experiment, seed=0, data=replace(data, seed=0) if isinstance(data, Canaries) else data,
                   private=private and replace(private, records=None, noise_multiplier=None, expected_batch=None))
