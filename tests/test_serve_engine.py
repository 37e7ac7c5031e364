"""Continuous batching: a text's tokens are those of `chat`, alone and in company; slots come and go."""

import itertools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.errors import UserError
from lab.models.generate import pick, truncated
from lab.models.gpt import GPT
from lab.models.session import Session
from lab.serve import decoding, sampling
from lab.serve import slots as slots_file
from lab.serve.engine import Busy, Closed, Engine, collect
from lab.serve.sampling import Settings, pick_rows, rows_of
from lab.serve.slots import Slots
from tests.test_generate import TINY, random_params
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

SMALL = TINY | {"context": 48}
LONG = np.random.default_rng(3).integers(0, 29, 23).tolist()
SETTINGS = [Settings(temperature=0.0), Settings(seed=1), Settings(0.7, 0.9, 5, seed=2), Settings(1.3, 0.5, seed=7),
            Settings(1.0, 1.0, 3, seed=4_000_000_000)]
REQUESTS = [dict(ids=ids, new_tokens=new, settings=how, stop=()) for (ids, new), how in zip(
    [([3, 1, 4], 12), ([5], 20), (LONG, 25), ([9, 2, 6, 5, 3], 8), ([7, 7], 16)], SETTINGS, strict=True)]


@pytest.fixture
def engine(monkeypatch):
    """Makes engines of a random model, with short parts of prompts, and stops them."""
    monkeypatch.setattr(slots_file, "WIDTHS", (4, 8))
    made = []

    def make(slots=3, fields=None, queue=64, start=True):
        model = GPT(**SMALL | (fields or {}))
        made.append(Engine(Slots(model, random_params(model), slots=slots, vocab=27), queue))
        if start:
            made[-1].start()
        return made[-1]

    yield make
    for one in made:
        if one._thread.is_alive():
            assert one.close(0)


def together(engine, requests):
    """Their tokens, all submitted at once."""
    found = [None] * len(requests)

    def run(i):
        tokens, reason, _ = collect(engine, **requests[i])
        found[i] = [token.id for token in tokens], reason

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


@pytest.mark.parametrize("fields", [{}, {"scan": True, "kv_heads": 2, "position": "rotary"}], ids=str)
def test_tokens_are_those_of_chat_alone_and_in_company(engine, fields):
    one = engine(fields=fields)
    model = one.slots.model
    params = random_params(model)
    company = together(one, REQUESTS + REQUESTS[::-1])
    for request, (tokens, reason) in zip(REQUESTS, company, strict=False):
        how = request["settings"]
        session = Session(model, params, vocab=27, seed=how.seed, temperature=how.temperature, top_k=how.top_k,
                          top_p=how.top_p)
        assert tokens == list(itertools.islice(session.tokens(request["ids"]), request["new_tokens"]))
        assert reason == "length" and max(tokens) < 27
        alone, _, _ = collect(one, **request)
        assert [token.id for token in alone] == tokens
        other, _, _ = collect(one, **request | {"settings": Settings(how.temperature + 0.5, seed=11)})
        assert [token.id for token in other] != tokens  # negative control
    assert company[::-1][:len(REQUESTS)] == company[:len(REQUESTS)]


def test_a_row_is_sampled_as_pick_samples_it():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(40, 11)) * 2, jnp.float32)
    settings = [Settings(t, p, k, seed) for seed, (t, p, k) in enumerate(itertools.product(
        (0.0, 0.6, 1.5), (1.0, 0.9, 0.2), (None, 1, 4, 99)))] + SETTINGS[1:]
    found = pick_rows(logits, rows_of(settings), jnp.arange(40))
    logp = jax.nn.log_softmax(logits)
    picked = jax.jit(pick, static_argnums=3)
    for i, how in enumerate(settings):
        key = jax.random.fold_in(jax.random.key(how.seed), i)[None]
        token = picked(logits[i:i + 1], key, how.temperature, how.top_k, how.top_p)[0]
        assert token == found.token_B[i]
        assert found.logp_B[i] == pytest.approx(float(logp[i, token]), abs=1e-6)
    np.testing.assert_array_equal(found.top_BT, jnp.argsort(-logits, axis=-1))
    assert len(set(np.asarray(found.token_B).tolist())) > 5


def test_what_can_be_sampled_is_that_of_truncated():
    """Top-k and top-p without a sort: ties, steep and flat distributions."""
    rng = np.random.default_rng(1)
    logits = jnp.asarray(np.concatenate([rng.normal(size=(30, 50)) * 3, np.round(rng.normal(size=(30, 50))),
                                         rng.normal(size=(30, 50)) * 0.1]), jnp.float32)
    cut = jax.jit(truncated, static_argnums=2)
    for settings in ([Settings(float(t), float(p), int(k)) for t, p, k in zip(rng.choice([0.5, 1.0], 90), rng.choice(
            [1.0, 0.9, 0.5, 0.1], 90), rng.choice([0, 3, 8, 99], 90), strict=True)], [Settings(1.0, 0.5)] * 90):
        found = np.asarray(sampling._truncated(logits, rows_of(settings)))
        want = [cut(logits[i:i + 1], how.temperature, how.top_k or None, how.top_p)[0]
                for i, how in enumerate(settings)]
        np.testing.assert_array_equal(found, want)
        assert 1 <= (found > -np.inf).sum(-1).min() < 20 < (found > -np.inf).sum(-1).max()


def test_logprobs_are_those_of_the_model(engine):
    one = engine()
    tokens, _, request = collect(one, **REQUESTS[2])
    text = LONG + [token.id for token in tokens]
    logits = one.slots.model.apply({"params": random_params(one.slots.model)}, np.array([text]), train=False)[0]
    logp = np.asarray(jax.nn.log_softmax(jnp.where(jnp.arange(29) < 27, logits, -jnp.inf)))
    for at, token in enumerate(tokens, len(LONG) - 1):
        assert token.logp == pytest.approx(logp[at, token.id], abs=1e-4)
        assert token.top[0][1] == pytest.approx(logp[at].max(), abs=1e-4) and len(token.top) == 20


def test_the_next_turn_of_a_chat_computes_what_is_new(engine):
    one = engine()
    first, _, _ = collect(one, **REQUESTS[2] | {"new_tokens": 6})
    collect(one, **REQUESTS[0])  # another text, in another slot
    turn = LONG + [token.id for token in first] + [8, 8]
    second, _, request = collect(one, ids=turn, new_tokens=6, settings=SETTINGS[0], stop=())
    assert request.reused == len(LONG) + 5  # all but the last token, which was never fed
    fresh, _, request = collect(engine(), ids=turn, new_tokens=6, settings=SETTINGS[0], stop=())
    assert request.reused == 0 and [t.id for t in fresh] == [t.id for t in second]
    # A text that shares little with a long one leaves it alone.
    _, _, request = collect(one, ids=LONG[:3] + [1, 1], new_tokens=2, settings=SETTINGS[0], stop=())
    assert request.reused == 0


def test_programs_are_compiled_once(engine):
    one = engine()
    assert one.ready.wait(60)
    before = [f._cache_size() for f in (slots_file._prefill, slots_file._decode)]
    together(one, REQUESTS * 2)
    assert [f._cache_size() for f in (slots_file._prefill, slots_file._decode)] == before


def test_stop_tokens_limits_and_deadlines(engine):
    one = engine(slots=1, queue=2)
    whole = [token.id for token in collect(one, **REQUESTS[1])[0]]
    k = next(i for i, token in enumerate(whole) if token not in whole[:i] and i > 1)
    tokens, reason, _ = collect(one, **REQUESTS[1] | {"stop": (whole[k],)})
    assert [token.id for token in tokens] == whole[:k] and reason == "stop"
    with pytest.raises(ValueError, match="context of 48"):
        collect(one, **REQUESTS[1] | {"new_tokens": 48})
    assert collect(one, **REQUESTS[1], deadline=time.monotonic() - 1)[1:2] == ("deadline",)
    with pytest.raises(UserError, match="top-p"):
        Settings(top_p=0.0).validate()


def test_a_cancelled_request_frees_its_slot_and_a_full_queue_says_when(engine):
    one = engine(slots=1, queue=1, start=False)
    from lab.serve.engine import Request

    ends, tokens = [], []

    def request(i):
        return Request(**REQUESTS[1], emit=lambda e: (ends.append((i, e)) if isinstance(e, str) else tokens.append(i)))

    first, second = request(0), request(1)
    one.submit(first)
    one.submit(second)  # the slot and the queue are full
    with pytest.raises(Busy) as found:
        one.submit(request(2))
    assert 1 <= found.value.seconds <= 60
    one.cancel(first)
    one.start()
    assert one.ready.wait(60)
    assert one.close(60) and ends == [(0, "cancelled"), (1, "length")] and 0 not in tokens
    with pytest.raises(Closed):
        one.submit(request(2))


def test_a_failed_step_ends_its_requests_and_not_the_engine(engine, monkeypatch):
    one = engine()
    want = collect(one, **REQUESTS[0])[0]
    step = one.slots.step
    monkeypatch.setattr(one.slots, "step", lambda *_: 1 / 0)
    assert collect(one, **REQUESTS[0])[1] == "failed"
    monkeypatch.setattr(one.slots, "step", step)
    assert collect(one, **REQUESTS[0])[0] == want


def test_a_step_of_any_size_gives_the_same_tokens(monkeypatch):
    """Few texts make a small step and many a large one; a text does not notice, also in bfloat16."""
    monkeypatch.setattr(slots_file, "WIDTHS", (8,))
    model = GPT(**SMALL | {"context": 16})
    for precision in ("float32", "bfloat16"):
        slots = Slots(model, random_params(model), slots=10, vocab=27, precision=precision)
        assert slots.rows == [8, 10]
        slots.compile()
        found = []
        for others in ((), (1, 3), (1, 2, 9)):
            token, texts = {}, []
            for slot in (0, *others):
                slots.rewind(slot, 0)
                token[slot] = int(slots.extend(slot, [5, 2 + slot], SETTINGS[2])[1].token_B[0])
            for _ in range(8):
                step = slots.step(token, dict.fromkeys(token, SETTINGS[2]))
                token = {slot: int(step.token_B[slot]) for slot in token}
                texts.append((token[0], step.top_logp_BT[0].tolist()))
            found.append(texts)
        assert [[token for token, _ in texts] for texts in found] == [[token for token, _ in found[0]]] * 3
        assert slots.rows == [10] or found[0] == found[1] == found[2]


def test_a_step_whose_bits_differ_is_not_used(monkeypatch):
    monkeypatch.setattr(slots_file, "WIDTHS", (8,))
    model = GPT(**SMALL | {"context": 16})
    slots = Slots(model, random_params(model), slots=10, vocab=27)
    step = slots._step

    def other(tokens, settings, rows):
        found = step(tokens, settings, rows)
        return found._replace(top_logp_BT=np.nextafter(found.top_logp_BT, 0)) if rows == 8 else found

    monkeypatch.setattr(slots, "_step", other)
    slots.compile()
    assert slots.rows == [10] and slots.rows_to(0) == 10


def test_a_text_over_all_blocks_of_the_cache(monkeypatch):
    """Logits of a text that fills several blocks are those of the model, after parts and single tokens."""
    monkeypatch.setattr(decoding, "KEYS", 4)
    monkeypatch.setattr(slots_file, "WIDTHS", (4, 8))
    assert decoding.blocks_of(48) == (4, 4, 8, 16, 16)
    model = GPT(**SMALL | {"kv_heads": 2, "position": "rotary"})
    params = random_params(model)
    slots = Slots(model, params, slots=2, vocab=29)
    text = np.random.default_rng(5).integers(0, 29, 48).tolist()
    logp = jax.nn.log_softmax(model.apply({"params": params}, np.array([text]), train=False)[0])
    slots.extend(0, text[:8], SETTINGS[0])
    for at in range(8, 48):
        found = slots.step({0: text[at]}, {0: SETTINGS[0]})
        np.testing.assert_allclose(found.top_logp_BT[0], np.sort(logp[at])[::-1][:20], atol=2e-4)
    assert np.abs(np.sort(logp[46])[::-1][:20] - found.top_logp_BT[0]).max() > 0.01  # negative control
