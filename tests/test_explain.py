"""Explanations: closed forms, independent loops, and what must not change with the weights."""

import re
from dataclasses import replace
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.commands.explain_models import _number
from lab.commands.explain_text import next_token, text_subject, token_names
from lab.data.tokenizers import Bytes, with_padding
from lab.errors import UserError
from lab.explain.asked import Asked, class_number
from lab.explain.attention import attention_maps
from lab.explain.embeddings import embedding_table, with_embeddings
from lab.explain.explanation import Subject, as_json, explain
from lab.explain.methods import gradient_x_input, integrated_gradients, occlusion
from lab.explain.page import blocks
from lab.explain.question import Question, each_unit, squares
from lab.explain.sanity import randomised, rank_correlation, sanity, top_modules
from lab.models.bert import BERT
from lab.models.gpt import GPT
from lab.models.linear import MLP, Linear
from lab.models.rnn import LSTM
from lab.models.vit import ViT
from lab.study.report.render import Markup, Picture, html, without_pictures
from lab.tasks.supervised import Classify
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

TEXT = dict(depth=2, width=16, heads=2, vocab=260, context=16)
TOKENS = np.array([5, 9, 200, 9, 31], np.int32)


def random_variables(model: nn.Module, inputs: np.ndarray, **more) -> dict:
    """All arrays random, also those that begin at zero."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.asarray(inputs), train=False, **more))
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.5, shapes)


def asked(model: nn.Module, x: np.ndarray, baseline: np.ndarray, of=lambda y: y[:, 1], units=None, windows=None):
    units = np.arange(x.size).reshape(x.shape) if units is None else units
    return Question(lambda v, x: of(model.apply(v, x, train=False)), random_variables(model, x[None]), x, baseline,
                    units, each_unit(int(units.max()) + 1) if windows is None else windows)


@pytest.fixture(scope="module")
def curved() -> Question:
    """A network with ReLU and two hidden layers."""
    rng = np.random.default_rng(1)
    return asked(MLP(classes=3, depth=2, width=32), *rng.normal(size=(2, 6)).astype(np.float32))


# ------------------------------------------------------------------------------------------------------ methods


@pytest.mark.parametrize("classes", [None, 3])
def test_a_linear_model_is_coefficient_times_input_exactly(classes):
    rng = np.random.default_rng(0)
    x, base = rng.normal(size=(2, 7)).astype(np.float32)
    question = asked(Linear(classes), x, base, (lambda y: y) if classes is None else lambda y: y[:, 1])
    kernel = np.asarray(question.variables["params"]["head"]["kernel"], np.float64)[:, 0 if classes is None else 1]
    found = integrated_gradients(question)
    assert np.array_equal(found.values, kernel * (x.astype(np.float64) - base)) and found.steps == 16
    assert np.array_equal(gradient_x_input(question), kernel * x.astype(np.float64))
    np.testing.assert_allclose(occlusion(question), found.values, rtol=1e-4, atol=1e-5)
    assert not np.array_equal(integrated_gradients(replace(question, baseline=x * 0)).values, found.values)


def test_integrated_gradients_are_complete(curved):
    found = integrated_gradients(curved)
    assert found.gap < 0.01 and abs(found.values.sum() - found.difference) < 0.01 * abs(found.difference)
    # Negative control: the gradient at the input alone does not add up, nor do two steps.
    naive = gradient_x_input(curved).sum()
    assert abs(naive - found.difference) > 0.05 * abs(found.difference)
    strict = integrated_gradients(curved, gap=1e-3)
    assert strict.steps > found.steps >= 16 and strict.gap < 1e-3
    assert integrated_gradients(curved, gap=0.0, most=100).steps == 64


def test_the_integral_is_that_of_another_rule(curved):
    """Gauss-Legendre with 400 points, by hand; a path to another baseline is another integral."""
    at, weight = np.polynomial.legendre.leggauss(400)
    line = curved.baseline + (at[:, None] + 1) / 2 * (curved.x - curved.baseline)
    one = jax.grad(lambda x: curved.score(curved.variables, x[None])[0])
    slopes = np.asarray(jax.vmap(one)(line.astype(np.float32)), np.float64)
    wanted = (curved.x - curved.baseline) * ((weight / 2) @ slopes)
    found = integrated_gradients(curved, gap=1e-3).values
    np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(wanted).max())
    elsewhere = integrated_gradients(replace(curved, baseline=-curved.baseline), gap=1e-4).values
    assert np.abs(elsewhere - wanted).max() > 0.1 * np.abs(wanted).max()


def test_a_difference_of_zero_has_no_gap_that_can_close(curved):
    same = integrated_gradients(replace(curved, baseline=curved.x))
    assert same.gap == 0 and not same.values.any()
    even = Question(lambda v, x: jnp.square(x).sum(-1), {}, np.ones(2, np.float32), np.array([-1, 1], np.float32),
                    np.arange(2), each_unit(2))
    assert integrated_gradients(even, most=32).gap in (0.0, float("inf"))


@pytest.mark.parametrize("side", [2, 3])
def test_occlusion_equals_a_loop(side):
    rng = np.random.default_rng(2)
    image, base = rng.normal(size=(2, 5, 4, 3)).astype(np.float32)
    units = np.broadcast_to(np.arange(20).reshape(5, 4, 1), image.shape)
    question = asked(MLP(classes=2, width=8), image, base, units=units, windows=squares(5, 4, side))
    f = lambda x: float(question.score(question.variables, x[None])[0])
    total, count = np.zeros((5, 4)), np.zeros((5, 4))
    for top in sorted({*range(0, 5 - side + 1, side // 2), 5 - side}):
        for left in sorted({*range(0, 4 - side + 1, side // 2), 4 - side}):
            hidden = image.copy()
            hidden[top : top + side, left : left + side] = base[top : top + side, left : left + side]
            total[top : top + side, left : left + side] += f(image) - f(hidden)
            count[top : top + side, left : left + side] += 1
    assert count.min() >= 1
    found = occlusion(question).reshape(5, 4)
    np.testing.assert_allclose(found, total / count, rtol=1e-4, atol=1e-5)
    other = occlusion(replace(question, windows=squares(5, 4, 5 - side))).reshape(5, 4)
    assert np.abs(other - found).max() > 1e-2


def test_categories_are_summed_back_to_their_column():
    x, base = np.array([0.5, 0, 1, 0, -2], np.float32), np.array([0, 1, 0, 0, 0], np.float32)  # a number, 3, a number
    units = np.array([0, 1, 1, 1, 2])
    question = asked(Linear(2), x, base, units=units)
    kernel = np.asarray(question.variables["params"]["head"]["kernel"], np.float64)[:, 1]
    wanted = [kernel[0] * 0.5, kernel[2] - kernel[1], kernel[4] * -2]
    np.testing.assert_allclose(integrated_gradients(question).values, wanted, rtol=1e-6)
    np.testing.assert_allclose(occlusion(question), wanted, rtol=1e-4)  # a column is hidden as a whole
    assert question.moved.tolist() == [True, True, True]


# --------------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("model", [GPT(**TEXT), BERT(**TEXT, classes=3), BERT(**TEXT, classes=3, pool="pooler"),
                                   LSTM(vocab=260, width=8, hidden=4, classes=3), GPT(**TEXT, scan=True)])
def test_the_tokens_own_embeddings_give_the_models_output(model):
    variables = random_variables(model, TOKENS[None])
    run = lambda variables, tokens: model.apply(variables, tokens, train=False)
    table = embedding_table(run, variables, TOKENS)
    params = variables["params"]
    assert np.array_equal(table, params["wte" if "wte" in params else "embedding"]["embedding"])
    own = jax.jit(with_embeddings(run, TOKENS))(variables, table[TOKENS][None])
    np.testing.assert_allclose(own, jax.jit(run)(variables, TOKENS[None]), atol=1e-5)
    changed = table[TOKENS]
    changed[2] = table[7]
    other = TOKENS.copy()
    other[2] = 7
    found = jax.jit(with_embeddings(run, TOKENS))(variables, changed[None])
    np.testing.assert_allclose(found, jax.jit(run)(variables, other[None]), atol=1e-5)
    assert np.abs(found - own).max() > 1e-3


def test_a_model_without_an_embedding_is_refused():
    class Counts(nn.Module):
        @nn.compact
        def __call__(self, tokens, *, train):
            return nn.Dense(2, name="head")(jax.nn.one_hot(tokens, 300).sum(1))

    variables = random_variables(Counts(), TOKENS[None])
    with pytest.raises(UserError, match="calls no Embed with its tokens"):
        embedding_table(lambda v, tokens: Counts().apply(v, tokens, train=False), variables, TOKENS)


def test_padding_has_no_part_in_a_text():
    fitted, model = with_padding(Bytes().fit(None, 0)), BERT(**TEXT, classes=2, pool="mean")
    tokens = np.zeros(12, np.int32)
    tokens[:3] = fitted.encode("abc")
    mask = np.arange(12) < 3
    variables = random_variables(model, tokens[None])

    def run(variables, tokens_BL):
        return model.apply(variables, tokens_BL, train=False, mask=jnp.broadcast_to(mask, tokens_BL.shape))

    subject = text_subject(run, lambda y: y[:, 0], variables, tokens, 3, fitted, None, "pad")
    assert subject.names == ["a", "b", "c"] and subject.question.x.shape == (3, 16)
    whole = float(jax.jit(run)(variables, tokens[None])[0, 0])
    assert subject.question.scores(subject.question.x[None])[0] == pytest.approx(whole, abs=1e-5)
    without = np.where(np.arange(12) == 1, 0, tokens).astype(np.int32)  # id 0: padding
    drop = whole - float(jax.jit(run)(variables, without[None])[0, 0])
    assert occlusion(subject.question)[1] == pytest.approx(drop, abs=1e-5) and abs(drop) > 1e-4
    with pytest.raises(UserError, match="--baseline blur: give pad, mean, zero"):
        text_subject(run, lambda y: y[:, 0], variables, tokens, 3, fitted, "blur", "pad")


# ---------------------------------------------------------------------------------------------------- attention


def by_hand(params, tokens, heads, causal, mask=None) -> np.ndarray:
    """Attention probabilities (heads, L, L) of the first block of a pre-norm Transformer with learned positions."""
    x = params["wte"]["embedding"][tokens] + params["wpe"]["embedding"][: len(tokens)]
    normed = lambda x, p: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p[
        "bias"]
    if "wse" in params:
        x = normed(x + params["wse"]["embedding"][0], params["embedding_norm"])
    block = params["block_0"]
    h = normed(x, block["attention_norm"])
    q, k = (h @ block["attn"][name]["kernel"] + block["attn"][name]["bias"] for name in ("query", "key"))
    q, k = (np.moveaxis(a.reshape(len(tokens), heads, -1), 1, 0) for a in (q, k))
    scores = q @ np.swapaxes(k, 1, 2) / np.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[1:])), scores, -np.inf)
    scores = scores if mask is None else np.where(mask, scores, -np.inf)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_attention_of_a_gpt_equals_a_forward_pass_by_hand():
    model = GPT(**TEXT)
    variables = random_variables(model, TOKENS[None])
    found = attention_maps(model, variables, TOKENS[None])
    assert found.shape == (2, 2, 5, 5)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    assert not np.triu(found, 1).any()
    np.testing.assert_allclose(found[0], by_hand(variables["params"], TOKENS, 2, True), atol=1e-5)
    assert np.abs(found[1] - found[0]).max() > 1e-2  # negative control: the layers are told apart


def test_attention_of_a_bert_leaves_padding_out():
    model = BERT(**TEXT, classes=2, dropout=0.0)
    variables = random_variables(model, TOKENS[None])
    mask = np.array([1, 1, 1, 0, 0])
    found = attention_maps(model, variables, TOKENS[None], mask=mask[None])
    np.testing.assert_allclose(found[0], by_hand(variables["params"], TOKENS, 2, False, mask), atol=1e-5)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    assert not found[..., 3:].any() and attention_maps(model, variables, TOKENS[None])[..., 3:].all()


@pytest.mark.parametrize("change", [{"remat": "blocks"}, {"remat": "dots"}, {"scan": True}])
def test_attention_does_not_depend_on_how_layers_are_run(change):
    rich = GPT(**TEXT, position="rotary", kv_heads=1, qk_norm=True, norm="rmsnorm", mlp="swiglu")
    variables = random_variables(rich, TOKENS[None])
    wanted = attention_maps(rich, variables, TOKENS[None])
    params = dict(variables["params"])
    if "scan" in change:
        params["blocks"] = jax.tree.map(lambda *x: np.stack(x), *(params.pop(f"block_{i}") for i in range(2)))
    np.testing.assert_allclose(attention_maps(rich.clone(**change), {"params": params}, TOKENS[None]), wanted,
                               atol=1e-5)


def test_eleven_layers_stay_in_order_and_other_models_have_none():
    model = GPT(depth=11, width=8, heads=1, vocab=260, context=8)
    variables = random_variables(model, TOKENS[None])
    found = attention_maps(model, variables, TOKENS[None])
    shallow = attention_maps(model.clone(depth=3), variables, TOKENS[None])
    assert np.array_equal(found[:3], shallow) and len(found) == 11
    assert attention_maps(MLP(classes=2), {}, TOKENS[None]) is None


# ----------------------------------------------------------------------------------------------- randomised weights


def test_the_parts_of_a_model_are_in_the_order_of_their_calls():
    model = ViT(depth=2, width=8, heads=1, patch=2, classes=3)
    image = np.ones((1, 4, 4, 1), np.float32)
    variables = random_variables(model, image)
    order = top_modules(lambda v: model.apply(v, image, train=False), variables)
    assert order == ["patches", "wpe", "block_0", "block_1", "final_norm", "head", "token"]


def test_randomised_weights_change_the_maps(curved):
    maps = {"integrated gradients": integrated_gradients(curved).values, "gradient x input": gradient_x_input(curved)}
    modules = ["dense_0", "dense_1", "head"]
    stages = sanity(curved, maps, modules)
    assert [stage.modules for stage in stages] == [("head",), ("head", "dense_1"), ("head", "dense_1", "dense_0")]
    assert all(-1 <= x <= 0.9 for x in stages[-1].signed.values())
    none = randomised(curved.variables["params"], (), 0)
    assert jax.tree.all(jax.tree.map(np.array_equal, none, curved.variables["params"]))
    some = randomised(curved.variables["params"], ("head",), 0)
    assert np.array_equal(some["dense_0"]["kernel"], curved.variables["params"]["dense_0"]["kernel"])
    before, after = curved.variables["params"]["head"]["kernel"], some["head"]["kernel"]
    assert abs(np.corrcoef(before.ravel(), after.ravel())[0, 1]) < 0.5 and after.std() == pytest.approx(
        before.std(), rel=0.3)


def test_a_map_that_ignores_the_weights_is_seen():
    """Negative control: a score that is the same for all weights gives the same maps, and a warning."""
    x = np.linspace(1, 2, 9).astype(np.float32)
    question = Question(lambda v, x: jnp.square(x).sum(-1) + 0 * v["params"]["a"]["k"].sum(),
                        {"params": {"a": {"k": np.ones(4, np.float32)}}}, x, 0 * x, np.arange(9), each_unit(9))
    subject = Subject(question, "table", "It", "a sum", "a sum", "zero", "one column", [f"c{i}" for i in range(9)],
                      ["a"], cells=["1"] * 9)
    found = explain(subject)
    assert found.stages[-1].signed == {"integrated gradients": pytest.approx(1), "gradient x input": pytest.approx(1)}
    assert "it shows the input, not what the model learned" in html(without_pictures(blocks(found)))


def test_the_rank_correlation_is_spearmans():
    assert rank_correlation(np.array([1, 2, 3, 4]), np.array([1, 4, 9, 16])) == pytest.approx(1)
    assert rank_correlation(np.array([1, 2, 3, 4]), np.array([4, 3, 2, 1])) == pytest.approx(-1)
    assert np.isnan(rank_correlation(np.ones(4), np.arange(4))) and np.isnan(rank_correlation(np.ones(2), np.ones(2)))


# --------------------------------------------------------------------------------------------------------- page


def test_a_language_model_from_text_to_page():
    model, fitted = GPT(**TEXT), Bytes().fit(None, 0)
    variables = random_variables(model, TOKENS[None])
    subject = next_token("GPT", model, variables, fitted, Asked("a <b>&", target="x", against="y"))
    found = explain(subject)
    assert subject.names == ["a", " ", "<", "b", ">", "&"] and subject.reader == 5
    assert subject.asked == "log-odds of 'x' against 'y' as the next token"
    logits = model.apply(variables, fitted.encode("a <b>&")[None], train=False)[0, -1]
    assert found.scores[0] == pytest.approx(float(logits[ord("x")] - logits[ord("y")]), abs=1e-4)
    page = html([b for b in blocks(found) if not isinstance(b, Picture)])
    assert "&lt;</span>" in page and "<b>" not in page and "prefers-color-scheme: dark" in page
    assert not re.search(r"https?://|<script|<link|@import", page)
    assert sum(isinstance(b, Markup) for b in blocks(found)) == 3 + 2  # three maps, two layers
    numbers = as_json(found)
    assert len(numbers["maps"]["occlusion"]) == 6 and numbers["completeness"]["gap"] == found.integrated.gap
    assert numbers["units"] == subject.names and numbers["explained"] == subject.asked


def test_texts_that_cannot_be_explained():
    model, fitted = GPT(**TEXT), Bytes().fit(None, 0)
    variables = random_variables(model, TOKENS[None])
    for how, words in ((Asked(" "), "--input is empty"),
                       (Asked("a" * 20), "The text has 20 tokens and the model reads 16"),
                       (Asked("a", target="the"), r"'the' must be one token of the model's .*, not 3 \('t', 'h'"),
                       (Asked("a", target="b", against="b"), "the same token"),
                       (Asked("a", record=1), "--record is for files with several records"),
                       (Asked("no.txt"), "no.txt does not exist")):
        with pytest.raises(UserError, match=words):
            next_token("GPT", model, variables, fitted, how)


def test_names():
    assert token_names(Bytes().fit(None, 0), np.array([104, 105])) == ["h", "i"]
    assert class_number("7", ["5", "7"], "--target") == 1
    with pytest.raises(UserError, match="Perhaps you meant 'Malignant'"):
        class_number("malignent", ["Malignant", "Benign"], "--target")
    with pytest.raises(UserError, match="There are a, b"):
        class_number("zebra", ["a", "b"], "--target")


@pytest.mark.parametrize("more", [{}, {"target": "c"}, {"target": "a", "against": "b"}])
def test_classes_are_explained_by_their_log_odds(more):
    logits = np.array([[1.0, -2.0, 0.5]], np.float32)
    of, what, answer, offset = _number(Classify(), logits, {}, SimpleNamespace(classes=("a", "b", "c")),
                                       Asked("x", **more))
    p = np.exp(logits[0]) / np.exp(logits[0]).sum()
    wanted = {0: np.log(p[0] / (1 - p[0])), 1: np.log(p[2] / (1 - p[2])), 2: 3.0}[len(more) if more else 0]
    assert float(of(logits)[0]) == pytest.approx(wanted, abs=1e-5) and offset == 0
    assert float(of(logits + 7)[0]) == pytest.approx(wanted, abs=1e-5)  # what all logits share says nothing
    assert answer == "a (probability 0.6037)" and what.endswith("b" if len(more) == 2 else "all other classes")


def test_two_classes_are_the_difference_of_their_coefficients_exactly():
    """As scikit-learn's `coef_`; a log-odds of two classes is linear."""
    rng = np.random.default_rng(5)
    x, base = rng.normal(size=(2, 9)).astype(np.float32)
    of = _number(Classify(), np.zeros((1, 2), np.float32), {}, SimpleNamespace(classes=("no", "yes")),
                 Asked("x", target="yes"))[0]
    question = asked(Linear(2), x, base, of)
    kernel = np.asarray(question.variables["params"]["head"]["kernel"])
    coefficient = (kernel[:, 1] - kernel[:, 0]).astype(np.float64)
    assert np.array_equal(integrated_gradients(question).values, coefficient * (x.astype(np.float64) - base))
    assert np.array_equal(gradient_x_input(question), coefficient * x.astype(np.float64))
    assert not np.array_equal(gradient_x_input(question), kernel[:, 1].astype(np.float64) * x)
