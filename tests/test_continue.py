"""A finished run extended, and a checkpoint gone on from under other settings: as new runs."""

import hashlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lab.errors import UserError
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.optim import SGD, Adam, AdamW, Cosine, Lion, ScheduleFreeAdamW
from lab.pretrained import Continue
from lab.train import ending, loop
from lab.train.continued import places, take_over
from lab.train.experiment_file import load
from lab.train.metrics import read_rows
from lab.train.restore import open_run
from tests.test_foreign_folders import OWN
from tests.test_identity import RETURN
from tests.test_loop import Quiet
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[Experiment, Path]:
    """An experiment of 4 updates, and the folder where it ended."""
    place = tmp_path_factory.mktemp("continue")
    (place / "own.py").write_text(OWN)
    experiment = replace(load(place / "own.py").experiment, optim=AdamW(lr=Cosine(1e-2, warmup=0)), steps=4,
                         evaluate=Evaluate(every=0), checkpoint=Checkpoint(every=2, keep=5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ending.plots, "curves", lambda *_: [])
        patch.setattr(type(experiment.task), "artifacts", lambda *_: [])
        with Quiet() as screen:
            assert loop.train(experiment, place / "run", screen, place / "own.py") == 0
    return experiment, place / "run"


@pytest.fixture(autouse=True)
def no_pictures(base, monkeypatch):
    monkeypatch.setattr(ending.plots, "curves", lambda *_: [])
    monkeypatch.setattr(type(base[0].task), "artifacts", lambda *_: [])


def rows(folder: Path, split: str = "train") -> dict[int, dict]:
    return {row["step"]: row for row in read_rows(folder / "metrics.jsonl") if row["split"] == split}


def digest_of(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def train(experiment: Experiment, folder: Path, **stop) -> tuple[int, str]:
    with Quiet(**stop) as screen:
        return loop.train(experiment, folder, screen), "\n".join(screen.lines)


def test_a_finished_run_is_extended(base, tmp_path):
    """With a constant rate the extension is the run that had been longer from the start, bit by bit."""
    experiment, _ = base
    constant = replace(experiment, optim=AdamW(lr=1e-2))
    assert train(constant, tmp_path / "short")[0] == 0
    assert train(replace(constant, steps=8), tmp_path / "long")[0] == 0
    before = digest_of(tmp_path / "short")
    longer = replace(constant, steps=8, init_from=Continue(str(tmp_path / "short")))
    assert longer.fingerprint() not in (constant.fingerprint(), replace(constant, steps=8).fingerprint())
    status, said = train(longer, tmp_path / "extended")
    assert status == 0 and "at random: nothing; not taken: nothing" in said
    assert digest_of(tmp_path / "short") == before  # the old run stays as it is
    new, whole = rows(tmp_path / "extended"), rows(tmp_path / "long")
    assert sorted(new) == [5, 6, 7, 8] and new == {step: whole[step] for step in new}
    assert rows(tmp_path / "extended", "validation").keys() == {4, 8}
    ends = [jax.device_get(open_run(tmp_path / name)[2]) for name in ("extended", "long")]
    assert jax.tree.all(jax.tree.map(np.array_equal, *ends))
    fresh = replace(constant, steps=8)  # negative control: neither from the start nor without the moments
    assert rows(tmp_path / "long")[5]["loss"] != rows(tmp_path / "long")[1]["loss"]
    assert fresh.fingerprint() != longer.fingerprint()


def test_the_schedule_is_evaluated_anew_and_a_checkpoint_may_be_named(base, tmp_path):
    """From update 2 of 4, to 10 updates in all at another peak: the rates are those of the new schedule there."""
    experiment, run = base
    optim = AdamW(lr=Cosine(3e-2, warmup=0), grad_clip_norm=1.0)
    for i, start in enumerate((Continue(str(run), 2), Continue(str(run / "checkpoints" / "2")))):
        other = replace(experiment, optim=optim, steps=10, init_from=start)
        status, said = train(other, tmp_path / str(i))
        assert status == 0 and "at random: nothing" in said  # clipping holds nothing
        found, rate = rows(tmp_path / str(i)), optim.rate(10)
        assert {step: row["learning_rate"] for step, row in found.items()} == pytest.approx(
            {step: float(rate(step - 1)) for step in range(3, 11)})
        assert json.loads((tmp_path / str(i) / "pretrained.json").read_text())["step"] == 2
    assert abs(float(rate(2)) - float(experiment.optim.rate(4)(2))) > 1e-3  # the old schedule's would be seen


def test_stopped_and_gone_on(base, tmp_path):
    experiment, run = base
    longer = replace(experiment, steps=12, init_from=Continue(str(run)))
    assert train(longer, tmp_path / "whole")[0] == 0
    assert train(longer, tmp_path / "part", at=3, action=lambda: os.kill(os.getpid(), signal.SIGTERM))[0] == 75
    assert train(longer, tmp_path / "part")[0] == 0
    assert (tmp_path / "part/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


@pytest.mark.parametrize(("change", "message"), [
    ({"steps": 4}, "--steps 4 counts all steps, and .* made 4 of them: give more"),
    ({"init_from": Continue("RUN", 3)}, "no checkpoint of step 3"),
    ({"init_from": Continue("RUN", 0)}, "--init-from.step must be at least 1"),
    ({"init_from": Continue("RUN/checkpoints/2", 4)}, "name two checkpoints"),
    ({"init_from": Continue("gone")}, "is not a run folder"),
    ({"init_from": Continue("RUN", freeze="head")}, "--init-from.freeze must be a tuple of str"),
    ({"steps_per_call": 3, "steps": 9}, "at step 4, which is not a multiple of --steps-per-call 3"),
])
def test_mistakes(base, tmp_path, change, message):
    experiment, run = base
    change = {name: replace(value, run=value.run.replace("RUN", str(run))) if name == "init_from" else value
              for name, value in change.items()}
    other = replace(experiment, **{"steps": 8, "init_from": Continue(str(run))} | change)
    other = replace(other, checkpoint=Checkpoint(every=0))
    with pytest.raises(UserError, match=message):
        other.validate()
        train(other, tmp_path / "run")


def test_another_model(base, tmp_path):
    """A layer more begins at random and is named; another shape is refused."""
    experiment, run = base
    (tmp_path / "more.py").write_text(OWN.replace(RETURN, f"last = nn.Dense(2, name='last')\n        "
                                                          f"return last({RETURN.removeprefix('return ')})"))
    more = load(tmp_path / "more.py").experiment
    other = replace(experiment, model=more.model, steps=8, init_from=Continue(str(run)))
    status, said = train(other, tmp_path / "run")
    assert status == 0 and "last/" in said.partition("at random:")[2].partition("not taken")[0]
    report = json.loads((tmp_path / "run/pretrained.json").read_text())
    assert {"last/kernel", "last/bias"} < set(report["random"]) and "head/kernel" in report["loaded"]
    (tmp_path / "wide.py").write_text(OWN.replace(RETURN, RETURN.replace("(inputs)", "(inputs[:, :5])")))
    with pytest.raises(UserError, match=r"head/kernel is \(\d+, 2\) .* and \(5, 2\) here: continuing a run needs"):
        train(replace(other, model=load(tmp_path / "wide.py").experiment.model), tmp_path / "wrong")


# -------------------------------------------------------------------------------------------------- optimizer state

PARAMS = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "b": {"kernel": jnp.full((3, 2), 0.5)}}


def after(optim, updates: int = 3, steps: int = 10):
    """The optimizer state after some updates on constant gradients, and a fresh one."""
    tx, params = optim.build(steps), PARAMS
    state = tx.init(params)
    for i in range(updates):
        grads = jax.tree.map(lambda p, by=0.1 * (i + 1): by + 0 * p, params)
        change, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, change)
    return state, tx.init(PARAMS)


OPTIMIZERS = [SGD(lr=0.1, momentum=0.9), Adam(lr=0.1), AdamW(lr=Cosine(0.1), grad_clip_norm=1.0, ema=0.9), Lion(lr=0.1),
              ScheduleFreeAdamW(lr=0.1), AdamW(lr=0.1, lr_multipliers=(("a/", 0.0),))]


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda o: f"{type(o).__name__}{len(o.lr_multipliers)}")
def test_the_same_optimizer_takes_everything_over(optim):
    there, here = after(optim)
    given, fresh, left = take_over(there, here, 3)
    own = {path: x for _, path, x in places(there)}
    assert (fresh, left) == ([], []) and given.keys() | {p for p in own if p.endswith("b1")} == own.keys()
    assert all(np.array_equal(given[path], own[path]) for path in given)
    assert any(not np.array_equal(given[path], x) for _, path, x in places(here) if path in given)


def test_what_has_no_place_begins_afresh_and_is_named():
    """Counts of updates are the run's; those that correct a bias belong to moments that begin at 0."""
    there, _ = after(SGD(lr=Cosine(0.1)))
    _, here = after(AdamW(lr=Cosine(0.1), ema=0.9))
    given, fresh, left = take_over(there, here, 3)
    counts = {key[-1]: given.get(path) for key, path, _ in places(here) if key[-1].endswith(".count")}
    assert counts["ScaleByScheduleState.count"] == 3 and counts["EmaState.count"] == 3
    assert counts["ScaleByAdamState.count"] is None
    assert {path.rpartition("/")[2] for path in fresh} == {"count", "kernel", "bias"} and left == []
    moved = take_over(
        after(AdamW(lr=0.1))[0], after(AdamW(lr=0.1, grad_clip_norm=1.0, weight_decay=0.0, ema=0.5))[1], 3
    )
    assert not [path for path in moved[1] if "mu" in path or "nu" in path]  # another place in the chain
    gone = take_over(after(AdamW(lr=0.1))[0], after(SGD(lr=0.1))[1], 3)
    assert any("mu" in path for path in gone[2])
