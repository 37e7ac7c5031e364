"""CLIP and Contrastive: the loss by NumPy and transformers, negatives of the global batch, captions, zero-shot classes,
the commands."""

import csv
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lab.data.images import Augment, CaptionedImages, Images
from lab.data.pipeline import train_batch
from lab.data.tables import Sklearn
from lab.data.word_tokenizer import words
from lab.errors import UserError
from lab.experiment import Mesh
from lab.models.clip import MOST, START, capped
from lab.tasks.base import transform_batch
from lab.tasks.contrastive import Contrastive, pair_losses
from lab.train.check import check_data
from lab.train.program import Program
from lab.train.step import State, prepare
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HEAD = f'''"""Digits and words.

    ./launch.sh pairs.py
"""

import flax.linen as nn

from lab.data.images import CaptionedImages
from lab.data.tables import Sklearn
from lab.experiment import Checkpoint, Evaluate, Experiment, Mesh
from lab.models.bert import BERT
from lab.models.clip import CLIP
from lab.models.vit import ViT
from lab.optim import SGD, Constant
from lab.tasks.contrastive import Contrastive


class Image(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(6, name="features")(x.reshape(len(x), -1))


class Text(nn.Module):
    @nn.compact
    def __call__(self, ids, *, train, mask):
        return (nn.Embed(16, 6, name="words")(ids) * mask[..., None]).sum(1)


def of(model):
    data = CaptionedImages(Sklearn("digits"), shape=(8, 8, 1), test=0.2, names={NAMES},
                           templates=("a handwritten {{}}", "the digit {{}}"))
    return Experiment(data, model, Contrastive(), SGD(lr=Constant(1.0)), steps=2, batch=16, evaluate=Evaluate(every=0),
                      checkpoint=Checkpoint(every=0), mesh=Mesh(data=1))
'''
SMALL = "\n\nexperiment = of(CLIP(Image(), Text(), 8))\n"  # compiles fast
LARGE = '''

experiment = of(CLIP(ViT(depth=1, width=8, heads=2, patch=4, classes=None),
                     BERT(depth=1, width=8, heads=2, context=4, segments=0, pool="mean", output="embedding"), 8))
'''
exec(HEAD + SMALL, defined := {})
PAIRS = defined["experiment"]
DATA = PAIRS.data
TRANSFORMERS = 19.211476  # image_text_contrastive_loss of transformers 5.24, of the pairs below times 20


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("contrastive")
    (folder / "small.py").write_text(HEAD + SMALL)
    (folder / "pairs.py").write_text(HEAD + LARGE)
    return folder


# --------------------------------------------------------------------------------------------------------------- loss

def pairs(n: int = 6, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    found = draw.normal(size=(2, n, width))
    return tuple((found / np.linalg.norm(found, axis=-1, keepdims=True)).astype(np.float32))


def by_numpy(image: np.ndarray, text: np.ndarray, scale: float) -> np.ndarray:
    """The pseudocode of Radford et al. 2021, figure 3, in float64, for each pair."""
    logits = scale * image.astype(np.float64) @ text.T.astype(np.float64)
    each = [-np.diag(x - np.log(np.exp(x).sum(1, keepdims=True))) for x in (logits, logits.T)]
    return sum(each) / 2


def test_the_loss_is_that_of_the_paper_and_of_transformers():
    image, text = pairs()
    found = np.asarray(jax.jit(pair_losses)(image, text, 20.0, np.ones(6)))
    np.testing.assert_allclose(found, by_numpy(image, text, 20.0), atol=1e-6 * 20)
    assert found.mean() == pytest.approx(TRANSFORMERS, abs=1e-5)
    halves = np.concatenate([by_numpy(image[part], text[part], 20.0) for part in (slice(3), slice(3, 6))])
    assert np.abs(halves - found).max() > 0.1  # negative control: negatives of half of the batch


def test_padding_is_no_negative():
    image, text = pairs()
    weight = np.array([1, 0, 1, 1, 0, 1])
    real = weight > 0

    @jax.jit
    def total(image, text, weight):
        return jax.value_and_grad(lambda pair: (pair_losses(*pair, 20.0, weight) * weight).sum())((image, text))

    found, gradient = total(image, text, weight)
    assert found == pytest.approx(by_numpy(image[real], text[real], 20.0).sum(), rel=1e-5)
    assert all(np.all(g[~real] == 0) and np.all(np.any(g[real] != 0, -1)) for g in map(np.asarray, gradient))
    assert abs(found - by_numpy(image, text, 20.0)[real].sum()) > 0.1  # negative control: with them
    assert np.isfinite(total(image, text, 0 * weight)[0])


def test_the_scale_stops_at_its_cap_and_comes_back():
    gradient = jax.grad(lambda x, sign: sign * jnp.exp(capped(x)))
    assert float(jnp.exp(capped(MOST + 1.0))) == pytest.approx(100)
    assert gradient(START, -1.0) == pytest.approx(-1 / 0.07, rel=1e-5)
    assert gradient(MOST + 1.0, -1.0) == 0 and gradient(MOST + 1.0, 1.0) == pytest.approx(100, rel=1e-5)
    assert jax.grad(lambda x: jnp.exp(jnp.minimum(x, MOST)))(MOST + 1.0) == 0  # negative control: it would stay


@dataclass(frozen=True)
class OwnNegatives(Contrastive):
    """What each device computes alone."""

    whole_batch: ClassVar[bool] = False


def test_eight_devices_have_the_negatives_of_one():
    rows, draw = train_batch(DATA.load().train, 0, PAIRS.batch, 0), np.random.default_rng(0)

    def step(task: Contrastive, state: State | None = None) -> tuple[float, Any, State, str]:
        program = Program(replace(PAIRS, mesh=Mesh(data=8), task=task))
        if state is None:
            state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.abstract)
            normal = lambda x: draw.normal(size=x.shape).astype(x.dtype)
            state = state._replace(params=jax.tree.map(normal, state.params))
        after, values = program.train(jax.device_put(state, program.shardings), program.batch(lambda _: rows, 0))
        total, weight = jax.device_get(values["loss"])
        gradient = jax.tree.map(np.subtract, state.params, jax.device_get(after.params))  # the rate is 1
        return total / weight, gradient, state, program.compiled.as_text()

    @jax.jit
    @jax.value_and_grad
    def on_one_device(params: Any) -> jax.Array:
        batch = prepare(PAIRS, rows, True, 0)
        total, weight, _, _ = PAIRS.task.loss(PAIRS.model, {"params": params}, batch, {}, train=True)
        return total / weight

    loss, gradient, state, program = step(Contrastive())
    want_loss, want = jax.device_get(on_one_device(state.params))
    assert "all-gather" in program and loss == pytest.approx(want_loss, abs=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), gradient, want)
    loss, gradient, _, program = step(OwnNegatives(), state)  # negative control
    assert "all-gather" not in program and abs(loss - want_loss) > 1
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), gradient, want))) > 1e-2


# --------------------------------------------------------------------------------------------------------------- data

def rows_of(data: CaptionedImages, keys: jax.Array, train: bool = True) -> dict[str, np.ndarray]:
    records = data.load().train[np.arange(len(keys))]
    return jax.device_get(transform_batch(data, records, keys, train))


def test_a_caption_says_the_class_and_follows_from_the_key():
    keys = jax.random.split(jax.random.key(1), 40)
    found, other = rows_of(DATA, keys), rows_of(DATA, jax.random.split(jax.random.key(2), 40))
    data = DATA.load()
    prompts = rows_of(DATA, keys, train=False)["prompts"]
    assert "prompts" not in found and prompts.shape == (10, 2, 3) and prompts.dtype == np.int32
    assert data.metadata["vocab"] == 2 + 14 and prompts.max() == 15 and data.classes == NAMES
    where = np.array([[np.array_equal(text, caption) for caption in prompts[target]]
                      for text, target in zip(found["text"], found["targets"], strict=True)])
    assert np.all(where.sum(1) == 1) and set(where.argmax(1)) == {0, 1}
    assert np.array_equal(found["text"], rows_of(DATA, keys)["text"])
    assert not np.array_equal(found["text"], other["text"])
    np.testing.assert_array_equal(found["inputs"], rows_of(Images(DATA.source, DATA.shape, test=0.2), keys)["inputs"])
    assert len({prompts[i, j].tobytes() for i in range(10) for j in range(2)}) == 20 and words("A {}") == ["a"]


def test_names_of_the_source_are_filled_in():
    exec(HEAD + LARGE, made := {})
    found = replace(made["experiment"], data=replace(DATA, names=())).filled()
    assert found.data.names == tuple("0123456789") and found.model.text.vocab == 16
    assert found.data.load().fingerprint == DATA.load().fingerprint  # the same records


# ---------------------------------------------------------------------------------------------------------- zero-shot

def test_an_image_has_the_class_whose_captions_are_nearest():
    batch = rows_of(DATA, jax.random.split(jax.random.key(0), 12), train=False)
    batch["weight"] = np.ones(12, np.float32)
    shapes = jax.eval_shape(lambda: PAIRS.task.init(PAIRS.model, jax.random.key(0), batch))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), shapes)

    @jax.jit
    def everything(params):
        flat = batch["prompts"].reshape(20, 3)
        return (PAIRS.task.predict(PAIRS.model, params, batch),
                PAIRS.model.apply(params, batch["inputs"], flat, train=False),
                PAIRS.task.loss(PAIRS.model, params, batch, {}, False)[2])

    predicted, found, metrics = jax.device_get(everything(params))
    texts = found["text"].reshape(10, 2, -1)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=-1), 1, rtol=1e-5)
    classes = texts.mean(1) / np.linalg.norm(texts.mean(1), axis=-1, keepdims=True)
    logits = found["scale"] * found["image"] @ classes.T
    want = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(predicted["probabilities"], want / want.sum(1, keepdims=True), rtol=1e-3, atol=1e-6)
    assert np.array_equal(predicted["prediction"], logits.argmax(1))
    assert float(metrics["accuracy"][0]) == (logits.argmax(1) == batch["targets"]).sum()
    single = found["scale"] * found["image"] @ texts[:, 0].T
    assert np.abs(single - logits).max() > 0.1  # negative control: one template


# ----------------------------------------------------------------------------------------------------------- commands

def test_from_training_to_predictions(typed, mistake, place):
    status, out, err = typed("small.py", "--run-dir", "run")
    assert status == 0, err
    assert re.search(r"Accuracy: zero-shot 0\.\d{4}, linear probe 0\.\d{4}, chance 0\.1000", out)
    found = json.loads((place / "run/zero_shot.json").read_text())
    final = json.loads((place / "run/result.json").read_text())["test"]
    assert found["zero_shot"] == pytest.approx(final["accuracy"]) and found["records"] == 359
    assert found["linear_probe"] > 0.3 and found["probe_records"] == 1294
    assert (place / "run/plots/confusion.png").exists() and "seven" in (place / "run/report.txt").read_text()
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(place / "digit.png")
    status, out, err = typed("predict", "run", "--input", "digit.png", "--output", "-")
    row = next(csv.DictReader(out.splitlines()))
    assert status == 0 and row["prediction"] in NAMES and 0 < float(row["p_seven"]) < 1 and "embedding" not in row
    assert "the task of run is Contrastive" in mistake("explain", "run", "--input", "digit.png")
    assert "no metric 'loss' of single records" in mistake("audit", "run", "--records", "100")


@pytest.mark.parametrize("flags, said", [
    (("--grad-accum-steps", "2"), "Contrastive compares each record with all others of the batch, and "
                                  "--grad-accum-steps 2 computes parts of it alone"),
    (("--parallel", "pmap"), "and --parallel pmap computes parts"), (("--exact",), "and --exact computes parts"),
    (("--batch", "1"), "--batch must be at least 2"),
    (("--data.names", "one", "two"), "--data.names has 2 names, and scikit-learn digits has 10 classes"),
    (("--data.names", "one", "One"), "--data.names: 'One' is the same words as 'one'"),
    (("--data.templates", "a digit"), "'a digit' must have {} once"),
    (("--data.augment.mixup", "0.2", "--data.classes", "10"), "no caption says"),
    (("--data.templates", "a very long caption of {}"), "longest caption has 6 words, and --model.text.context is 4"),
    (("--model.text.vocab", "9"), "Use --model.text.vocab 16"),
    (("--model.image.classes", "10"), "--model.image.classes must be None"),
    (("--model.text.output", "hidden"), "--model.text.output must be embedding"),
    (("--model.image.patch", "3"), "not divisible by --model.image.patch 3"),
])
def test_mistakes_are_a_sentence(mistake, place, flags, said):
    assert said in mistake("pairs.py", *flags, "--run-dir", "other")
    assert not (place / "other/result.json").exists()


def test_other_data_and_models_are_refused(monkeypatch):
    plain = replace(PAIRS, data=Images(Sklearn("digits"), (8, 8, 1)))
    with pytest.raises(UserError, match="Contrastive needs images with captions"):
        check_data(plain, plain.data.load())
    with pytest.raises(UserError, match="Image cannot be applied"):
        check_data(replace(PAIRS, model=PAIRS.model.image), DATA.load())
    source = DATA._open()
    monkeypatch.setattr(CaptionedImages, "_open", lambda self: replace(source, names=()))
    with pytest.raises(UserError, match="has no class names to write captions with: give --data.names, one for each"):
        replace(DATA, names=()).named()
    with pytest.raises(UserError, match="'\\?' has no word in it"):
        replace(DATA, names=("?", "two")).validate()
    assert replace(DATA, augment=Augment(rotate=5.0)).validate() is None
