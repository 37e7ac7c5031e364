"""The encoder-decoder against T5 and torch, its caches against the whole pass; beam search against all sequences."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.errors import UserError
from lab.models.attention import choose_attention
from lab.models.beam import CACHES, beam_search
from lab.models.seq2seq import Seq2Seq, relative_bucket, sinusoids
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

# T5Attention._relative_position_bucket, and logits of the last target token by T5ForConditionalGeneration in float64
# (transformers 5.24.0, torch 2.13.0, 2026-11-28), with the parameters of `wave`, numbered in the order of their names.
OFFSETS = [-500, -128, -127, -91, -64, -33, -20, -16, -15, -9, -8, -7, -1, 0, 1, 7, 8, 9, 15, 16, 20, 33, 64, 91, 127,
           128, 500]
BUCKETS = {True: [15, 15, 15, 15, 14, 12, 10, 10, 9, 8, 8, 7, 1, 0, 17, 23, 24, 24, 25, 26, 26, 28, 30, 31, 31, 31, 31],
           False: [31, 31, 31, 29, 26, 21, 17, 16, 15, 9, 8, 7, 1] + [0] * 14}
T5 = [[-0.3752517, 0.395119, -0.4145581, 0.4335477, -0.4520674, 0.4700971, -0.4876172, 0.5046088, -0.5210534, 0.5369332,
       -0.552231, 0.5669302, -0.5810149],
      [-0.4153686, 0.4342929, -0.4527464, 0.4707092, -0.4881618, 0.5050853, -0.5214612, 0.5372719, -0.5525003,
       0.5671297, -0.5811444, 0.5945292, -0.6072696]]
# The same by torch's TransformerEncoder and TransformerDecoder (post-norm, ReLU) between tied embeddings.
TORCH = [[-0.6867271, 0.0638026, 0.6645033, -0.2952635, -0.5616567, 0.4909006, 0.3906654, -0.6269778, -0.1722756,
          0.6869851, -0.0670161, -0.6636419, 0.2981769],
         [-0.6630214, 0.1653755, 0.6054176, -0.3762555, -0.4743597, 0.5414852, 0.2857488, -0.6410176, -0.0624685,
          0.6627768, -0.1683909, -0.6041226, 0.3788198]]
SOURCE = np.array([[3, 7, 1, 12, 5, 9, 2, 2], [4, 11, 6, 8, 1, 0, 0, 0]])
MASK, TARGET = np.array([[1] * 8, [1] * 5 + [0] * 3]), np.array([[0, 5, 2, 9], [0, 8, 8, 1]])


def wave(shape, k):
    return 0.4 * np.sin(np.arange(np.prod(shape)) * (0.7 + 0.13 * k) + k).reshape(shape)


def numbered(shapes, norm):
    """Name -> array, as the references have them."""
    return {name: wave(shapes[name], k) + norm(name) for k, name in enumerate(sorted(shapes))}


def t5(D=8, N=3, K=4, F=12, V=13):
    """Our parameters from T5's names."""
    shapes = {"shared": (V, D)}
    for side in ("encoder", "decoder"):
        shapes[f"{side}.final_layer_norm"] = (D,)
        shapes[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"] = (32, N)
        for i, (j, attention) in itertools.product(range(2), enumerate(["SelfAttention", "EncDecAttention"])):
            if side == "encoder" and j:
                continue
            at = f"{side}.block.{i}.layer.{j}"
            shapes |= {f"{at}.layer_norm": (D,), **{f"{at}.{attention}.{x}": (N * K, D) for x in "qkv"},
                       f"{at}.{attention}.o": (D, N * K)}
        for i in range(2):
            at = f"{side}.block.{i}.layer.{1 if side == 'encoder' else 2}"
            shapes |= {f"{at}.layer_norm": (D,), f"{at}.DenseReluDense.wi": (F, D), f"{at}.DenseReluDense.wo": (D, F)}
    found = {name.removesuffix(".weight"): x for name, x in numbered(
        {f"{name}.weight": shape for name, shape in shapes.items()}, lambda name: "layer_norm" in name).items()}

    def attention(at):
        scales = {"q": K**0.5, "k": 1, "v": 1, "o": 1}  # T5 does not divide the scores by sqrt(K)
        return {ours: {"kernel": found[f"{at}.{x}"].T * scales[x]}
                for x, ours in zip("qkvo", ("query", "key", "value", "out"), strict=True)}

    def side(name):
        out = {"relative": {"embedding": found[f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias"]},
               "final_norm": {"scale": found[f"{name}.final_layer_norm"] * (1 if name == "encoder" else D**-0.5)}}
        for i in range(2):
            at, last = f"{name}.block.{i}.layer", 1 if name == "encoder" else 2
            out[f"block_{i}"] = block = {
                "attn": attention(f"{at}.0.SelfAttention"), "attention_norm": {"scale": found[f"{at}.0.layer_norm"]},
                "mlp_norm": {"scale": found[f"{at}.{last}.layer_norm"]},
                "ffn": {"up": {"kernel": found[f"{at}.{last}.DenseReluDense.wi"].T},
                        "down": {"kernel": found[f"{at}.{last}.DenseReluDense.wo"].T}}}
            if last == 2:
                block |= {"cross_attn": attention(f"{at}.1.EncDecAttention"),
                          "cross_norm": {"scale": found[f"{at}.1.layer_norm"]}}
        return out

    model = Seq2Seq(depth=2, width=D, heads=N, head_width=K, hidden_multiple=F / D, vocab=V, context=8, norm="rmsnorm",
                    norm_epsilon=1e-6, mlp="relu", bias=False, position="relative")
    return model, {"wte": {"embedding": found["shared"]}, "encoder": side("encoder"), "decoder": side("decoder")}


def torch_layers(D=8, N=2, F=12, V=13):
    """Our parameters from those of torch's layers."""
    shapes = {}
    for side, i in itertools.product(("enc", "dec"), range(2)):
        at, attentions = f"{side}.layers.{i}", ["self_attn"] + ["multihead_attn"] * (side == "dec")
        for name in attentions:
            shapes |= {f"{at}.{name}.in_proj_weight": (3 * D, D), f"{at}.{name}.in_proj_bias": (3 * D,),
                       f"{at}.{name}.out_proj.weight": (D, D), f"{at}.{name}.out_proj.bias": (D,)}
        shapes |= {f"{at}.linear1.weight": (F, D), f"{at}.linear1.bias": (F,), f"{at}.linear2.weight": (D, F),
                   f"{at}.linear2.bias": (D,)}
        shapes |= {f"{at}.norm{n}.{x}": (D,) for n in range(1, 2 + len(attentions)) for x in ("weight", "bias")}
    found = numbered(shapes, lambda name: "norm" in name and name.endswith("weight"))

    def dense(at):
        return {"kernel": found[f"{at}.weight"].T, "bias": found[f"{at}.bias"]}

    def attention(at):
        parts = zip(np.split(found[f"{at}.in_proj_weight"], 3), np.split(found[f"{at}.in_proj_bias"], 3), strict=True)
        each = {name: {"kernel": w.T, "bias": b}
                for name, (w, b) in zip(("query", "key", "value"), parts, strict=True)}
        return {**each, "out": dense(f"{at}.out_proj")}

    def block(at, names):
        norms = {f"{name}_norm": {"scale": found[f"{at}.norm{n}.weight"], "bias": found[f"{at}.norm{n}.bias"]}
                 for n, name in enumerate(names, 1)}
        cross = {"cross_attn": attention(f"{at}.multihead_attn")} if "cross" in names else {}
        return {"attn": attention(f"{at}.self_attn"), **cross, **norms,
                "ffn": {"up": dense(f"{at}.linear1"), "down": dense(f"{at}.linear2")}}

    model = Seq2Seq(depth=2, width=D, heads=N, hidden_multiple=F / D, vocab=V, context=8, mlp="relu", norm_place="post")
    return model, {"wte": {"embedding": 0.5 * wave((V, D), 99)},
                   "encoder": {f"block_{i}": block(f"enc.layers.{i}", ("attention", "mlp")) for i in range(2)},
                   "decoder": {f"block_{i}": block(f"dec.layers.{i}", ("attention", "cross", "mlp")) for i in range(2)}}


@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_buckets_are_t5s(bidirectional):
    found = jax.jit(relative_bucket, static_argnums=1)(jnp.array(OFFSETS), bidirectional).tolist()
    assert found == BUCKETS[bidirectional] != BUCKETS[not bidirectional]


def test_sinusoids_are_those_of_the_paper():
    place, width = np.arange(5)[:, None], 8
    angle = place / 10_000 ** (2 * np.arange(width // 2) / width)
    found = sinusoids(jnp.arange(5), width)
    np.testing.assert_allclose(found[:, 0::2], np.sin(angle), atol=1e-6)
    np.testing.assert_allclose(found[:, 1::2], np.cos(angle), atol=1e-6)


@pytest.mark.parametrize("make, wanted, other", [(t5, T5, ("encoder", "relative", "embedding")),
                                                 (torch_layers, TORCH, ("decoder", "block_1", "cross_norm", "bias"))])
def test_logits_are_those_of_other_libraries(make, wanted, other):
    (model, params), wanted = make(), np.array(wanted)
    run = jax.jit(lambda params, mask: model.apply({"params": params}, SOURCE, TARGET, train=False, mask=mask)[:, -1])
    np.testing.assert_allclose(run(params, MASK), wanted, atol=2e-6)
    assert np.abs(run(params, np.ones_like(MASK)) - wanted)[1].max() > 1e-4  # negative controls
    place = functools.reduce(lambda tree, key: tree[key], other[:-1], params)
    place[other[-1]] = place[other[-1]] + np.linspace(0, 0.3, place[other[-1]].size).reshape(place[other[-1]].shape)
    assert np.abs(run(params, MASK) - wanted).max() > 1e-4


def moved(model, seed=0):
    """Parameters that are far from their initial values."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), SOURCE, TARGET, train=False))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.5, shapes)


@pytest.mark.parametrize("position", ["rotary", "sinusoidal", "learned", "relative"])
def test_caches_give_what_the_whole_pass_gives(position):
    more = dict(kv_heads=2, qk_norm=True, embeddings="separate", tied=False, scan=True) if position == "rotary" else {}
    model = Seq2Seq(depth=2, width=16, heads=4, vocab=13, context=9, position=position, **more)
    variables = {"params": moved(model)}
    whole = jax.jit(lambda v, source: model.apply(v, source, TARGET, train=False, mask=MASK))(variables, SOURCE)
    first, cache = jax.jit(lambda v: model.apply(v, SOURCE, TARGET[:, :2], train=False, mask=MASK, decode=True,
                                                 mutable=CACHES))(variables)
    step = jax.jit(lambda v, token, at: model.apply(v, None, token, train=False, mask=MASK, decode=True, positions=at,
                                                    mutable=CACHES))
    parts = [first]
    for i in (2, 3):
        logits, cache = step({**variables, **cache}, TARGET[:, i:i + 1], np.array([i]))
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=2e-5)
    wrong = step({**variables, **cache}, TARGET[:, 3:], np.array([2]))[0]  # negative control: another position
    assert np.abs(wrong - whole[:, 3:]).max() > 1e-2


# ------------------------------------------------------------------------------------------------------- beam search

V, LENGTH = 4, 4
SMALL = Seq2Seq(depth=1, width=16, heads=2, vocab=V + 1, context=8, position="relative")  # one id pads the vocabulary


def all_targets():
    """Every target of at most LENGTH tokens, which 0 ends, (n, LENGTH), and its number of tokens."""
    found = [ids for n in range(1, LENGTH + 1) for ids in itertools.product(range(V), repeat=n)
             if all(ids[:-1]) and (ids[-1] == 0 or n == LENGTH)]
    return np.array([[*ids, *[0] * (LENGTH - len(ids))] for ids in found]), np.array([len(ids) for ids in found])


@functools.cache
def log_probs():
    """Parameters, and log P of `all_targets` for each of two sources, from whole passes: (params, (2, n))."""
    params, (targets, sizes) = moved(SMALL, 31), all_targets()  # greedy and best targets are long, and differ
    inputs = np.concatenate([np.zeros((len(targets), 1), int), targets[:, :-1]], 1)

    @jax.jit
    def each(source, mask):
        rows = lambda x: jnp.broadcast_to(x, (len(targets), x.shape[-1]))
        logits = SMALL.apply({"params": params}, rows(source), inputs, train=False, mask=rows(mask))
        log_p = jax.nn.log_softmax(jnp.where(jnp.arange(V + 1) < V, logits, -jnp.inf))
        own = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        return (own * (np.arange(LENGTH) < sizes[:, None])).sum(1)

    return params, np.stack([each(SOURCE[i] % V, MASK[i]) for i in range(2)])


def searched(beams, penalty, vocab=V):
    params, _ = log_probs()
    found = beam_search(SMALL, params, SOURCE % V, MASK, beams=beams, length=LENGTH, penalty=penalty, vocab=vocab)
    return [np.asarray(x) for x in found]


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_a_wide_beam_is_exhaustive_search(penalty):
    targets, sizes = all_targets()
    tokens, scores = searched(len(targets) + 3, penalty)
    for row, log_p in enumerate(log_probs()[1]):
        wanted = log_p / ((5 + sizes) / 6) ** penalty
        order = np.argsort(-wanted)
        np.testing.assert_allclose(scores[row, :len(targets)], wanted[order], atol=2e-5)
        assert (tokens[row, 0] == targets[order[0]]).all() and (scores[row, len(targets):] == -np.inf).all()
        if penalty == 2.0:  # negative control: it changes the order
            assert order.tolist() != np.argsort(-log_p).tolist()


def test_one_beam_is_greedy_decoding():
    params, _ = log_probs()
    run = jax.jit(lambda ids: SMALL.apply({"params": params}, SOURCE % V, ids, train=False, mask=MASK))
    ids = np.zeros((2, LENGTH + 1), int)
    ended = np.zeros(2, bool)
    for i in range(LENGTH):  # without a cache
        best = np.asarray(run(ids))[:, i, :V].argmax(-1)
        ids[:, i + 1] = np.where(ended, 0, best)
        ended |= best == 0
    assert (ids[:, 1:4] > 0).all() and not ended.any()
    for penalty in (0.0, 2.0):
        assert (searched(1, penalty)[0][:, 0] == ids[:, 1:]).all()
    best, scores = (x[:, 0] for x in searched(124, 0.0))
    assert (searched(1, 0.0)[1][:, 0] <= scores + 1e-5).all()
    assert (best != ids[:, 1:]).any() and (best[:, :3] > 0).all()  # negative control


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match="--data.source-length 9 is longer than --model.context 8"):
        SMALL.check({"source_length": 9, "target_length": 4})
    with pytest.raises(UserError, match="Use --model.vocab 300"):
        SMALL.check({"vocab": 300})
    with pytest.raises(UserError, match="needs an even --model.width"):
        Seq2Seq(width=15, heads=3).validate()
    assert choose_attention("auto", "gpu", "bfloat16", 64, 64, True, False, biased=True) == "einsum"
    with pytest.raises(UserError, match="cudnn cannot add a bias to the scores"):
        choose_attention("cudnn", "gpu", "bfloat16", 64, 64, True, False, biased=True)
