"""GANs: the one scalar against two separate losses, shapes, devices, sample grids, and the judge's scores."""

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from lab.errors import UserError
from lab.models.gan import GAN, pixel_shuffle, stages
from lab.optim import Adam
from lab.tasks.adversarial import GAP, GRID, Adversarial, generate_images, grid, judge_scores, latents, over_time
from lab.tasks.base import EvalResult
from tests.conftest import computing

B = 8
WEIGHT = np.array([1, 1, 0, 1, 1, 1, 1, 0], np.float32)
MODEL = GAN(latent=3, width=4, shape=(8, 8, 1), norm="batchnorm")
KINDS = ("non_saturating", "hinge")


@pytest.fixture(autouse=True, scope="module")
def quick_compiles() -> Iterator[None]:
    """Compiling takes most of the time here; what is compiled has no need to be fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class ToyGenerator(nn.Module):
    """A perceptron with BatchNorm."""

    @nn.compact
    def __call__(self, z, train):
        h = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(8, name="hidden")(z))
        return nn.tanh(nn.Dense(64, name="out")(nn.relu(h))).reshape(-1, 8, 8, 1)


class ToyDiscriminator(nn.Module):
    """A perceptron."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(1, name="out")(nn.leaky_relu(nn.Dense(8, name="hidden")(x.reshape(-1, 64))))[:, 0]


class Toy(nn.Module):
    """What the task asks of a model; compiles in no time."""

    latent: int = 3

    def setup(self):
        self.generator, self.discriminator = ToyGenerator(), ToyDiscriminator()

    def generate(self, z, train):
        return self.generator(z, train)

    def discriminate(self, x, train):
        return self.discriminator(x, train)

    def __call__(self, inputs, *, train, mask=None):
        return self.generate(jnp.zeros((1, 3)), train), self.discriminate(inputs, train)


@functools.cache
def batch_of(n: int = B) -> dict[str, Any]:
    """Random images in [-1, 1] with keys by record, two of them padding."""
    images = np.random.default_rng(0).uniform(-1, 1, (n, 8, 8, 1)).astype(np.float32)
    keys = jax.jit(jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i)))(jnp.arange(n))
    return {"inputs": jnp.asarray(images), "weight": jnp.asarray(WEIGHT[:n]), "key": keys}


def norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(tree))))


def apart(a: Any, b: Any) -> float:
    """The norm of the difference, relative to that of `b`."""
    return norm(jax.tree.map(lambda x, y: np.asarray(x, np.float64) - y, a, b)) / norm(b)


def made(model: nn.Module) -> dict[str, Any]:
    """Parameters with which the discriminator says something else for every image."""
    found = jax.jit(lambda: Adversarial().init(model, jax.random.key(0), batch_of()))()
    grow = 20 if model is MODEL else 2
    return {**found, "params": jax.tree.map(lambda x: x * (grow if x.ndim > 1 else 1), found["params"])}


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    return made(MODEL)


@pytest.fixture(scope="module")
def toy() -> dict[str, Any]:
    return made(Toy())


def scalar(model: nn.Module, kind: str, variables: Any, batch: Any) -> tuple[Any, Any]:
    """Gradient of the task's scalar, and the rest that the task returns."""
    def loss(params: Any) -> Any:
        total, *rest = Adversarial(kind).loss(model, {**variables, "params": params}, batch, {}, train=True)
        return total, rest

    return jax.grad(loss, has_aux=True)(variables["params"])


combined = jax.jit(scalar, static_argnums=(0, 1))


def separate(model: nn.Module, kind: str, variables: Any, batch: Any) -> Any:
    """Two losses with a gradient each, from the papers' formulas and without any stop-gradient."""
    both, weight = variables["params"], batch["weight"]
    model_state = {name: value for name, value in variables.items() if name != "params"}
    z = latents(batch["key"], model.latent)

    def run(method: str, inputs: Any, **params: Any) -> Any:
        return model.apply(
            {"params": both | params, **model_state}, inputs, True, method=method, mutable=["batch_stats"]
        )[0]

    def of_discriminator(params: Any) -> Any:
        real, fake = (run("discriminate", x, discriminator=params) for x in (batch["inputs"], run("generate", z)))
        if kind == "hinge":
            return (weight * (jnp.maximum(0, 1 - real) + jnp.maximum(0, 1 + fake))).sum()
        return -(weight * (jnp.log(jax.nn.sigmoid(real)) + jnp.log(1 - jax.nn.sigmoid(fake)))).sum()

    def of_generator(params: Any) -> Any:
        fake = run("discriminate", run("generate", z, generator=params))
        return -(weight * (fake if kind == "hinge" else jnp.log(jax.nn.sigmoid(fake)))).sum()

    return jax.jit(lambda: {"discriminator": jax.grad(of_discriminator)(both["discriminator"]),
                            "generator": jax.grad(of_generator)(both["generator"])})()


@pytest.mark.parametrize(("model", "kind"), [(Toy(), "non_saturating"), (Toy(), "hinge"), (MODEL, "non_saturating")],
                         ids=["toy-non_saturating", "toy-hinge", "gan"])
def test_one_scalar_has_the_gradients_of_two_losses(model, kind, monkeypatch):
    batch, variables = batch_of(), made(model)
    want = separate(model, kind, variables, batch)
    found, _ = combined(model, kind, variables, batch)
    for part in ("generator", "discriminator"):
        assert norm(want[part]) > 0.1
        assert apart(found[part], want[part]) < 1e-5
    if model is MODEL:
        return
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda x: x)  # negative control: the plain sum of the two losses
    wrong, _ = jax.jit(lambda *trees: scalar(model, kind, *trees))(variables, batch)
    for part in want:
        assert apart(wrong[part], want[part]) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_losses_in_closed_form(kind):
    real, fake, fooled = np.random.default_rng(1).normal(scale=2, size=(3, 50))
    d, g = Adversarial(kind).losses(*(jnp.asarray(x, jnp.float32) for x in (real, fake, fooled)))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    if kind == "hinge":
        want = np.maximum(0, 1 - real) + np.maximum(0, 1 + fake), -fooled
    else:
        want = -np.log(sigmoid(real)) - np.log(1 - sigmoid(fake)), -np.log(sigmoid(fooled))
        smooth, _ = Adversarial(kind, label_smoothing=0.1).losses(*map(jnp.float32, (real, fake, fooled)))
        smoothed = -0.9 * np.log(sigmoid(real)) - 0.1 * np.log(1 - sigmoid(real)) - np.log(1 - sigmoid(fake))
        np.testing.assert_allclose(smooth, smoothed, rtol=1e-5)
        assert np.abs(smooth - want[0]).max() > 0.1  # negative control
    np.testing.assert_allclose(d, want[0], rtol=1e-5)
    np.testing.assert_allclose(g, want[1], rtol=1e-5)
    assert np.abs(d - Adversarial(kind).losses(fake, real, fooled)[0]).max() > 0.1  # negative control: exchanged


def test_metrics_count_real_records_only(variables):
    batch = batch_of()
    loss, weight, metrics, model_state = jax.jit(
        lambda b: Adversarial().loss(MODEL, variables, b, {}, train=False))(batch)
    assert apart(model_state["batch_stats"], variables["batch_stats"]) == 0  # evaluation leaves the statistics alone

    @jax.jit
    def logits(images: Any, z: Any) -> Any:
        judge = lambda x: MODEL.apply(variables, x, False, method="discriminate")
        return judge(images), judge(MODEL.apply(variables, z, False, method="generate"))

    real, fake = (np.asarray(x, np.float64) for x in logits(batch["inputs"], latents(batch["key"], 3)))
    softplus = lambda x: np.log1p(np.exp(x))
    per_record = {"discriminator_loss": softplus(-real) + softplus(fake), "generator_loss": softplus(-fake),
                  "real_accuracy": real > 0, "fake_accuracy": fake < 0}
    per_record["loss"] = per_record["discriminator_loss"] + per_record["generator_loss"]
    assert set(metrics) == set(per_record)
    for name, values in per_record.items():
        assert float(metrics[name][0]) == pytest.approx((values * WEIGHT).sum(), rel=1e-5)
        assert float(metrics[name][1]) == WEIGHT.sum() == 6
    assert (float(loss), float(weight)) == tuple(map(float, metrics["loss"]))
    assert 0 < per_record["real_accuracy"].mean() < 1 or 0 < per_record["fake_accuracy"].mean() < 1
    # Negative control: the padding counted.
    assert abs(per_record["loss"].mean() - (per_record["loss"] * WEIGHT).sum() / 6) > 1e-4


def test_noise_is_by_record(variables):
    keys = batch_of()["key"]
    z = latents(keys, 3)
    assert jnp.array_equal(latents(keys[3:5], 3), z[3:5])
    assert len({tuple(row) for row in z.tolist()}) == B
    many = np.asarray(latents(jax.random.split(jax.random.key(1), 4096), 3))
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03


def test_one_and_eight_devices_agree(toy):
    """Also with BatchNorm, whose statistics are those of the whole batch."""
    batch = batch_of()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole = combined(Toy(), "non_saturating", toy, batch)
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    copies = jax.device_put(toy, NamedSharding(mesh, PartitionSpec()))
    eight = combined(Toy(), "non_saturating", copies, spread)
    assert len(spread["inputs"].sharding.device_set) == 8
    assert apart(eight[0], whole[0]) < 1e-4
    for one, other in zip(jax.tree.leaves(eight[1]), jax.tree.leaves(whole[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    new = whole[1][2]["batch_stats"]
    assert apart(new, toy["batch_stats"]) > 1e-3  # training did change the statistics
    # Negative control: statistics of every half on its own.
    halves = [combined(Toy(), "non_saturating", toy, jax.tree.map(lambda x, i=i: x[i::2], batch))[0] for i in (0, 1)]
    assert apart(jax.tree.map(jnp.add, *halves), whole[0]) > 1e-2


@pytest.mark.parametrize("shape", [(28, 28, 1), (8, 8, 1), (32, 32, 3), (12, 20, 3)])
@pytest.mark.parametrize("norm", ["batchnorm", "groupnorm"])
def test_shapes(shape, norm):
    model = GAN(latent=5, width=8, shape=shape, norm=norm)
    model.validate()
    model.check(dict(zip(("height", "width", "channels"), shape, strict=True)))
    x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), x)
    assert set(shapes["params"]) == {"generator", "discriminator"}
    assert ("batch_stats" in shapes) == (norm == "batchnorm")
    assert {p.dtype for p in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    images, logits = jax.eval_shape(lambda v, x: model.apply(v, x, train=False), shapes, x)
    assert (images.shape, logits.shape) == ((2, *shape), (2,))


def test_stages():
    sizes = [(28, 28), (8, 8), (32, 32), (12, 20), (64, 8), (7, 8), (6, 6), (28, 27)]
    assert [stages(*s) for s in sizes] == [2, 1, 3, 1, 1, 0, 0, 0]


def test_pixel_shuffle_equals_numpy():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 8))
    want = np.zeros((2, 6, 8, 2))
    for row in range(6):
        for column in range(8):
            part = 2 * (row % 2) + column % 2
            want[:, row, column] = x[:, row // 2, column // 2, 2 * part: 2 * part + 2]
    np.testing.assert_array_equal(pixel_shuffle(x), want)


def test_cost_on_fashion_mnist():
    """At most 8 million multiply-adds an image forward, for either network."""
    model = GAN()
    x = jnp.zeros((1, 28, 28, 1))
    v = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    for method, inputs in (("generate", jnp.zeros((1, model.latent))), ("discriminate", x)):
        run = jax.jit(lambda v, i, method=method: model.apply(v, i, False, method=method))
        assert 5e5 < run.lower(v, inputs).cost_analysis()["flops"] / 2 < 8e6


@pytest.mark.parametrize(("change", "words"), [
    ({"latent": 0}, "model.latent"), ({"width": 1}, "model.width"), ({"shape": (28, 27, 1)}, "model.shape"),
    ({"shape": (6, 6, 1)}, "model.shape"), ({"shape": (28, 28, 2)}, "model.shape")])
def test_wrong_models(change, words):
    with pytest.raises(UserError, match=words):
        GAN(**change).validate()


def test_what_does_not_fit():
    GAN().check({"classes": 10})
    with pytest.raises(UserError, match="8 x 8 x 1.*--model.shape 8 8 1"):
        GAN().check({"height": 8, "width": 8, "channels": 1, "classes": 10})
    with pytest.raises(UserError, match="label-smoothing"):
        Adversarial(label_smoothing=1.0).validate()
    with pytest.raises(UserError, match="hinge"):
        Adversarial("hinge", label_smoothing=0.1).validate()
    with pytest.raises(UserError, match="normalise"):
        Adversarial().loss(MODEL, {"params": {}}, batch_of() | {"inputs": jnp.zeros((B, 8, 8, 1), jnp.uint8)}, {}, True)


# ---------------------------------------------------------------------------------------------------------- samples


def outcome(folder: Any, variables: Any, step: int = 1, seed: int = 0) -> EvalResult:
    return EvalResult(model=MODEL, compute=computing(MODEL, variables), data=None, records=None, split="validation",
                   means={}, counts={}, predictions=dict, step=step, seed=seed, folder=folder)


def pixels(path: Any) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_sample_i_depends_on_the_seed_and_i_alone(variables):
    images = generate_images(computing(MODEL, variables), 10, seed=3, batch=16)
    assert images.shape == (10, 8, 8, 1) and images.dtype == np.uint8 and images.std() > 0
    np.testing.assert_array_equal(generate_images(computing(MODEL, variables), 10, seed=3, batch=4), images)
    assert (generate_images(computing(MODEL, variables), 10, seed=4, batch=16) != images).any()
    assert len(np.unique(images.reshape(10, -1), axis=0)) == 10


def test_snapshots_have_the_same_noise(variables, tmp_path):
    task = Adversarial()
    for step, seed in ((10, 0), (20, 0), (30, 1)):
        task.snapshot(outcome(tmp_path, variables, step, seed))
    a, b, other = (pixels(tmp_path / "samples" / f"step-{step:06d}.png") for step in (10, 20, 30))
    np.testing.assert_array_equal(a, b)
    assert (a != other).any()  # negative control: another seed has other noise
    assert not list(tmp_path.rglob("*.tmp"))
    # The picture holds the images: undo frame and magnification.
    scale = 56 // 8
    inner = a[GAP:, GAP:].reshape(GRID, 8 * scale + GAP, GRID, 8 * scale + GAP)[:, :-GAP:scale, :, :-GAP:scale]
    np.testing.assert_array_equal(inner.transpose(0, 2, 1, 3).reshape(64, 8, 8, 1),
                                  generate_images(computing(MODEL, variables), 64, seed=0))


def test_samples_over_time_are_read_back(variables, tmp_path):
    """As in a resumed run: the snapshots of the first process are files only, one of them from a lost future."""
    task, later = Adversarial(), {**variables, "params": jax.tree.map(lambda x: x * 0.5, variables["params"])}
    assert len(task.artifacts(outcome(tmp_path / "eval", variables))) == 1  # no snapshots: one grid, no history
    for step, v in ((0, variables), (5, later), (9, variables)):
        task.snapshot(outcome(tmp_path, v, step))
    lines = Adversarial().artifacts(outcome(tmp_path, later, step=5))
    assert "2 steps" in lines[1]
    np.testing.assert_array_equal(pixels(tmp_path / "plots/samples.png"), pixels(tmp_path / "samples/step-000005.png"))
    sheet = pixels(tmp_path / "plots/samples_over_time.png")
    height = 56 + GAP
    assert sheet.shape[0] == 2 * height + GAP
    for row, step in enumerate((0, 5)):
        first = pixels(tmp_path / "samples" / f"step-{step:06d}.png")[:height]
        np.testing.assert_array_equal(sheet[row * height: (row + 1) * height, 60:, 0], first)
    assert (sheet[:height, 60:] != sheet[height: 2 * height, 60:]).any()


def test_many_snapshots_are_thinned_out(tmp_path):
    paths = {}
    for step in range(0, 300, 10):
        paths[step] = tmp_path / f"{step}.png"
        grid(np.full((64, 8, 8, 3), step % 256, np.uint8)).save(paths[step])
    sheet = np.asarray(over_time(paths))
    assert sheet.shape[0] == 12 * 58 + GAP
    assert (sheet[30, 100, 0], sheet[11 * 58 + 30, 100, 0]) == (0, 290 % 256)  # the first and the last


def test_evaluation_draws_the_averaged_generator(variables, tmp_path):
    """The optimizer's average, which `lab.train.step.eval_params` hands to evaluation, is what the grid shows."""
    from lab.train.step import State, eval_params

    optim = Adam(0.05, b1=0.5, ema=0.99, lr_multipliers=(("^generator/", 1.0), ("^discriminator/", 0.0)))
    tx, params, batch = optim.build(10), variables["params"], batch_of()
    state = tx.init(params)  # raises UserError if a group matches no path
    for _ in range(3):
        grads, _ = combined(MODEL, "non_saturating", {**variables, "params": params}, batch)
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    assert apart(params["discriminator"], variables["params"]["discriminator"]) == 0
    assert apart(params["generator"], variables["params"]["generator"]) > 0.01
    experiment = SimpleNamespace(optim=optim, precision="float32", adapt=None)
    averaged = {**variables, "params": eval_params(experiment, State(jnp.int32(3), params, {}, state))}
    Adversarial().snapshot(outcome(tmp_path, averaged))
    shown = pixels(tmp_path / "samples" / "step-000001.png")
    np.testing.assert_array_equal(shown, np.asarray(grid(generate_images(computing(MODEL, averaged), 64, seed=0))))
    last = computing(MODEL, {**variables, "params": params})
    assert (shown != np.asarray(grid(generate_images(last, 64, seed=0)))).any()


# ----------------------------------------------------------------------------------------------------------- scores


def sure(labels: np.ndarray, classes: int, p: float = 0.95) -> np.ndarray:
    """Probabilities that give every sample's label p and share the rest."""
    found = np.full((len(labels), classes), (1 - p) / (classes - 1))
    found[np.arange(len(labels)), labels] = p
    return found


def test_judge_scores():
    even = judge_scores(sure(np.arange(1000) % 10, 10))
    assert even == pytest.approx({"samples": 1000, "confident": 1, "confidence": 0.95, "entropy": np.log(10),
                                  "normalised_entropy": 1, "classes": 10, "collapsed": 0})
    assert judge_scores(sure(np.arange(1000) % 10, 10, p=0.89))["confident"] == 0
    one = judge_scores(sure(np.zeros(50, int), 10))
    assert (one["entropy"], one["classes"], one["collapsed"]) == (0, 1, 1)
    p = np.array([0.5, 0.3, 0.15, 0.05])
    labels = np.repeat(np.arange(4), (p * 1000).round().astype(int))
    assert judge_scores(sure(labels, 10))["entropy"] == pytest.approx(-(p * np.log(p)).sum())


@pytest.mark.parametrize(("counts", "collapsed"), [
    ([100] * 10, 0),
    ([200] * 5, 0),  # half of the classes, entropy 0.70: still none
    ([250] * 4, 1),  # fewer than half
    ([905] + [11] * 8 + [7], 1),  # 9 classes, but nearly all in one: entropy 0.26
    ([960] + [5] * 8, 1),  # classes below 1 % do not count
])
def test_the_rule_of_collapse(counts, collapsed):
    found = judge_scores(sure(np.repeat(np.arange(len(counts)), counts), 10))
    assert found["collapsed"] == collapsed, found


@pytest.mark.parametrize("shape", [(0, 10), (5,), (5, 1)])
def test_scores_of_nothing(shape):
    with pytest.raises(UserError, match="probabilities"):
        judge_scores(np.ones(shape))
