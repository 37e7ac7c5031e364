"""GPT against two NumPy models written from the papers; scan, remat, cache, initial weights, precision, causality."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.errors import UserError
from lab.models.gpt import GPT
from lab.tasks.language import LanguageModel
from lab.train.step import cast
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

TINY = {"depth": 2, "width": 16, "heads": 4, "vocab": 13, "context": 8}
MODERN = {"norm": "rmsnorm", "position": "rotary", "mlp": "swiglu", "kv_heads": 2, "qk_norm": True, "tied": False,
          "softcap": 4.0, "bias": False}
TOKENS = np.random.default_rng(0).integers(0, 13, (3, 6)).astype(np.int32)
BATCH = {"tokens": np.concatenate([TOKENS, TOKENS[:, :1]], 1), "bytes": np.full(3, 6, np.int32),
         "weight": np.ones(3, np.float32)}


def shapes_of(model):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), train=False))["params"]


def random_params(model, scale=0.3):
    """Random values for every parameter, biases and norm scales too; the scales around 1."""
    rng = np.random.default_rng(0)

    def one(path, x):
        return (rng.normal(size=x.shape) * scale + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree.map_with_path(one, shapes_of(model))


def forward(model, params, tokens=TOKENS, **kwargs):
    return np.asarray(jax.jit(lambda p, t: model.apply({"params": p}, t, train=False, **kwargs))(params, tokens))


def loss_of(model, params, batch=BATCH):
    loss, weight, *_ = LanguageModel().loss(model, {"params": params}, batch, {}, train=True)
    return loss / weight


@functools.cache
def compiled(model):
    """parameters -> (loss, gradient), compiled once for all tests."""
    return jax.jit(jax.value_and_grad(functools.partial(loss_of, model)))


def loss_and_gradient(model, params):
    return compiled(model)(params)


def assert_trees_close(a, b, atol):
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, err_msg=jax.tree_util.keystr(path))


def stacked(params, depth):
    """Unrolled parameters as the scanned model holds them."""
    rest = {name: value for name, value in params.items() if not name.startswith("block_")}
    return rest | {"blocks": jax.tree.map(lambda *x: np.stack(x), *(params[f"block_{i}"] for i in range(depth)))}


# --------------------------------------------------------------------------------- against independent references

def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gpt2(params, tokens, heads=4, depth=2, erf=False, scaled=True):
    """GPT-2 as in the paper's code: one (L, D) sequence at a time, float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    dense = lambda q, x: x @ q["kernel"] + q["bias"]
    layernorm = lambda q, x: ((x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * q["scale"]
                              + q["bias"])
    if erf:
        gelu = lambda x: x * 0.5 * (1 + np.vectorize(__import__("math").erf)(x / np.sqrt(2)))
    else:
        gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    logits = []
    for row in tokens:
        x = p["wte"]["embedding"][row] + p["wpe"]["embedding"][: len(row)]
        for i in range(depth):
            b = p[f"block_{i}"]
            h = layernorm(b["attention_norm"], x)
            q, k, v = (dense(b["attn"][name], h) for name in ("query", "key", "value"))
            parts, K = [], x.shape[1] // heads
            for n in range(heads):
                part = slice(n * K, (n + 1) * K)
                scores = q[:, part] @ k[:, part].T / (np.sqrt(K) if scaled else 1)
                scores[np.triu_indices(len(row), 1)] = -np.inf
                parts.append(softmax(scores) @ v[:, part])
            x = x + dense(b["attn"]["out"], np.concatenate(parts, 1))
            x = x + dense(b["ffn"]["down"], gelu(dense(b["ffn"]["up"], layernorm(b["mlp_norm"], x))))
        logits.append(layernorm(p["final_norm"], x) @ p["wte"]["embedding"].T)
    return np.stack(logits)


def modern(params, tokens, heads=4, groups=2, depth=2, softcap=4.0, qk_norm=True, turn=1.0, dealt=False):
    """LLaMA's block with grouped queries, normalised queries and keys, and capped logits; rotations as complex."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    rms = lambda scale, x: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    D = p["wte"]["embedding"].shape[1]
    K = D // heads

    def rotate(x):
        z = x[:, : K // 2] + 1j * x[:, K // 2:]
        z = z * np.exp(1j * turn * np.arange(len(x))[:, None] * 10_000.0 ** (-np.arange(K // 2) * 2 / K))
        return np.concatenate([z.real, z.imag], 1)

    logits = []
    for row in tokens:
        x = p["wte"]["embedding"][row]
        for i in range(depth):
            a, f = p[f"block_{i}"]["attn"], p[f"block_{i}"]["ffn"]
            h = rms(p[f"block_{i}"]["attention_norm"]["scale"], x)
            parts = []
            for n in range(heads):
                g = n % groups if dealt else n // (heads // groups)
                q, k = h @ a["query"]["kernel"][:, n * K:][:, :K], h @ a["key"]["kernel"][:, g * K:][:, :K]
                if qk_norm:
                    q, k = rms(a["query_norm"]["scale"], q), rms(a["key_norm"]["scale"], k)
                scores = rotate(q) @ rotate(k).T / np.sqrt(K)
                scores[np.triu_indices(len(row), 1)] = -np.inf
                parts.append(softmax(scores) @ (h @ a["value"]["kernel"][:, g * K:][:, :K]))
            x = x + np.concatenate(parts, 1) @ a["out"]["kernel"]
            h = rms(p[f"block_{i}"]["mlp_norm"]["scale"], x)
            gate = h @ f["gate"]["kernel"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ f["up"]["kernel"])) @ f["down"]["kernel"]
        out = rms(p["final_norm"]["scale"], x) @ p["head"]
        logits.append(out if softcap is None else softcap * np.tanh(out / softcap))
    return np.stack(logits)


CLOSE = 2e-5


def test_gpt2_equals_numpy():
    model = GPT(**TINY)
    params = random_params(model)
    assert all(np.abs(x).min() > 0 for x in jax.tree.leaves(params))  # biases too
    got = forward(model, params)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, gpt2(params, TOKENS), atol=CLOSE)
    for wrong in ({"erf": True}, {"scaled": False}, {"depth": 1}, {"heads": 2}):  # negative controls
        assert np.abs(got - gpt2(params, TOKENS, **wrong)).max() > 10 * CLOSE, wrong


def test_the_modern_variant_equals_numpy():
    model = GPT(**TINY, **MODERN)
    params = random_params(model)
    assert not any("bias" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params))
    assert "wpe" not in params and params["head"].shape == (16, 13)
    got = forward(model, params)
    np.testing.assert_allclose(got, modern(params, TOKENS), atol=CLOSE)
    scanned = forward(GPT(**TINY, **MODERN, scan=True), stacked(params, 2))
    np.testing.assert_allclose(scanned, modern(params, TOKENS), atol=CLOSE)
    for wrong in ({"softcap": None}, {"qk_norm": False}, {"turn": 0.5}, {"dealt": True}, {"depth": 1}):
        assert np.abs(got - modern(params, TOKENS, **wrong)).max() > 10 * CLOSE, wrong  # negative controls
    assert np.abs(got).max() < 4.0  # the cap


def test_positions_and_masks():
    """Rows padded on the right, and on the left with positions that say so, give the logits of the rows alone."""
    model = GPT(**TINY)
    params = random_params(model)
    run = jax.jit(lambda mask, positions: model.apply({"params": params}, TOKENS, train=False, mask=mask,
                                                      positions=positions))
    everything, usual = np.ones((3, 6), bool), np.arange(6)
    plain = gpt2(params, TOKENS)
    np.testing.assert_allclose(run(everything, usual), plain, atol=CLOSE)

    moved = params | {"wpe": {"embedding": np.roll(params["wpe"]["embedding"], -2, axis=0)}}
    got = run(everything, usual + 2)
    np.testing.assert_allclose(got, gpt2(moved, TOKENS), atol=CLOSE)
    assert np.abs(got - plain).max() > 0.1  # negative control

    lengths = [4, 6, 2]
    right = run(usual < np.array(lengths)[:, None], usual)
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(right[i, :n], gpt2(params, TOKENS[i:i + 1, :n])[0], atol=CLOSE)
    positions, alone = np.array([0, 0, 0, 1, 2, 3]), gpt2(params, TOKENS[:, 2:])
    left = run(np.broadcast_to(usual >= 2, (3, 6)), positions)  # unlike on the right, in the sight of what follows
    np.testing.assert_allclose(left[:, 2:], alone, atol=CLOSE)
    assert np.abs(run(everything, positions)[:, 2:] - alone).max() > 0.1  # negative control: unmasked


# ------------------------------------------------------------------------------------------------ scan and remat

def test_scanned_equals_unrolled():
    """Loss and gradients; for the modern variant's logits see its NumPy test."""
    unrolled, scanned = GPT(**TINY), GPT(**TINY, scan=True)
    params = random_params(unrolled)
    both = stacked(params, 2)
    assert jax.tree.map(jnp.shape, both) == jax.tree.map(jnp.shape, shapes_of(scanned))
    (loss, grads), (scanned_loss, scanned_grads) = (loss_and_gradient(*x) for x in ((unrolled, params),
                                                                                     (scanned, both)))
    np.testing.assert_allclose(loss, scanned_loss, atol=1e-6)
    assert_trees_close(stacked(grads, 2), scanned_grads, atol=1e-6)
    swapped = stacked(params | {"block_0": params["block_1"], "block_1": params["block_0"]}, 2)
    assert abs(loss_and_gradient(scanned, swapped)[0] - loss) > 1e-4  # negative control: the order of the layers


def count(jaxpr, name):
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive.name == name
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            total += count(inner, name) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("remat", ["dots", "blocks"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_remat_changes_the_work_and_not_the_result(scan, remat):
    plain, again = GPT(**TINY, scan=scan), GPT(**TINY, scan=scan, remat=remat)
    params = random_params(GPT(**TINY))
    params = stacked(params, 2) if scan else params
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes_of(again))  # checkpoints carry over
    (loss, grads), (again_loss, again_grads) = (loss_and_gradient(m, params) for m in (plain, again))
    np.testing.assert_allclose(loss, again_loss, atol=1e-6)
    assert_trees_close(grads, again_grads, atol=1e-6)
    other = loss_and_gradient(plain, jax.tree.map(lambda x: 1.01 * x, params))[1]
    with pytest.raises(AssertionError):  # negative control: 1 % is seen
        assert_trees_close(grads, other, atol=1e-6)

    # 8 products forward in a block: 4 projections, 2 in attention, 2 in the MLP. The last is not needed again, and with
    # "dots" only those in attention are: also in reduced precision, where a custom derivative hides the products.
    once = {"blocks": (7, 8), "dots": (2,)}[remat]
    for precision in ("float32", "bfloat16"):
        reduced = jax.tree.map(lambda x, to=precision: x.astype(to), params)
        works = [count(jax.make_jaxpr(jax.grad(functools.partial(loss_of, m)))(reduced).jaxpr, "dot_general")
                 for m in (plain, again)]
        assert works[1] - works[0] in [n if scan else 2 * n for n in once]


# ---------------------------------------------------------------------------------------------------- the cache

@pytest.mark.parametrize("fields", [{}, MODERN | {"scan": True}], ids=["gpt2", "modern scanned"])
def test_the_cache_path_equals_the_full_forward_pass(fields):
    """Rows at different positions: prefill of 3 tokens, then single tokens, row 1 two positions behind."""
    model = GPT(**TINY, **fields)
    params = random_params(model)
    full = forward(model, params)

    @jax.jit
    def run(tokens, positions, cache):
        return model.apply({"params": params, **cache}, tokens, train=False, decode=True, positions=positions,
                           mutable=["cache"])

    logits, cache = run(TOKENS[:, :3], jnp.arange(3), {})
    np.testing.assert_allclose(logits, full[:, :3], atol=CLOSE)
    at = np.array([3, 1, 3])
    rows = np.arange(3)
    for _ in range(3):
        logits, cache = run(TOKENS[rows, at][:, None], at[:, None], cache)
        np.testing.assert_allclose(logits[:, 0], full[rows, at], atol=CLOSE)
        at = at + 1
    late, _ = run(TOKENS[rows, at - 1][:, None], at[:, None], cache)
    assert np.abs(late[:, 0] - full[rows, at - 1]).max() > 0.01  # negative control: a wrong position


def assert_causal_with_a_cache(fields, steps):
    """By the derivative of the logits at t by the embedding of the token at s; each token appears once."""
    L = 4
    tokens = jnp.arange(L)[None]
    model = GPT(**TINY | {"depth": 1} | fields | {"tied": False})
    params = random_params(model)

    def logits(embedding):
        variables, out = {"params": params | {"wte": {"embedding": embedding}}}, []
        for part in np.split(np.arange(L), steps):
            y, cache = model.apply(variables, tokens[:, part], train=False, decode=True, mutable=["cache"],
                                   positions=jnp.asarray(part))
            variables, out = variables | cache, [*out, y[0]]
        return jnp.concatenate(out) @ jnp.ones(13)

    found = np.abs(np.asarray(jax.jit(jax.jacrev(logits))(params["wte"]["embedding"])))[:, :L].max(-1)
    future = np.triu(np.ones((L, L), bool), 1)
    assert (found[~future] > 1e-7).all()
    assert (found[future] == 0).all(), "looks ahead"


@pytest.mark.parametrize("fields,steps", [({}, 2), (MODERN, 1)], ids=["gpt2 in 2 steps", "modern"])
def test_no_logit_depends_on_the_future_through_the_cache(fields, steps):
    """Without the cache: see test_layers."""
    assert_causal_with_a_cache(fields, steps)


def test_the_support_test_sees_a_cache_that_shows_the_future(monkeypatch):
    """Negative control of the test above: with every cached row in sight, prefill looks ahead."""
    from lab.models import layers

    seen = layers.einsum_attention
    monkeypatch.setattr(layers, "einsum_attention", lambda q, k, v, visible, *drop, **bias: seen(
        q, k, v, visible if drop else None, *drop, **bias))
    with pytest.raises(AssertionError, match="looks ahead"):
        assert_causal_with_a_cache({}, 1)


# ------------------------------------------------------------------------------------------------ initial weights

def test_gpt2_initialisation():
    params = initial(GPT(depth=2, width=128, heads=2, vocab=300, context=200))
    seen = 0
    for path, leaf in jax.tree.leaves_with_path(params):
        *_, module, name = (k.key for k in path)
        if name in ("bias", "scale"):
            np.testing.assert_array_equal(leaf, float(name == "scale"))
            continue
        want = 0.02 / 4**0.5 if module in ("out", "down") else 0.02  # sqrt(2 depth)
        assert abs(leaf.std() / want - 1) < 5 / (2 * leaf.size) ** 0.5, path
        assert abs(leaf.std() * 2 / want - 1) > 5 / (2 * leaf.size) ** 0.5  # negative control
        seen += 1
    assert seen == 2 * 6 + 2


SIZES = [(12, 768, 12, 124_439_808), (24, 1024, 16, 354_823_168), (48, 1600, 25, 1_557_611_200)]


@pytest.mark.parametrize("depth,width,heads,want", SIZES, ids=["small", "medium", "xl"])
def test_gpt2_parameter_counts(depth, width, heads, want):
    def count(**fields):
        model = GPT(depth=depth, width=width, heads=heads, vocab=50257, **fields)
        return sum(x.size for x in jax.tree.leaves(shapes_of(model)))

    assert count(scan=True) == want
    assert count(scan=True, bias=False) == want - (depth * (9 + 2) + 1) * width  # MLPs 5, attention 4, norms 2
    if depth == 12:
        assert count() == want
        assert count(scan=True, tied=False) == want + 50257 * 768  # negative control: the count sees the head
        assert GPT(vocab=50257) == GPT(depth=12, width=768, heads=12, vocab=50257, context=1024)


@functools.cache
def initial(model):
    """With a generator that compiles in a tenth of the time of the default one; the keys are made in the same way."""
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32), train=False)["params"])
    return jax.tree.map(np.asarray, init(jax.random.key(3, impl="unsafe_rbg")))


def flat(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}


ONE = TINY | {"depth": 1}


def test_an_ablation_keeps_the_initial_weights_of_shared_layers():
    base = flat(initial(GPT(**ONE)))
    other = flat(initial(GPT(**ONE, qk_norm=True, mlp="swiglu", tied=False, dropout=0.1, remat="blocks")))
    assert len(other) == len(base) + 2 + 2 + 1
    for path, x in base.items():
        np.testing.assert_array_equal(x, other[path], err_msg=path)
    drawn = [x.ravel()[:16].tobytes() for path, x in base.items() if not path.endswith(("bias", "scale"))]
    assert len(set(drawn)) == len(drawn) == 8  # negative control: they are not all the same draw


def test_another_depth_keeps_the_initial_weights_of_shared_layers():
    """All but the residual projections, whose standard deviation is a function of the depth: the same draws, scaled."""
    base, deeper = (flat(initial(GPT(**TINY | {"depth": depth}))) for depth in (1, 2))
    scaled = 0
    for path, x in base.items():
        if path.endswith(("out/kernel", "down/kernel")):
            np.testing.assert_allclose(x * 0.5**0.5, deeper[path], rtol=1e-5)
            scaled += 1
        else:
            np.testing.assert_array_equal(x, deeper[path], err_msg=path)
    assert scaled == 2
    kernel = "block_0/attn/query/kernel"
    assert (deeper[kernel] != deeper[kernel.replace("0", "1")]).any()  # negative control


def test_without_names_an_inserted_layer_changes_the_others():
    """Negative control of the two tests above: what automatic names would do."""
    class Unnamed(nn.Module):
        extra: bool

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4)(x) if self.extra else x
            return nn.Dense(4)(x)

    a, b = (Unnamed(extra).init(jax.random.key(0), jnp.zeros((1, 4)))["params"] for extra in (False, True))
    last = b["Dense_1"]["kernel"]
    assert (a["Dense_0"]["kernel"] != last).any()


# ------------------------------------------------------------------------------------------- precision and shapes

def test_bfloat16_is_close_and_not_equal():
    """Each rounding to bfloat16 is off by at most 2^-9 of a value. The errors of the logits are of both signs, and the
    loss averages over tokens: it stays within 2^-8 of itself (measured: a tenth of that). Four bits do not."""
    model = GPT(**TINY)
    params = random_params(model, scale=0.1)
    run = jax.jit(functools.partial(loss_of, model))
    full, half = float(run(params)), float(run(cast(params, "bfloat16")))
    assert 0 < abs(half - full) < 2.0**-8 * full
    assert jax.eval_shape(lambda p: model.apply({"params": p}, TOKENS, train=False), cast_shapes(params)
                          ).dtype == jnp.float32
    coarse = jax.tree.map(lambda x: x.astype(jnp.float8_e5m2).astype(jnp.float32), params)
    assert abs(float(run(coarse)) - full) > 2.0**-8 * full  # negative control


def test_gradients_arrive_in_the_type_of_the_parameters():
    model = GPT(**TINY, tied=False)
    grads = jax.eval_shape(jax.grad(lambda p: loss_of(model, cast(p, "bfloat16"))), shapes_of(model))
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    raw = jax.eval_shape(jax.grad(functools.partial(loss_of, model)), cast_shapes(shapes_of(model)))
    assert {x.dtype for x in jax.tree.leaves(raw)} == {jnp.dtype(jnp.bfloat16)}  # negative control: no cast inside


def cast_shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), tree)


def test_dropout_is_on_the_embedding_too():
    """1 on the embedding, 1 on the probabilities and 2 on residual branches in a block; none in evaluation."""
    def draws(train):
        model = GPT(**TINY | {"depth": 1}, dropout=0.5)
        run = lambda p, key: model.apply({"params": p}, TOKENS, train=train, rngs={"dropout": key})
        return count(jax.make_jaxpr(run)(shapes_of(model), jax.random.key(0)).jaxpr, "random_bits")

    assert (draws(True), draws(False)) == (4, 0)


@pytest.mark.parametrize("fields", [{}, MODERN], ids=["gpt2", "modern"])
def test_nothing_broadcasts_over_ranks(fields):
    model = GPT(**TINY, **fields)
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(functools.partial(loss_of, model), shapes_of(model))


# ------------------------------------------------------------------------------------------------------- mistakes

def test_data_that_does_not_fit():
    model = GPT(**TINY)
    model.check({"vocab": 13, "length": 8})
    with pytest.raises(UserError) as e:
        model.check({"vocab": 14, "length": 8})
    assert str(e.value) == ("The vocabulary is too small: the tokenizer has 14 tokens and the model 13. "
                            "Use --model.vocab 14.")
    with pytest.raises(UserError) as e:
        model.check({"vocab": 13, "length": 9})
    assert str(e.value) == "--data.length 9 is longer than --model.context 8."


def test_validate_is_that_of_every_transformer():
    GPT(**TINY).validate()
    with pytest.raises(UserError, match="--model.width 10 is not divisible by --model.heads 4"):
        GPT(**TINY | {"width": 10}).validate()
