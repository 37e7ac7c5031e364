"""Forked arms: an arm that is the base for a while goes on from its state, and gives the bits of the whole run."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from lab.configuration.values import override
from lab.errors import UserError
from lab.experiment import Evaluate, Experiment, Mesh
from lab.optim import SGD, AdamW, Constant, Cosine, WarmupStableDecay
from lab.study.design.arms import Fork, Study
from lab.study.report.results import merge, read_study
from lab.study.run import preflight
from lab.study.run.forks import acts_from, check_fork
from lab.train.checkpoint import Checkpoints
from lab.train.experiment_file import load
from lab.train.metrics import read_rows
from lab.train.program import Program
from tests.test_study import FILE, ran

FILE = FILE.replace("SGD(lr=Cosine(1e-2, warmup=0)), steps=4", "AdamW(lr=WarmupStableDecay(1e-2, decay=4)), steps=16")
STUDY = FILE.replace("import SGD, Cosine", "import AdamW, WarmupStableDecay").replace("every=2", "every=4") + '''
from lab.study.design.arms import Fork, Study
study = local = Study(experiment, {
    "longer": {"optim.lr.decay": 8}, "end": {"optim.lr.end": 0.5}, "mean": {"optim.ema": 0.9, "optim.ema_from": 8},
    "often": {"evaluate.every": 2}, "whole": {"optim.lr.peak": 3e-2}}, seeds=2)
stated = Study(experiment, {"late": Fork(8, {"optim.lr.peak": 1e-3}), "early": {"optim.lr.peak": 1e-3}}, seeds=1)
del experiment
'''
AFTER = {"base": 0, "longer": 8, "end": 12, "mean": 8, "often": 16, "whole": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the two studies."""
    folder = tmp_path_factory.mktemp("forks")
    (folder / "tails.py").write_text(STUDY)
    (folder / "late.py").write_text(STUDY + "study = local = stated\n")
    return folder


def test_when_an_arm_begins_to_differ(place):
    """From what schedules, averages and evaluation declare; anything else acts from the first update."""
    base = load(place / "tails.py").study.base
    other = {"peak": {"optim.lr.peak": 1.0}, "warm": {"optim.lr.warmup": 2}, "width": {"batch": 8},
             "both": {"optim.lr.end": 0.5, "optim.b1": 0.8}, "patience": {"evaluate.patience": 3},
             "sgd": {"optim": SGD(WarmupStableDecay(1e-2, decay=4))}, "ema": {"optim.ema": 0.9}}
    assert acts_from(base, override(base, {"optim.ema_from": 4})) == 16  # of no average
    found = {name: acts_from(base, override(base, changes)) for name, changes in other.items()}
    assert found == dict.fromkeys(other, 0)
    constant, cosine = (override(base, {"optim.lr": lr}) for lr in (Constant(1e-2), Cosine(1e-2, warmup=0)))
    assert acts_from(base, constant) == 12 and acts_from(base, cosine) == 1
    assert acts_from(constant, replace(constant, steps=24)) == 16  # a longer run is the same run, gone on
    assert acts_from(base, replace(base, steps=24)) == 12  # whose decay begins later
    for schedule in (WarmupStableDecay(0.1, warmup=3, decay=4, end=0.2), Cosine(0.1, warmup=5), Constant(0.1)):
        rates = np.array(schedule.build(16)(np.arange(16)))
        plain = np.array(Constant(0.1, schedule.warmup).build(16)(np.arange(16)))
        same = int(np.argmin(np.append(rates == plain, False)))
        assert schedule.tail(16) == same  # to the update


def states(study: Path, arm: str, seed: int) -> list[np.ndarray]:
    """The arrays of the last checkpoint."""
    experiment = next(e for name, (_, e) in load(study.parent.parent / "tails.py").study.experiments().items()
                      if name == arm)
    target = Program(replace(experiment, mesh=Mesh(data=1))).abstract
    return jax.tree.leaves(Checkpoints(study / f"cells/{arm}/{seed}/checkpoints").restore(target))


def test_a_forked_arm_is_the_whole_run_bit_for_bit(typed, place, monkeypatch):
    status, out, err = typed("tails.py", "--studies", "forked")
    assert status == 0 and "12 cells planned = 12 done + 0 diverged + 0 failed." in out, err
    assert "after step" in out
    with monkeypatch.context() as patched:
        patched.setattr(preflight, "WORTH", 2.0)  # never worth it
        assert typed("tails.py", "--studies", "whole", "--execution", "loop")[0] == 0
    forked, whole = (next((place / name).glob("tails-*")) for name in ("forked", "whole"))
    said = {a["name"]: a["forked_after"] for a in json.loads((forked / "study.json").read_text())["arms"]}
    assert said == AFTER
    for arm, after in AFTER.items():
        for seed in (0, 1):
            a, b = (study / "cells" / arm / str(seed) for study in (forked, whole))
            for x, y in zip(states(forked, arm, seed), states(whole, arm, seed), strict=True):
                np.testing.assert_array_equal(x, y)
            ours, theirs = (read_rows(f / "metrics.jsonl") for f in (a, b))
            assert ours[-1] == theirs[-1]
            for split in ("train", "validation")[: 1 if arm in ("often", "mean") else 2]:
                assert [r for r in ours if r["split"] == split] == [r for r in theirs if r["split"] == split]
            updates = json.loads((a / "result.json").read_text()).get("timed_steps", 0)
            assert updates == 16 - after  # it has really not repeated them
    ends = [read_rows(forked / f"cells/{arm}/0/metrics.jsonl")[-1] for arm in ("base", "longer", "end", "whole")]
    assert len({row["loss"] for row in ends}) == 4


def test_an_arm_that_says_where_it_forks(typed, place):
    """It has the base's rows up to there and the rate of its own after; the same changes from the start are others."""
    status, out, err = typed("late.py", "--studies", "late")
    assert status == 0 and "3 cells planned = 3 done + 0 diverged + 0 failed." in out, err
    study = next((place / "late").glob("late-*"))
    rows = {arm: read_rows(study / f"cells/{arm}/0/metrics.jsonl") for arm in ("base", "late", "early")}
    rates = {arm: [r["learning_rate"] for r in own if r["split"] == "train"] for arm, own in rows.items()}
    assert rates["late"] == rates["base"][:8] + rates["early"][8:] and rates["base"][0] != rates["early"][0]
    assert "after step 8: optim.lr.peak=0.001" in (study / "report.md").read_text()
    merged = merge([read_study(study), read_study(study)])
    assert [arm.name for arm in merged.arms] == ["base", "late", "early"] and merged.count()["done"] == 3
    prints = {json.loads(p.read_text())["fingerprint"] for p in study.glob("cells/*/0/cell.json")}
    assert len(prints) == 3
    assert ran(typed("late.py", "--studies", "late2", "--only", "late")[1]) == ["base seed 0", "late seed 0"]


@pytest.mark.parametrize(("after", "changes", "message"), [
    (16, {"optim.lr.peak": 0.1}, "not inside its 16 steps"), (0, {"optim.lr.peak": 0.1}, "not inside"),
    (8, {"optim": SGD(0.1, momentum=0.9)}, "another structure"), (8, {"model.classes": 3}, "another structure"),
    (8, {"batch": 8}, "the base's data and batch"), (8, {"evaluate": Evaluate(patience=2)}, "may stop early")])
def test_forks_that_cannot_be(place, after, changes, message):
    base: Experiment = load(place / "tails.py").study.base
    with pytest.raises(UserError, match=message):
        check_fork(base, override(base, changes), after)
    with pytest.raises(UserError, match="Arm x: it "):
        preflight.preflight(Study(base, {"x": Fork(after, changes)}))


def test_an_average_may_begin_late(place):
    """ema_from: until then the average is the parameters; then it forgets them as one that began there."""
    params, grads = {"w": np.ones(3, np.float32)}, {"w": np.full(3, 0.5, np.float32)}
    late, early = AdamW(0.1, ema=0.5, ema_from=3).build(6), AdamW(0.1, ema=0.5).build(6)
    ours, state, mean = dict(params), late.init(params), None
    for count in range(6):
        updates, state = late.update(grads, state, ours)
        ours = jax.tree.map(lambda p, u: p + u, ours, updates)
        t = count - 3
        d = min(0.5, (1 + t) / (10 + t))
        mean = ours["w"] if t < 0 else d * mean + (1 - d) * ours["w"]
        np.testing.assert_allclose(state.ema["w"], mean, rtol=1e-6)
    assert early.init(params).ema["w"] is not None and abs(float(mean[0] - ours["w"][0])) > 1e-3
