"""EfficientNet: torchvision's sizes and logits, stochastic depth, other people's files, and the study's equal FLOPs."""

import hashlib
import json
import math
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from lab.errors import UserError
from lab.models import cnn
from lab.models.depthwise import depthwise, shifted
from lab.models.efficientnet import SIZES, EfficientNet, MBConv
from lab.train.cost import count_flops
from lab.train.experiment_file import load
from lab.weights import find
from lab.weights.efficientnet import TIMM_RULES, TORCHVISION_RULES
from lab.weights.read import parameter_shapes, variables_of
from lab.weights.rules import Rules, applicable
from tests.conftest import ROOT
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

SMALL = {"width_multiple": 0.25, "depth_multiple": 0.5}
IMAGES = np.random.RandomState(0).standard_normal((2, 50, 64, 3)).astype(np.float32)  # odd and even sides, halved
# Logits of both images for the first 7 classes, of torchvision 0.28 (torch 2.13) in float64 with the weights of
# `tensors`: of its efficientnet_b0, and of its _efficientnet_conf(width_mult=0.25, depth_mult=0.5) with 7 classes.
WANTED = {
    "small": [[0.0025035986, -0.031991968, 0.055910978, 0.90965671, 0.39203227, 0.67654038, 0.73568626],
              [-0.01098531, -0.023310085, 0.052464808, 0.90780017, 0.39208474, 0.68424974, 0.73759787]],
    "b0": [[-1.1841159, 0.78280487, 0.47511275, 0.3861527, -0.29933345, -0.11797163, 0.49069492],
           [-1.1758631, 0.78021815, 0.47954908, 0.39247357, -0.31317565, -0.10404158, 0.48633133]]}
# sha256 of the sorted names and shapes of timm 1.0.31's efficientnet_b0 to b3.
TIMM = {"b0": "4204551cf9e54a73113090b632fcfa68f01621c3f13291a250c4650be6af0631",
        "b1": "60e99d10eea956b86437e5b20e2967fe424e86b6b78c97f464aa6889edcfe19e",
        "b2": "7b0a488ac41d620d9490289f71a166475a8db356b3b80bf2fa2880ed1e97a7c3",
        "b3": "38d6c64bbb7a0e60606affbe392b981da3210269521c33c55ac4de071c1bdffb"}


def shapes(model: EfficientNet, rules: Rules = TORCHVISION_RULES) -> dict[str, tuple[int, ...]]:
    """Names and shapes of their tensors."""
    ours = parameter_shapes(model, jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32))
    empty = {path: np.broadcast_to(np.float32(0), shape) for path, shape in ours.items()}
    return {rule.theirs: rule.write([empty[path] for path in rule.paths], {}).shape
            for rule in applicable(rules, 1, ours)}


def tensors(named: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Random tensors, each from its name alone. With 1.7 neither the signal nor the rounding grows from block to block:
    torch's float32 is within 6e-7 of its float64 for all sizes."""
    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        random = np.random.RandomState(zlib.crc32(name.encode()))
        if name.endswith("running_var") or name.endswith("weight") and len(shape) == 1:
            return random.uniform(0.5, 1.5, shape).astype(np.float32)
        scale = (1.7 / math.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.2
        return (random.standard_normal(shape) * scale).astype(np.float32)

    return {name: one(name, shape) for name, shape in named.items()}


def ours(model: EfficientNet, given: dict[str, np.ndarray], rules: Rules = TORCHVISION_RULES) -> dict[str, np.ndarray]:
    """Our arrays by path."""
    paths = parameter_shapes(model, jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32))
    return {path: x for rule in applicable(rules, 1, paths)
            for path, x in zip(rule.paths, rule.read(given[rule.theirs], {}), strict=True)}


def logits_of(model: EfficientNet):
    """A function of arrays by path, compiled once."""
    run = jax.jit(lambda v: model.apply(v, IMAGES, train=False))
    return lambda arrays: np.asarray(run(variables_of(arrays)))


def far(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, by the largest value."""
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("size, want", [("b0", 5_288_548), ("b1", 7_794_184), ("b2", 9_109_994), ("b3", 12_233_232)])
def test_sizes_are_torchvisions(size, want):
    def count(model: EfficientNet) -> int:
        spec = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
        return sum(math.prod(s) for path, s in parameter_shapes(model, spec).items() if "batch_stats" not in path)

    model = EfficientNet(**SIZES[size])
    assert count(model) == want and (size != "b0" or model == EfficientNet())
    if size == "b0":
        assert count(model.clone(stem="cifar")) == count(model.clone(norm="group")) == want
        assert count(model.clone(squeeze_ratio=0.0)) < want - 600_000  # negative control
    named = json.dumps(sorted(shapes(model, TIMM_RULES).items()))
    assert hashlib.sha256(named.encode()).hexdigest() == TIMM[size]


def test_logits_are_torchvisions(monkeypatch):
    model = EfficientNet(classes=7, **SMALL)
    given = ours(model, tensors(shapes(model)))
    logits = logits_of(model)
    want = np.array(WANTED["small"])
    assert far(logits(given), want) < 1e-5
    # Negative controls: no squeeze-excitation, the paper's epsilon, kernels turned, and "SAME" padding of even sizes.
    off = {path: x * 0 + (50 if path.endswith("bias") else 0) for path, x in given.items() if "/excite/" in path}
    assert far(logits(given | off), want) > 0.1
    assert far(logits({path: x + 1e-3 * path.endswith("/var") for path, x in given.items()}), want) > 1e-4
    turned = {path: x.swapaxes(0, 1) for path, x in given.items() if path.endswith("depthwise/kernel")}
    assert far(logits(given | turned), want) > 0.01
    convolution = nn.Conv

    def same(features: int, size: tuple[int, int], strides: int, padding: int, **fields) -> nn.Conv:
        sides = [(padding - 1, padding)] * 2 if strides == 2 else padding
        return convolution(features, size, strides=strides, padding=sides, **fields)

    monkeypatch.setattr(cnn.nn, "Conv", same)
    assert far(logits_of(model)(given), want) > 0.01


def test_b0_has_torchvisions_logits():
    model = EfficientNet()
    found = logits_of(model)(ours(model, tensors(shapes(model))))
    assert found.shape == (2, 1000) and found.dtype == np.float32
    assert far(found[:, :7], np.array(WANTED["b0"])) < 1e-5


@pytest.mark.parametrize("library, size", [("torchvision", "small"), *(("torchvision", size) for size in SIZES),
                                           ("timm", "b0"), ("timm", "b3")])
def test_beside_the_library_itself(library, size):
    torch = pytest.importorskip("torch", reason=f"{library} on torch is the reference here; torch is not installed")
    models = pytest.importorskip(f"{library}.models.efficientnet", reason=f"{library} is the reference here")
    model = EfficientNet(classes=7, **SMALL) if size == "small" else EfficientNet(**SIZES[size])
    if size == "small":
        stages, _ = models._efficientnet_conf("efficientnet_b0", width_mult=0.25, depth_mult=0.5)
        theirs = models.EfficientNet(stages, dropout=0.2, num_classes=7)
    else:
        theirs = getattr(models, f"efficientnet_{size}")()
    rules = TIMM_RULES if library == "timm" else TORCHVISION_RULES
    named = {name: tuple(x.shape) for name, x in theirs.state_dict().items() if "num_batches" not in name}
    assert named == shapes(model, rules)
    given = tensors(named)
    theirs.load_state_dict({name: torch.from_numpy(x) for name, x in given.items()}, strict=False)
    with torch.no_grad():
        want = theirs.eval()(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())).numpy()
    assert far(logits_of(model)(ours(model, given, rules)), want) < 1e-5
    if library == "torchvision" and size in WANTED:
        stored = np.array(WANTED[size])
        assert far(want[:, : stored.shape[1]], stored) < 1e-5


def test_stochastic_depth_skips_records_by_the_key_alone():
    block = MBConv(channels=8, expansion=1, size=3, stride=1, squeezed=2, drop=0.5, norm="group")
    x = np.random.default_rng(0).normal(size=(32, 4, 4, 8)).astype(np.float32)
    v = jax.jit(lambda: block.init(jax.random.key(0), x, False))()
    run = jax.jit(lambda key: block.apply(v, x, True, rngs={"dropout": key}) - x)
    branch = np.asarray(jax.jit(lambda: block.apply(v, x, False) - x)())  # evaluation has no random numbers
    once, again, other = (np.asarray(run(jax.random.key(seed))) for seed in (1, 1, 2))
    skipped = ~once.any((1, 2, 3))
    assert np.array_equal(once, again) and not np.array_equal(skipped, ~other.any((1, 2, 3)))
    assert 8 <= skipped.sum() <= 24
    np.testing.assert_allclose(once, np.where(skipped[:, None, None, None], 0, 2 * branch), atol=1e-5)

    rates = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, MBConv) and context.method_name == "__call__":
            rates.append(context.module.drop)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        shapes(EfficientNet(classes=7, stochastic_depth=0.4, **SMALL))
    np.testing.assert_allclose(rates, 0.4 * np.arange(10) / 10)


def written(folder, named: dict[str, np.ndarray], **config) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_classes": 3} | config))
    save_file(named, folder / "model.safetensors")
    return str(folder)


def test_files_are_read_and_what_does_not_fit_is_a_sentence(tmp_path):
    model = EfficientNet(classes=3)
    given = tensors(shapes(model, TIMM_RULES))
    found = find(written(tmp_path / "w", given, architecture="efficientnet_b0"))
    arrays = found.arrays()
    assert found.model == model
    assert all(np.array_equal(arrays[path], x) for path, x in ours(model, given, TIMM_RULES).items())
    other = written(tmp_path / "t", tensors(shapes(model)), architecture="torchvision_efficientnet_b0")
    assert find(other).model == model
    for i, (architecture, said) in enumerate({"efficientnet_b4": "'efficientnet_b4' is not known",
                                              "efficientnet_b1": "parameters without a tensor",
                                              "torchvision_efficientnet_b0": "tensors without a place"}.items()):
        with pytest.raises(UserError, match=said):
            find(written(tmp_path / str(i), given, architecture=architecture))


@pytest.mark.parametrize("size, stride, side", [(3, 1, 5), (3, 2, 6), (5, 2, 7)])
def test_the_form_for_cpus_is_the_convolution(size, stride, side):
    """Values and gradients; and what is traced is a convolution, whose FLOPs and matrices are counted."""
    random = np.random.default_rng(0)
    x, kernel = (random.normal(size=s).astype(np.float32) for s in ((2, side, side + 1, 4), (size, size, 1, 4)))
    ways = ((stride, stride), ((size // 2, size // 2),) * 2)
    fields = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 4}

    @jax.jit
    def both(x, kernel):
        found = [jax.vjp(f, x, kernel) for f in (
            lambda x, w: depthwise(x, w, *ways, **fields),
            lambda x, w: shifted(x, w, strides=ways[0], padding=ways[1]),
            lambda x, w: jax.lax.conv_general_dilated(x, w, *ways, **fields))]
        return [(y, *back(jnp.cos(y))) for y, back in found]

    chosen, own, wanted = both(x, kernel)
    for a, b, c in zip(chosen, own, wanted, strict=True):
        assert far(a, c) < 1e-5 and far(b, c) < 1e-5
    assert far(both(x, kernel[::-1])[1][0], wanted[0]) > 0.1  # negative control
    flops = [count_flops(jax.make_jaxpr(lambda x, w, f=f: f(x, w, *ways, **fields))(x, kernel))
             for f in (depthwise, jax.lax.conv_general_dilated)]
    assert flops[0] == flops[1] == 2 * chosen[0].size * size**2


@pytest.mark.parametrize("which", ["study", "local"])
def test_the_study_compares_at_equal_flops(which):
    def flops(experiment) -> int:
        image = jax.ShapeDtypeStruct((1, *experiment.data.shape), np.float32)
        init = lambda x: experiment.model.init_with_output(jax.random.key(0), x, train=False)[0]
        return count_flops(jax.make_jaxpr(init)(image))

    arms = getattr(load(ROOT / "experiments/ablate_cifar_efficientnet.py"), which).experiments()
    found = {arm: flops(experiment) for arm, (_, experiment) in arms.items()}
    assert abs(found["efficientnet"] / found["base"] - 1) < 0.03
