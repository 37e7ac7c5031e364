"""MultiTask and its model: the gradient is the weighted sum of the parts', and every part reports as it would alone."""

import functools
import json
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics as sk
from PIL import Image

from lab.data.pipeline import Arrays, eval_batches
from lab.errors import UserError
from lab.models.multitask import ClassifyAndReconstruct
from lab.tasks.base import EvalResult
from lab.tasks.multitask import MultiTask, Part
from lab.tasks.regress import Regress
from lab.tasks.supervised import Classify
from lab.train import metrics
from tests.conftest import computing

GROUPS = (0, 1, 0, 1, 2)
PARTS = (Part("class", Classify(label_smoothing=0.1), weight=1.5),
         Part("group", Classify(class_weights=(1.0, 2.0, 0.5)), weight=0.5, groups=GROUPS,
              group_names=("top", "shoe", "bag")),
         Part("image", Regress("huber"), weight=3.0, target="inputs"))
TASK = MultiTask(PARTS)


class Small(nn.Module):
    """A trunk and three heads that compile fast."""

    @nn.compact
    def __call__(self, x, *, train):
        code = nn.tanh(nn.Dense(6, name="trunk")(x.reshape(len(x), -1)))
        return {"class": nn.Dense(5, name="class_head")(code), "group": nn.Dense(3, name="group_head")(code),
                "image": nn.Dense(30, name="image_head")(code).reshape(x.shape)}


MODEL, CONVOLUTIONS = Small(), ClassifyAndReconstruct(classes=5, groups=3, channels=(3, 4), code=6)
RNG = np.random.default_rng(0)
N, B = 11, 4
RECORDS = Arrays({"inputs": RNG.normal(size=(N, 6, 5, 1)).astype(np.float32),
                  "targets": RNG.integers(0, 5, N).astype(np.int32)})
BATCH = RECORDS[np.arange(B)] | {"weight": np.array([1, 0, 1, 1], np.float32)}


@functools.cache
def variables():
    return jax.jit(lambda: TASK.init(MODEL, jax.random.key(0), BATCH))()


class Output:
    """One output of the model, as a model of its own."""

    def __init__(self, name):
        self.name = name

    def apply(self, variables, x, **options):
        return MODEL.apply(variables, x, **options)[self.name]


OWN_TARGETS = {"class": lambda batch: batch["targets"], "group": lambda batch: np.array(GROUPS)[batch["targets"]],
               "image": lambda batch: batch["inputs"]}


@functools.cache
def compiled():
    """Of MultiTask and of each part's task alone, with targets made here: ((loss sum, (weight, metrics)), gradient)."""
    def gradient(task, model, params, batch):
        def loss(params):
            total, weight, found, _ = task.loss(model, {"params": params}, batch, {}, train=True)
            return total, (weight, found)

        return jax.value_and_grad(loss, has_aux=True)(params)

    @jax.jit
    def everything(params, batch, targets):
        return gradient(TASK, MODEL, params, batch), [
            gradient(part.task, Output(part.name), params, batch | {"targets": targets[part.name]}) for part in PARTS]

    return lambda batch: everything(variables()["params"], batch,
                                    {name: make(batch) for name, make in OWN_TARGETS.items()})


def test_the_gradient_is_the_weighted_sum_of_the_parts():
    ((total, (weight, found)), gradient), each = compiled()(BATCH)
    assert weight == 3
    np.testing.assert_allclose(total, sum(p.weight * a[0][0] for p, a in zip(PARTS, each, strict=True)), rtol=1e-5)
    want = jax.tree.map(lambda *g: sum(p.weight * x for p, x in zip(PARTS, g, strict=True)), *(a[1] for a in each))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, want)
    for part, ((_, (_, own)), _) in zip(PARTS, each, strict=True):
        for name, pair in own.items():
            np.testing.assert_allclose(found[f"{part.name}_{name}"], pair, rtol=1e-5)
    for _, other in each:  # every part moves the trunk
        assert np.abs(other["trunk"]["kernel"]).max() > 1e-2
    np.testing.assert_allclose(found["loss"], (total, weight))
    plain = jax.tree.map(lambda a, *b: np.abs(a - sum(b)).max(), gradient, *(a[1] for a in each))
    assert max(jax.tree.leaves(plain)) > 0.1  # negative control: the sum without weights


def test_padding_counts_nothing():
    first, _ = compiled()(BATCH)
    garbage = BATCH | {"inputs": BATCH["inputs"].copy()}
    garbage["inputs"][1] = 50
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(compiled()(garbage)[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    counted, _ = compiled()(garbage | {"weight": np.ones(B, np.float32)})
    assert abs(counted[0][0] - first[0][0]) > 1  # negative control


def evaluated():
    step = jax.jit(lambda batch: TASK.loss(MODEL, variables(), batch, {}, train=False)[2])
    total = None
    for batch in eval_batches(RECORDS, B):
        total = metrics.add(total, step(batch))
    means, counts = metrics.means(total), metrics.counts(total)
    return means | TASK.summary(means, counts), counts


def predicted():
    step = jax.jit(lambda batch: TASK.predict(MODEL, variables(), batch))
    parts = [jax.device_get(step(batch)) for batch in eval_batches(RECORDS, B)]
    return {name: np.concatenate([part[name] for part in parts])[:N] for name in parts[0]}


class Data:
    classes = ("shirt", "boot", "dress", "sandal", "bag")
    test = None

    def reference(self):
        return []


def test_evaluation_predictions_and_report(tmp_path):
    """Every part beside scikit-learn and NumPy, on a ragged split; the files have the names of the parts."""
    found, counts = evaluated()
    predictions = predicted()
    true, groups = RECORDS.arrays["targets"], np.array(GROUPS)[RECORDS.arrays["targets"]]
    for part, truth in (("class", true), ("group", groups)):
        guess = predictions[f"{part}_prediction"]
        assert found[f"{part}_accuracy"] == pytest.approx(sk.accuracy_score(truth, guess))
        macro = sk.f1_score(truth, guess, average="macro", zero_division=0)
        assert found[f"{part}_f1"] == pytest.approx(macro, rel=1e-5)
        assert counts[f"{part}_confusion"].sum() == N
    outputs = MODEL.apply(variables(), RECORDS.arrays["inputs"], train=False)
    want = RECORDS.arrays["inputs"].reshape(N, -1), np.asarray(outputs["image"]).reshape(N, -1)
    assert found["image_rmse"] == pytest.approx(sk.root_mean_squared_error(want[0].ravel(), want[1].ravel()), rel=1e-4)
    assert found["image_r2"] == pytest.approx(sk.r2_score(want[0].ravel(), want[1].ravel()), rel=1e-3)
    new = {"inputs": RECORDS.arrays["inputs"]}  # what `predict` has: no targets
    for name, value in TASK.predict(MODEL, variables(), new).items():
        np.testing.assert_allclose(value, predictions[name], rtol=1e-3, atol=1e-3)
    columns = TASK.columns(predictions, Data())
    assert list(columns) == ["class_prediction", *(f"class_p_{c}" for c in Data.classes), "group_prediction",
                             "group_p_top", "group_p_shoe", "group_p_bag", "image_error"]
    assert columns["class_prediction"] == [Data.classes[i] for i in predictions["class_prediction"]]
    np.testing.assert_allclose(columns["image_error"], np.square(want[0] - want[1]).mean(1), rtol=2e-2)

    lines = TASK.artifacts(EvalResult(MODEL, computing(MODEL, None), Data(), RECORDS, "validation", found, counts,
                                   lambda: predictions, 1, 0, tmp_path))
    for start in ("class: Validation split, 11 records: accuracy", "group: Validation split, 11 records: accuracy",
                  "image: Validation split, 11 records: mean squared error"):
        assert any(line.startswith(start) for line in lines)
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == [
        "class_confusion.png", "class_worst.png", "group_confusion.png", "group_worst.png", "image.png"]
    assert "shoe" in (tmp_path / "group_report.txt").read_text()
    assert Image.open(tmp_path / "plots" / "image.png").size[0] == 1800  # 10 inputs above 10 reconstructions


def test_soft_targets_become_soft_groups():
    soft = RNG.dirichlet(np.ones(5), 3).astype(np.float32)
    got = np.asarray(PARTS[1].of({"targets": soft})["targets"])
    want = np.stack([soft[:, [0, 2]].sum(1), soft[:, [1, 3]].sum(1), soft[:, 4]], 1)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    hard = np.array([4, 0, 3])
    assert PARTS[1].of({"targets": hard})["targets"].tolist() == [2, 0, 1]


def test_reconstruction_knows_no_units_of_the_target():
    batch = {"inputs": 1, "targets": 2, "scale": 3, "offset": 4, "weight": 5}
    assert PARTS[2].of(batch) == {"inputs": 1, "targets": 1, "weight": 5}
    assert PARTS[0].of(batch) == batch


def test_curves_are_those_of_the_parts():
    assert TASK.curves == ("loss", "class_loss", "class_accuracy", "group_loss", "group_accuracy", "image_loss",
                           "image_mae")


@pytest.mark.parametrize("parts, text", [
    ((), "MultiTask needs parts=(Part(...), ...), each with a name of its own."),
    ((PARTS[0], PARTS[0]), "MultiTask needs parts=(Part(...), ...), each with a name of its own."),
    ((replace(PARTS[0], weight=-1.0),), "--task.parts.0.weight must be 0 or more, not -1.0."),
    ((PARTS[0], replace(PARTS[0], name="b", target="inputs")), "--task.parts.1.target inputs: only Regress can match "
                                                               "inputs."),
    ((replace(PARTS[2], groups=(0,)),), "--task.parts.0.groups must be numbers from 0, for a part whose task is "
                                        "Classify."),
    ((replace(PARTS[1], groups=(0, -1)),), "--task.parts.0.groups must be numbers from 0, for a part whose task is "
                                           "Classify."),
    ((replace(PARTS[1], group_names=("a",)),), "--task.parts.0.group-names must have one name for each group."),
    ((PARTS[2], replace(PARTS[0], task=Classify(2.0))), "--task.parts.1.task.label-smoothing must be in [0, 1), not "
                                                        "2.0."),
])
def test_parts_that_cannot_be(parts, text):
    with pytest.raises(UserError) as e:
        MultiTask(parts).validate()
    assert str(e.value) == text
    TASK.validate()


@pytest.mark.parametrize("parts, text", [
    ((replace(PARTS[0], name="klass"),), "--task.parts.0.name klass is not an output of the model, which has class, "
                                         "group, image."),
    ((replace(PARTS[1], groups=(0, 1, 2, 3, 3), group_names=()),), "--task.parts.0.groups has group 3, but the model's "
                                                                   "output group is for 3 groups."),
    ((PARTS[0], replace(PARTS[1], groups=(0, 1, 2, 0))), "--task.parts.1.groups has 4 numbers for 5 classes."),
])
def test_outputs_that_do_not_fit(parts, text):
    """JAX would clamp the index or go on with another shape."""
    with pytest.raises(UserError) as e:
        jax.eval_shape(lambda v: MultiTask(parts).loss(MODEL, v, BATCH, {}, True), variables())
    assert str(e.value) == text


def test_flags_and_json_reach_into_the_parts():
    import tyro

    from lab.configuration.field_types import check_types
    from lab.configuration.rebuild import from_json
    from lab.configuration.values import to_json

    changed = tyro.cli(MultiTask, default=TASK, args=["--parts.1.weight", "7", "--parts.0.task.label-smoothing", "0.3"],
                       config=(tyro.conf.AvoidSubcommands,))
    assert (changed.parts[1].weight, changed.parts[0].task.label_smoothing) == (7.0, 0.3)
    assert changed.parts[2] == TASK.parts[2]
    assert from_json(json.loads(json.dumps(to_json(changed)))) == changed != TASK
    check_types(TASK)


# ----------------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("groups, reconstruct, shape", [(3, True, (7, 9, 3)), (0, False, (8, 8, 1)),
                                                        (0, True, (4, 5, 1))])
def test_heads_are_chosen_by_fields(groups, reconstruct, shape):
    model = ClassifyAndReconstruct(classes=4, groups=groups, reconstruct=reconstruct, channels=(2, 3), code=5)
    x = jax.ShapeDtypeStruct((2, *shape), jnp.bfloat16)
    outputs, shapes = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, train=False), x)
    want = {"class": (2, 4)} | ({"group": (2, 3)} if groups else {}) | ({"image": (2, *shape)} if reconstruct else {})
    assert {name: out.shape for name, out in outputs.items()} == want
    assert all(out.dtype == jnp.float32 for out in outputs.values())  # the heads, whatever the compute type
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
    assert ("decoder" in shapes["params"]) == reconstruct and ("group_head" in shapes["params"]) == (groups > 0)


def test_each_head_reaches_the_trunk_and_no_other_head():
    """And dropout is for training, where the reconstruction still sees all of the code."""
    x = BATCH["inputs"]
    params = jax.jit(lambda: CONVOLUTIONS.init(jax.random.key(0), x, train=False))()["params"]

    def run(params, key=None, rate=0.5):
        rngs = {} if key is None else {"dropout": key}
        return CONVOLUTIONS.clone(dropout=rate).apply({"params": params}, x, train=key is not None, rngs=rngs)

    @jax.jit
    def everything(params, first, second):
        return jax.jacrev(lambda p: jax.tree.map(jnp.sum, run(p)))(params), [
            run(params, first), run(params, second), run(params), run(params, first, 0.0)]

    gradients, (a, b, evaluated, without) = everything(params, jax.random.key(1), jax.random.key(2))
    heads = {"class": "class_head", "group": "group_head", "image": "image_head"}
    for name, gradient in gradients.items():
        moved = {key for key, value in gradient.items() if any(np.any(x) for x in jax.tree.leaves(value))}
        assert {"conv_0", "conv_1", "code_layer", heads[name]} <= moved
        assert not moved & (set(heads.values()) - {heads[name]})
        assert ("decoder" in moved) == (name == "image")
    assert np.abs(a["class"] - b["class"]).max() > 1e-3 < np.abs(a["group"] - b["group"]).max()
    np.testing.assert_allclose(a["image"], b["image"], rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), evaluated, without)


@pytest.mark.parametrize("change, text", [
    ({"classes": 0}, "--model.classes must be at least 1, not 0."),
    ({"groups": -1}, "--model.groups must be 0 or more, not -1."),
    ({"channels": ()}, "--model.channels must be one number or more, each at least 1."),
    ({"dropout": 1.0}, "--model.dropout must be in [0, 1), not 1.0."),
])
def test_fields_out_of_range(change, text):
    with pytest.raises(UserError) as e:
        CONVOLUTIONS.clone(**change).validate()
    assert str(e.value) == text
    CONVOLUTIONS.validate()


@pytest.mark.parametrize("facts, text", [
    ({"classes": 10}, "The data has 10 classes and the model 5. Use --model.classes 10."),
    ({"height": 3}, "2 poolings halve the image as often, and its height is only 3. Give fewer --model.channels."),
])
def test_data_that_does_not_fit(facts, text):
    with pytest.raises(UserError) as e:
        CONVOLUTIONS.check(facts)
    assert str(e.value) == text
    CONVOLUTIONS.check({"classes": 5, "height": 4})
    CONVOLUTIONS.check({})
