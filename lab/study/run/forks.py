"""Forked arms: an arm identical to the base up to some step starts from the base's state there, without rerunning it.

The step is derived from the fields that differ (the tail of a schedule, the start of an average, evaluation), or set by
the arm: ``Fork(500, {"optim.lr.peak": 1e-4})``.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lab.configuration.values import to_json
from lab.errors import UserError
from lab.experiment import Experiment
from lab.files import replace_file
from lab.models.members import Several
from lab.optim import Prune
from lab.train.checkpoint import Checkpoints
from lab.train.metrics import marked_rows
from lab.train.program import Program
from lab.train.restore import with_base
from lab.train.shapes import abstract_state
from lab.train.step import State

WORTH = 0.1  # minimum fraction of steps to share; less does not repay waiting for the base


def acts_from(base: Experiment, arm: Experiment) -> int:
    """Number of initial steps in which the arm cannot differ from the base; 0 if unknown."""
    if base.evaluate.patience is not None or arm.evaluate.patience is not None or base.exact or arm.exact:
        return 0
    if isinstance(arm.optim, Prune) or isinstance(base.optim, Prune):
        return 0
    ours, theirs, first = arm.optim, base.optim, min(arm.steps, base.steps)
    if (ours.lr, arm.steps) != (theirs.lr, base.steps):
        if (ours.lr.peak, ours.lr.warmup) != (theirs.lr.peak, theirs.lr.warmup):
            return 0
        first = min(first, ours.lr.tail(arm.steps), theirs.lr.tail(base.steps))
    if (ours.ema, ours.ema_from) != (theirs.ema, theirs.ema_from):
        first = min([first, *(o.ema_from for o in (ours, theirs) if o.ema is not None)])
    optim = replace(ours, lr=theirs.lr, ema=theirs.ema, ema_from=theirs.ema_from)
    rest = replace(arm, optim=optim, steps=base.steps, evaluate=base.evaluate)
    return first if rest.fingerprint() == base.fingerprint() else 0


def check_fork(base: Experiment, arm: Experiment, after: int) -> None:
    """Raises UserError if an arm cannot start from the base's state after step `after`."""
    if not 0 < after < arm.steps or after > base.steps:
        raise UserError(f"it forks after step {after}, which is not inside its {arm.steps} steps.")
    if base.evaluate.patience is not None or arm.evaluate.patience is not None:
        raise UserError("it forks from a run that may stop early: leave out evaluate.patience.")
    if to_json(base.data) != to_json(arm.data) or base.batch != arm.batch:
        raise UserError("it forks, and so must have the base's data and batch.")
    there, here = abstract_state(base), abstract_state(arm)
    taken = there._replace(opt_state=jax.eval_shape(functools.partial(_taken, arm), there))
    if str(taken) != str(here):
        raise UserError("it cannot start from the base's state: its model or optimizer has another structure.")


def _taken(experiment: Experiment, state: State) -> Any:
    """Converts the base's optimizer state to the arm's."""
    take_over = experiment.optim.take_over
    if isinstance(experiment.model, Several):
        take_over = jax.vmap(take_over, in_axes=(0, 0, 0, None))
    return take_over(state.opt_state, state.params, state.model_state, jnp.array(state.step))


def take_over(folder: Path, after: int, experiment: Experiment, base: Experiment, program: Program, own: Path) -> (
        State | None):
    """The base's state after step `after`, converted for the arm; None if it was not kept.

    `folder`, `base`: the base's run with this seed; `own`, `experiment`: the arm's. Copies metric rows up to that step.
    """
    kept = Checkpoints(folder / "checkpoints") if (folder / "checkpoints").exists() else None
    if kept is None or after not in kept.steps():
        return None
    state = kept.restore(program.placed(base), after)
    state = with_base(base, program, state)
    opt_state = _taken(experiment, state)
    state = jax.tree.map(lambda x, target: jax.device_put(x, target.sharding), state._replace(opt_state=opt_state),
                         program.abstract)
    same = base.evaluate == experiment.evaluate and base.optim.ema == experiment.optim.ema
    found = marked_rows(folder / "metrics.jsonl", kept.beside(after))
    rows = [row for row in found if row["split"] == "train" and row["step"] <= after
            or row["split"] == "validation" and same and row["step"] < after]
    replace_file(own / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return state
