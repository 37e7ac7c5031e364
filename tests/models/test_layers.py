"""Layers against NumPy and torch; causality and masking by gradient support; precision; every error sentence."""

import functools
import logging
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.errors import UserError
from lab.models.attention import choose_attention, einsum_attention, rotary
from lab.models.dropout import dropout, is_zero
from lab.models.layers import Dense, Embed, FeedForward, SelfAttention, Transformer, norm
from lab.models.precision import elementwise, project, softmax
from lab.models.splash import splash_attention
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

TINY = {"depth": 1, "width": 8, "heads": 2, "context": 8}
LENGTH = 5
BF16 = jnp.bfloat16


def normal(*shape, seed=0, scale=1.0):
    return (np.random.default_rng([seed, *shape]).normal(size=shape) * scale).astype(np.float32)


def random_params(module, *args, scale=0.3, **kwargs):
    """Random values for every parameter, biases and norm scales too, without running the initialisers."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([normal(*x.shape, seed=i, scale=scale) for i, x in enumerate(leaves)])


def products(jaxpr, name="dot_general"):
    """The types of the operands of all products in a jaxpr and in everything inside it."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            found.append(tuple(str(v.aval.dtype) for v in eqn.invars))
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found += products(inner, name) if hasattr(inner, "eqns") else []
    return found


class Stack(Transformer):
    """The blocks and the final norm alone, on given embeddings."""

    @nn.compact
    def __call__(self, x, mask=None, causal=True, train=False):
        return self.stack(x, jnp.arange(x.shape[1]), mask, causal=causal, train=train)


# ---------------------------------------------------------------------------------------------------- attention

def numpy_attention(q, k, v, visible, group_of):
    """Loops in float64; `group_of(n)` is the key/value head of query head n."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        g = group_of(n)
        score = np.array([q[b, t, n] @ k[b, s, g] / np.sqrt(q.shape[-1]) for s in range(k.shape[1])])
        score[~visible[b, t]] = -np.inf
        p = np.exp(score - score.max())
        out[b, t, n] = (p / p.sum()) @ v[b, :, g]
    return out


def attention_inputs(groups):
    q, k, v = normal(2, LENGTH, 4, 6), normal(2, LENGTH, groups, 6, seed=1), normal(2, LENGTH, groups, 6, seed=2)
    visible = np.broadcast_to(np.tril(np.ones((LENGTH, LENGTH), bool)), (2, LENGTH, LENGTH)).copy()
    visible[1, 1:, 1] = False  # a hole, on top of causality
    return q, k, v, visible


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_einsum_attention_equals_numpy(groups):
    q, k, v, visible = attention_inputs(groups)
    got = einsum_attention(q, k, v, visible)
    np.testing.assert_allclose(got, numpy_attention(q, k, v, visible, lambda n: n // (4 // groups)), atol=2e-6)
    wrong = numpy_attention(q, k, v, np.ones_like(visible), lambda n: n // (4 // groups))
    assert np.abs(got - wrong).max() > 0.1  # negative control: the mask matters
    if groups == 2:  # negative control: key/value heads dealt out in turn instead of in runs
        assert np.abs(got - numpy_attention(q, k, v, visible, lambda n: n % groups)).max() > 0.1


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_einsum_attention_equals_torch(groups, masked):
    torch = pytest.importorskip("torch", reason="torch is the independent reference here, and is not installed")
    q, k, v, visible = attention_inputs(groups)
    visible = visible if masked else None
    arrays = [torch.from_numpy(x.swapaxes(1, 2).copy()) for x in (q, k, v)]
    mask = None if visible is None else torch.from_numpy(visible[:, None])
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, *arrays, attn_mask=mask,
                               enable_gqa=groups != 4)
    got = np.asarray(einsum_attention(q, k, v, visible))
    np.testing.assert_allclose(got, attend().numpy().swapaxes(1, 2), atol=2e-6)
    assert np.abs(got - attend(scale=1.0).numpy().swapaxes(1, 2)).max() > 0.1  # negative control: no 1/sqrt(K)


def test_attention_gradients_equal_torch():
    torch = pytest.importorskip("torch", reason="torch is the independent reference here, and is not installed")
    q, k, v, visible = attention_inputs(2)
    cotangent = normal(2, LENGTH, 4, 6, seed=3)
    got = jax.jit(jax.grad(lambda *a: jnp.vdot(einsum_attention(*a, visible), cotangent), (0, 1, 2)))(q, k, v)
    arrays = [torch.from_numpy(x.swapaxes(1, 2).copy()).requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*arrays, attn_mask=torch.from_numpy(visible[:, None]),
                                                           enable_gqa=True)
    out.backward(torch.from_numpy(cotangent.swapaxes(1, 2).copy()))
    for ours, theirs in zip(got, arrays, strict=True):
        np.testing.assert_allclose(ours, theirs.grad.numpy().swapaxes(1, 2), atol=5e-6)
    assert np.abs(np.asarray(got[1]) - np.asarray(got[2])).max() > 0.1  # they are not all alike


@pytest.mark.parametrize("causal", [True, False])
def test_the_xla_backend_equals_einsum(causal):
    x, mask = normal(2, LENGTH, 8), np.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]], bool)
    ours, xla = (SelfAttention(**TINY | {"heads": 4, "kv_heads": 2}, attention=a) for a in ("einsum", "xla"))
    rest = (causal, False, False)
    params = random_params(ours, x, jnp.arange(LENGTH), mask, *rest)

    def run(model):
        return jax.jit(lambda mask: model.apply({"params": params}, x, jnp.arange(LENGTH), mask, *rest))

    got, run = np.asarray(run(ours)(mask)), run(xla)
    np.testing.assert_allclose(got[mask], run(mask)[mask], atol=1e-5)
    assert np.abs(got - run(np.ones_like(mask)))[mask].max() > 1e-3  # negative control: a backend that loses the mask


# ------------------------------------------------------------------------------------ what an output depends on

def support(model, *masks, causal=True):
    """For each mask (B, L): (B, t, s), the largest |d output[b, t] / d input[b, s]| over both widths."""
    masks = masks or (np.ones((1, LENGTH), bool),)
    x = normal(len(masks[0]), LENGTH, model.width)
    params = random_params(model, x, scale=0.5)
    direction = normal(model.width, 2, seed=9)

    def row(x, mask):
        return model.apply({"params": params}, x[None], mask[None], causal)[0] @ direction

    jacobian = jax.jit(jax.vmap(jax.jacrev(row)))
    return [np.abs(np.asarray(jacobian(x, mask))).max(axis=(2, 4)) for mask in masks]


BEFORE = np.tril(np.ones((LENGTH, LENGTH), bool))


# Every norm with every position encoding and every MLP, and every position encoding with every MLP.
@pytest.mark.parametrize("norm,position,mlp", [
    ("layernorm", "learned", "gelu"), ("rmsnorm", "rotary", "gelu"), ("layernorm", "rotary", "swiglu"),
    ("rmsnorm", "learned", "swiglu"), ("layernorm", "learned", "relu2"), ("rmsnorm", "rotary", "relu2")])
def test_no_output_depends_on_the_future(norm, position, mlp):
    [[found]] = support(Stack(**TINY, norm=norm, position=position, mlp=mlp, bias=mlp != "swiglu"))
    assert (found[~BEFORE] == 0).all()
    assert (found[BEFORE] > 1e-6).all()


@pytest.mark.parametrize("fields", [
    {"depth": 2, "scan": True, "qk_norm": True, "kv_heads": 1, "remat": "blocks"}, {"depth": 2, "attention": "xla"}],
    ids=str)
def test_no_output_depends_on_the_future_whatever_else_is_chosen(fields):
    [[found]] = support(Stack(**TINY | fields))
    assert (found[~BEFORE] == 0).all()
    assert (found[BEFORE] > 1e-6).all()


@pytest.mark.parametrize("attention", ["einsum", "xla"])
def test_without_causality_every_output_depends_on_the_future(attention):
    """Negative control of the two tests above: the same measure sees a model that looks ahead."""
    [found] = support(Stack(**TINY, attention=attention), causal=False)
    assert (found > 1e-6).all()


@pytest.mark.parametrize("attention,causal", [("einsum", True), ("einsum", False), ("xla", False)])
def test_real_positions_do_not_depend_on_padding(attention, causal):
    real = np.array([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1]], bool)
    found, unmasked = support(Stack(**TINY, attention=attention), real, np.ones_like(real), causal=causal)
    to_padding, to_real = (real[:, :, None] & other[:, None, :] for other in (~real, real))
    assert (found[to_padding] == 0).all()
    seen = to_real & BEFORE if causal else to_real
    assert (found[seen] > 1e-6).all()
    assert (unmasked[to_padding & BEFORE] > 1e-6).all()  # negative control


# ------------------------------------------------------------------------------------------------- small pieces

def numpy_norm(kind, x, scale, bias, epsilon=1e-5):
    x = np.asarray(x, np.float64)
    if kind == "layernorm":
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * scale + bias
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon) * scale


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms_equal_numpy(kind):
    module, x = norm(kind, bias=True, name=None), normal(3, 7, scale=3e-3) + np.float32(1e-3)
    params = random_params(module, x)
    got = np.asarray(module.apply({"params": params}, x))
    bias = params.get("bias", 0)
    np.testing.assert_allclose(got, numpy_norm(kind, x, params["scale"], bias), rtol=1e-5, atol=1e-6)
    for wrong in (numpy_norm(kind, x, params["scale"], bias, epsilon=1e-6), numpy_norm(kind, x, 1, bias)):
        assert np.abs(got - wrong).max() > 1e-2  # negative controls: another epsilon, no scale


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_the_statistics_of_a_norm_are_float32_in_bfloat16(kind):
    x = (normal(2, 512) + 30).astype(BF16)
    module = norm(kind, bias=False, name=None)
    got = module.apply({"params": {"scale": jnp.ones(512, BF16)}}, x)
    want = numpy_norm(kind, x, 1, 0)
    assert got.dtype == BF16
    bound = 2.0**-8 * np.abs(want) + 2e-4  # one rounding to bfloat16; float32's cancellation against the mean 30
    assert (np.abs(np.asarray(got, np.float64) - want) <= bound).all()
    if kind == "layernorm":  # negative control: the mean of squares minus the squared mean, in bfloat16
        x16 = np.asarray(x)
        low = (x16 - x16.mean(-1, keepdims=True)).astype(np.float64) / np.sqrt(
            np.float64((x16 * x16).mean(-1, keepdims=True) - np.square(x16.mean(-1, keepdims=True))).clip(1e-5))
        assert (np.abs(low - want) > bound).any()


def test_rotary_is_a_rotation_by_position():
    x, positions = normal(2, 4, 3, 6), np.array([[0, 1, 2, 9], [3, 1, 4, 1]])
    z = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * positions[..., None, None] * 10_000.0 ** (-np.arange(3) / 3))
    got = np.asarray(rotary(jnp.asarray(x), jnp.asarray(positions)))
    np.testing.assert_allclose(got, np.concatenate([z.real, z.imag], -1), atol=2e-6)
    np.testing.assert_array_equal(got[0, 0], x[0, 0])
    shared = rotary(jnp.asarray(x), jnp.asarray(positions[0]))
    np.testing.assert_array_equal(shared[0], got[0])
    pairs = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(
        1j * positions[..., None, None] * 10_000.0 ** (-np.arange(3) / 3))
    interleaved = np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)
    assert np.abs(got - interleaved).max() > 0.1  # negative control: the other convention


def test_rotary_scores_depend_on_the_distance_only():
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)

    def score(turn, i, j):
        return float((turn(jnp.asarray(q), jnp.array([i])) * turn(jnp.asarray(k), jnp.array([j]))).sum())

    assert score(rotary, 7, 3) == pytest.approx(score(rotary, 104, 100), abs=1e-4)
    assert abs(score(rotary, 7, 3) - score(rotary, 7, 2)) > 1e-2  # negative control: another distance
    added = lambda x, p: x + jnp.sin(p.astype(jnp.float32))[:, None, None]
    assert abs(score(added, 7, 3) - score(added, 104, 100)) > 1e-2  # negative control: positions added, not turned


def numpy_mlp(kind, p, x):
    up = x @ p["up"]["kernel"] + p["up"]["bias"]
    if kind == "gelu":
        hidden = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    elif kind == "relu2":
        hidden = np.maximum(up, 0) ** 2
    else:
        gate = x @ p["gate"]["kernel"] + p["gate"]["bias"]
        hidden = gate / (1 + np.exp(-gate)) * up
    return hidden @ p["down"]["kernel"] + p["down"]["bias"]


@pytest.mark.parametrize("kind", ["gelu", "swiglu", "relu2"])
def test_mlps_equal_numpy(kind):
    module, x = FeedForward(**TINY, hidden_multiple=2.5, mlp=kind), normal(2, 3, 8)
    params = random_params(module, x, False, scale=0.5)
    assert params["up"]["kernel"].shape == (8, 20)
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    got = np.asarray(module.apply({"params": params}, x, False))
    np.testing.assert_allclose(got, numpy_mlp(kind, wide, x), atol=5e-6)
    for other in {"gelu", "swiglu", "relu2"} - {kind}:  # negative control
        assert np.abs(got - numpy_mlp(other, wide | {"gate": wide["up"]}, x)).max() > 1e-2


def test_gelu_is_the_tanh_form():
    torch = pytest.importorskip("torch", reason="torch is the independent reference here, and is not installed")
    x = normal(64, 8, scale=2)
    eye = {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}
    got = FeedForward(**TINY, hidden_multiple=1.0).apply({"params": {"up": eye, "down": eye}}, x, False)
    gelu = functools.partial(torch.nn.functional.gelu, torch.from_numpy(x))
    np.testing.assert_allclose(got, gelu(approximate="tanh").numpy(), atol=1e-6)
    assert np.abs(got - gelu().numpy()).max() > 1e-4  # negative control: the exact form


@pytest.mark.parametrize("fields,biases", [({}, 8), ({"norm": "rmsnorm"}, 6), ({"bias": False}, 0),
                                           ({"mlp": "swiglu", "norm": "rmsnorm"}, 7)], ids=str)
def test_the_bias_switch_is_for_projections_and_layernorms(fields, biases):
    x = jnp.zeros((1, 2, 8))
    shapes = jax.eval_shape(Stack(**TINY, **fields).init, jax.random.key(0), x)["params"]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(shapes["block_0"])]
    assert sum("bias" in path for path in paths) == biases
    assert ("bias" in shapes["final_norm"]) == ("norm" not in fields and "bias" not in fields)


def test_initial_values():
    """GPT-2: normal(0.02), the projections into the residual stream 0.02 / sqrt(2 depth), biases 0, scales 1."""
    model = Stack(depth=3, width=128, heads=2, context=8, scan=True, mlp="swiglu", qk_norm=True)
    params = jax.jit(model.init)(jax.random.key(0, impl="unsafe_rbg"), jnp.zeros((1, 2, 128)))["params"]
    kernels = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        name = path[-1].key
        if name == "kernel":
            kernels[path[-2].key] = np.asarray(leaf)
        else:
            np.testing.assert_array_equal(leaf, 0 if name == "bias" else 1)
    assert set(kernels) == {"query", "key", "value", "out", "up", "gate", "down"}
    for name, stacked in kernels.items():
        want = 0.02 / 6**0.5 if name in ("out", "down") else 0.02
        other = 0.02 if name in ("out", "down") else 0.02 / 6**0.5
        for layer in stacked:
            n = layer.size
            assert abs(layer.mean()) < 5 * want / n**0.5
            assert abs(layer.std() / want - 1) < 5 / (2 * n) ** 0.5  # five standard errors of a standard deviation
            assert abs(layer.std() / other - 1) > 5 / (2 * n) ** 0.5  # negative control
        assert abs(np.corrcoef(stacked[0].ravel(), stacked[1].ravel())[0, 1]) < 5 / n**0.5  # layers are not copies


# ------------------------------------------------------------------------------------------------------ dropout

class Drop(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x, train):
        return dropout(self, x, self.rate, train)


def dropped(rate, x, key=0, train=True):
    return Drop(rate).apply({}, x, train, rngs={"dropout": jax.random.key(key)})


def test_dropout_keeps_the_mean_and_what_survives_is_scaled():
    n, rate = 100_000, 0.25
    y = np.asarray(dropped(rate, jnp.ones(n)))
    np.testing.assert_allclose(np.unique(y), [0, 4 / 3], rtol=1e-6)
    five = 5 * (rate / (1 - rate) / n) ** 0.5
    assert abs(y.mean() - 1) < five
    assert abs((y * (1 - rate)).mean() - 1) > five  # negative control: without the scaling the mean is off
    assert abs((y == 0).mean() - rate) < 5 * (rate * (1 - rate) / n) ** 0.5


def test_dropout_off():
    x = jnp.asarray(normal(64))
    assert dropped(0, x) is x and dropped(0.0, x) is x
    assert Drop(0.5).apply({}, x, False) is x  # evaluation needs no key
    assert (dropped(jnp.zeros(()), x) == x).all()
    assert (dropped(0.5, x) != x).any()  # negative control
    assert is_zero(0) and is_zero(0.0) and not is_zero(1e-9) and not is_zero(jnp.zeros(()))


def test_dropout_depends_on_its_key():
    x = jnp.ones(64)
    assert (dropped(0.5, x) == dropped(0.5, x)).all()
    assert (dropped(0.5, x) != dropped(0.5, x, key=1)).any()


def test_a_traced_dropout_rate_equals_a_static_one():
    x, rates = jnp.asarray(normal(64)), [0.0, 0.25, 0.5]
    many = jax.jit(jax.vmap(lambda rate: dropped(rate, x)))(jnp.array(rates))
    for rate, got in zip(rates, many, strict=True):
        np.testing.assert_array_equal(got, dropped(rate, x))
    assert (many[1] != many[2]).any()  # negative control


def test_a_traced_dropout_rate_works_in_a_whole_model():
    x, rngs = jnp.asarray(normal(1, LENGTH, 8)), {"dropout": jax.random.key(0)}
    params = random_params(Stack(**TINY), x)
    run = lambda rate: Stack(**TINY, dropout=rate).apply({"params": params}, x, train=True, rngs=rngs)
    many, none, half = jax.jit(lambda rates: (jax.vmap(run)(rates), run(0.0), run(0.5)))(jnp.array([0.0, 0.5]))
    np.testing.assert_allclose(many[0], none, atol=1e-5)
    np.testing.assert_allclose(many[1], half, atol=1e-5)
    assert np.abs(many[0] - many[1]).max() > 0.1  # negative control


def test_dropout_places():
    """Attention probabilities and both residual branches, in training only (embeddings: see test_gpt)."""
    def draws(rate, train):
        run = lambda x: Stack(**TINY, dropout=rate).apply({"params": params}, x, train=train,
                                                          rngs={"dropout": jax.random.key(0)})
        return len(products(jax.make_jaxpr(run)(x).jaxpr, "random_bits"))

    x = jnp.zeros((1, LENGTH, 8))
    params = random_params(Stack(**TINY), x)
    assert (draws(0.5, True), draws(0.0, True), draws(0.5, False)) == (3, 0, 0)


@pytest.mark.parametrize("scan", [False, True])
def test_every_layer_drops_its_own(scan):
    """All weights 0 but one bias: each of two layers adds 0 or 2 per element, so the sums are 0, 2 and 4 if (and only
    if) the layers draw different masks; the norm at the end keeps distinct values distinct."""
    model, x = Stack(**TINY | {"depth": 2, "width": 64}, dropout=0.5, scan=scan), jnp.zeros((1, 1, 64))
    params = jax.tree.map(np.zeros_like, random_params(model, x))
    blocks = [params["blocks"]] if scan else [params["block_0"], params["block_1"]]
    for block in blocks:
        block["attn"]["out"]["bias"] = jnp.ones_like(block["attn"]["out"]["bias"])
    params["final_norm"]["scale"] = jnp.ones(64)
    run = jax.jit(lambda p, key: model.apply({"params": p}, x, train=True, rngs={"dropout": key}))
    y = run(params, jax.random.key(0, impl="unsafe_rbg"))  # a generator that compiles fast
    assert len(np.unique(np.round(np.asarray(y), 4))) == 3


# ------------------------------------------------------------------------------------------- reduced precision

def rounded(*shape, seed=0):
    return jnp.asarray(normal(*shape, seed=seed)).astype(BF16)


def wide(x):
    return np.asarray(x, np.float64)


def assert_one_rounding(got, want, magnitude):
    """Within one rounding to bfloat16 (2^-9 of the value, twice for ties) and float32's errors in the sum."""
    assert got.dtype == BF16
    assert (np.abs(wide(got) - want) <= 2.0**-8 * np.abs(want) + 1e-6 * magnitude).all()


def test_project_in_bfloat16_is_rounded_once():
    x, kernel, g = rounded(2, 3, 300), rounded(300, 5, seed=1), rounded(2, 3, 5, seed=2)
    y, back = jax.vjp(lambda x, k: project(x, k, None, BF16), x, kernel)
    dx, dkernel = back(g)
    X, W, G = map(wide, (x, kernel, g))
    assert_one_rounding(y, X @ W, np.abs(X) @ np.abs(W))
    assert_one_rounding(dx, G @ W.T, np.abs(G) @ np.abs(W.T))
    flat_x, flat_g = X.reshape(-1, 300), G.reshape(-1, 5)
    assert_one_rounding(dkernel, flat_x.T @ flat_g, np.abs(flat_x.T) @ np.abs(flat_g))
    with pytest.raises(AssertionError):  # negative control: an accumulator of 8 bits
        total = np.zeros((2, 3, 5), BF16)
        for d in range(300):
            total = (total + np.asarray(x)[..., d, None] * np.asarray(kernel)[d]).astype(BF16)
        assert_one_rounding(total, X @ W, np.abs(X) @ np.abs(W))


def test_project_to_float32_keeps_the_sum_unrounded():
    """As for the logits: bfloat16 operands, float32 result; the cotangent is rounded once before its products."""
    x, kernel, g = rounded(3, 300), rounded(300, 5, seed=1), jnp.asarray(normal(3, 5, seed=2))
    y, back = jax.vjp(lambda x, k: project(x, k, None, jnp.float32), x, kernel)
    X, W = wide(x), wide(kernel)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, X @ W, atol=1e-4)
    assert np.abs(wide(y.astype(BF16)) - X @ W).max() > 1e-3  # negative control: rounded
    dx, dkernel = back(g)
    G = wide(g.astype(BF16))
    assert_one_rounding(dx, G @ W.T, np.abs(G) @ np.abs(W.T))
    assert_one_rounding(dkernel, X.T @ G, np.abs(X.T) @ np.abs(G))


def test_project_in_float32_has_the_gradients_of_a_matrix_product():
    x, kernel, g = jnp.asarray(normal(2, 3, 4)), jnp.asarray(normal(4, 5)), jnp.asarray(normal(2, 3, 5))
    ours = jax.vjp(lambda x, k: project(x, k, None, jnp.float32), x, kernel)
    theirs = jax.vjp(jnp.matmul, x, kernel)
    for a, b in zip((ours[0], *ours[1](g)), (theirs[0], *theirs[1](g)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("out", [BF16, jnp.float32], ids=["bfloat16", "float32"])
def test_project_makes_only_products_of_two_bfloat16(out):
    x, kernel, g = rounded(2, 3, 4), rounded(4, 5), jnp.ones((2, 3, 5), out)

    def types(f):
        return products(jax.make_jaxpr(lambda x, k, g: (jax.vjp(f, x, k)[1](g), f(x, k)))(x, kernel, g).jaxpr)

    numbers = (((2,), (0,)), ((), ()))
    plain = lambda x, k: jax.lax.dot_general(x, k, numbers, preferred_element_type=jnp.float32).astype(out)
    assert types(lambda x, k: project(x, k, None, out)) == [("bfloat16", "bfloat16")] * 4
    assert ("float32", "bfloat16") in types(plain)  # negative control: what autodiff makes of the same product


def test_every_projection_of_a_model_is_a_bfloat16_product():
    x = jnp.asarray(normal(1, LENGTH, 8)).astype(BF16)
    model = Stack(**TINY, mlp="swiglu")
    params = random_params(model, x)

    def types(params):
        loss = lambda p, x: model.apply({"params": p}, x).astype(jnp.float32).sum()
        return products(jax.make_jaxpr(jax.grad(loss))(params, x).jaxpr)

    found = types(jax.tree.map(lambda p: p.astype(BF16), params))
    # Seven projections, each with three products (x's own gradient is needed everywhere: all read a norm with a
    # scale), and attention's two, whose own backward products this test leaves out.
    assert found.count(("bfloat16", "bfloat16")) >= 21
    assert ("float32", "float32") not in found
    assert ("bfloat16", "bfloat16") not in types(params)  # negative control: float32 parameters


# -------------------------------------------------------------------------------------- the choice of a backend

@pytest.fixture
def choose():
    choose_attention.cache_clear()
    yield choose_attention
    choose_attention.cache_clear()


GOOD = ("gpu", "bfloat16", 64, 100, True, False)


def test_auto_takes_cudnn_where_it_runs_and_says_so_once(choose, caplog):
    with caplog.at_level(logging.INFO, "lab.models.attention"):
        assert [choose("auto", *GOOD) for _ in range(3)] == ["cudnn"] * 3
    assert caplog.messages == ["attention: cudnn (fused, memory linear in the length)"]


@pytest.mark.parametrize("place,reason", [
    (("cpu", "bfloat16", 64, 100, True, False), "runs on NVIDIA GPUs only, and this is cpu"),
    (("gpu", "float32", 64, 100, True, False), "needs --precision bfloat16, not float32"),
    (("gpu", "bfloat16", 256, 100, True, False), "needs a head width of at most 128 and a multiple of 8, not 256"),
    (("gpu", "bfloat16", 20, 100, True, False), "needs a head width of at most 128 and a multiple of 8, not 20"),
    (("gpu", "float16", 64, 100, True, True), "cannot drop out attention probabilities"),
    ((*GOOD, True), "needs the whole length on every device, so no --mesh.sequence"),
    ((*GOOD, False, True), "cannot keep the documents of a window apart"),
], ids=str)
def test_where_cudnn_cannot_run_auto_falls_to_einsum_and_cudnn_is_an_error(choose, caplog, place, reason):
    with caplog.at_level(logging.INFO, "lab.models.attention"):
        assert [choose("auto", *place) for _ in range(2)] == ["einsum"] * 2
    assert caplog.messages == [f"attention: einsum (cudnn {reason})"]
    with pytest.raises(UserError) as e:
        choose("cudnn", *place)
    assert str(e.value) == f"Attention backend cudnn {reason}. Use --model.attention auto or einsum."


TPU = ("tpu", "float32", 20, 128, False, False)


@pytest.mark.parametrize("place,reason", [
    (("cpu", *TPU[1:]), "runs on TPUs only, and this is cpu"), ((*TPU[:3], 100, False, False),
     "needs a length that is a multiple of 128, not 100"), ((*TPU[:4], True, False), "does not support padding"),
    ((*TPU[:4], False, True), "cannot drop out attention probabilities"),
], ids=str)
def test_where_splash_cannot_run_it_is_an_error_and_auto_falls_to_einsum(choose, caplog, place, reason):
    with caplog.at_level(logging.INFO, "lab.models.attention"):
        assert choose("auto", *TPU) == choose("splash", *TPU) == "splash" and choose("auto", *place) == "einsum"
    assert caplog.messages[0] == "attention: splash (fused, memory linear in the length)"
    if place[0] == "tpu":
        assert caplog.messages[1] == f"attention: einsum (splash {reason})"
    with pytest.raises(UserError) as e:
        choose("splash", *place)
    assert str(e.value) == f"Attention backend splash {reason}. Use --model.attention auto or einsum."


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_splash_is_einsum_attention(causal):
    """Grouped queries; JAX's interpreter of kernels in the place of a TPU. Values and gradients."""
    q, k, v = (jnp.asarray(normal(1, 128, n, 8, seed=n)) for n in (2, 1, 1))
    visible = jnp.tril(jnp.ones((1, 128, 128), bool))

    def results(attend):
        return jax.jit(jax.value_and_grad(lambda *args: jnp.sin(attend(*args)).sum(), argnums=(0, 1, 2)))(q, k, v)

    kernel = results(functools.partial(splash_attention, causal=causal, interpret=True))
    plain, other = (results(lambda *args, see=see: einsum_attention(*args, see))
                    for see in ((visible, None) if causal else (None, visible)))
    for a, b, c in zip(*map(jax.tree.leaves, (kernel, plain, other)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
        assert np.abs(a - c).max() > 1e-2  # negative control: the other mask


def test_a_named_backend_is_taken_or_is_an_error(choose, caplog):
    with caplog.at_level(logging.INFO, "lab.models.attention"):
        assert choose("cudnn", *GOOD) == "cudnn"
        assert choose("einsum", "cpu", "float32", 20, 5, True, True) == "einsum"
        assert choose("xla", "cpu", "float32", 20, 5, True, False) == "xla"
    assert caplog.messages == []  # it is what was asked for
    with pytest.raises(UserError, match="xla cannot drop out attention probabilities"):
        choose("xla", "cpu", "float32", 64, 5, True, True)


def test_a_model_asks_for_its_backend(choose):
    x = jnp.zeros((1, 2, 8))
    with pytest.raises(UserError, match="NVIDIA GPUs only, and this is cpu"):
        jax.eval_shape(Stack(**TINY, attention="cudnn").init, jax.random.key(0), x)
    run = functools.partial(Stack(**TINY, attention="xla", dropout=0.1).init_with_output, train=True)
    with pytest.raises(UserError, match="xla cannot drop out"):
        jax.eval_shape(run, {"params": jax.random.key(0), "dropout": jax.random.key(0)}, x)


# ------------------------------------------------------------------------------------------------- bad settings

@pytest.mark.parametrize("fields,sentence", [
    ({"depth": 0}, "--model.depth must be at least 1, not 0."),
    ({"width": 0}, "--model.width must be at least 1, not 0."),
    ({"heads": -1}, "--model.heads must be at least 1, not -1."),
    ({"context": 0}, "--model.context must be at least 1, not 0."),
    ({"width": 10, "heads": 4}, "--model.width 10 is not divisible by --model.heads 4."),
    ({"heads": 4, "kv_heads": 3}, "--model.heads 4 is not divisible by --model.kv-heads 3."),
    ({"width": 6, "heads": 2, "position": "rotary"}, "Rotary positions need an even head width, not 3."),
    ({"dropout": 1.0}, "--model.dropout must be in [0, 1), not 1.0."),
    ({"dropout": -0.1}, "--model.dropout must be in [0, 1), not -0.1."),
], ids=str)
def test_settings_that_contradict_each_other(fields, sentence):
    with pytest.raises(UserError) as e:
        Transformer(**TINY | fields).validate()
    assert str(e.value) == sentence


def test_good_settings_are_silent():
    Transformer().validate()
    Transformer(**TINY, kv_heads=1, position="rotary", dropout=0.5).validate()
    jax.jit(lambda rate: Transformer(**TINY, dropout=rate).validate())(0.1)  # a traced rate cannot be checked


# ------------------------------------------------------------------------------------ reduced precision inside


def distance(a, b):
    """The greatest difference, in units of bfloat16's rounding of the largest value."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.abs(a - b).max() / (np.abs(b).max() * 2.0**-8)


@pytest.mark.parametrize("f, operands", [(nn.gelu, 1), (lambda x: jnp.square(nn.relu(x)), 1),
                                         (lambda x, y: nn.silu(x) * y, 2)])
def test_elementwise_rounds_once(f, operands):
    xs = [jnp.asarray(normal(64, 64, seed=i, scale=2.0), BF16) for i in range(operands)]
    g = jnp.asarray(normal(64, 64, seed=7), BF16)
    y, back = jax.vjp(functools.partial(elementwise, f), *xs)
    wide_y, wide_back = jax.vjp(f, *(x.astype(jnp.float32) for x in xs))
    np.testing.assert_array_equal(y, wide_y.astype(BF16))
    for got, wanted in zip(back(g), wide_back(g.astype(jnp.float32)), strict=True):
        np.testing.assert_array_equal(got, wanted.astype(BF16))


def test_rounding_after_every_operation_gives_other_numbers():
    """The negative control of the test above."""
    x = jnp.asarray(normal(64, 64, scale=2.0), BF16)
    assert (np.asarray(nn.gelu(x)) != np.asarray(elementwise(nn.gelu, x))).any()


def test_elementwise_keeps_only_its_operands():
    x = jnp.ones((4, 4), BF16)
    kept = jax.tree.leaves(jax.vjp(functools.partial(elementwise, nn.gelu), x)[1])
    assert [(k.shape, k.dtype) for k in kept] == [((4, 4), BF16)]
    assert len(jax.tree.leaves(jax.vjp(nn.gelu, x)[1])) > 1


@pytest.mark.parametrize("place", ["cpu", "gpu"])
def test_gpus_get_barriers(place, monkeypatch):
    """So that what is to be computed again is not kept; under vmap, too, as in a study."""
    monkeypatch.setattr("lab.models.precision.platform", lambda: place)
    x = jnp.ones((3, 4), BF16)
    for f in (jax.grad(lambda x: elementwise(nn.gelu, x).astype(jnp.float32).sum()),
              jax.vmap(jax.grad(lambda x: elementwise(nn.gelu, x).astype(jnp.float32).sum()))):
        assert str(jax.make_jaxpr(f)(x)).count("optimization_barrier") == (2 if place == "gpu" else 0)
        np.testing.assert_array_equal(f(x), jax.grad(lambda x: nn.gelu(x.astype(jnp.float32)).sum())(x))


def test_softmax_gradient_from_rounded_probabilities():
    scores, g = jnp.asarray(normal(8, 33, scale=3.0)), jnp.asarray(normal(8, 33, seed=1), BF16)
    p, back = jax.vjp(lambda s: softmax(s, BF16), scores)
    wide, wide_back = jax.vjp(jax.nn.softmax, scores)
    wanted = wide_back(g.astype(jnp.float32))[0]
    np.testing.assert_array_equal(p, wide.astype(BF16))
    assert distance(back(g)[0], wanted) < 1
    assert distance(p.astype(jnp.float32) * g.astype(jnp.float32), wanted) > 5  # without the second term


@pytest.mark.parametrize("place", ["cpu", "gpu"])
def test_bias_gradients_are_summed_in_float32(place, monkeypatch):
    """4,096 ones: a running sum in bfloat16 stops at 256."""
    monkeypatch.setattr("lab.models.precision.platform", lambda: place)
    x, layer = jnp.ones((4096, 2), BF16), Dense(3, bias=True, stddev=0.02)
    params = jax.tree.map(lambda p: p.astype(BF16), layer.init(jax.random.key(0), x)["params"])
    got = jax.grad(lambda p: layer.apply({"params": p}, x).astype(jnp.float32).sum())(params)["bias"]
    np.testing.assert_array_equal(got.astype(jnp.float32), np.full(3, 4096.0))
    assert jax.lax.fori_loop(0, 4096, lambda i, total: total + jnp.ones((), BF16), jnp.zeros((), BF16)) == 256
    weights = rounded(4096, 3)  # rounded more than once, these sums are wrong by 1 %
    got = jax.grad(lambda p: (layer.apply({"params": p}, x) * weights).astype(jnp.float32).sum())(params)["bias"]
    assert_one_rounding(got, wide(weights).sum(0), np.abs(wide(weights)).sum(0))


def test_rows_and_broadcast_gradients_are_summed_in_float32():
    """As above: a token 4,096 times in a batch, and a position of 4,096 records."""
    table, ids, y = jnp.zeros((3, 2), BF16), jnp.ones((4096, 1), int), jnp.zeros((4096, 5, 2), BF16)
    found = jax.grad(lambda t: Embed.embedding_lookup(t, ids).astype(jnp.float32).sum())(table)
    np.testing.assert_array_equal(found.astype(jnp.float32), [[0, 0], [4096, 4096], [0, 0]])
    plain = jax.grad(lambda t: t[ids].astype(jnp.float32).sum())(table)
    assert plain[1, 0] < 4096  # negative control
    rows, back = jax.vjp(functools.partial(elementwise, jnp.add), y, jnp.ones((1, 5, 2), BF16))
    assert rows.dtype == BF16 and (rows == 1).all()
    np.testing.assert_array_equal(back(jnp.ones_like(rows))[1].astype(jnp.float32), np.full((1, 5, 2), 4096.0))


def test_gpus_write_products_in_the_compute_type(monkeypatch):
    """The same layer, values and gradients to a rounding or two."""
    layer, x = FeedForward(**TINY), jnp.asarray(normal(16, LENGTH, 8), BF16)
    params = jax.tree.map(lambda p: p.astype(BF16), random_params(layer, x, True))

    def run(params, x):
        return jnp.sin(layer.apply({"params": params}, x, True).astype(jnp.float32)).sum()

    found = {}
    for place, type_ in (("cpu", "f32"), ("gpu", "bf16")):
        monkeypatch.setattr("lab.models.precision.platform", lambda place=place: place)
        found[place] = jax.value_and_grad(run, argnums=(0, 1))(params, x)
        text = jax.jit(jax.grad(run)).lower(params, x).as_text()
        assert set(re.findall(r"dot_general.* -> tensor<[\dx]*x(\w+)>", text)) == {type_}
    for a, b in zip(*map(jax.tree.leaves, (found["cpu"], found["gpu"])), strict=True):
        assert distance(a, b) < 3
    wrong = jax.tree.map(lambda p: p * 1.1, params)
    assert distance(run(wrong, x), found["cpu"][0]) > 3  # negative control
