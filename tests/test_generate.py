"""Sampling: greedy decoding equals repeated full forward passes; the distributions in closed form; compilations."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.errors import UserError
from lab.models.generate import generate, pick, sample_texts, truncated
from lab.models.gpt import GPT
from tests.conftest import computing
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

TINY = {"depth": 2, "width": 16, "heads": 4, "vocab": 29, "context": 16, "tied": False}
PROMPT = np.random.default_rng(0).integers(0, 29, (3, 6)).astype(np.int32)
LENGTHS = np.array([6, 1, 4])
NEW = 8


def random_params(model):
    """Matrices large and biases small, so that what comes next depends on what came before."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), PROMPT, train=False))["params"]

    def one(path, x):
        scale = {"bias": 0.1, "scale": 0.1}.get(path[-1].key, 0.8)
        return (rng.normal(size=x.shape) * scale + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree.map_with_path(one, shapes)


def greedy_reference(model, params, prompt, lengths, new):
    """The argmax of a full forward pass over each row so far, again and again. Returns the tokens and the narrowest
    margin by which one won."""
    full = jax.jit(lambda tokens: model.apply({"params": params}, tokens, train=False))
    rows, tokens = np.arange(len(prompt)), np.zeros((len(prompt), model.context), np.int32)
    for row, text, n in zip(tokens, prompt, lengths, strict=True):
        row[:n] = text[:n]
    out, margin, at = [], np.inf, np.array(lengths)
    for _ in range(new):
        logits = np.asarray(full(tokens))[rows, at - 1]
        best = np.sort(logits, axis=-1)
        margin = min(margin, (best[:, -1] - best[:, -2]).min())
        tokens[rows, at] = logits.argmax(-1)
        out.append(tokens[rows, at])
        at = at + 1
    return np.stack(out, 1), margin


# Every pair of (position, heads), (position, layers), (heads, layers).
@pytest.mark.parametrize("fields", [
    {}, {"kv_heads": 2, "scan": True}, {"position": "rotary", "scan": True},
    {"depth": 1, "position": "rotary", "kv_heads": 1, "qk_norm": True, "norm": "rmsnorm"}], ids=str)
def test_greedy_equals_repeated_argmax_of_the_full_forward_pass(fields):
    model = GPT(**TINY | fields)
    params = random_params(model)
    want, margin = greedy_reference(model, params, PROMPT, LENGTHS, NEW)
    assert margin > 5e-4  # 100 times rounding: no tie decides
    assert len(np.unique(want)) > 3  # and it is not one token for ever
    run = lambda lengths: np.asarray(generate(model, params, PROMPT, lengths, keys(len(lengths)), new_tokens=NEW,
                                              temperature=0.0))
    np.testing.assert_array_equal(run(LENGTHS), want)
    wrong = run(np.array([6, 6, 6]))  # negative control: padding taken for text
    assert (wrong[0] == want[0]).all() and (wrong[1:] != want[1:]).any()


# ----------------------------------------------------------------------------------------------- one token's draw

def keys(rows, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


PROBABILITY = np.array([0.05, 0.4, 0.1, 0.25, 0.15, 0.05])
DRAWS = 20_000


def frequencies(temperature=1.0, top_k=None, top_p=1.0, key=0):
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(PROBABILITY, jnp.float32)) + 3.0, (DRAWS, 6))
    tokens = pick(logits, keys(DRAWS, key), temperature, top_k, top_p)
    assert tokens.dtype == jnp.int32 and tokens.shape == (DRAWS,)
    return np.bincount(np.asarray(tokens), minlength=6) / DRAWS


def closed_form(temperature=1.0, kept=(0, 1, 2, 3, 4, 5)):
    p = np.where(np.isin(np.arange(6), kept), PROBABILITY ** (1 / temperature), 0)
    return p / p.sum()


def agrees(found, want):
    """Within five standard deviations of a binomial; exactly 0 where nothing may fall."""
    return (np.abs(found - want) <= 5 * np.sqrt(want * (1 - want) / DRAWS)).all()


@pytest.mark.parametrize("settings,want", [
    ({}, closed_form()),
    ({"temperature": 0.5}, closed_form(0.5)),
    ({"temperature": 2.0}, closed_form(2.0)),
    ({"top_k": 3}, closed_form(kept=(1, 3, 4))),
    ({"top_k": 6}, closed_form()),
    ({"top_k": 100}, closed_form()),
    ({"top_p": 0.3}, closed_form(kept=(1,))),
    ({"top_p": 0.6}, closed_form(kept=(1, 3))),
    ({"top_p": 0.7}, closed_form(kept=(1, 3, 4))),
    ({"top_p": 1e-9}, closed_form(kept=(1,))),
    ({"top_p": 0.6, "temperature": 2.0}, closed_form(2.0, kept=(1, 3, 4))),  # 0.29, 0.23, 0.18: after the temperature
    ({"top_k": 3, "top_p": 0.7}, closed_form(kept=(1, 3))),  # 0.5, 0.31, 0.19 of what top-k left
    ({"temperature": 0.0}, closed_form(kept=(1,))),
], ids=str)
def test_draws_follow_the_closed_form(settings, want):
    found = frequencies(**settings)
    assert agrees(found, want), (found, want)


def test_the_frequency_test_sees_a_wrong_distribution():
    """Negative control of the test above: a temperature of 0.9, the neighbouring k and p."""
    assert not agrees(frequencies(temperature=0.9), closed_form())
    assert not agrees(frequencies(top_k=4), closed_form(kept=(1, 3, 4)))
    assert not agrees(frequencies(top_p=0.7), closed_form(kept=(1, 3)))
    assert not agrees(frequencies(top_p=0.6, temperature=2.0), closed_form(2.0, kept=(1, 3)))


def test_rows_are_filtered_by_their_own_logits():
    logits = jnp.log(jnp.array([[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]]))
    for settings in ({"top_k": 1, "top_p": 1.0}, {"top_k": None, "top_p": 0.5}):
        for i in range(10):
            assert pick(logits, keys(2, i), 1.0, **settings).tolist() == [0, 2]
    assert len({tuple(pick(logits, keys(2, i), 1.0, None, 1.0).tolist()) for i in range(20)}) > 3  # neg. control


def support(logits, top_k, top_p):
    """Which tokens may be sampled."""
    return np.isfinite(np.asarray(truncated(jnp.asarray(logits), 1.0, top_k, top_p)))


def test_the_support_in_closed_form():
    logits = np.random.default_rng(0).normal(size=(20, 40)).astype(np.float32) * 2
    order = np.argsort(-logits, axis=-1)
    p = np.take_along_axis(np.exp(np.float64(logits)) / np.exp(np.float64(logits)).sum(-1, keepdims=True), order, -1)
    for top_p in (0.2, 0.5, 0.9):
        kept = support(logits, None, top_p)
        for row in range(20):
            smallest = int(np.searchsorted(np.cumsum(p[row]), top_p)) + 1
            assert set(np.flatnonzero(kept[row])) == set(order[row, :smallest])
    for top_k in (1, 7, 40):
        kept = support(logits, top_k, 1.0)
        assert [set(np.flatnonzero(r)) for r in kept] == [set(o[:top_k]) for o in order]
    assert support(logits, None, 1.0).all()
    assert not support(logits, None, 0.99).all()  # negative control


def test_top_p_1_keeps_everything_of_a_large_vocabulary():
    logits = np.random.default_rng(0).normal(size=(4, 50257)).astype(np.float32) * 3
    assert support(logits, None, 1.0).all()


# ------------------------------------------------------------------------------------------------- a known "model"

TRACES = []


@dataclass(frozen=True)
class Successor:
    """A language of 10 tokens in which t is followed by t + 1 (mod 10), with a cache that only counts; it says
    when it is traced."""

    context: int = 16
    sharpness: float = 30.0

    def apply(self, variables, tokens, *, train, decode, positions, mutable):
        TRACES.append(tokens.shape)
        count = variables["cache"]["count"] if "cache" in variables else jnp.zeros((), jnp.int32)
        logits = self.sharpness * jax.nn.one_hot((tokens + 1) % 10, 10) * variables["params"]
        return logits, {"cache": {"count": count + 1}}


def succeed(prompt, lengths, new=5, model=Successor(), temperature=1.0, top_p=1.0, stop=-1):
    return np.asarray(generate(model, jnp.ones(()), np.array(prompt, np.int32), np.array(lengths), keys(len(prompt)),
                               new_tokens=new, temperature=temperature, top_p=top_p, stop=stop)).tolist()


def test_after_the_stop_token_a_row_is_filled_with_it():
    prompt = [[1, 2, 3], [7, 0, 0], [9, 8, 0]]
    assert succeed(prompt, [3, 1, 2]) == [[4, 5, 6, 7, 8], [8, 9, 0, 1, 2], [9, 0, 1, 2, 3]]
    assert succeed(prompt, [3, 1, 2], stop=9) == [[4, 5, 6, 7, 8], [8, 9, 9, 9, 9], [9, 9, 9, 9, 9]]
    assert succeed(prompt, [3, 1, 2], stop=jnp.array(5)) == [[4, 5, 5, 5, 5], [8, 9, 0, 1, 2], [9, 0, 1, 2, 3]]


def test_a_prompt_and_its_continuation_must_fit_the_context():
    assert len(succeed([[1] * 11], [11])[0]) == 5
    with pytest.raises(ValueError, match="12 prompt \\+ 5 new tokens exceed the context of 16"):
        succeed([[1] * 12], [12])


def test_settings_are_arguments_not_programs():
    succeed([[1, 2]], [2], new=3)
    before = len(TRACES)
    for temperature, top_p, stop, length in ((0.5, 0.9, 3, 1), (0.0, 1.0, -1, 2), (1.3, 0.1, 7, 1)):
        succeed([[4, 5]], [length], new=3, temperature=temperature, top_p=top_p, stop=stop)
    assert len(TRACES) == before
    succeed([[4, 5]], [2], new=4)
    assert len(TRACES) > before  # negative control: the counter counts


def test_top_k_1_is_greedy_and_a_key_is_a_draw():
    model = Successor(sharpness=1.0)

    def draw(key, temperature=1.0, top_k=None, top_p=1.0):
        return np.asarray(generate(model, jnp.ones(()), np.array([[3]], np.int32), np.array([1]), keys(1, key),
                                   new_tokens=12, temperature=temperature, top_k=top_k, top_p=top_p)).tolist()

    greedy = draw(0, temperature=0.0)
    assert greedy == [[(4 + i) % 10 for i in range(12)]]
    assert draw(0, top_k=1) == draw(1, top_k=1) == greedy
    assert draw(0, top_p=1e-6) == greedy
    assert draw(0) == draw(0) != draw(1)  # also the negative control: without them it is not greedy
    assert len(set(draw(0)[0])) > 2  # each token has a key of its own


class Digits:
    """Text of digits; "9" ends a text if `eot`."""

    def __init__(self, eot=None):
        self.eot = eot

    def encode(self, text):
        return [int(c) if c.isdigit() else 0 for c in text]

    def decode(self, ids):
        return "".join(str(int(i)) for i in ids)


def texts(prompts, new=4, eot=None, model=Successor(), **settings):
    compute = computing(model, {"params": jnp.ones(())})
    return sample_texts(compute, model.context, Digits(eot), prompts, seed=0, new_tokens=new, **settings)


def test_sampled_texts_continue_their_prompts():
    assert texts(["12", "5", "7654321"]) == ["3456", "6789", "2345"]
    assert texts(["12", "5", "7"], eot=8) == ["3456", "67", ""]  # up to the end of the text, without it


def test_an_empty_prompt_starts_at_the_end_of_a_text_or_at_a_line_end():
    assert texts([""]) == ["1234"]  # Digits encodes a line end as 0
    assert texts([""], eot=4) == ["5678"]
    assert texts(["", "2"], eot=9) == ["0123", "3456"]


def test_a_window_slides_beyond_the_context(caplog):
    """The context is 16: of a long prompt as much is kept as leaves room, and then half of what there is, each time."""
    caplog.set_level("INFO", "lab.models.generate")
    assert texts(["0123456789" * 5, "3"]) == ["0123", "4567"]
    assert texts(["0123456789" * 5], new=100) == ["0123456789" * 10]
    assert [len(text) for text in texts(["12", "5" * 40, ""], new=300)] == [300, 300, 300]
    assert len(caplog.messages) == 3  # once each
    assert "(50 + 100) exceed the model's context of 16: each token sees the last 8 to 16" in caplog.messages[1]
    assert texts(["2"], new=15) == ["345678901234567"] and texts(["2"], new=None) == ["345678901234567"]
    assert texts(["7", "12"], new=40, eot=9) == ["8", "345678"]  # nothing follows the end of a text
    assert len(caplog.messages) == 4
    with pytest.raises(UserError, match="a context of 1 token has no room"):
        sample_texts(None, 1, Digits(), ["1"], seed=0)


def test_sampling_begins_with_a_token_that_there_is():
    class Letters(Digits):
        def encode(self, text):
            if set(text) - set("0123456789"):
                raise UserError("no such character")
            return super().encode(text)

    compute = computing(Successor(), {"params": jnp.ones(())})
    assert sample_texts(compute, 16, Letters(), ["", "3"], seed=0, new_tokens=2) == ["12", "45"]
    with pytest.raises(UserError, match="no such character"):  # what the user types is theirs
        sample_texts(compute, 16, Letters(), ["x"], seed=0)


def test_padding_of_the_vocabulary_is_never_chosen():
    """Logits that prefer ids from 7 on, which the tokenizer does not have."""
    def draw(vocab, temperature):
        prompt, key = np.array([[5]], np.int32), keys(1)
        return np.asarray(generate(Successor(), jnp.ones(()), prompt, np.array([1]), key, new_tokens=9,
                                   temperature=temperature, vocab=vocab))

    for temperature in (0.0, 1.0, 100.0):
        assert draw(7, temperature).max() < 7 <= draw(None, temperature).max()


def test_one_compilation_serves_all_prompts_of_a_bucket():
    texts(["12345"])
    before = len(TRACES)
    for prompt in ("123456", "1234567", "12345678"):
        assert texts([prompt]) == [Digits().decode([(int(prompt[-1]) + i + 1) % 10 for i in range(4)])]
    assert len(TRACES) == before
    texts(["12345"], new=3)
    assert len(TRACES) > before  # negative control: another number of new tokens
    assert max(shape[1] for shape in TRACES) <= 16


def test_a_seed_of_its_own_makes_each_text_repeatable_alone():
    model = Successor(sharpness=1.0)

    def draw(prompts, seed, new_tokens=10):
        compute = lambda f, *inputs, **static: f(model, {"params": jnp.ones(())}, *map(jnp.asarray, inputs), **static)
        return sample_texts(compute, model.context, Digits(None), prompts, seed=seed, new_tokens=new_tokens)

    together = draw(["3", "3", "12"], [5, 6, 5])
    assert together == [draw([prompt], seed)[0] for prompt, seed in (("3", 5), ("3", 6), ("12", 5))]
    assert together[0] != together[1]  # negative control: the seed matters
    sliding = draw(["3", "3"], [5, 6], 30)
    assert sliding == [draw(["3"], 5, 30)[0], draw(["3"], 6, 30)[0]]
