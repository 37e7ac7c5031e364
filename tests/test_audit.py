"""`./launch.sh audit`: membership inference by the loss."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics

import lab
from lab.commands.audit import attack, shown_epsilon
from lab.data.images.images import Images
from lab.data.tables import Sklearn
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.linear import MLP
from lab.optim import Adam, Constant
from lab.private import DPSGD
from lab.tasks.supervised import Classify
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

BASE = Experiment(data=Images(Sklearn("digits"), shape=(8, 8, 1), test=0.9, mean=(0.3,), std=(0.37,)),
                  model=MLP(classes=10, width=64), task=Classify(), optim=Adam(lr=Constant(3e-3)), steps=150, batch=64,
                  evaluate=Evaluate(every=0), checkpoint=Checkpoint(every=0))


def test_numbers_are_those_of_scikit_learn():
    draw = np.random.default_rng(0)
    members, others = draw.exponential(1.0, 300), draw.exponential(1.5, 200)
    found = attack(members, others)
    truth, score = np.repeat([1, 0], [300, 200]), -np.concatenate([members, others])
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(truth, score))
    false, true, _ = metrics.roc_curve(truth, score, drop_intermediate=False)
    assert found["found"] == pytest.approx(true[false <= 0.01].max())
    assert found["auc_low"] < found["auc"] < found["auc_high"] and found["auc_low"] > 0.5
    same = attack(draw.exponential(1.0, 300), draw.exponential(1.0, 200))
    assert same["auc_low"] < 0.5 < same["auc_high"]


def test_the_shown_epsilon_is_a_lower_bound():
    """Randomised response with p = e^eps / (1 + e^eps) is exactly eps-private (Warner 1965)."""
    draw, epsilon = np.random.default_rng(0), 2.0
    p = math.exp(epsilon) / (1 + math.exp(epsilon))
    members, others = draw.random(20000) < 1 - p, draw.random(20000) < p  # the loss is 0 or 1
    shown = shown_epsilon(members.astype(float), others.astype(float), 1e-5)
    assert 1.85 < shown <= epsilon
    assert shown_epsilon(others.astype(float), others.astype(float), 1e-5) == 0


@pytest.fixture
def place(tmp_path):
    return tmp_path


def test_a_run_that_learned_by_heart_and_a_private_one(place, typed, mistake):
    private = DPSGD(noise_multiplier=1.0, clip_norm=0.3, delta=1e-3, expected_batch=24)
    for name, experiment in (("heart", BASE), ("private", replace(BASE, private=private, steps=40))):
        lab.fit(experiment, place / name, quiet=True)
    found = {}
    for name in ("heart", "private"):
        status, out, err = typed("audit", name, "--records", "150")
        assert status == 0, err
        found[name] = json.loads((place / name / "audit.json").read_text())
        assert found[name]["members"] == 150 and found[name]["others"] == 150 and f"{found[name]['auc']:.4f}" in out
    assert found["heart"]["auc_low"] > 0.52 and found["private"]["auc"] < found["heart"]["auc"] - 0.02
    assert found["private"]["epsilon_shown"] <= found["private"]["epsilon_claimed"]
    assert "epsilon_claimed" not in found["heart"]
    assert "at least 100" in mistake("audit", "heart", "--records", "10")
    assert "Perhaps you meant loss" in mistake("audit", "heart", "--metric", "los", "--records", "100")
    assert "nowhere" in mistake("audit", "nowhere")
