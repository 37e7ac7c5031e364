"""Classify and Regress: every metric against scikit-learn over ragged batches, losses and gradients against torch."""

import csv
import functools
import warnings
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics as sk
from PIL import Image

from lab.data.pipeline import Arrays, eval_batches
from lab.data.tables.features import Target
from lab.errors import UserError
from lab.models.members import Members
from lab.tasks import reports
from lab.tasks.base import EvalResult
from lab.tasks.regress import Regress
from lab.tasks.supervised import Classify
from lab.train import metrics
from tests.conftest import computing

N, B, F = 50, 16, 4  # 50 records in batches of 16: the last one has 14 rows of padding
WEIGHT = np.array([1, 1, 0, 1, 1, 0, 1], np.float32)
REAL = WEIGHT > 0




class Identity(nn.Module):
    """Its output is its input."""

    @nn.compact
    def __call__(self, x, *, train):
        return x + self.param("zero", nn.initializers.zeros, ())


ONE = Identity()


class Together(Identity):
    """Its output is that of several members, its input."""

    @nn.compact
    def __call__(self, x, *, train):
        return Members(x + self.param("zero", nn.initializers.zeros, ()))


VARIABLES = {"params": {"zero": jnp.zeros(())}}


@functools.cache
def compiled(task):
    return jax.jit(lambda batch: task.loss(Identity(), VARIABLES, batch, {}, train=False)[2])


def evaluate(task, records, padding_counts=False):
    """What Program.evaluate does: (means with the summary, counts)."""
    total = None
    for batch in eval_batches(records, B):
        if padding_counts:
            batch["weight"] = np.ones_like(batch["weight"])
        total = metrics.add(total, compiled(task)(batch))
    means, counts = metrics.means(total), metrics.counts(total)
    return means | task.summary(means, counts), counts


def labelled(classes, n=N, absent=None):
    """Random logits that know something; the last record, which pads, is an outlier."""
    rng = np.random.default_rng(classes)  # its own, so that a test is the same whatever ran before
    targets = rng.integers(0, classes, n).astype(np.int32)
    logits = (rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[targets]).astype(np.float32)
    if absent is not None:
        targets[targets == absent] = (absent + 1) % classes
        logits[:, absent] = -20
    logits[-1, (targets[-1] + 1) % classes] = 6
    return Arrays({"inputs": logits, "targets": targets})


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ------------------------------------------------------------------------------------------------- metrics: classes


@pytest.mark.parametrize("classes, absent", [(2, None), (4, None), (12, 5)])
def test_every_metric_equals_scikit_learn(classes, absent):
    records = labelled(classes, absent=absent)
    logits, true = records.arrays["inputs"], records.arrays["targets"]
    predicted, probabilities = logits.argmax(-1), softmax(logits)
    found, counts = evaluate(Classify(), records)
    macro = sk.precision_recall_fscore_support(true, predicted, average="macro", zero_division=0)
    want = {"loss": sk.log_loss(true, probabilities, labels=range(classes)),
            "accuracy": sk.accuracy_score(true, predicted),
            "precision": macro[0], "recall": macro[1], "f1": macro[2]}
    if classes > 5:
        want["top5_accuracy"] = sk.top_k_accuracy_score(true, logits, k=5, labels=range(classes))
        assert want["top5_accuracy"] < 1
    if classes == 2:
        want["auc"] = sk.roc_auc_score(true, probabilities[:, 1])
    assert found == {name: pytest.approx(value, rel=1e-5) for name, value in want.items()}
    matrix = sk.confusion_matrix(true, predicted, labels=range(classes))
    np.testing.assert_array_equal(counts["confusion"], matrix)
    assert (matrix != matrix.T).any()  # or [true, predicted] could not be told from [predicted, true]
    each = sk.precision_recall_fscore_support(true, predicted, labels=range(classes), zero_division=0)
    for got, figure in zip(reports.class_figures(matrix), each, strict=False):
        np.testing.assert_allclose(got, figure)
    np.testing.assert_array_equal(reports.confusion(true, predicted, classes), matrix)
    padded, more = evaluate(Classify(), records, padding_counts=True)  # negative control
    assert all(abs(padded[name] - found[name]) > 1e-3 for name in found if name != "top5_accuracy")
    assert more["confusion"].sum() == 64
    if absent is not None:  # what the documentation says of a class that does not occur
        over_all = sk.f1_score(true, predicted, labels=range(classes), average="macro", zero_division=0)
        assert abs(over_all - found["f1"]) > 1e-2


SCORES = {  # from truth + noise
    "ordinary": lambda x: x, "tiny": lambda x: 1e-4 * x, "far from 0": lambda x: 40 + x, "sure": lambda x: 30 * x - 15,
    "huge": lambda x: 1e4 * x, "ties": np.round, "constant": np.zeros_like,
}


@pytest.mark.parametrize("kind", SCORES)
def test_auc_from_the_histogram(kind):
    rng = np.random.default_rng(2)
    truth = (rng.random(2000) < 0.3).astype(np.int32)
    margin = SCORES[kind](rng.normal(size=2000) + truth).astype(np.float32)
    batch = {"inputs": np.stack([np.zeros_like(margin), margin], 1), "targets": truth, "weight": np.ones(2000)}
    got = reports.area(compiled(Classify())(batch)["scores"])
    want = sk.roc_auc_score(truth, margin)
    assert got == pytest.approx(want, abs=2e-4)
    if kind in ("far from 0", "sure"):  # negative control: as many bins, even in the probability
        place = np.round(softmax(batch["inputs"])[:, 1] * 2**15).astype(int)
        naive = np.stack([np.bincount(place[truth == c], minlength=2**15 + 1) for c in (0, 1)])
        assert abs(reports.area(naive) - want) > 1e-3


def test_counts_add_over_devices():
    """A batch spread over 8 devices gives the counts of one."""
    sharding = jax.NamedSharding(jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,)),
                                 jax.sharding.PartitionSpec("data"))
    batch = labelled(2)[np.arange(48)] | {"weight": (np.arange(48) % 5 > 0).astype(np.float32)}
    one, many = (compiled(Classify())(b) for b in (batch, jax.device_put(batch, sharding)))
    assert len(jax.device_put(batch["weight"], sharding).devices()) == 8
    for name in ("confusion", "scores"):
        np.testing.assert_array_equal(one[name], many[name])
        assert one[name].sum() == batch["weight"].sum() < 48


def test_auc_without_one_of_the_classes_is_no_number():
    assert np.isnan(reports.area(np.array([[3, 2], [0, 0]])))


def test_large_logits_do_not_overflow():
    records = labelled(4)
    records.arrays["inputs"] = records.arrays["inputs"] * 1e4
    logits, true = records.arrays["inputs"].astype(np.float64), records.arrays["targets"]
    want = (logits.max(-1) - logits[np.arange(N), true]).mean()
    assert evaluate(Classify(label_smoothing=0.1), records)[0]["loss"] == pytest.approx(want, rel=1e-5)


# ---------------------------------------------------------------------------------------- losses and gradients: torch


@functools.cache
def trainer(task, model):
    def loss(x, batch):
        total, weights, found, model_state = task.loss(model, VARIABLES, batch | {"inputs": x}, {}, train=True)
        assert model_state == {}
        return total, (weights, found)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def training(task, logits, targets, model=ONE):
    """((objective sum, (weight, metrics)), gradient of the sum with respect to the logits)."""
    return trainer(task, model)(logits, {"targets": targets, "weight": WEIGHT})


RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(7, 3)).astype(np.float32) * 2
HARD = np.array([0, 2, 1, 1, 0, 2, 2], np.int32)
SOFT = RNG.dirichlet(np.ones(3), 7).astype(np.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [(), (0.5, 3.0, 1.0)])
@pytest.mark.parametrize("targets", [HARD, SOFT], ids=["hard", "soft"])
def test_losses_and_gradients_equal_torch(smoothing, weights, targets):
    torch = pytest.importorskip("torch", reason="torch is the independent reference here, and is not installed")
    task = Classify(label_smoothing=smoothing, class_weights=weights)
    (total, (weight, found)), gradient = training(task, LOGITS, targets)
    logits = torch.tensor(LOGITS[REAL], requires_grad=True)
    wanted = torch.from_numpy(targets[REAL])
    wanted = wanted.long() if targets.ndim == 1 else wanted

    def reference(smoothing, weights=weights, reduction="sum"):
        return torch.nn.functional.cross_entropy(logits, wanted, torch.tensor(weights) if weights else None,
                                                 label_smoothing=smoothing, reduction=reduction)

    want = reference(smoothing)
    want.backward()
    np.testing.assert_allclose(total, want.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient[REAL], logits.grad, atol=1e-5)
    assert not gradient[~REAL].any()
    if targets.ndim == 1:  # torch divides by the weights of the targets; for soft ones by the number of records
        np.testing.assert_allclose(total / weight, reference(smoothing, reduction="mean").item(), rtol=1e-5)
    assert abs(total - reference(smoothing + 0.05).item()) > 1e-2  # negative controls
    assert abs(total - reference(smoothing, weights=(1.0, 1.0, 2.0)).item()) > 1e-2
    plain = reference(0.0, (), "sum").item() / 5
    assert float(found["loss"][0] / found["loss"][1]) == pytest.approx(plain, rel=1e-5)  # whatever is optimised
    assert ("objective" in found) == (smoothing > 0 or weights != ())
    if "objective" in found:
        assert found["objective"] == (total, weight)


def test_one_hot_targets_are_classes():
    for task in (Classify(), Classify(0.1, (1.0, 2.0, 5.0))):
        for a, b in zip(jax.tree.leaves(training(task, LOGITS, HARD)),
                        jax.tree.leaves(training(task, LOGITS, np.eye(3, dtype=np.float32)[HARD])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_mixed_targets_mix_loss_accuracy_and_top5():
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 8, (2, 7))
    eye = np.eye(8, dtype=np.float32)
    logits = rng.normal(size=(7, 8)).astype(np.float32) + 2 * eye[a]
    (_, (_, mixed)), _ = training(Classify(), logits, 0.7 * eye[a] + 0.3 * eye[b])
    (_, (_, first)), _ = training(Classify(), logits, a.astype(np.int32))
    (_, (_, second)), _ = training(Classify(), logits, b.astype(np.int32))
    for name in ("loss", "accuracy", "top5_accuracy"):
        np.testing.assert_allclose(mixed[name][0], 0.7 * first[name][0] + 0.3 * second[name][0], rtol=1e-5)
        assert first[name][0] != second[name][0]  # negative control


def test_members_of_an_ensemble_train_as_alone():
    logits_BMC = np.random.default_rng(4).normal(size=(7, 4, 3)).astype(np.float32)
    task = Classify(0.1, (1.0, 2.0, 0.5))
    (total, (weight, found)), gradient = training(task, logits_BMC, HARD, Together())
    alone = [training(task, logits_BMC[:, m], HARD) for m in range(4)]
    for m, ((_, (weight_alone, _)), gradient_alone) in enumerate(alone):
        np.testing.assert_allclose(gradient[:, m], gradient_alone, atol=1e-6)
        assert weight == weight_alone  # so the step divides both by the same
    np.testing.assert_allclose(total, sum(a[0][0] for a in alone), rtol=1e-6)
    np.testing.assert_allclose(found["member_accuracy"][0], np.mean([a[0][1][1]["accuracy"][0] for a in alone]))
    mean = np.log(softmax(logits_BMC).mean(1)).astype(np.float32)
    (_, (_, of_mean)), of_mean_gradient = training(Classify(), mean, HARD)
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(found[name], of_mean[name], rtol=1e-5)
    assert np.abs(gradient.mean(1) - of_mean_gradient).max() > 1e-2  # negative control: the loss of the mean
    answer = task.predict(Together(), VARIABLES, {"inputs": logits_BMC})
    np.testing.assert_allclose(answer["probabilities"], softmax(logits_BMC).mean(1), rtol=1e-5)
    assert (answer["prediction"] == mean.argmax(-1)).all()
    assert np.abs(answer["probabilities"] - softmax(logits_BMC.mean(1))).max() > 1e-2  # not the mean of logits


@pytest.mark.parametrize("task, targets", [(Classify(0.1, (1.0, 6.0, 0.1)), HARD), (Regress("huber"), LOGITS[:, 0])])
def test_sums_over_parts_are_the_sum(task, targets):
    outputs = LOGITS if isinstance(task, Classify) else LOGITS[:, 1]
    batch = {"inputs": outputs, "targets": targets, "weight": WEIGHT}
    run = jax.jit(lambda batch: task.loss(Identity(), VARIABLES, batch, {}, train=False)[:3])
    whole, *parts = (run({name: x[rows] for name, x in batch.items()})
                     for rows in (slice(None), slice(0, 2), slice(2, 7)))
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a, b + c, rtol=1e-5, atol=1e-6), whole, *parts)
    mean_of_means = np.mean([part[0] / part[1] for part in parts])
    assert abs(mean_of_means - whole[0] / whole[1]) > 1e-2  # negative control
    nothing = run(batch | {"weight": np.zeros(7, np.float32)})
    assert not any(np.any(x) for x in jax.tree.leaves(nothing))
    garbage = run(batch | {"inputs": np.where(REAL.reshape(-1, *[1] * (outputs.ndim - 1)), outputs, 99.0)})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole, garbage)


def test_options_may_be_traced():
    batch = {"inputs": LOGITS, "targets": HARD, "weight": WEIGHT}
    run = lambda e: Classify(label_smoothing=e).loss(Identity(), VARIABLES, batch, {}, train=True)[0]
    many = jax.jit(jax.vmap(run))(jnp.array([0.0, 0.3]))
    np.testing.assert_allclose(many, [run(0.0), run(0.3)], rtol=1e-6)
    assert abs(many[0] - many[1]) > 0.1  # negative control


# ------------------------------------------------------------------------------------------------------ regression


def measured(offset=3.0, scale=25.0, n=N):
    """Predictions of a target with this mean and deviation; the last record, which pads, is an outlier."""
    rng = np.random.default_rng(1)
    z = rng.normal(size=n).astype(np.float32)
    guess = (0.8 * z + 0.3 * rng.normal(size=n)).astype(np.float32)
    guess[-1] += 5
    return Arrays({"inputs": guess, "targets": z, "scale": np.full(n, scale, np.float32),
                   "offset": np.full(n, offset, np.float32)})


@pytest.mark.parametrize("offset, scale", [(3.0, 25.0), (2e6, 0.5)])
def test_every_metric_of_a_regression_equals_scikit_learn(offset, scale):
    records = measured(offset, scale)
    z, guess = (records.arrays[name].astype(np.float64) for name in ("targets", "inputs"))
    true, predicted = z * scale + offset, guess * scale + offset
    found, _ = evaluate(Regress(), records)
    want = {"loss": sk.mean_squared_error(z, guess), "mse": sk.mean_squared_error(true, predicted),
            "mae": sk.mean_absolute_error(true, predicted), "rmse": sk.root_mean_squared_error(true, predicted),
            "r2": sk.r2_score(true, predicted)}
    assert found == {name: pytest.approx(value, rel=1e-4) for name, value in want.items()}
    padded, _ = evaluate(Regress(), records, padding_counts=True)
    assert all(abs(padded[name] - found[name]) > 1e-2 for name in found)  # negative control
    short = true.astype(np.float32)
    in_units = 1 - want["mse"] / (np.square(short).mean(dtype=np.float32) - short.mean(dtype=np.float32) ** 2)
    assert (abs(in_units - want["r2"]) > 0.1) == (offset > 1e6)  # why the sums are of standardised numbers


def test_r2_of_equal_targets_is_no_number():
    records = Arrays({"inputs": np.ones(5, np.float32), "targets": np.zeros(5, np.float32)})
    assert np.isnan(evaluate(Regress(), records)[0]["r2"])


@pytest.mark.parametrize("criterion", ["mse", "mae", "huber"])
def test_criteria_and_gradients_equal_torch(criterion):
    torch = pytest.importorskip("torch", reason="torch is the independent reference here, and is not installed")
    outputs, targets = LOGITS[:, 0], LOGITS[:, 1]
    assert (np.abs(outputs - targets)[REAL] > 1).any() and (np.abs(outputs - targets)[REAL] < 1).any()
    (total, (weight, found)), gradient = training(Regress(criterion), outputs, targets)
    guess = torch.tensor(outputs[REAL], requires_grad=True)
    functions = {"mse": torch.nn.functional.mse_loss, "mae": torch.nn.functional.l1_loss,
                 "huber": torch.nn.functional.huber_loss}
    want = functions[criterion](guess, torch.from_numpy(targets[REAL]), reduction="sum")
    want.backward()
    np.testing.assert_allclose(total, want.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient[REAL], guess.grad, atol=1e-6)
    assert not gradient[~REAL].any() and weight == 5 and "objective" not in found
    for other in functions.keys() - {criterion}:  # negative control
        assert abs(training(Regress(other), outputs, targets)[0][0] - total) > 0.1


def test_members_of_a_regression_train_as_alone():
    outputs_BM, targets = LOGITS, LOGITS[:, 0] + 1
    (total, (_, found)), gradient = training(Regress("huber"), outputs_BM, targets, Together())
    alone = [training(Regress("huber"), outputs_BM[:, m], targets) for m in range(3)]
    np.testing.assert_allclose(gradient, np.stack([a[1] for a in alone], 1), atol=1e-6)
    np.testing.assert_allclose(total, sum(a[0][0] for a in alone), rtol=1e-6)
    of_mean = training(Regress("huber"), outputs_BM.mean(1), targets)[0][1][1]
    np.testing.assert_allclose(found["loss"], of_mean["loss"], rtol=1e-5)
    assert abs(found["loss"][0] - total / 3) > 1e-2  # negative control
    np.testing.assert_allclose(Regress().predict(Together(), VARIABLES, {"inputs": outputs_BM})["prediction"],
                               outputs_BM.mean(1), rtol=1e-6)


def test_records_of_many_elements_count_once():
    images, targets = np.random.default_rng(5).normal(size=(2, 7, 4, 5, 1)).astype(np.float32)
    (total, (weight, _)), _ = training(Regress(), images, targets)
    assert weight == 5
    np.testing.assert_allclose(total, np.square(images - targets).mean((1, 2, 3))[REAL].sum(), rtol=1e-5)


# ------------------------------------------------------------------------------------------ models and predictions


class Padded(nn.Module):
    """Sees mask and segments."""

    @nn.compact
    def __call__(self, x, *, train, mask, segments):
        return jnp.stack([mask.sum(-1), segments.sum(-1)], -1) * 1.0 + self.param("zero", nn.initializers.zeros, ())


def test_texts_come_with_mask_and_segments():
    ids = np.ones((2, 3), np.int32)
    batch = {"inputs": ids, "mask": np.array([[1, 1, 0], [1, 1, 1]], np.uint8), "segments": ids * 5}
    probabilities = Classify().predict(Padded(), VARIABLES, batch)["probabilities"]
    np.testing.assert_allclose(probabilities, softmax(np.array([[2.0, 15], [3, 15]])), rtol=1e-5)


def test_predictions_are_in_units_of_the_target():
    records = measured()
    rows = records[np.arange(3)]
    got = Regress().predict(Identity(), VARIABLES, {name: rows[name] for name in ("inputs", "scale", "offset")})
    np.testing.assert_array_equal(got["prediction"], rows["inputs"])  # units are left to NumPy and float64
    np.testing.assert_allclose(Regress().columns(got, None)["prediction"], rows["inputs"] * 25 + 3, rtol=1e-6)
    assert Regress().columns({"prediction": np.array([1.5, 2.5])}, None) == {"prediction": [1.5, 2.5]}


def test_a_target_far_from_0_keeps_its_digits():
    """1.7e9 +- 0.06, where float32 has steps of 128."""
    target = Target("t", mean=1.7e9 + 1 / 3, scale=0.06)
    z = RNG.normal(size=50).astype(np.float32)
    arrays = {"prediction": z, **target.arrays(50)}
    wanted = z.astype(np.float64) * 0.06 + (1.7e9 + 1 / 3)
    assert arrays["offset"].dtype == np.float32
    found = np.array(Regress().columns(jax.device_get(jax.device_put(arrays)), None)["prediction"])
    assert np.abs(found - wanted).max() < 1e-6
    assert reports.fit(wanted, found).endswith("R2 1.0000") and reports.digits(wanted) == 16
    single = found.astype(np.float32).astype(np.float64)  # the negative control
    assert "R2 1.0000" not in reports.fit(wanted, single) and np.abs(single - wanted).max() > 0.3
    assert reports.digits(np.array([1.0, 3.0])) == 6 == reports.digits(np.array([2.0, 2.0]))


def test_columns_have_names_of_classes():
    predictions = {"probabilities": np.array([[0.25, 0.75], [1, 0]]), "prediction": np.array([1, 0])}
    assert Classify().columns(predictions, Data(classes=("cat", "dog"))) == {
        "prediction": ["dog", "cat"], "p_cat": [0.25, 1.0], "p_dog": [0.75, 0.0]}
    assert list(Classify().columns(predictions, Data(classes=()))) == ["prediction", "p_0", "p_1"]


@pytest.mark.parametrize("task, text", [
    (Classify(label_smoothing=1.0), "--task.label-smoothing must be in [0, 1), not 1.0."),
    (Classify(class_weights=(1.0, -1.0)), "--task.class-weights must be numbers of 0 or more, not all 0."),
    (Classify(class_weights=(0.0, 0.0)), "--task.class-weights must be numbers of 0 or more, not all 0."),
])
def test_values_out_of_range(task, text):
    with pytest.raises(UserError) as e:
        task.validate()
    assert str(e.value) == text
    Classify(0.99, (0.0, 1.0)).validate()


def test_class_weights_for_another_number_of_classes():
    with pytest.raises(UserError) as e:
        training(Classify(class_weights=(1.0, 2.0)), LOGITS, HARD)
    assert str(e.value) == "--task.class-weights has 2 numbers, but there are 3 classes."


# ------------------------------------------------------------------------------------------------------- artifacts


class Data:
    """What reports read of a Dataset."""

    test = None

    def __init__(self, classes=(), **more):
        self.classes = classes
        self.__dict__.update(more)

    def reference(self):
        return ["a simple model: accuracy 0.5"]


def outcome(task, records, outputs, data, folder, split="validation"):
    found = task.predict(Identity(), VARIABLES, {"inputs": outputs} | {
        name: records.arrays[name] for name in ("scale", "offset") if name in records.arrays})
    return EvalResult(None, computing(None, None), data, records, split, {}, {}, lambda: jax.device_get(found), 0, 0,
                   folder)


def test_report_on_images(tmp_path):
    logits, true = (labelled(3).arrays[name] for name in ("inputs", "targets"))
    images = np.random.default_rng(6).integers(0, 256, (N, 8, 8, 1), dtype=np.uint8)
    records = Arrays({"inputs": images, "targets": true})
    classes = ("shirt", "coat", "bag")
    given = outcome(Classify(), records, logits, Data(classes), tmp_path)
    lines = Classify().artifacts(given)
    predicted = logits.argmax(-1)
    accuracy = sk.accuracy_score(true, predicted)
    assert lines[0].startswith(f"Validation split, 50 records: accuracy {accuracy:.4f}; macro")
    assert lines[-1] == "Baseline (same split): a simple model: accuracy 0.5"
    for line in Classify().artifacts(replace(given, split="train"))[-1:]:
        assert line == "Baseline: a simple model: accuracy 0.5"  # it is not
    want = sk.precision_recall_fscore_support(true, predicted)
    rows = [line.split() for line in (tmp_path / "report.txt").read_text().splitlines()[3:6]]
    assert [row[0] for row in rows] == list(classes)
    np.testing.assert_allclose(np.array([row[1:] for row in rows], float), np.array(want).T, atol=5.1e-5)
    for name in ("confusion.png", "worst.png"):
        picture = np.asarray(Image.open(tmp_path / "plots" / name).convert("L"))
        assert min(picture.shape) > 100 and picture.std() > 5
    assert not (tmp_path / "worst.csv").exists() and not (tmp_path / "worst.txt").exists()
    right = outcome(Classify(), records, 9 * np.eye(3, dtype=np.float32)[true], Data(classes), tmp_path)
    Classify().artifacts(right)
    assert not (tmp_path / "plots" / "worst.png").exists()  # nothing is wrong, and no picture says otherwise


def test_worst_messages_are_the_surest_mistakes(tmp_path):
    records = labelled(3)
    logits, true = records.arrays["inputs"], records.arrays["targets"]
    ids = np.stack([np.arange(N), np.full(N, 7)], 1).astype(np.int32)
    mask = np.stack([np.ones(N), np.zeros(N)], 1).astype(np.uint8)
    data = Data(("a", "b", "c"), decode=lambda ids: " ".join(f"<{i}>" for i in ids))
    records = Arrays({"inputs": ids, "targets": true, "mask": mask})
    Classify().artifacts(outcome(Classify(), records, logits, data, tmp_path))
    blocks = (tmp_path / "worst.txt").read_text().strip().split("\n\n")
    probability = softmax(logits).max(-1)
    wrong = [i for i in np.argsort(-probability) if logits[i].argmax() != true[i]][:25]
    assert len(wrong) > 3 and wrong[0] == N - 1
    assert [int(block.split()[2].rstrip(":")) for block in blocks] == wrong
    assert [block.splitlines()[1] for block in blocks] == [f"<{i}>" for i in wrong]  # without the padding
    i = wrong[0]
    names = "abc"
    assert blocks[0].startswith(f"--- record {i}: true {names[true[i]]}, predicted {names[logits[i].argmax()]}, "
                                f"probability {probability[i]:.4f}")


def test_many_classes_leave_the_screen_the_worst(tmp_path):
    records = labelled(30, n=300)
    data = Data(tuple(f"intent_{i}" for i in range(30)))
    lines = Classify().artifacts(outcome(Classify(), records, records.arrays["inputs"], data, tmp_path))
    f1 = sk.f1_score(records.arrays["targets"], records.arrays["inputs"].argmax(-1), average=None)
    shown = [line.split()[0] for line in lines if line.startswith("  intent_")]
    assert sorted(f1)[:5] == [f1[int(name.removeprefix("intent_"))] for name in shown]
    assert (tmp_path / "report.txt").read_text().count("intent_") == 30
    with (tmp_path / "worst.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 25 and list(rows[0])[:5] == ["record", "true", "predicted", "probability", "input 0"]
    i = int(rows[0]["record"])
    assert float(rows[0]["input 2"]) == pytest.approx(records.arrays["inputs"][i, 2], rel=1e-5)


def test_report_on_a_regression(tmp_path):
    records = measured()
    z, guess = records.arrays["targets"], records.arrays["inputs"]
    table = Arrays(records.arrays | {"inputs": np.stack([guess, z], 1)})
    data = Data(feature_names=("guess", "z"))
    lines = Regress().artifacts(outcome(Regress(), table, guess, data, tmp_path))
    true, predicted = z * 25 + 3, guess * 25 + 3
    assert lines == [f"Validation split, 50 records: RMSE {sk.root_mean_squared_error(true, predicted):.4g}, MAE "
                     f"{sk.mean_absolute_error(true, predicted):.4g}, R2 {sk.r2_score(true, predicted):.4f}",
                     "Baseline (same split): a simple model: accuracy 0.5"]
    with (tmp_path / "worst.csv").open() as file:
        rows = list(csv.DictReader(file))
    order = np.argsort(-np.abs(predicted - true))[:25]
    assert [int(row["record"]) for row in rows] == order.tolist()
    assert float(rows[0]["guess"]) == pytest.approx(guess[order[0]], rel=1e-5)
    np.testing.assert_allclose([float(row["error"]) for row in rows], (predicted - true)[order], rtol=1e-4)
    assert Image.open(tmp_path / "plots" / "scatter.png").size == (720, 720)


def test_real_probabilities_of_scikit_learn(tmp_path):
    """The whole report beside scikit-learn's, on its own digits."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    x, y = load_digits(return_X_y=True)
    with warnings.catch_warnings(action="ignore"):  # it need not converge
        model = LogisticRegression(max_iter=20).fit(x[:300] / 16, y[:300])
    logits = model.decision_function(x[300:] / 16).astype(np.float32)
    records = Arrays({"inputs": logits, "targets": y[300:].astype(np.int32)})
    found, _ = evaluate(Classify(), records)
    want = sk.classification_report(y[300:], logits.argmax(-1), output_dict=True)
    assert found["accuracy"] == pytest.approx(want["accuracy"])
    assert found["f1"] == pytest.approx(want["macro avg"]["f1-score"])
    assert found["recall"] == pytest.approx(want["macro avg"]["recall"])
    lines = Classify().artifacts(outcome(Classify(), records, logits, Data(tuple("0123456789")), tmp_path, "test"))
    assert any(line.split() == ["9", *(f"{want['9'][k]:.4f}" for k in ("precision", "recall", "f1-score")),
                                f"{int(want['9']['support'])}"] for line in lines)
