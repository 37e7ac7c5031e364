"""Metrics by group: fairlearn's numbers, intervals, devices, reweighing, where groups come from, and the commands."""

import csv
import functools
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from scipy import stats as scipy_stats

from lab.configuration.values import to_json
from lab.data.messages import Messages
from lab.data.pipeline import Arrays, eval_batches
from lab.data.tables import Csv, Sklearn, Table
from lab.data.tables.columns import Columns
from lab.data.tables.groups import group_fields
from lab.data.word_tokenizer import Words
from lab.errors import UserError
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.linear import Linear
from lab.optim import SGD, Constant
from lab.private import DPSGD
from lab.study.report import pictures
from lab.study.report.report import report
from lab.tasks import group_report, groups
from lab.tasks.base import EvalResult
from lab.tasks.distill import Distill
from lab.tasks.multitask import MultiTask, Part
from lab.tasks.regress import Regress
from lab.tasks.supervised import Classify
from lab.train import metrics
from lab.train.check import check_data
from lab.train.program import Program
from tests.conftest import ROOT
from tests.studies import make_study
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)
from tests.test_supervised import ONE, VARIABLES, Together, evaluate

FAIRLEARN = json.loads((ROOT / "tests/data/fairlearn.json").read_text())
NAMES = ("a", "b", "c")
OF = np.array(list(FAIRLEARN["groups"]))
FIELDS = {f"g={name}": (name == OF).astype(np.uint8) for name in NAMES}
TARGETS = np.array(FAIRLEARN["targets"], np.int32)
SCORE = np.array(FAIRLEARN["score"])
CLASSES = Arrays({"inputs": np.stack([0 * SCORE, SCORE - 0.7], -1).astype(np.float32), "targets": TARGETS, **FIELDS})
NUMBERS = Arrays({"inputs": np.array(FAIRLEARN["numbers"], np.float32),
                  "targets": np.array(FAIRLEARN["true"], np.float32), **FIELDS})


def outcome(records, folder, predictions):
    return EvalResult(None, None, None, records, "test", {}, {}, lambda: predictions, 0, 0, folder)


@functools.cache
def probabilities():
    p = 1 / (1 + np.exp(-(SCORE - 0.7)))
    return np.stack([1 - p, p], -1)


def written(folder):
    """(metric, group) -> value, of groups.csv."""
    with (folder / "groups.csv").open() as file:
        return {(row["metric"], row["group"].removeprefix("g=")): float(row["value"]) for row in csv.DictReader(file)}


# ------------------------------------------------------------------------------------------------------- fairlearn


def test_classes_are_as_fairlearn_says_over_ragged_batches(tmp_path):
    found, _ = evaluate(Classify(groups="g"), CLASSES)
    (tmp_path / "plots").mkdir()
    group_report.of_classes(outcome(CLASSES, tmp_path, {}), "g", TARGETS, probabilities(), ("no", "yes"))
    table = written(tmp_path)
    for metric, values in FAIRLEARN["by_group"].items():
        name = f"{metric} of yes" if metric.endswith("rate") else metric
        for group, value in values.items():
            if (name, group) in table:
                assert table[name, group] == pytest.approx(value, abs=1e-12)
            if f"{metric}/g={group}" in found:
                assert found[f"{metric}/g={group}"] == pytest.approx(value, rel=1e-6)
        if metric != "records":
            assert table[name, "gap"] == pytest.approx(FAIRLEARN["difference"][metric], abs=1e-12)
        if f"{metric}_gap" in found:
            assert found[f"{metric}_gap"] == pytest.approx(FAIRLEARN["difference"][metric], rel=1e-5)
    assert {name for name, _ in table} >= {"selection rate of yes", "true positive rate of yes", "f1", "auc"}
    for group, value in FAIRLEARN["auc"].items():
        assert table["auc", group] == pytest.approx(value, abs=1e-12)
        assert found[f"auc/g={group}"] == pytest.approx(value, abs=2e-4)
    for name in ("demographic_parity_difference", "equalized_odds_difference"):
        assert found[name] == pytest.approx(FAIRLEARN[name], rel=1e-12)
    assert found["records/g=c"] == FAIRLEARN["by_group"]["records"]["c"]


def test_padding_and_other_groups_would_be_noticed():
    """Negative controls of the test above."""
    padded, _ = evaluate(Classify(groups="g"), CLASSES, padding_counts=True)
    assert padded["records/g=a"] + padded["records/g=b"] + padded["records/g=c"] > len(TARGETS)
    moved = Arrays(CLASSES.arrays | {f"g={n}": np.roll(FIELDS[f"g={n}"], 1) for n in NAMES})
    found, _ = evaluate(Classify(groups="g"), moved)
    assert abs(found["equalized_odds_difference"] - FAIRLEARN["equalized_odds_difference"]) > 0.01


def test_numbers_are_as_fairlearn_says(tmp_path):
    found, _ = evaluate(Regress(groups="g"), NUMBERS)
    (tmp_path / "plots").mkdir()
    true, predicted = np.array(FAIRLEARN["true"]), np.array(FAIRLEARN["numbers"])
    group_report.of_numbers(outcome(NUMBERS, tmp_path, {}), "g", true, predicted)
    table = written(tmp_path)
    for metric, values in FAIRLEARN["regression"].items():
        for group, value in values.items():
            if metric != "mean prediction":
                assert found[f"{metric}/g={group}"] == pytest.approx(value, rel=2e-5)
            if metric != "mse":
                assert table[metric, group] == pytest.approx(value, rel=1e-9)
        if metric != "mse":
            assert table[metric, "gap"] == pytest.approx(FAIRLEARN["regression_difference"][metric], rel=1e-9)
    error = {n: (predicted - true)[n == OF].mean() for n in NAMES}
    assert found["mean_error_gap"] == pytest.approx(max(error.values()) - min(error.values()), rel=1e-4)


def test_fairlearn_itself():
    fairlearn = pytest.importorskip("fairlearn.metrics", reason="fairlearn is not installed")
    rng = np.random.default_rng(1)
    true, predicted, group = rng.integers(0, 2, 200), rng.integers(0, 2, 200), rng.integers(0, 4, 200)
    confusion = np.zeros((4, 2, 2))
    np.add.at(confusion, (group, true, predicted), 1)
    for name, value in groups.disparity(confusion).items():
        assert value == pytest.approx(getattr(fairlearn, name)(true, predicted, sensitive_features=group), rel=1e-12)


def test_more_than_two_classes_and_rates_that_do_not_exist():
    rng = np.random.default_rng(2)
    confusion = rng.integers(1, 9, (3, 4, 4)).astype(float)
    found = groups.disparity(confusion)
    rates = confusion / confusion.sum(2, keepdims=True)
    gaps = [abs(rates[a] - rates[b]).max() for a in range(3) for b in range(3)]
    assert found["equalized_odds_difference"] == pytest.approx(max(gaps))
    chosen = confusion.sum(1) / confusion.sum((1, 2))[:, None]
    assert found["demographic_parity_difference"] == pytest.approx(np.ptp(chosen, 0).max())
    lacking = np.array([[[4, 1], [1, 4]], [[5, 5], [0, 0]]], float)  # group 1 has no record of class 1
    assert groups.disparity(lacking)["equalized_odds_difference"] == pytest.approx(0.3)  # not 0.8 - 0
    assert np.isnan(groups.disparity(confusion[:1])["demographic_parity_difference"])
    assert np.isnan(groups.spread(np.array([1.0, np.nan]))) and groups.spread(np.array([1.0, np.nan, 3.0])) == 2


# ------------------------------------------------------------------------------------------------------- intervals


def test_shares_have_wilsons_and_newcombes_intervals():
    for hits, n in ((7, 21), (0, 9), (9, 9), (500, 1000)):
        known = scipy_stats.binomtest(hits, n).proportion_ci(method="wilson")
        assert group_report.wilson(np.array(hits), np.array(n)) == pytest.approx(tuple(known), abs=1e-12)
        assert group_report.wilson(np.array(hits), np.array(n + 1)) != pytest.approx(tuple(known), abs=1e-12)
    found = group_report.share("x", np.array([56, 48]), np.array([70, 80]))  # Newcombe 1998, table II, (a)
    assert found.gap == pytest.approx(0.2) and found.gap_ends == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert found.order == (1, 0)


def test_the_bootstrap_is_students_interval_of_a_mean_and_the_same_each_time():
    values = np.random.default_rng(3).normal(5, 2, 400)
    rows = [np.arange(300), np.arange(300, 400), np.arange(1)]
    figure, = group_report.resampled(["mean"], rows, lambda own: [values[own].mean()])
    again, = group_report.resampled(["mean"], rows, lambda own: [values[own].mean()])
    for g in (0, 1):
        own = values[rows[g]]
        t = scipy_stats.t.interval(0.95, len(own) - 1, own.mean(), scipy_stats.sem(own))
        assert (figure.ends[0][g], figure.ends[1][g]) == pytest.approx(t, abs=0.1 * (t[1] - t[0]))
    assert figure.gap_ends == again.gap_ends or np.isnan(figure.gap_ends).all()
    assert np.isnan(figure.ends[0][2])  # one record has no interval


# ------------------------------------------------------------------------------------------------------- data


ROWS = 300


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """people.csv: pay depends on age and, for the same age, on sex; four people did not say theirs."""
    rng = np.random.default_rng(4)
    path = tmp_path_factory.mktemp("groups") / "people.csv"
    age, sex = rng.integers(18, 60, ROWS), rng.choice(["f", "m"], ROWS, p=[0.4, 0.6])
    pay = age + 12 * (sex == "m") + rng.normal(0, 8, ROWS)
    shown = np.where(np.arange(ROWS) % 75 == 7, "", sex)
    lines = [f"{i},{a},{s},{'high' if p > 45 else 'low'},{p:.2f},a {s or 'silent'} person of {a},x"
             for i, (a, s, p) in enumerate(zip(age, shown, pay, strict=True))]
    path.write_text("id,age,sex,pay,amount,text,same\n" + "\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def base(table):
    source = Csv(str(table), target="pay", drop=("id", "amount", "text", "same"))
    return Experiment(data=Table(source, unseen="zeros"), model=Linear(classes=2), task=Classify(groups="sex"),
                      optim=SGD(lr=Constant(0.5)), steps=6, batch=48, evaluate=Evaluate(every=0),
                      checkpoint=Checkpoint(every=0)).filled()


def test_the_column_may_be_an_input_or_not(base, table):
    data = base.data.load()
    rows = [line.split(",") for line in table.read_text().splitlines()[1:]]
    names = ["sex=f", "sex=m", "sex=missing"]
    for split in ("train", "validation", "test"):
        arrays, origin = getattr(data, split).arrays, data.origins[split]
        of = [f"sex={rows[i][2] or 'missing'}" for i in origin.rows]
        assert all([name == o for o in of] == arrays[name].astype(bool).tolist() for name in names)
    hidden = replace(base.data, source=replace(base.data.source, drop=("id", "sex", "amount", "text", "same")))
    assert hidden.load().metadata["features"] == 1 and data.metadata["features"] == 3
    assert hidden.load().train.arrays["sex=m"].tolist() == data.train.arrays["sex=m"].tolist()
    plain = replace(hidden, groups=None).load()
    assert plain.fingerprint != hidden.load().fingerprint and "sex=m" not in plain.train.arrays
    assert data.summary["groups by sex"].startswith("f ")


def test_experiments_without_groups_keep_their_fingerprint(base):
    assert not {"groups", "reweigh", "weights"} & to_json(Classify(), identity=True).keys()
    assert "groups" not in to_json(Table(Sklearn("diabetes")), identity=True)
    assert "groups" in to_json(base.task, identity=True) and base.filled() == base


def test_numbers_are_groups_by_their_value():
    found, = group_fields([Columns("t", {"sex": np.array([1.0, 2.0, 1.0, 2.0, np.nan, np.nan])}, [1] * 6)], "sex")
    assert {name: values.tolist() for name, values in found.items()} == {
        "sex=1": [1, 0, 1, 0, 0, 0], "sex=2": [0, 1, 0, 1, 0, 0], "sex=missing": [0, 0, 0, 0, 1, 1]}


def test_messages_have_groups_too(table):
    data = Messages(Csv(str(table), target="pay", text="text", drop=("id",)), Words(50), length=8, groups=("sex",))
    found = data.load()
    assert set(data.record_spec()) == set(found.train.arrays) == set(found.validation.arrays)
    row = found.train.arrays["sex=m"].tolist()
    assert row == [int(text.startswith("a m ")) for text in found.texts["train"]]
    assert found.fingerprint != replace(data, groups=None).load().fingerprint
    from lab.data.messages.sources import PythonPackages

    with pytest.raises(UserError, match="column of a CSV file"):
        replace(data, source=PythonPackages()).record_spec()


# ------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def reweighed(base):
    return replace(base, task=replace(base.task, reweigh=True)).filled()


def test_reweighing_makes_group_and_class_independent(base, reweighed):
    train = base.data.load().train
    fields = groups.fields_of(train.arrays, "sex")
    members, targets = np.stack([train.arrays[name] for name in fields], -1), train.arrays["targets"]
    weight = np.asarray(groups.record_weights(reweighed.task.weights, "sex", train.arrays, jax.nn.one_hot(targets, 2)))
    wanted = [np.mean(members[:, g]) * np.mean(targets == y) / np.mean(members[:, g] * (targets == y))
              for g, y in zip(members.argmax(1), targets, strict=True)]
    np.testing.assert_allclose(weight, wanted, rtol=1e-6)

    def shares(weight):
        return [np.average(targets, weights=weight * members[:, g]) for g in range(2)]

    assert np.ptp(shares(weight)) < 1e-6 and np.ptp(shares(np.ones_like(weight))) > 0.2  # the negative control
    assert sum(weight) == pytest.approx(len(weight), rel=1e-6)


def update(experiment, devices, batch):
    program = Program(experiment, devices=jax.devices()[:devices])
    state, values = program.train(program.init(), program.batch(lambda call: batch, 0))
    return jax.device_get(state.params["head"]["kernel"]), metrics.means(jax.device_get(values))


def test_one_step_is_that_of_weighted_records_on_any_devices(base, reweighed):
    """Zero weights predict 1/2: the gradient is known."""
    train = base.data.load().train
    rows = train[np.arange(48)]
    batch = {**rows, "index": np.arange(48, dtype=np.int32), "weight": (np.arange(48) % 5 > 0).astype(np.float32)}
    members = np.stack([rows[name] for name in groups.fields_of(rows, "sex")], -1)
    weight = (members @ np.array(reweighed.task.weights))[np.arange(48), rows["targets"]] * batch["weight"]
    gradient = (weight[:, None, None] * rows["inputs"][:, :, None] * (0.5 - np.eye(2)[rows["targets"]])[:, None])
    wanted = -0.5 * gradient.sum(0) / weight.sum()
    one, means = update(reweighed, 1, batch)
    np.testing.assert_allclose(one, wanted, atol=1e-6)
    np.testing.assert_allclose(update(replace(reweighed, grad_accum_steps=2), 8, batch)[0], one, atol=1e-6)
    plain, _ = update(base, 1, batch)
    assert abs(plain - one).max() > 1e-3  # the negative control
    assert means["objective"] == pytest.approx(np.log(2), rel=1e-6) and "accuracy/sex=m" not in means


def test_metrics_by_group_are_the_same_on_8_devices(reweighed):
    rows = reweighed.data.load().test  # 60 records in batches of 48
    found = []
    for devices in (1, 8):
        program = Program(reweighed, devices=jax.devices()[:devices])
        params = {"head": {"kernel": np.float32([[2, -2], [1, -1], [-1, 1]]), "bias": np.float32([0.1, 0])}}
        state = jax.device_put(program.init()._replace(params=params), program.shardings)
        found.append(program.evaluate(state, eval_batches(rows, 48, rows=program.eval_rows))[0])
    assert found[0].keys() == found[1].keys() and 0 < found[0]["demographic_parity_difference"] < 1
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-6, err_msg=name)


def test_around_and_beside(base):
    """Distill and MultiTask pass groups on."""
    bare = replace(base, data=replace(base.data, groups=None))
    distilled = replace(bare, task=Distill(replace(base.task, reweigh=True), teacher="runs/x")).filled()
    assert distilled.data.groups == ("sex",) and distilled.task.task.weights and distilled.task.teacher == "runs/x"
    both = replace(bare, task=MultiTask((Part("pay", base.task),))).filled()
    assert both.data.groups == ("sex",)
    with pytest.raises(UserError, match="Classify of its own"):
        MultiTask((Part("pay", replace(base.task, reweigh=True)),)).validate()


def test_an_ensemble_has_groups():
    """The mean probability of equal members is that of one; the objective is the sum of theirs."""
    members = Arrays(CLASSES.arrays | {"inputs": np.stack([CLASSES.arrays["inputs"]] * 2, 1)})
    task = Classify(groups="g", reweigh=True, weights=((1.0, 2.0),) * 3)
    found, one = jax.jit(lambda several, single: (task.loss(Together(), VARIABLES, several, {}, train=False)[2],
                                                  task.loss(ONE, VARIABLES, single, {}, train=False)[2]))(
        next(eval_batches(members, len(TARGETS))), next(eval_batches(CLASSES, len(TARGETS))))
    for name in ("accuracy/g=a", "objective/g=b"):
        scale = 2 if "objective" in name else 1
        assert float(found[name][0]) == pytest.approx(scale * float(one[name][0]), rel=1e-5)
    assert float(found["member_accuracy/g=c"][1]) == FAIRLEARN["by_group"]["records"]["c"]


def test_what_is_refused(base, tmp_path):
    def said(task, **changes):
        with pytest.raises(UserError) as e:
            changed = replace(base, task=task, data=changes.pop("data", replace(base.data, groups=None)), **changes)
            changed.validate()
            filled = changed.filled()
            check_data(filled, filled.data.load())
        return str(e.value)

    assert "near it are sex" in said(Classify(groups="sx"))
    assert "300 different values" in said(Classify(groups="id")) and "all 300" in said(Classify(groups="same"))
    assert "--task.reweigh needs --task.groups" in said(Classify(reweigh=True))
    private = DPSGD(noise_multiplier=1.0, public=True)
    assert "use one of the two" in said(Classify(groups="sex", reweigh=True), private=private)
    with pytest.raises(UserError, match=r"no field sx=VALUE. Perhaps you meant sex"):
        groups.fields_of(["inputs", "sex=f"], "sx")
    with pytest.raises(UserError, match="They have inputs, targets"):
        Classify(groups="sex").check(jax.ShapeDtypeStruct((1, 2), np.float32), replace(base.data, groups=None).load())
    with pytest.raises(UserError, match="training record 1 is in 2"):
        groups.reweighing(np.array([0, 1]), np.array([[1, 0], [1, 1]]), 2)


# ------------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def place(tmp_path):
    return tmp_path


EXPERIMENT = """from lab.data.tables import Csv, Table
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.linear import Linear
from lab.optim import SGD, Constant
from lab.tasks.supervised import Classify

experiment = local = Experiment(
    data=Table(Csv("people.csv", target="pay", drop=("id", "amount", "text", "same")), unseen="zeros"),
    model=Linear(classes=2), task=Classify(), optim=SGD(lr=Constant(0.5)), steps=20, batch=64,
    evaluate=Evaluate(every=0), checkpoint=Checkpoint(every=0))
"""


def test_train_and_evaluate_as_typed(table, place, typed, mistake):
    (place / "people.csv").write_bytes(table.read_bytes())
    (place / "pay.py").write_text(EXPERIMENT)
    status, out, _ = typed("pay.py", "--task.groups", "sex", "--task.reweigh", "--run-dir", "run")
    assert status == 0 and "groups by sex: f " in out and "By sex, test split: sex=f" in out
    assert "few records, whose figures say little" in out and "accuracy/sex" not in out
    final = json.loads((place / "run/result.json").read_text())["test"]
    assert final["accuracy_gap"] > 0 and final["records/sex=missing"] >= 0
    status, out, _ = typed("evaluate", "run")
    assert status == 0 and "demographic_parity_difference  " in out and "Equalized odds difference" in out
    folder = place / "run/evaluation-validation-20"
    assert (folder / "groups.csv").stat().st_size and (folder / "plots/groups.png").stat().st_size
    assert (folder / "groups.txt").read_text().splitlines()[0].strip() in out
    assert "near it are sex" in mistake("pay.py", "--task.groups", "sxe")
    assert "--task.reweigh needs" in mistake("pay.py", "--task.reweigh")


def test_the_report_of_a_study(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "png", lambda figure: b"")
    folder = make_study(tmp_path / "fair-1", {"other": {"model.norm": "rmsnorm"}})
    for path in folder.glob("cells/*/*/result.json"):
        result = json.loads(path.read_text())
        high = 0.8 + 0.01 * int(path.parent.name) - 0.1 * (path.parent.parent.name == "other")
        result["final"] |= {"accuracy": 0.8, "accuracy/sex=f": 0.7, "accuracy/sex=m": high, "records/sex=f": 12.0,
                            "records/sex=m": 3000.0, "accuracy_gap": high - 0.7,
                            "demographic_parity_difference": high / 2, "loss/sex=f": 1.0, "loss/sex=m": float("nan")}
        path.write_text(json.dumps(result))
    text = (report([folder], quiet=True) / "report.md").read_text()
    assert "| base | sex=m | 3,000 | 0.82 ± 0.02 |  |" in text and "sex=f (12)" in text
    assert "| accuracy | other | 5 | 0.02 ± 0.02 | -0.1000 |" in text
    assert "| demographic parity | base | 5 | 0.41 ± 0.0098 |" in text
    plain = make_study(tmp_path / "plain-1", {"other": {"model.norm": "rmsnorm"}})
    assert "By group" not in (report([plain], quiet=True) / "report.md").read_text()
