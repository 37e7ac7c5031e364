"""Linear models, convolutional networks and ViT against NumPy and torch; BatchNorm on 8 devices; counts; mistakes."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lab.configuration.field_types import check_types
from lab.configuration.rebuild import from_json
from lab.configuration.values import to_json
from lab.errors import UserError
from lab.models.cnn import BLOCKS, ConvNet, ResidualBlock, ResNet, conv, image_norm, max_pool
from lab.models.convolution import convolution
from lab.models.efficientnet import EfficientNet
from lab.models.linear import MLP, Ensemble, Linear
from lab.models.vit import ViT, sincos
from lab.train.step import cast
from tests.models.test_layers import products
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

CLOSE = 2e-5


def normal(*shape, seed=0, scale=1.0):
    return (np.random.default_rng([seed, *shape]).normal(size=shape) * scale).astype(np.float32)


def shapes_of(model, inputs, **kwargs):
    kwargs = kwargs or {"train": False}
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, **kwargs), inputs)


def random_variables(model, inputs, **kwargs):
    """Random values for everything: kernels that keep the size of the signal, scales and variances around 1."""
    rng = np.random.default_rng(0)

    def one(path, x):
        name = path[-1].key
        if name == "var":
            return rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
        scale = (2 / math.prod(x.shape[:-1])) ** 0.5 if name == "kernel" else 0.2
        return (rng.normal(size=x.shape) * scale + (name == "scale")).astype(np.float32)

    return jax.tree.map_with_path(one, shapes_of(model, inputs, **kwargs))


def size(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def draws(model, inputs, train):
    """How often random bits are drawn."""
    run = lambda v, key: model.apply(v, inputs, train=train, rngs={"dropout": key}, mutable=["batch_stats"])
    return len(products(jax.make_jaxpr(run)(shapes_of(model, inputs), jax.random.key(0)).jaxpr, "random_bits"))


def evaluate(model, variables, inputs):
    return np.asarray(jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, inputs))


def assert_trees_close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance, err_msg=jax.tree_util.keystr(path))


# ------------------------------------------------------------------------------------------------- linear models

def test_linear_equals_numpy():
    x = normal(6, 4, 3)
    for classes, units in ((None, 1), (5, 5)):
        v = {"params": {"head": {"kernel": normal(12, units), "bias": normal(units)}}}
        want = x.reshape(6, 12) @ v["params"]["head"]["kernel"] + v["params"]["head"]["bias"]
        got = Linear(classes).apply(v, x, train=True)
        assert got.shape == ((6,) if classes is None else (6, 5)) and got.dtype == jnp.float32
        np.testing.assert_allclose(got, want if classes else want[:, 0], atol=CLOSE)
        wrong = x.swapaxes(1, 2).reshape(6, 12) @ v["params"]["head"]["kernel"] + v["params"]["head"]["bias"]
        assert np.abs(got - (wrong if classes else wrong[:, 0])).max() > 0.1  # negative control: another order
        assert not any(x.any() for x in jax.tree.leaves(Linear(classes).init(jax.random.key(0), x, train=False)))
    half = Linear(5).apply(cast(v, "bfloat16"), x.astype(jnp.bfloat16), train=False)
    assert half.dtype == jnp.float32


def test_mlp_equals_numpy():
    model, x = MLP(classes=3, depth=2, width=7, dropout=0.5), normal(5, 2, 4)
    v = random_variables(model, x)
    h = x.reshape(5, 8)
    for i in range(2):
        h = np.maximum(h @ v["params"][f"dense_{i}"]["kernel"] + v["params"][f"dense_{i}"]["bias"], 0)
    head = v["params"]["head"]
    got = evaluate(model, v, x)
    np.testing.assert_allclose(got, h @ head["kernel"] + head["bias"], atol=CLOSE)
    dropped = jax.jit(lambda v: model.apply(v, x, train=True, rngs={"dropout": jax.random.key(0)}))(v)
    assert np.abs(dropped - got).max() > 0.1
    assert (draws(model, x, True), draws(model, x, False), draws(model.clone(dropout=0.0), x, True)) == (2, 0, 0)
    number = model.clone(classes=None)
    assert jax.eval_shape(lambda v: number.apply(v, x, train=False), shapes_of(number, x)).shape == (5,)
    init = jax.jit(lambda key: MLP(width=400, depth=1).init(key, normal(1, 100), train=False)["params"])
    first = init(jax.random.key(0, impl="unsafe_rbg"))["dense_0"]["kernel"]
    assert abs(first.std() / (2 / 100) ** 0.5 - 1) < 0.02  # He's, of the fan-in


def test_ensemble_members_are_members_alone():
    model, x = Ensemble(MLP(classes=3, width=8, depth=1, dropout=0.5), members=4), normal(5, 6)
    model.validate()
    v = jax.jit(lambda: model.init(jax.random.key(0), x, train=False))()
    kernel = v["params"]["member"]["dense_0"]["kernel"]
    assert kernel.shape == (4, 6, 8)
    assert all((kernel[i] != kernel[j]).mean() > 0.99 for i in range(4) for j in range(i))
    v = jax.tree.map(lambda x: np.asarray(x) + normal(*x.shape), v)  # the output layers start at zero
    got = evaluate(model, v, x)[0]
    assert got.shape == (5, 4, 3)
    one = jax.jit(lambda p: model.member.apply({"params": p}, x, train=False))
    alone = [one(jax.tree.map(lambda p, m=m: p[m], v["params"]["member"])) for m in range(4)]
    np.testing.assert_allclose(got, np.stack(alone, axis=1), atol=CLOSE)
    assert np.abs(got - np.stack(alone[::-1], axis=1)).max() > 0.1  # negative control: another order

    same = jax.tree.map(lambda x: np.broadcast_to(x[:1], x.shape), v)
    dropped = jax.jit(lambda v: model.apply(v, x, train=True, rngs={"dropout": jax.random.key(0)}))(same).values
    assert np.abs(dropped[:, 0] - dropped[:, 1]).max() > 0.1  # each member drops its own units ...
    assert np.ptp(evaluate(model, same, x)[0], axis=1).max() < CLOSE  # ... and there is no other difference


def test_an_ensemble_of_networks_with_statistics():
    model, x = Ensemble(ConvNet(classes=3, channels=(4,), convs=(1,), dense=None), members=2), normal(3, 4, 4, 1)
    v = shapes_of(model, x)
    assert {leaf.shape for leaf in jax.tree.leaves(v["batch_stats"])} == {(2, 4)}
    out, new = jax.eval_shape(lambda v: model.apply(v, x, train=True, rngs={"dropout": jax.random.key(0)},
                                                    mutable=["batch_stats"]), v)
    assert out.values.shape == (3, 2, 3)
    assert jax.tree.structure(new) == jax.tree.structure({"batch_stats": v["batch_stats"]})


# ------------------------------------------------------------------------------------------------------- pooling

@pytest.mark.parametrize("window,padding", [(2, 0), (3, 1)])
def test_max_pool_equals_flax(window, padding):
    x = np.random.default_rng(0).permutation(2 * 7 * 6 * 3).reshape(2, 7, 6, 3).astype(np.float32) - 126  # no ties
    flax_pool = lambda x: nn.max_pool(x, (window, window), (2, 2), ((padding, padding),) * 2)
    ours = functools.partial(max_pool, window=window, padding=padding)

    @jax.jit
    def both(x):
        (y, back), (z, back_flax) = jax.vjp(ours, x), jax.vjp(flax_pool, x)
        return (y, back(normal(*y.shape))[0]), (z, back_flax(normal(*z.shape))[0])

    got, want = both(x)
    assert_trees_close(got, want, atol=1e-6)
    assert (got[0] != both(x[:, ::-1])[0][0]).any()  # negative control


# ------------------------------------------------------------------- convolutional networks against torch's functions

def torch_of(array, order=None):
    torch = pytest.importorskip("torch", reason="torch is the independent reference here, and is not installed")
    return torch.from_numpy(np.array(array if order is None else np.transpose(array, order)))


class TorchNet:
    """Our parameters in torch's functions, with torch's layouts and torch's running statistics (unbiased variance)."""

    def __init__(self, variables, train, group=False):
        self.params = jax.tree.map_with_path(
            lambda path, x: torch_of(x, (3, 2, 0, 1) if x.ndim == 4 else None).requires_grad_(), variables["params"])
        self.stats = jax.tree.map(torch_of, variables.get("batch_stats", {}))
        self.unbiased = jax.tree.map(lambda x: 1.0, variables.get("batch_stats", {}))
        self.train, self.group = train, group

    def at(self, tree, path):
        return functools.reduce(lambda node, name: node[name], path, tree)

    def conv(self, x, *path, stride=1):
        from torch.nn.functional import conv2d

        p = self.at(self.params, path)
        return conv2d(x, p["kernel"], p.get("bias"), stride=stride, padding=p["kernel"].shape[-1] // 2)

    def norm(self, x, *path):
        from torch.nn.functional import batch_norm, group_norm

        p = self.at(self.params, path)
        if self.group:
            return group_norm(x, math.gcd(32, x.shape[1]), p["scale"], p["bias"])
        s, n = self.at(self.stats, path), x.numel() / x.shape[1]
        self.at(self.unbiased, path)["var"] = n / (n - 1)
        return batch_norm(x, s["mean"], s["var"], p["scale"], p["bias"], training=self.train, momentum=0.1)

    def block(self, x, *path, stride, first_conv=False):
        names = sorted(name for name in self.at(self.params, path) if name.startswith("conv"))
        strided = "conv1" if len(names) == 2 or first_conv else "conv2"
        h = x
        for i, name in enumerate(names, 1):
            h = self.norm(self.conv(h, *path, name, stride=stride if name == strided else 1), *path, f"norm{i}")
            h = h if i == len(names) else h.relu()
        if "shortcut" in self.at(self.params, path):
            x = self.norm(self.conv(x, *path, "shortcut", stride=stride), *path, "shortcut_norm")
        return (x + h).relu()

    def resnet(self, x, imagenet):
        from torch.nn.functional import linear, max_pool2d

        x = self.norm(self.conv(x, "stem", stride=2 if imagenet else 1), "stem_norm").relu()
        x = max_pool2d(x, 3, 2, 1) if imagenet else x
        for name in sorted(name for name in self.params if name.startswith("stage")):
            x = self.block(x, name, stride=2 if name.endswith("block1") and name[5] != "1" else 1)
        return linear(x.mean((2, 3)), self.params["head"]["kernel"].T, self.params["head"]["bias"])

    def running(self, before):
        """The statistics after `batch_norm`, with the biased variance that we keep."""
        biased = lambda new, old, factor: (new.numpy() - 0.9 * old) / factor + 0.9 * old
        return jax.tree.map(biased, self.stats, before, self.unbiased)

    def gradients(self):
        return jax.tree.map(lambda p: p.grad.numpy().transpose(2, 3, 1, 0) if p.ndim == 4 else p.grad.numpy(),
                            self.params)


def run_block(block, v, x, train=True):
    """Output, new statistics, and the gradients of a weighted sum of the output."""
    def value(params):
        y, new = block.apply({**v, "params": params}, x, train, mutable=["batch_stats"])
        return (y * normal(*y.shape, seed=1)).sum(), (y, new.get("batch_stats", {}))

    (_, aux), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(v["params"])
    return *aux, grads


BASIC = ResidualBlock(channels=12, stride=1, bottleneck=False, norm="batch", zero_init=False)
BOTTLENECK = ResidualBlock(channels=6, stride=2, bottleneck=True, norm="batch", zero_init=False)
IMAGES = normal(3, 6, 6, 12)


@pytest.mark.parametrize("block", [BASIC, BOTTLENECK, BOTTLENECK.clone(norm="group")],
                         ids=["basic", "bottleneck", "group"])
def test_a_block_trains_as_in_torch(block):
    """Outputs, gradients and running statistics."""
    v = random_variables(block, IMAGES, train=False)
    y, stats, grads = run_block(block, v, IMAGES)
    net = TorchNet(v, train=True, group=block.norm == "group")
    theirs = net.block(torch_of(IMAGES, (0, 3, 1, 2)), stride=block.stride)
    (theirs * torch_of(normal(*y.shape, seed=1), (0, 3, 1, 2))).sum().backward()
    np.testing.assert_allclose(y, theirs.detach().numpy().transpose(0, 2, 3, 1), atol=CLOSE)
    assert_trees_close(grads, net.gradients(), atol=2e-4)
    if block.norm == "batch":
        assert_trees_close(stats, net.running(v["batch_stats"]), atol=CLOSE)
        with pytest.raises(AssertionError):  # negative control: the variance is the biased one
            assert_trees_close(stats, jax.tree.map(np.asarray, net.stats), atol=CLOSE)
    if block.bottleneck:  # negative control: the stride in the first 1x1 convolution, version 1
        old = TorchNet(v, train=True, group=block.norm == "group").block(
            torch_of(IMAGES, (0, 3, 1, 2)), stride=block.stride, first_conv=True)
        assert np.abs(y - old.detach().numpy().transpose(0, 2, 3, 1)).max() > 0.1


@pytest.mark.parametrize("model", [ResNet(18, classes=5, width=4), ResNet(50, classes=5, width=2, stem="cifar")],
                         ids=["18 imagenet", "50 cifar"])
def test_resnet_evaluates_as_in_torch(model):
    imagenet = model.stem == "imagenet"
    x = normal(2, 64, 64, 3) if imagenet else normal(2, 16, 16, 3)
    v = random_variables(model, x)
    got = evaluate(model, v, x)
    theirs = TorchNet(v, train=False).resnet(torch_of(x, (0, 3, 1, 2)), imagenet).detach().numpy()
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(got / scale, theirs / scale, atol=CLOSE)
    other = TorchNet(v, train=True).resnet(torch_of(x, (0, 3, 1, 2)), imagenet).detach().numpy()
    assert np.abs(got - other).max() / scale > 0.01  # negative control: with the statistics of the batch


@pytest.mark.parametrize("batch_norm", [True, False])
def test_convnet_equals_torch(batch_norm):
    model = ConvNet(classes=5, channels=(4, 6), convs=(1, 2), dense=7, batch_norm=batch_norm)
    x = normal(3, 9, 8, 2)
    v = random_variables(model, x)
    assert ("batch_stats" in v) == batch_norm == ("bias" not in v["params"]["conv_0_0"])
    got = evaluate(model, v, x)
    net, h = TorchNet(v, train=False), torch_of(x, (0, 3, 1, 2))
    from torch.nn.functional import max_pool2d

    for i, convs in enumerate(model.convs):
        for j in range(convs):
            h = net.conv(h, f"conv_{i}_{j}")
            h = (net.norm(h, f"norm_{i}_{j}") if batch_norm else h).relu()
        h = max_pool2d(h, 2)
    h, p = h.detach().permute(0, 2, 3, 1).reshape(3, -1).numpy(), v["params"]
    h = np.maximum(h @ p["dense"]["kernel"] + p["dense"]["bias"], 0)
    np.testing.assert_allclose(got, h @ p["head"]["kernel"] + p["head"]["bias"], atol=CLOSE)
    assert np.abs(got - got[::-1]).max() > 0.1  # negative control


def test_convnet_drops_in_training_only():
    model, x = ConvNet(), jnp.zeros((2, 28, 28, 1))
    assert (draws(model, x, True), draws(model, x, False)) == (4, 0)
    assert draws(model.clone(dropout=0.0), x, True) == 1
    assert draws(model.clone(dropout=0.0, dense_dropout=0.0), x, True) == 0
    assert shapes_of(model, x)["params"]["dense"]["kernel"].shape == (3 * 3 * 128, 256)
    assert "dense" not in shapes_of(model.clone(dense=None), x)["params"]


def test_convnet_is_cheap():
    """At most 12 million multiply-adds for a 28x28 image, counted by XLA."""
    model, x = ConvNet(), jnp.zeros((1, 28, 28, 1))
    run = jax.jit(lambda v, x: model.apply(v, x, train=False))
    products = run.lower(shapes_of(model, x), x).cost_analysis()["flops"] / 2
    by_hand = 9 * (28**2 * 32 + 14**2 * 32 * 64 + 7**2 * 64 * 128) + 9 * 128 * 256 + 256 * 10  # XLA skips the padding
    assert 0.8 * by_hand < products < 1.1 * by_hand < 12e6


# ------------------------------------------------------------------------------------------- sizes and first weights

@pytest.mark.parametrize("depth,want", [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032)])
def test_resnet_parameter_counts(depth, want):
    """torchvision's."""
    count = lambda **fields: size(shapes_of(ResNet(depth, **fields), jnp.zeros((1, 32, 32, 3)))["params"])
    assert count() == count(norm="group") == want
    assert count(stem="cifar") == want - (49 - 9) * 3 * 64  # negative control: the count sees the stem
    model = ResNet(depth)
    assert size(shapes_of(model, jnp.zeros((1, 32, 32, 3)))["batch_stats"]) > 0
    assert "batch_stats" not in shapes_of(model.clone(norm="group"), jnp.zeros((1, 32, 32, 3)))


def test_zero_init_makes_every_block_its_shortcut():
    x = np.abs(normal(2, 4, 4, 8))
    def initial(**fields):
        block = ResidualBlock(**{"channels": 8, "stride": 1, "bottleneck": False, "norm": "batch"} | fields)
        return jax.jit(lambda x: block.init_with_output(jax.random.key(0, impl="unsafe_rbg"), x, True)[0])(x)

    np.testing.assert_array_equal(initial(zero_init=True), x)
    np.testing.assert_array_equal(initial(zero_init=True, norm="group"), x)
    assert np.abs(initial(zero_init=False) - x).max() > 0.1  # negative control

    def zeros(model):
        """Norm scales that start at 0."""
        seen = []

        def spy(method, args, kwargs, context):
            if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
                seen.append(context.module.scale_init is nn.initializers.zeros)
            return method(*args, **kwargs)

        with nn.intercept_methods(spy):
            shapes_of(model, jnp.zeros((1, 8, 8, 3)))
        return sum(seen)

    assert [zeros(ResNet(depth)) for depth in BLOCKS] == [sum(blocks) for blocks in BLOCKS.values()]
    assert zeros(ResNet(18, zero_init=False)) == 0


def test_convolutions_start_with_he_fan_out():
    kernel = conv(64, 3, stride=2, name="c").init(jax.random.key(0), jnp.zeros((1, 8, 8, 16)))["params"]["kernel"]
    assert abs(kernel.std() / (2 / (9 * 64)) ** 0.5 - 1) < 0.03
    assert abs(kernel.std() / (2 / (9 * 16)) ** 0.5 - 1) > 0.3  # negative control: fan-in
    alone = conv(512, 3, depthwise=True, name="d").init(jax.random.key(0), jnp.zeros((1, 3, 3, 512)))["params"]
    assert alone["kernel"].shape == (3, 3, 1, 512) and abs(alone["kernel"].std() / (2 / 9) ** 0.5 - 1) < 0.05


# --------------------------------------------------------------------------------------------- BatchNorm and devices

@pytest.mark.parametrize("padding", ["around", "SAME", "VALID"])
@pytest.mark.parametrize(("size", "stride", "side"), [(3, 1, 6), (3, 2, 7), (4, 2, 6), (7, 2, 8), (1, 2, 5)])
def test_the_gradients_of_a_convolution_are_jaxs(size, stride, side, padding):
    padding = ((size // 2,) * 2,) * 2 if padding == "around" else padding
    x, kernel, ways = normal(2, side, side + 1, 3), normal(size, size, 3, 4), ((stride,) * 2, padding)
    plain = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def both(x, kernel):
        y, pull = jax.vjp(lambda x, kernel: plain(x, kernel, *ways), x, kernel)
        return y, pull(y), jax.vjp(lambda x, kernel: convolution(x, kernel, *ways), x, kernel)[1](y)

    y, want, got = jax.jit(both)(x, kernel)
    assert_trees_close(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no dilation, groups or precision"):
        convolution(x, kernel, *ways, feature_group_count=3)


def test_in_a_loop_all_convolutions_have_the_form_that_cpus_are_fast_at():
    x, kernel = jnp.ones((2, 3, 6, 6, 2)), jnp.ones((3, 3, 2, 2))
    plain = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def forms(function):
        apply = lambda x, kernel: jnp.sin(function(x, kernel, (1, 1), ((1, 1), (1, 1))))
        loss = lambda kernel, x: apply(apply(x, kernel), kernel).sum()
        total = lambda kernel: jax.lax.scan(lambda sum_, x: (sum_ + jax.grad(loss)(kernel, x), None), kernel, x)[0]
        compiled = jax.jit(total).lower(kernel).compile().as_text()
        return set(re.findall(r"dim_labels=([0-9a-z]+_[0-9a-z]+->[0-9a-z]+)", compiled))

    assert forms(convolution) == {"b01f_01io->b01f"}
    assert forms(plain) > {"b01f_01io->b01f"}  # negative control


def test_norms_equal_numpy():
    """BatchNorm in training and evaluation with its running statistics, and GroupNorm, by their papers."""
    x, scale, bias = normal(5, 3, 2, 12) * 3 + 1, normal(12), normal(12, seed=1)
    mean, var = normal(12, seed=2), np.abs(normal(12, seed=3)) + 0.5
    v = {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": var}}
    affine = lambda x, mean, var: (x - mean) / np.sqrt(var + 1e-5) * scale + bias
    apply = lambda kind, train: jax.jit(lambda v, x: image_norm(kind, 12, train, name="n").apply(
        v, x, mutable=["batch_stats"]))(v, x)

    y, new = apply("batch", True)
    batch_mean, batch_var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(y, affine(x, batch_mean, batch_var), atol=CLOSE)
    want = {"mean": 0.9 * mean + 0.1 * batch_mean, "var": 0.9 * var + 0.1 * batch_var}
    assert_trees_close(new["batch_stats"], want, atol=CLOSE)
    other = {"mean": 0.1 * mean + 0.9 * batch_mean, "var": 0.1 * var + 0.9 * batch_var}
    with pytest.raises(AssertionError):  # negative control: the other way round
        assert_trees_close(new["batch_stats"], other, atol=CLOSE)

    np.testing.assert_allclose(apply("batch", False)[0], affine(x, mean, var), atol=CLOSE)
    grouped = x.reshape(5, 3, 2, 4, 3)  # 4 groups: the largest divisor of 12 that divides 32
    moments = [np.repeat(f(grouped, axis=(1, 2, 4), keepdims=True), 3, -1).reshape(5, 1, 1, 12) for f in
               (np.mean, np.var)]
    group = apply("group", True)[0]
    np.testing.assert_allclose(group, affine(x, *moments), atol=CLOSE)
    assert np.abs(group - y).max() > 0.1  # negative control


def test_batch_norm_is_the_same_on_8_devices():
    """Outputs, gradients and statistics. Statistics of each device's own records would give others."""
    block = ResidualBlock(channels=4, stride=2, bottleneck=False, norm="batch", zero_init=False)
    x = normal(16, 4, 4, 3) + np.arange(16, dtype=np.float32).reshape(16, 1, 1, 1) / 4  # devices differ
    v = random_variables(block, x, train=False)
    one = run_block(block, v, x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    assert len(sharded.sharding.device_set) == 8
    eight = run_block(block, jax.device_put(v, NamedSharding(mesh, PartitionSpec())), sharded)
    assert len(eight[0].sharding.device_set) == 8
    for a, b in zip(one, eight, strict=True):
        assert_trees_close(a, jax.tree.map(np.asarray, b), atol=1e-4, rtol=1e-4)

    alone = jax.jit(jax.vmap(lambda x: block.apply(v, x, True, mutable=["batch_stats"])))
    y, new = alone(x.reshape(8, 2, 4, 4, 3))  # negative control
    assert np.abs(y.reshape(one[0].shape) - one[0]).max() > 0.1
    var = new["batch_stats"]["norm1"]["var"]
    assert np.abs(var.mean(0) - one[1]["norm1"]["var"]).max() > 0.01
    assert np.ptp(new["batch_stats"]["norm1"]["mean"], axis=0).max() > 0.01


def test_statistics_change_in_training_only():
    model, x = ConvNet(classes=3, channels=(4,), convs=(1,), dense=None, dropout=0.0), normal(8, 4, 4, 1) + 2
    v = random_variables(model, x)
    other = np.concatenate([x[:2], x[2:] + 1])
    run = jax.jit(lambda x, train: model.apply(v, x, train=train, mutable=["batch_stats"]), static_argnames="train")
    (together, same), (near_others, _) = run(x, False), run(other, False)
    assert_trees_close(same["batch_stats"], v["batch_stats"], rtol=0)
    np.testing.assert_allclose(together[:2], near_others[:2], atol=CLOSE)  # no record looks at another
    (trained, new), (trained_near_others, _) = run(x, True), run(other, True)
    assert np.abs(trained[:2] - trained_near_others[:2]).max() > 0.01  # negative control
    for kind in ("mean", "var"):
        moved = new["batch_stats"]["norm_0_0"][kind] - v["batch_stats"]["norm_0_0"][kind]
        assert np.abs(moved).max() > 1e-3


@pytest.mark.parametrize("model", [ResNet(18, classes=5, width=4), ConvNet(classes=5),
                                   EfficientNet(0.25, 0.1, classes=5),
                                   ViT(depth=1, width=8, heads=2, patch=8, classes=5)], ids=lambda m: type(m).__name__)
def test_reduced_precision_keeps_logits_and_statistics_float32(model):
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    v = shapes_of(model, x)
    run = lambda v, x, key: model.apply(v, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), (v["params"], x))
    with jax.numpy_rank_promotion("raise"):
        logits, new = jax.eval_shape(run, v | {"params": half[0]}, half[1], jax.random.key(0))
    assert logits.shape == (2, 5) and logits.dtype == jnp.float32
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new.get("batch_stats", {})) == jax.tree.map(
        lambda x: (x.shape, x.dtype), v.get("batch_stats", {}))
    jaxpr = jax.make_jaxpr(run)(v | {"params": half[0]}, half[1], jax.random.key(0)).jaxpr
    operands = products(jaxpr, "conv_general_dilated") + products(jaxpr)
    assert operands.count(("float32", "float32")) == 1 < operands.count(("bfloat16", "bfloat16"))  # the head alone
    assert len(operands) == 1 + operands.count(("bfloat16", "bfloat16"))


# ---------------------------------------------------------------------------------------------------------- ViT

SMALL = {"depth": 1, "width": 8, "heads": 2, "patch": 2, "classes": 5}
PICTURES = normal(2, 4, 6, 3)


def vit(params, images, heads=2, patch=2, token=True, positions=None, causal=False):
    """One image at a time in float64, after the paper (with the tanh form of gelu)."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    dense = lambda q, x: x @ q["kernel"] + q["bias"]
    layernorm = lambda q, x: ((x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * q["scale"]
                              + q["bias"])
    gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    b, out = p["block_0"], []
    for image in images:
        x = np.stack([dense(p["patches"], image[i:i + patch, j:j + patch].ravel())
                      for i in range(0, image.shape[0], patch) for j in range(0, image.shape[1], patch)])
        x = np.concatenate([p["token"][None], x]) if token else x
        x = x if positions is None else x + positions
        h = layernorm(b["attention_norm"], x)
        q, k, v = (dense(b["attn"][name], h) for name in ("query", "key", "value"))
        parts, K = [], x.shape[1] // heads
        for n in range(heads):
            part = slice(n * K, (n + 1) * K)
            scores = q[:, part] @ k[:, part].T / np.sqrt(K)
            scores = np.where(np.triu(np.ones_like(scores), 1), -np.inf, scores) if causal else scores
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            parts.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
        x = x + dense(b["attn"]["out"], np.concatenate(parts, 1))
        x = x + dense(b["ffn"]["down"], gelu(dense(b["ffn"]["up"], layernorm(b["mlp_norm"], x))))
        x = layernorm(p["final_norm"], x)
        out.append(dense(p["head"], x[0] if token else x.mean(0)))
    return np.stack(out)


def test_vit_equals_numpy():
    for fields in ({}, {"pool": "mean", "position": "sincos"}, {"position": "sincos"}):
        model = ViT(**SMALL, **fields)
        v = random_variables(model, PICTURES)
        table = v["params"]["wpe"]["embedding"] if model.position == "learned" else sincos(2, 3, 8)
        token = model.pool == "token"
        if token and model.position == "sincos":
            table = np.concatenate([np.zeros((1, 8)), table])
        got = evaluate(model, v, PICTURES)
        reference = functools.partial(vit, v["params"], PICTURES, token=token)
        np.testing.assert_allclose(got, reference(positions=table), atol=CLOSE)
        for wrong in ({"positions": None}, {"positions": table[::-1]}, {"positions": table, "heads": 4},
                      {"positions": table, "causal": True}):
            assert np.abs(got - reference(**wrong)).max() > 1e-3, wrong  # negative controls


def test_patches_are_a_strided_convolution():
    model = ViT(**SMALL, pool="mean")
    v = random_variables(model, PICTURES)
    p, pictures = v["params"]["patches"], torch_of(PICTURES, (0, 3, 1, 2))
    kernel = torch_of(p["kernel"].reshape(2, 2, 3, 8), (3, 2, 0, 1))
    from torch.nn.functional import conv2d

    want = conv2d(pictures, kernel, torch_of(p["bias"]), stride=2).permute(0, 2, 3, 1)
    patches = lambda module, _: module.name == "patches"
    run = jax.jit(lambda v: model.apply(v, PICTURES, train=False, capture_intermediates=patches))
    got = run(v)[1]["intermediates"]["patches"]["__call__"][0]
    np.testing.assert_allclose(got, want.numpy().reshape(2, 6, 8), atol=CLOSE)
    assert np.abs(got - want.permute(0, 2, 1, 3).numpy().reshape(2, 6, 8)).max() > 0.1  # negative control: by columns


def test_without_positions_the_order_of_patches_does_not_matter():
    order = np.array([3, 1, 5, 0, 2, 4])
    cut = PICTURES.reshape(2, 2, 2, 3, 2, 3).swapaxes(2, 3).reshape(2, 6, 2, 2, 3)[:, order]
    moved = cut.reshape(2, 2, 3, 2, 2, 3).swapaxes(2, 3).reshape(2, 4, 6, 3)
    for pool, position in (("mean", "none"), ("token", "none"), ("mean", "learned"), ("mean", "sincos")):
        model = ViT(**SMALL, pool=pool, position=position)
        run = jax.jit(functools.partial(model.apply, random_variables(model, PICTURES), train=False))
        difference = np.abs(run(PICTURES) - run(moved)).max()
        assert difference < CLOSE if position == "none" else difference > 1e-3, (pool, position)


def test_the_class_token():
    model = ViT(**SMALL)
    v = random_variables(model, PICTURES)
    assert v["params"]["token"].shape == (8,) and v["params"]["wpe"]["embedding"].shape == (1 + 6, 8)
    other = v | {"params": v["params"] | {"token": -v["params"]["token"]}}
    run = jax.jit(lambda v: model.apply(v, PICTURES, train=False))
    assert np.abs(run(v) - run(other)).max() > 1e-3
    mean = shapes_of(ViT(**SMALL, pool="mean"), PICTURES)["params"]
    assert "token" not in mean and mean["wpe"]["embedding"].shape == (6, 8)


def test_sincos_positions():
    """Entry by entry, by the formula of MoCo v3."""
    table = sincos(2, 3, 8)
    for y, x in np.ndindex(2, 3):
        want = [f(place / 10_000 ** (k / 2)) for place in (x, y) for f in (math.sin, math.cos) for k in range(2)]
        np.testing.assert_allclose(table[3 * y + x], want, atol=1e-6)
    assert len({row.tobytes() for row in table}) == 6


@pytest.mark.parametrize("width,heads,want", [(192, 3, 5_717_416), (384, 6, 22_050_664), (768, 12, 86_567_656)],
                         ids=["Ti", "S", "B"])
def test_vit_parameter_counts(width, heads, want):
    """DeiT's and timm's."""
    count = lambda **fields: size(shapes_of(ViT(width=width, heads=heads, scan=True, **fields),
                                            jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)))
    assert count() == want
    assert count(pool="mean") == want - 2 * width  # negative control: the token and its position
    assert ViT() == ViT(depth=12, width=384, heads=6, patch=16)


def test_vit_has_no_context():
    """What means nothing is no flag."""
    assert "context" not in to_json(ViT()) and "patch" in to_json(ViT())
    with pytest.raises(TypeError, match="context"):
        ViT(context=3)


# ------------------------------------------------------------------------------------------------------- mistakes

GOOD = [Linear(), Linear(3), MLP(), ConvNet(), ResNet(), EfficientNet(), ViT(), Ensemble(MLP(classes=3))]


@pytest.mark.parametrize("model", GOOD, ids=lambda m: type(m).__name__)
def test_models_are_configurations(model):
    model.validate()
    model.check({})
    check_types(model)
    assert from_json(to_json(model)) == model and hash(from_json(to_json(model))) == hash(model)


WRONG = [
    (Linear(0), "--model.classes must be at least 1, not 0."),
    (MLP(depth=0), "--model.depth must be at least 1, not 0."),
    (MLP(dropout=1.0), "--model.dropout must be in [0, 1), not 1.0."),
    (Ensemble(MLP(classes=2), members=0), "--model.members must be at least 1, not 0."),
    (Ensemble(MLP()), "The members of an Ensemble must be classifiers. Give --model.member.classes."),
    (Ensemble(Linear(2)), "All members would stay equal: Linear starts at zero. Use MLP as --model.member, or "
                             "--model.bootstrap."),
    (ConvNet(channels=(8, 8), convs=(1,)),
     "--model.channels (8, 8) and --model.convs (1,) must have one number for each stage."),
    (ConvNet(convs=(1, 0, 1)), "--model.channels and --model.convs must be at least 1 in every stage."),
    (ConvNet(dense_dropout=-0.1), "--model.dense-dropout must be in [0, 1), not -0.1."),
    (ResNet(width=0), "--model.width must be at least 1, not 0."),
    (EfficientNet(width_multiple=0.0), "--model.width-multiple must be above 0, not 0.0."),
    (EfficientNet(depth_multiple=math.nan), "--model.depth-multiple must be above 0, not nan."),
    (EfficientNet(squeeze_ratio=-1.0), "--model.squeeze-ratio must be in [0, 1], not -1.0."),
    (EfficientNet(stochastic_depth=1.0), "--model.stochastic-depth must be in [0, 1), not 1.0."),
    (ViT(patch=0), "--model.patch must be at least 1, not 0."),
    (ViT(heads=5), "--model.width 384 is not divisible by --model.heads 5."),
    (ViT(width=6, position="sincos"), "--model.position sincos needs a --model.width divisible by 4, not 6."),
]


@pytest.mark.parametrize("model,sentence", WRONG, ids=lambda x: type(x).__name__)
def test_fields_out_of_range(model, sentence):
    with pytest.raises(UserError) as e:
        model.validate()
    assert str(e.value) == sentence


UNFIT = [
    (Linear(), {"classes": 3}, "The data has 3 classes, and a model without classes predicts one number. "
                               "Use --model.classes 3."),
    (MLP(2), {"classes": 3}, "The data has 3 classes and the model 2. Use --model.classes 3."),
    (Ensemble(MLP(2)), {"classes": 3}, "The data has 3 classes and the model 2. Use --model.member.classes 3."),
    (ResNet(), {"classes": 3}, "The data has 3 classes and the model 1000. Use --model.classes 3."),
    (EfficientNet(), {"classes": 3}, "The data has 3 classes and the model 1000. Use --model.classes 3."),
    (ConvNet(), {"classes": 10, "height": 8, "width": 7}, "3 stages halve the image as often, and its width is only 7. "
                                                          "Give fewer --model.channels and --model.convs."),
    (ViT(), {"classes": 1000, "height": 224, "width": 225},
     "The images' width of 225 pixels is not divisible by --model.patch 16."),
]


@pytest.mark.parametrize("model,facts,sentence", UNFIT, ids=lambda x: type(x).__name__)
def test_data_that_does_not_fit(model, facts, sentence):
    with pytest.raises(UserError) as e:
        model.check(facts)
    assert str(e.value) == sentence
    fitting = {"classes": getattr(model, "classes", None) or 2, "height": 32, "width": 64}
    if not isinstance(model, Linear):
        model.check(fitting)
