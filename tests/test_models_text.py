"""BERT and LSTM against NumPy on texts cut to their length, and torch; padding by gradient support; every error."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.configuration.values import to_json
from lab.errors import UserError
from lab.models.bert import BERT
from lab.models.rnn import LSTM
from lab.train.restore import leaves
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

B, L = 3, 6
LENGTHS = np.array([4, 6, 1])
MASK = (np.arange(L) < LENGTHS[:, None]).astype(np.uint8)
TOKENS = np.arange(1, B * L + 1, dtype=np.int32).reshape(B, L)  # each appears once; the padding, too, has ids
SEGMENTS = (np.arange(L) >= 2).astype(np.int32)[None].repeat(B, 0)
SELECT = np.array([[2, 0], [5, 1], [0, 3]], np.int32)
V = B * L + 2
SMALL = {"depth": 2, "width": 8, "heads": 2, "vocab": V, "context": 8}
CLOSE = 2e-5


def shapes_of(model, **kwargs):
    tokens = jnp.zeros((1, 2), jnp.int32)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, train=False, **kwargs))["params"]


def random_params(model, scale=0.4):
    """Random values for every parameter; those that scale are around 1."""
    rng = np.random.default_rng(0)

    def one(path, x):
        return (rng.normal(size=x.shape) * scale + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree.map_with_path(one, shapes_of(model))


@functools.cache
def compiled(model):
    return jax.jit(lambda params, tokens, kwargs: model.apply({"params": params}, tokens, train=False, **kwargs))


def forward(model, params, tokens=TOKENS, **kwargs):
    return np.asarray(compiled(model)(params, tokens, kwargs))


@functools.cache
def supported(model):
    """(params, tokens, mask) -> (logits, gradient of the sum of each row's logits 0), compiled once for all tests.

    Of a masked LM they are those of id 0, which is in no text, because the head has the same embedding.
    """
    def loss(params, tokens, mask):
        logits = model.apply({"params": params}, tokens, train=False, mask=mask)
        return (logits[..., 0] * (mask if logits.ndim == 3 else 1)).sum(), logits

    def run(params, tokens, mask):
        gradient, logits = jax.grad(loss, has_aux=True)(params, tokens, mask)
        return logits, gradient

    compiled = jax.jit(run)
    return lambda params, tokens=TOKENS, mask=MASK: jax.tree.map(np.asarray, compiled(params, tokens, mask))


def doubled(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


# --------------------------------------------------------------------------------- against independent references


def bert(params, tokens, segments, heads=2, depth=2, causal=False, post=False):
    """One text at a time, cut to its length, as in the paper but for the place of the norms: (L, V), and the trunk."""
    p = doubled(params)
    dense = lambda q, x: x @ q["kernel"] + q["bias"]
    layernorm = lambda q, x: ((x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * q["scale"]
                              + q["bias"])
    gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    tables = (p[name]["embedding"] for name in ("wte", "wpe", "wse"))
    x = layernorm(p["embedding_norm"], sum(t[i] for t, i in zip(tables, (tokens, np.arange(len(tokens)), segments),
                                                                strict=True)))
    K = x.shape[1] // heads
    for i in range(depth):
        b = p[f"block_{i}"]
        h = x if post else layernorm(b["attention_norm"], x)
        q, k, v = (dense(b["attn"][name], h) for name in ("query", "key", "value"))
        parts = []
        for n in range(heads):
            part = slice(n * K, (n + 1) * K)
            e = np.exp(q[:, part] @ k[:, part].T / np.sqrt(K))
            e = np.tril(e) if causal else e
            parts.append(e / e.sum(-1, keepdims=True) @ v[:, part])
        x = x + dense(b["attn"]["out"], np.concatenate(parts, 1))
        x = x + dense(b["ffn"]["down"], gelu(dense(b["ffn"]["up"], layernorm(b["mlp_norm"], x))))
    x = layernorm(p["final_norm"], x)
    if "classify" in p:
        return None, x
    return layernorm(p["mlm_norm"], gelu(dense(p["mlm_dense"], x))) @ p["wte"]["embedding"].T + p["mlm_bias"], x


def test_masked_lm_logits_equal_numpy():
    model = BERT(**SMALL)
    params = random_params(model)
    got = forward(model, params, mask=MASK, segments=SEGMENTS)
    assert got.shape == (B, L, V) and got.dtype == np.float32
    texts = [(tokens[:n], segments[:n]) for tokens, segments, n in zip(TOKENS, SEGMENTS, LENGTHS, strict=True)]
    for logits, text in zip(got, texts, strict=True):
        np.testing.assert_allclose(logits[:len(text[0])], bert(params, *text)[0], atol=CLOSE)
    for wrong in ({"causal": True}, {"post": True}, {"depth": 1}, {"heads": 1}):  # negative controls
        assert np.abs(got[1] - bert(params, *texts[1], **wrong)[0]).max() > 0.01, wrong
    assert np.abs(got[1] - bert(params, texts[1][0], 1 - texts[1][1])[0]).max() > 0.01
    chosen = forward(model, params, mask=MASK, segments=SEGMENTS, select=SELECT)
    np.testing.assert_allclose(chosen, got[np.arange(B)[:, None], SELECT], atol=1e-6)
    assert np.abs(chosen[:, 0] - chosen[:, 1]).max() > 0.1  # negative control: which position matters


@pytest.mark.parametrize("pool", ["first", "mean"])
def test_classifier_equals_numpy(pool):
    model = BERT(**SMALL, classes=3, pool=pool)
    params = random_params(model)
    got, _ = supported(model)(params)  # without segments: all 0
    assert got.shape == (B, 3) and got.dtype == np.float32
    for logits, tokens, n in zip(got, TOKENS, LENGTHS, strict=True):
        x = bert(params, tokens[:n], np.zeros(n, int))[1]
        head = lambda pooled: pooled @ params["classify"]["kernel"] + params["classify"]["bias"]
        np.testing.assert_allclose(logits, head(x[0] if pool == "first" else x.mean(0)), atol=CLOSE)
        if n > 1:
            assert np.abs(logits - head(x[0] if pool == "mean" else x.mean(0))).max() > 0.01  # negative control


def test_rotary_texts_may_be_padded_on_the_left():
    """Then the first token is not at place 0; with rotations only distances count."""
    model = BERT(**SMALL, classes=3, position="rotary", segments=0)
    params = random_params(model)
    assert "wpe" not in params and "wse" not in params
    right = forward(model, params, mask=MASK)
    turned = np.stack([np.roll(row, L - n) for row, n in zip(TOKENS, LENGTHS, strict=True)])
    np.testing.assert_allclose(forward(model, params, turned, mask=MASK[:, ::-1]), right, atol=CLOSE)
    assert np.abs(forward(model, params, turned, mask=MASK) - right)[[0, 2]].max() > 0.01  # negative control


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(params, tokens, depth, bidirectional, pool, order="ifgo", backward=slice(None, None, -1), keep=(1, 1)):
    """One text, cut to its length: logits (C,). `keep`: dropout masks on the state, of both directions."""
    p = doubled(params)
    x = p["embedding"]["embedding"][tokens]
    for i in range(depth):
        outputs, last = [], []
        ways = (("forward", slice(None), keep[0]), ("backward", backward, keep[1]))
        for name, turn, mask in ways[: 1 + bidirectional]:
            q = {part: p[f"layer_{i}"][f"{name}_{part}"] for part in ("input", "recurrent", "bias")}
            h = c = np.zeros(len(q["recurrent"]))
            out = []
            for step in x[turn]:
                z = np.split(step @ q["input"] + h * mask @ q["recurrent"] + q["bias"], 4)
                z = dict(zip(order, z, strict=True))
                c = sigmoid(z["f"]) * c + sigmoid(z["i"]) * np.tanh(z["g"])
                h = sigmoid(z["o"]) * np.tanh(c)
                out.append(h)
            outputs.append(np.array(out)[turn])
            last.append(h)
        x = np.concatenate(outputs, 1)
    pooled = {"last": np.concatenate(last), "mean": x.mean(0), "max": x.max(0)}[pool]
    return pooled @ p["classify"]["kernel"] + p["classify"]["bias"]


KINDS = [(1, False, "last"), (1, False, "max"), (2, False, "mean"), (1, True, "mean"), (2, True, "last"),
         (2, True, "max")]


def recurrent(depth, bidirectional, pool):
    return LSTM(vocab=V, width=3, hidden=4, depth=depth, bidirectional=bidirectional, pool=pool, classes=3)


@pytest.mark.parametrize("kind", KINDS)
def test_lstm_equals_numpy(kind):
    model = recurrent(*kind)
    params = random_params(model, 0.8)
    got, _ = supported(model)(params)
    assert got.shape == (B, 3) and got.dtype == np.float32
    for logits, tokens, n in zip(got, TOKENS, LENGTHS, strict=True):
        np.testing.assert_allclose(logits, lstm(params, tokens[:n], *kind), atol=CLOSE)
    wrong = [{"order": "fiog"}] + [{"backward": slice(None)}] * kind[1]
    assert all(np.abs(got[1] - lstm(params, TOKENS[1], *kind, **each)).max() > 0.01 for each in wrong)
    other = {"last": "mean", "mean": "max", "max": "last"}[kind[2]]
    assert np.abs(got[1] - lstm(params, TOKENS[1], *kind[:2], other)).max() > 0.01


def test_recurrent_dropout_has_one_mask_for_all_steps_of_a_text(monkeypatch):
    rng, kind = np.random.default_rng(1), (1, True, "max")
    model = recurrent(*kind).clone(recurrent_dropout=0.5)
    params, masks = random_params(model, 0.8), rng.integers(0, 2, (2, B, 4)) * np.float32(2)
    run = jax.jit(lambda key: model.apply({"params": params}, TOKENS, train=True, mask=MASK, rngs={"dropout": key}))
    drawn = np.stack([run(jax.random.key(seed)) for seed in (0, 0, 1)])
    assert (drawn[0] == drawn[1]).all() and (drawn[1] != drawn[2]).any()
    np.testing.assert_array_equal(forward(model, params, mask=MASK), forward(recurrent(*kind), params, mask=MASK))
    left = iter(masks)
    monkeypatch.setattr("lab.models.rnn.dropout", lambda module, x, rate, train: next(left) if x.shape == (B, 4) else x)
    got = model.apply({"params": params}, TOKENS, train=True, mask=MASK)
    want = lambda keep, row: lstm(params, TOKENS[row, :LENGTHS[row]], *kind, keep=keep[:, row])
    for row in range(B):
        np.testing.assert_allclose(got[row], want(masks, row), atol=CLOSE)
    assert np.abs(got[0] - want(np.ones_like(masks), 0)).max() > 0.01  # negative control


def test_without_a_mask_all_tokens_are_real():
    model = recurrent(*KINDS[0])
    params = random_params(model, 0.8)
    got = forward(model, params)
    np.testing.assert_allclose(got, supported(model)(params, mask=np.ones_like(MASK))[0], atol=CLOSE)
    assert np.abs(got - supported(model)(params)[0]).max() > 0.01  # negative control


def test_lstm_and_its_gradients_equal_torch_with_packed_sequences():
    torch = pytest.importorskip("torch", reason="torch is the independent reference here, and is not installed")
    from tests.benchmarks.torch_models import as_torch, build

    model = recurrent(2, True, "last")
    params = random_params(model, 0.8)
    reference = build(to_json(model), leaves(params), {"texts": "packed"})
    tokens, mask = torch.from_numpy(TOKENS), torch.from_numpy(MASK)
    want = reference(tokens, mask)
    want[:, 0].sum().backward()
    logits, got = supported(model)(params)
    np.testing.assert_allclose(logits, want.detach().numpy(), atol=CLOSE)
    full = reference(tokens, torch.ones_like(mask)).detach().numpy()
    assert np.abs(logits - full)[[0, 2]].max() > 0.01  # negative control: not packed
    np.testing.assert_allclose(supported(model)(params, mask=np.ones_like(MASK))[0], full, atol=CLOSE)
    for parameter, paths in reference.places():
        np.testing.assert_allclose(as_torch(paths, leaves(got)), parameter.grad, atol=5e-5, err_msg=str(paths))
    assert np.abs(got["layer_0"]["backward_recurrent"]).max() > 1e-3


# -------------------------------------------------------------------------------------- padding changes nothing

MODELS = [BERT(**SMALL), *(BERT(**SMALL, classes=3, pool=pool) for pool in ("first", "mean")),
          *(recurrent(*kind) for kind in KINDS)]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: f"{type(m).__name__} {m.pool} {m.depth}")
def test_padding_changes_nothing(model):
    """By the derivative of a row's logits by the embedding of each of its tokens, and by other ids in the padding."""
    params, run, real = random_params(model), supported(model), MASK > 0
    at = np.ones(B, bool) if "classify" in params else real  # which logits count
    size = lambda gradient: np.abs((gradient.get("embedding") or gradient["wte"])["embedding"]).max(-1)[TOKENS]
    logits, gradient = run(params)
    seen = size(gradient)
    assert (seen[~real] == 0).all()
    assert (seen[real] > 0).all() or (model.pool == "max" and (seen > 0).any(1).all())  # not all are the greatest
    others = np.where(real, TOKENS, TOKENS[:, ::-1] % 7)
    np.testing.assert_array_equal(run(params, others)[0][at], logits[at])
    everything = np.ones_like(MASK)  # negative controls
    unmasked, gradient = run(params, TOKENS, everything)
    assert (size(gradient)[~real] > 0).any()
    assert np.abs(run(params, others, everything)[0] - unmasked)[at].max() > 1e-3
    empty, _ = run(params, TOKENS, MASK * np.array([[1], [1], [0]], np.uint8))
    assert np.isfinite(empty).all()
    np.testing.assert_array_equal(empty[:2][at[:2]], logits[:2][at[:2]])
    if "classify" in params:  # a text without a token: zeros are pooled
        np.testing.assert_array_equal(empty[2], params["classify"]["bias"])


# ---------------------------------------------------------------------------------- parameters, precision, errors


def test_bert_base_has_the_parameters_of_the_paper():
    """The paper's code has 108,891,648 without its pooling layer; here one more norm after the last block."""
    count = lambda params: sum(x.size for x in jax.tree.leaves(params))
    params = shapes_of(BERT(vocab=30522))
    trunk = {name: part for name, part in params.items() if not name.startswith("mlm_")}
    D, norm = 768, 2 * 768
    embeddings = (30522 + 512 + 2) * D + norm
    block = 4 * (D * D + D) + (D * 4 * D + 4 * D) + (4 * D * D + D) + 2 * norm
    assert count(trunk) == embeddings + 12 * block + norm == 108_891_648 + norm == 108_893_184
    assert count(params) - count(trunk) == D * D + D + norm + 30522


def test_both_heads_stand_on_the_same_trunk():
    """A classifier finds its parameters in a masked LM by their paths."""
    def paths(model):
        return {jax.tree_util.keystr(path): x.shape for path, x in jax.tree.leaves_with_path(shapes_of(model))}

    mlm, classifier = paths(BERT(**SMALL)), paths(BERT(**SMALL, classes=3))
    trunk = {name: shape for name, shape in mlm.items() if not name.startswith("['mlm_")}
    assert trunk == {name: shape for name, shape in classifier.items() if not name.startswith("['classify']")}
    assert len(mlm) - len(trunk) == 5 and len(classifier) - len(trunk) == 2
    assert shapes_of(recurrent(1, True, "last"))["embedding"]["embedding"].shape == (V, 3)


def test_the_lstm_starts_with_open_forget_gates():
    model = recurrent(1, True, "last")
    params = jax.jit(lambda key: model.init(key, TOKENS, train=False))(jax.random.key(0))["params"]["layer_0"]
    for name in ("forward", "backward"):
        np.testing.assert_array_equal(params[f"{name}_bias"], np.repeat([0, 1, 0, 0], 4))
        rows = params[f"{name}_recurrent"]
        np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=1e-5)
    assert np.abs(params["forward_input"] - params["backward_input"]).max() > 0.1


def half_of(model):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_params(model))


@pytest.mark.parametrize("model", [MODELS[2], recurrent(1, True, "mean")], ids=["bert", "lstm"])
def test_reduced_precision_and_dropout(model):
    params = random_params(model)
    full, reduced = supported(model)(params)[0], forward(model, half_of(model), mask=MASK)
    assert reduced.dtype == np.float32
    assert 0 < np.abs(reduced - full).max() < 0.03 * np.abs(full).max() + 0.03
    drops = dataclasses.replace(model, dropout=0.5, parent=None)
    run = jax.jit(lambda key: drops.apply({"params": params}, TOKENS, train=True, mask=MASK, rngs={"dropout": key}))
    first, second = run(jax.random.key(0)), run(jax.random.key(1))
    assert np.abs(first - second).max() > 0.01 and np.abs(first - full).max() > 0.01
    shape = jax.eval_shape(lambda: BERT(**SMALL).apply({"params": half_of(BERT(**SMALL))}, TOKENS, train=False))
    assert shape.dtype == np.float32  # so are the masked LM's logits


FACTS = {"vocab": V - 1, "length": 8, "classes": 4}


@pytest.mark.parametrize("model,facts,words", [
    (BERT(**SMALL), {"vocab": V + 1}, f"has {V + 1} tokens and the model {V}. Use --model.vocab {V + 2}."),
    (BERT(**SMALL), {"vocab": V}, f"no id left for [MASK], the last of the model's vocabulary: the tokenizer has {V} "
                                  f"tokens. Use --model.vocab {V + 1}."),
    (BERT(**SMALL, classes=4), {"vocab": V + 1}, f"Use --model.vocab {V + 1}."),
    (BERT(**SMALL), {"length": 9}, "--data.length 9 is longer than --model.context 8."),
    (BERT(**SMALL, classes=3), {}, "The data has 4 classes and the model 3. Use --model.classes 4."),
    (LSTM(vocab=9, classes=4), {}, f"the tokenizer has {V - 1} tokens and the model 9. Use --model.vocab {V - 1}."),
    (LSTM(classes=3), {}, "The data has 4 classes and the model 3. Use --model.classes 4."),
])
def test_data_that_does_not_fit(model, facts, words):
    with pytest.raises(UserError) as error:
        model.check(FACTS | facts)
    assert words in str(error.value)


def test_data_that_fits():
    for model in (BERT(**SMALL), BERT(**SMALL, classes=4), LSTM(vocab=V, classes=4)):
        model.validate()
        model.check(FACTS)
        model.check({})  # nothing is known yet
    BERT(**SMALL, classes=4).check(FACTS | {"vocab": V})  # a classifier needs no [MASK]


@pytest.mark.parametrize("model,words", [
    (BERT(vocab=2), "--model.vocab must be at least 3, not 2."),
    (BERT(segments=-1), "--model.segments must be at least 0, not -1."),
    (BERT(classes=0), "--model.classes must be at least 1, not 0."),
    (BERT(width=10, heads=3), "not divisible by --model.heads 3"),
    (LSTM(hidden=0), "--model.hidden must be at least 1, not 0."),
    (LSTM(depth=0), "--model.depth must be at least 1, not 0."),
    (LSTM(dropout=1.0), "--model.dropout must be in [0, 1), not 1.0."),
])
def test_fields_out_of_range(model, words):
    with pytest.raises(UserError) as error:
        model.validate()
    assert words in str(error.value)


def test_segments_need_an_embedding():
    with pytest.raises(UserError, match="Use --model.segments 2"):
        shapes_of(BERT(**SMALL, segments=0), segments=jnp.zeros((1, 2), jnp.int32))
