"""Folds of the training records, and stacks: what they need, that nothing leaks, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import lab
from lab.data.dataset import Dataset
from lab.data.pipeline import Arrays
from lab.errors import UserError
from lab.study.design.arms import FOLD, Stack, Study
from lab.study.report.results import Results, read_study
from lab.study.report.stacking import _compared, _read, held_out_stack, rows, stacked
from lab.train.experiment_file import load
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

NOISE = '''"""Random targets: whoever predicts better than a coin has seen them."""

from dataclasses import dataclass

import numpy as np

from lab.data.dataset import Data, Dataset
from lab.data.folds import Folds
from lab.data.pipeline import Arrays
from lab.experiment import Checkpoint, Evaluate, Experiment, Mesh
from lab.models.linear import MLP, Ensemble, Linear
from lab.optim import Adam, Constant
from lab.study.design import Stack, Study
from lab.tasks.supervised import Classify


@dataclass(frozen=True)
class Coins(Data):
    """400 points in 20 dimensions, and as many coins."""

    def load(self) -> Dataset:
        """240 to learn from, 40 for validation, 120 for test."""
        draw = np.random.default_rng(0)
        x, y = draw.normal(size=(400, 20)).astype(np.float32), draw.integers(0, 2, 400).astype(np.int32)
        parts = (slice(240), slice(240, 280), slice(280, 400))
        return Dataset(*(Arrays({"inputs": x[p], "targets": y[p]}) for p in parts), classes=("heads", "tails"))


study = local = Study(
    Experiment(data=Folds(Coins(), folds=2), model=MLP(classes=2, depth=1, width=64), task=Classify(),
               mesh=Mesh(data=1), optim=Adam(lr=Constant(1e-2)), steps=200, batch=40, steps_per_call=50,
               evaluate=Evaluate(every=0, metric="accuracy", mode="max"), checkpoint=Checkpoint(every=0, best=False)),
    Stack({"net": {}}, beside={"bags": {"model": Ensemble(Linear(classes=2), 4, bootstrap=True)}}),
    seeds=1, split="test")
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the study of coins."""
    folder = tmp_path_factory.mktemp("stack")
    (folder / "coins.py").write_text(NOISE)
    (folder / "alone.py").write_text(NOISE.replace('{"net": {}}', "{}"))
    return folder


@pytest.fixture(scope="module")
def whole(place) -> Dataset:
    """The data of the study, without folds."""
    return load(place / "coins.py").study.base.data.load()


# ---------------------------------------------------------------------------------------------------- folds


def test_every_record_is_held_out_once(place, whole):
    base = load(place / "coins.py").study.base.data
    folds, n = replace(base, folds=7), len(whole.train)
    inputs = whole.train.arrays["inputs"]
    seen = []
    for fold in range(7):
        found = replace(folds, fold=fold).load()
        own = np.flatnonzero(folds.of(n) == fold)
        np.testing.assert_array_equal(found.validation.arrays["inputs"], inputs[own])
        assert len(found.train) + len(own) == n and len(own) in (n // 7, n // 7 + 1)
        assert not {x.tobytes() for x in found.train.arrays["inputs"]} & {x.tobytes() for x in inputs[own]}
        assert found.test is found.test and len(found.test) == 120 and found.fingerprint != whole.fingerprint
        np.testing.assert_array_equal(found.origins["validation"].rows, own)
        seen += own.tolist()
    assert sorted(seen) == list(range(n)) and folds.load().fingerprint == whole.fingerprint
    assert (replace(folds, seed=1).of(n) != folds.of(n)).mean() > 0.5
    np.testing.assert_array_equal(folds.of(n), replace(folds, fold=3).of(n))


class Moving(Arrays):
    """Records that differ between epochs, as windows of text."""

    def in_epoch(self, indices, epochs, seed):
        """The same."""
        return self[indices]


def test_folds_that_cannot_be(place, whole, monkeypatch):
    base = load(place / "coins.py").study.base.data
    for changes, message in (({"folds": 1}, "--data.folds must be at least 2, not 1"),
                             ({"fold": 2}, "--data.fold 2 is not one of the 2 folds, 0 to 1")):
        with pytest.raises(UserError, match=message):
            replace(base, **changes).validate()
    with pytest.raises(UserError, match="--data.folds 241 is above the 240 training records"):
        replace(base, folds=241).load()
    monkeypatch.setattr(type(base.data), "load", lambda self: replace(whole, train=Moving(whole.train.arrays)))
    with pytest.raises(UserError, match="the windows of this text move"):
        base.load()


# ---------------------------------------------------------------------------------------------------- the stack


def test_the_arms_of_a_stack(place):
    study = load(place / "coins.py").study
    wide = {"model.width": 128}
    both = replace(study, arms=replace(study.arms, members={"net": {}, "wide": wide}))
    found = {name: dict(changes) for name, (changes, _) in both.experiments().items()}
    assert found == {"base": {}, "wide": wide, "bags": dict(study.arms.beside["bags"]),
                     "net.fold-0": {FOLD: 0}, "net.fold-1": {FOLD: 1},
                     "wide.fold-0": {**wide, FOLD: 0}, "wide.fold-1": {**wide, FOLD: 1}}
    other = replace(study, arms=replace(study.arms, l2=2.0))
    assert other.fingerprint() != study.fingerprint()
    three = replace(study, base=replace(study.base, data=replace(study.base.data, folds=3)))
    assert "net.fold-2" in three.experiments()  # the number of folds is the data's, and there only


@pytest.mark.parametrize(("arms", "data", "message"), [
    (Stack({}), {}, "A stack needs members"),
    (Stack(["a", "b"]), {}, "A stack needs members, name -> changes of the base, such as"),
    (Stack({"a": {}, "b": {}}), {}, "The stack's member 'b' changes nothing, and another member is the base already"),
    (Stack({"a": {}}), {"folds": 1}, "--data.folds must be at least 2"),
    (Stack({"a": {}}), {"folds": 5000}, "--data.folds 5,000: a stack trains each of its 1 members as often"),
    (Stack({"a": {}}), {"fold": 1}, "--data.fold 1: a stack holds out every fold in turn"),
    (Stack({"a": {}}), None, "A stack needs data in folds"),
    (Stack({"a": {}}, l2=0.0), {}, "penalty l2 of a stack must be above 0"),
    (Stack({"a": {}, "b": {"data.seed": 1}}), {}, "b changes data.seed: the members of a stack and"),
    (Stack({"a": {}}, beside={"b": {"data.data": None}}), {}, "b changes data.data: "),
    (Stack({"a": {}}, beside={"a.fold-0": {"steps": 9}}), {}, "stack's table would be called 'a.fold-0'"),
    (Stack({"mean": {}}), {}, "Two rows of the stack's table would be called 'mean'"),
])
def test_stacks_that_cannot_be(place, arms, data, message):
    base = load(place / "coins.py").study.base
    base = replace(base, data=base.data.data if data is None else replace(base.data, **data))
    with pytest.raises(UserError, match=re.escape(message)):
        Study(base, arms).experiments()


def test_nothing_leaks(place, whole, typed):
    """With coins as targets the stack is no better than a coin, on held-out training records and on test; of members
    that learned the records whose features they make, it seems to be."""
    status, out, err = typed("coins.py", "--execution", "loop")
    assert status == 0, err
    for line in ("4 cells planned = 4 done", "net is the arm base above. Held out:",
                 "folds: 2 done; no table above has them.", "The stack is not distinguishable from the mean: "):
        assert line in " ".join(out.split()), out
    folder = next((place / "studies").iterdir())
    results, arrays = read_study(folder), _read(folder)[1]
    assert "net.fold-0" not in (folder / "report.md").read_text()
    found = rows(results, arrays, [0])
    assert list(found) == ["net", "mean", "bags", "stack"]
    assert abs(found["stack"].held_out - 0.5) < 0.11 and abs(found["stack"].right.mean() - 0.5) < 0.15  # 3.4 sd
    fold, targets = arrays["folds"], arrays["folds/targets"]
    np.testing.assert_array_equal(targets, whole.train.arrays["targets"])
    run = lab.open_run(folder / "cells/base/0")
    logits = np.asarray(run.apply(whole.train.arrays["inputs"]))
    seen = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    leaked = held_out_stack(np.stack([seen], 1), targets, fold, 1.0)
    assert (leaked.argmax(-1) == targets).mean() > 0.9  # negative control

    cells = {(c.arm, c.seed): c.result for c in results.cells}
    for name, arm in (("net", "base"), ("bags", "bags")):
        assert found[name].right.mean() == pytest.approx(cells[arm, 0]["test"]["accuracy"])
    for i in (0, 1):  # held-out predictions are in the order of the records
        hits = (arrays["folds/net/0"].argmax(-1) == targets)[fold == i]
        assert hits.mean() == pytest.approx(cells[f"net.fold-{i}", 0]["final"]["accuracy"])
    assert found["bags"].held_out == cells["bags", 0]["out_of_bag"]["accuracy"]
    said = (folder / "cells/bags/0/logs/screen.txt").read_text()
    assert re.search(r"Out of bag, 2\d\d training records by the members that did not learn them: (loss|acc)", said)

    table = out[out.index("Accuracy in % of 120 test records"):out.index("The whole report")]
    assert table in typed("report", folder)[1]
    (folder / "stack.safetensors").write_bytes(b"no")
    assert "The table of the stack failed and is left out." in typed("report", folder)[1]


def test_members_of_use_outweigh_the_others():
    """Of three members, one knows the class: the stack finds out, their mean does not."""
    draw = np.random.default_rng(0)
    y, asked = draw.integers(0, 3, 300), draw.integers(0, 3, 200)

    def probabilities(targets, sharpness):
        logits = sharpness * np.eye(3)[targets] + draw.normal(size=(len(targets), 3))
        return (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).astype(np.float32)

    arrays = {"folds": np.arange(300) % 5, "folds/targets": y, "whole/targets": asked}
    for name, sharpness in (("knows", 4.0), ("a", 0.0), ("b", 0.0)):
        for seed in (0, 1):
            arrays[f"folds/{name}/{seed}"], arrays[f"whole/{name}/{seed}"] = (
                probabilities(t, sharpness) for t in (y, asked))
    results = Results("", "", "max", "test", "stack", {"members": {"knows": "base", "a": "a", "b": "b"}, "beside": [],
                                                       "folds": 5, "l2": 1.0}, {}, [], [0, 1], [], [])
    found = rows(results, arrays, [0, 1])
    assert found["stack"].right.shape == (2, 200)
    assert found["stack"].right.mean() > 0.95 > 0.9 > found["mean"].right.mean() > found["a"].right.mean()
    assert found["stack"].held_out == pytest.approx(found["stack"].right.mean(), abs=0.04)
    assert _compared("mean", found["mean"], found["stack"]).startswith("The stack is better than the mean: +")
    assert "not distinguishable from knows, the best member" in _compared("knows", found["knows"], found["stack"])
    true = arrays["whole/knows/1"][np.arange(200), asked], arrays["whole/knows/0"][np.arange(200), asked]
    assert found["knows"].loss == pytest.approx(-np.log(true).mean(), rel=1e-5)


def test_the_stack_is_scikit_learns_regression():
    draw = np.random.default_rng(0)
    p = draw.dirichlet(np.ones(3), (90, 2)).astype(np.float32)
    y = p[:, 0].argmax(-1)
    mine = stacked(p, y, p, 4.0)
    theirs = LogisticRegression(C=0.25, max_iter=1000).fit(p.reshape(90, -1), y).predict_proba(p.reshape(90, -1))
    np.testing.assert_allclose(mine, theirs)
    assert np.abs(stacked(p, y, p, 1.0) - mine).max() > 0.01  # negative control: another penalty
    few = stacked(p[y != 1], y[y != 1], p, 1.0)  # a class without records has probability 0
    assert (few[:, 1] == 0).all() and np.allclose(few.sum(1), 1) and (stacked(p, y * 0, p, 1.0)[:, 0] == 1).all()


def test_mistakes_on_the_command_line(place, mistake):
    for words, message in (
            (("--data.folds", "1"), "--data.folds must be at least 2, not 1"),
            (("--data.folds", "300"), "--data.folds 300 is above the 240 training records"),
            (("--data.fold", "0"), "a stack holds out every fold in turn"),
            (("--evaluate.patience", "2"), "a run stops by its held-out fold")):
        assert message in mistake("coins.py", *words, "--studies", "none")
    assert "A stack needs members" in mistake("alone.py", "--studies", "none")
