"""`./launch.sh audit`: membership inference by the loss."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics

import lab
from lab.data.images.images import Images
from lab.data.tables import Sklearn
from lab.experiment import Checkpoint, Evaluate, Experiment, Mesh
from lab.models.linear import MLP
from lab.optim import Adam, Constant
from lab.private import DPSGD, Canaries
from lab.private.attacks import attack, confidence, likelihood_ratio, one_run_epsilon, shown_epsilon
from lab.tasks.supervised import Classify
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

BASE = Experiment(data=Images(Sklearn("digits"), shape=(8, 8, 1), test=0.9, mean=(0.3,), std=(0.37,)),
                  model=MLP(classes=10, width=64), task=Classify(), optim=Adam(lr=Constant(3e-3)), steps=150, batch=64,
                  evaluate=Evaluate(every=0), checkpoint=Checkpoint(every=0), mesh=Mesh(1))


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


# ---------------------------------------------------------------------------------------------------- canaries, LiRA

def test_one_run_shows_no_more_than_there_is():
    """Randomised response of each coin is exactly eps-private, and the bound holds with 95 % confidence."""
    epsilon, n, shown = 2.0, 4000, []
    for seed in range(40):
        draw = np.random.default_rng(seed)
        inside = draw.random(n) < 0.5
        right = draw.random(n) < 1 / (1 + math.exp(-epsilon))
        shown.append(one_run_epsilon((inside != right) + 1e-3 * draw.random(n), inside, 0.0))
    assert sum(value > epsilon for value in shown) <= 5 and np.median(shown) > 1.7
    # Negative controls: coins that nothing knows show nothing; what is known without noise shows much.
    assert one_run_epsilon(draw.random(n), inside, 0.0) < 0.2 and one_run_epsilon(~inside * 1.0, inside, 0.0) > 5
    assert one_run_epsilon(~inside * 1.0, inside, 1e-2) < 1  # a delta that explains it


def test_the_likelihood_ratio_finds_what_one_threshold_does_not():
    """Records differ in difficulty (sd 3) more than by their membership (1 sd), which shadows tell apart."""
    draw = np.random.default_rng(0)
    difficulty, inside = 3 * draw.standard_normal(800), draw.random((17, 800)) < 0.5
    runs = difficulty + inside + draw.standard_normal((17, 800))
    ratio = likelihood_ratio(runs[0], runs[1:], inside[1:])
    plain, found, wrong = (attack(-x[inside[0]], -x[~inside[0]])["auc"]
                           for x in (runs[0], ratio, likelihood_ratio(runs[0], runs[1:], inside[:-1])))
    assert plain < 0.62 and 0.70 < found < 0.80 and 0.46 < wrong < 0.54  # at best Phi(1 / sqrt 2) = 0.76
    one = np.ones((3, 1), bool)
    assert np.isnan(likelihood_ratio(np.zeros(1), np.zeros((3, 1)), one)).all()
    p = np.array([0.9, 0.5, 1e-3])
    np.testing.assert_allclose(confidence(-np.log(p)), np.log(p / (1 - p)), rtol=1e-9)


def test_canaries_are_the_same_records_for_each_seed():
    whole = BASE.data.load()
    runs = [Canaries(BASE.data, count=60, seed=seed) for seed in (0, 1)]
    (there, inside), (again, other) = (run.canaries() for run in runs)
    rows, n = np.arange(60), len(whole.train)
    for name in ("inputs", "targets"):
        np.testing.assert_array_equal(there[rows][name], again[rows][name])
    own = whole.train[rows * n // 60]["targets"]
    assert (there[rows]["targets"] != own).all() and 15 < inside.sum() < 45 and 15 < (inside != other).sum() < 45
    loaded = [run.load() for run in runs]
    assert len(loaded[0].train) == n - (~inside).sum() and loaded[0].fingerprint != loaded[1].fingerprint
    np.testing.assert_array_equal(*(data.validation[np.arange(9)]["targets"] for data in (loaded[0], whole)))
    trained = loaded[0].train[np.arange(len(loaded[0].train))]["inputs"]
    as_bytes = {x.tobytes() for x in trained}
    assert [x.tobytes() in as_bytes for x in there[rows]["inputs"]] == inside.tolist()
    true = Canaries(BASE.data, count=60, mislabelled=False).canaries()[0]
    np.testing.assert_array_equal(true[rows]["targets"], own)


class Noiseless(DPSGD):
    """A mistake: the noise is forgotten."""

    def protected(self, sums, key):
        return DPSGD(**vars(replace(self, noise_multiplier=0.0))).protected(sums, key)


def test_an_audit_notices_a_claim_that_is_wrong(place, typed, mistake):
    canaries = Canaries(replace(BASE.data, test=0.2), count=400)
    private = {"noise_multiplier": 4.0, "clip_norm": 1.0, "delta": 1e-4, "expected_batch": 96}
    base = replace(BASE, data=canaries, batch=192, steps=150, optim=Adam(lr=Constant(1e-2)))
    runs = {"honest": replace(base, private=DPSGD(**private)), "wrong": replace(base, private=Noiseless(**private)),
            "shadow": replace(base, data=replace(canaries, seed=1), private=DPSGD(**private))}
    for name, experiment in runs.items():
        lab.fit(experiment, place / name, quiet=True)
    said = {name: typed("audit", name)[1] for name in ("honest", "wrong")}
    found = {name: json.loads((place / name / "audit.json").read_text()) for name in said}
    assert "as it should be" in said["honest"] and "MORE THAN CLAIMED" in said["wrong"], said
    assert found["honest"]["epsilon_shown"] < found["honest"]["epsilon_claimed"] < found["wrong"]["epsilon_shown"]
    assert "two shadow runs or more" in mistake("audit", "honest", "--shadows", "shadow")
    assert "wrong differs from honest in more than its seeds" in mistake("audit", "honest", "--shadows", ".")
