"""MaskedLM: what is chosen and what it becomes, counted on many records; the loss against NumPy; the examples."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.data.pipeline import Arrays
from lab.errors import UserError
from lab.models.bert import BERT
from lab.models.gpt import GPT
from lab.models.rnn import LSTM
from lab.tasks.masked import MASK, MaskedLM, _decoded, _rounded_up
from tests.conftest import computing
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

V, L, MANY = 50, 40, 6000
RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(0, L + 1, MANY)
REAL = np.arange(L) < LENGTHS[:, None]
TOKENS = np.where(REAL, RNG.integers(1, V - 1, (MANY, L)), 0).astype(np.int32)


@functools.cache
def hider(rate):
    return jax.jit(MaskedLM(rate=rate).hide, static_argnums=3)


def keys(seed, indices):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.asarray(indices))


def hide(tokens, real, keys_B, rate=0.15):
    return [np.asarray(x) for x in hider(rate)(tokens, real.astype(np.uint8), keys_B, V)]


@functools.cache
def hidden():
    return hide(TOKENS, REAL, keys(0, np.arange(MANY)))


def chosen_map(chosen, weight):
    found = np.zeros((len(chosen), L), bool)
    np.put_along_axis(found, chosen, weight > 0, axis=1)
    return found


# ------------------------------------------------------------------------------------------- what becomes of tokens


def test_the_share_of_tokens_that_is_chosen():
    inputs, chosen, weight = hidden()
    assert inputs.shape == (MANY, L) and chosen.shape == weight.shape == (MANY, 6) and inputs.dtype == np.int32
    np.testing.assert_array_equal(weight.sum(1), np.ceil(LENGTHS * 15 / 100))
    assert (weight.sum(1) >= (LENGTHS > 0)).all() and (LENGTHS == 0).any() and (LENGTHS == 1).any()
    assert all(len(set(row)) == 6 for row in chosen)  # no position twice
    found = chosen_map(chosen, weight)
    assert not found[~REAL].any()  # padding is never chosen
    np.testing.assert_array_equal(inputs[~found], TOKENS[~found])  # nothing else changes


def test_every_position_is_chosen_as_often():
    _, chosen, weight = hide(TOKENS, np.ones_like(REAL), keys(1, np.arange(MANY)))
    share = chosen_map(chosen, weight).mean(0)
    deviation = np.sqrt(0.15 * 0.85 / MANY)
    assert np.abs(share - 0.15).max() < 4.5 * deviation
    _, chosen, weight = hidden()  # negative control: with padding the last positions are chosen less often
    assert np.abs(chosen_map(chosen, weight).mean(0) - 0.15).max() > 10 * deviation


def test_eighty_ten_ten():
    """Of a token replaced at random, 1 in V - 2 stays what it was."""
    inputs, chosen, weight = hidden()
    found = chosen_map(chosen, weight)
    old, new = TOKENS[found], inputs[found]
    n = len(old)
    assert n > 18_000
    kept = 0.1 + 0.1 / (V - 2)
    for share, expected in (((new == V - 1).mean(), 0.8), ((new == old).mean(), kept),
                            (((new != V - 1) & (new != old)).mean(), 0.2 - kept)):
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n), (share, expected)
        assert abs(share - 0.5 * expected) > 10 * np.sqrt(expected * (1 - expected) / n)  # negative control
    other = new[(new != V - 1) & (new != old)]
    assert other.min() == 1 and other.max() == V - 2  # never padding, never [MASK]
    counts = np.bincount(other, minlength=V)[1:V - 1]
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi2 < 90  # 47 degrees of freedom: exceeded once in 6,000
    half = np.bincount(other % (V // 2), minlength=V)[1:V - 1]
    assert ((half - half.mean()) ** 2 / half.mean()).sum() > 900  # negative control: half of the ids


def test_what_is_chosen_depends_on_the_records_key_alone():
    inputs, chosen, weight = hidden()
    some = np.array([17, 3, 3, 4999, 250])
    again = hide(TOKENS[some], REAL[some], keys(0, some))  # another batch, another order
    for x, y in zip(again, (inputs, chosen, weight), strict=True):
        np.testing.assert_array_equal(x, y[some])
    for other in (keys(1, some), keys(0, some + 1)):  # another step or seed, another record
        changed = hide(TOKENS[some], REAL[some], other)
        assert (changed[0] != again[0]).any(1)[LENGTHS[some] > 3].all()


def test_counts_are_rounded_up_exactly():
    counts = np.arange(601)
    for percent in range(1, 101):
        np.testing.assert_array_equal(_rounded_up(percent / 100, 600), -(-counts * percent // 100), str(percent))
    assert (np.ceil(0.07 * counts) != _rounded_up(0.07, 600)).any()  # negative control
    assert _rounded_up(1e-9, 5).tolist() == [0, 1, 1, 1, 1, 1]
    inputs, chosen, weight = hide(TOKENS[:50], REAL[:50], keys(0, np.arange(50)), rate=1.0)
    np.testing.assert_array_equal(chosen_map(chosen, weight), REAL[:50])


# ------------------------------------------------------------------------------------------------------- the loss

MODEL = BERT(depth=1, width=8, heads=2, vocab=V, context=L, dropout=0.0)
SOME = 6
# A third of the tokens is the one that the model says most often, so that some of its answers are right.
OFTEN = RNG.random((SOME, L + 1)) < 1 / 3
TEXTS = np.where(OFTEN[:, 1:] & REAL[:SOME], 7, TOKENS[:SOME])
BATCH = {"inputs": TEXTS, "mask": REAL[:SOME].astype(np.uint8), "key": keys(0, np.arange(SOME)),
         "weight": np.array([1, 1, 0, 1, 1, 1], np.float32), "targets": np.zeros(SOME, np.int32)}
WINDOWS = {"tokens": np.where(OFTEN, 7, RNG.integers(0, V - 1, (SOME, L + 1))).astype(np.int32),
           "bytes": np.ones(SOME, np.int32), "key": BATCH["key"], "weight": BATCH["weight"]}


@functools.cache
def variables():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: MaskedLM().init(MODEL, jax.random.key(0), BATCH))
    found = jax.tree.map(lambda x: (0.5 * rng.normal(size=x.shape)).astype(np.float32), shapes)
    found["params"]["mlm_bias"][7] = 6.0
    return found


@functools.cache
def compiled(train):
    return jax.jit(lambda batch: MaskedLM().loss(MODEL, variables(), batch, {}, train)[:3])


def reference(batch, tokens, real, hidden, count_all=False):
    """(nll, correct, chosen, real tokens), by loops over full logits."""
    inputs, chosen, weight = hidden
    mask = {} if "tokens" in batch else {"mask": batch["mask"]}
    logits = np.asarray(MODEL.apply(variables(), inputs, train=False, **mask), np.float64)
    nll = correct = total = 0
    for b in np.flatnonzero(batch["weight"]):
        for position, w in zip(chosen[b], weight[b], strict=True):
            if w > 0 or count_all:
                row, target = logits[b, position], tokens[b, position]
                nll += np.log(np.exp(row - row.max()).sum()) + row.max() - row[target]
                correct += row.argmax() == target
                total += 1
    return nll, correct, total, real[batch["weight"] > 0].sum()


@pytest.mark.parametrize("batch", [BATCH, WINDOWS], ids=["messages", "windows"])
def test_the_loss_equals_numpy(batch):
    tokens, real = (TEXTS, REAL[:SOME]) if batch is BATCH else (batch["tokens"][:, :-1], np.ones((SOME, L)))
    found = hide(tokens, real, batch["key"])
    nll, correct, total, words = reference(batch, tokens, real, found)
    loss, weight, metrics = compiled(True)(batch)
    assert weight == total and words > total > 10 and 0 < correct < total
    np.testing.assert_allclose(loss, nll, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (nll, total), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (correct, total))
    np.testing.assert_allclose(metrics["masked_share"], (total, words))
    jax.tree.map(np.testing.assert_array_equal, compiled(False)(batch)[2], metrics)  # evaluation hides the same
    everything = compiled(True)(batch | {"weight": np.ones(SOME, np.float32)})[0]
    assert abs(everything - nll) > 1  # negative control: padding records counted
    if batch is BATCH:
        assert abs(reference(batch, tokens, real, found, count_all=True)[0] - nll) > 1  # negative control
    assert MaskedLM().summary({"loss": 2.0}, {}) == {"perplexity": pytest.approx(np.exp(2.0))}


def test_a_hidden_token_leaves_no_trace_in_what_the_model_gets():
    inputs, chosen, weight = hide(TOKENS[:SOME], REAL[:SOME], keys(0, np.arange(SOME)))
    place = next((b, p) for b in range(SOME) for p, w in zip(chosen[b], weight[b], strict=True)
                 if w and inputs[b, p] == V - 1)
    other = TOKENS[:SOME].copy()
    other[place] = 1 + other[place] % (V - 2)
    np.testing.assert_array_equal(hide(other, REAL[:SOME], keys(0, np.arange(SOME)))[0], inputs)
    other = np.where(weight.sum(1, keepdims=True) > 0, (TOKENS[:SOME] + 1) % V, 0)
    assert (hide(other, REAL[:SOME], keys(0, np.arange(SOME)))[0] != inputs).any()  # negative control: all of them


def test_segments_reach_the_model():
    segments = {"segments": (np.arange(L)[None] > 3).astype(np.int32).repeat(SOME, 0)}
    plain, with_segments = compiled(True)(BATCH)[0], compiled(True)(BATCH | segments)[0]
    assert abs(plain - with_segments) > 1e-2


@pytest.mark.parametrize("model", [BERT(classes=2), LSTM(), GPT()])
def test_a_model_without_the_head_is_refused(model):
    with pytest.raises(UserError, match=f"BERT.classes=None.; this {type(model).__name__} has none"):
        MaskedLM().init(model, jax.random.key(0), BATCH)


@pytest.mark.parametrize("task,words", [
    (MaskedLM(rate=0.0), "--task.rate must be above 0 and at most 1, not 0.0."),
    (MaskedLM(rate=1.5), "--task.rate must be above 0"), (MaskedLM(samples=-1), "--task.samples must be 0 or more"),
])
def test_fields_out_of_range(task, words):
    MaskedLM().validate()
    with pytest.raises(UserError) as error:
        task.validate()
    assert words in str(error.value)


# ---------------------------------------------------------------------------------------------------- the examples

WORDS = np.array(["?"] + [f"w{i}" for i in range(1, V - 1)])


def words(ids):
    return " ".join(WORDS[ids])


def letters(ids):
    return "".join(chr(97 + i % 26) for i in ids)


def test_decoding_around_masks():
    ids = np.array([V - 1, 3, 4, V - 1, V - 1, 5])
    assert _decoded(words, ids, V - 1) == f"{MASK} w3 w4 {MASK} {MASK} w5"
    assert _decoded(letters, ids, V - 1) == f"{MASK}de{MASK}{MASK}f"
    assert _decoded(words, ids[:1], V - 1) == MASK
    assert _decoded(words, ids[1:3], V - 1) == "w3 w4"


@pytest.mark.parametrize("batch", [BATCH, WINDOWS], ids=["messages", "windows"])
def test_examples_are_written(tmp_path, batch):
    records = Arrays({name: value for name, value in batch.items() if name not in ("key", "weight")})
    outcome = SimpleNamespace(data=SimpleNamespace(decode=words), records=records, model=MODEL,
                              compute=computing(MODEL, variables()), seed=0, folder=tmp_path)
    lines = MaskedLM(samples=3).artifacts(outcome)
    assert lines == [f"Texts with hidden tokens and what the model guessed: {tmp_path / 'samples' / 'masked.txt'}"]
    text = (tmp_path / "samples" / "masked.txt").read_text()
    examples = text.split("--- original\n")[1:]
    assert len(examples) == 3
    for i, example in zip((0, 2, 5), examples, strict=True):
        original, masked, predicted = (part.split("\n")[1] if j else part.split("\n")[0]
                                       for j, part in enumerate(example.split("--- ")))
        tokens = TEXTS[i][REAL[i]] if batch is BATCH else batch["tokens"][i, :-1]
        assert original == words(tokens)
        assert len(masked.split()) == len(predicted.split()) == len(tokens)
        assert MASK in masked and MASK not in predicted  # guesses are arg max over real ids, here
    assert MaskedLM(samples=0).artifacts(outcome) == []
    outcome.data = SimpleNamespace()
    assert MaskedLM().artifacts(outcome) == []
