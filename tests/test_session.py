"""A conversation: the cache stays between turns, and the answers are those of a model without one."""

import io
import itertools
import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from lab import signals
from lab.__main__ import main
from lab.models.gpt import GPT
from lab.models.session import Session
from tests.test_generate import TINY, random_params
from tests.test_sample_weights import greedy, tiny  # noqa: F401 (a fixture)
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

FIRST, SECOND = [3, 1, 4], [1, 5]


def test_a_turn_computes_the_new_tokens_only_and_gives_the_same_ones():
    model = GPT(**TINY)
    params = random_params(model)
    session = Session(model, params, vocab=29, temperature=0.0)

    whole = jax.jit(lambda ids: model.apply({"params": params}, ids, train=False))

    def full(ids: list[int]) -> int:
        return int(whole(np.array([ids + [0] * (model.context - len(ids))]))[0, len(ids) - 1].argmax())

    text = list(FIRST)
    for added in ([], SECOND):
        text += added
        before, known = session.computed, len(session.ids)
        answer = list(itertools.islice(session.tokens(text), 4))
        for token in answer:
            assert token == full(text)
            text.append(token)
        # The last token of an answer was not fed back yet.
        assert session.computed - before == len(text) - 1 - known
    changed = text.copy()
    changed[2] = (changed[2] + 1) % 29
    assert next(session.tokens(changed)) == full(changed)
    assert full(changed) != full(text)  # negative control
    assert session.ids == changed


def test_it_ends_at_a_stop_token_and_at_the_end_of_the_context():
    model = GPT(**TINY)
    session = Session(model, random_params(model), vocab=29, temperature=0.0)
    whole = list(session.tokens(FIRST))
    assert len(whole) == model.context - len(FIRST) + 1
    k = next(i for i, token in enumerate(whole) if token not in whole[:i] and i)
    assert list(session.tokens(FIRST, stop=(whole[k],))) == whole[:k]
    with pytest.raises(ValueError, match="17 tokens"):
        next(session.tokens([1] * 17))


def test_sampled_tokens_depend_on_the_seed_and_the_place_only():
    model = GPT(**TINY)
    params = random_params(model)
    drawn = {}
    for seed in (0, 0, 1):
        session = Session(model, params, vocab=29, temperature=1.0, seed=seed)
        tokens = list(session.tokens(FIRST))
        assert drawn.setdefault(seed, tokens) == tokens
    again = Session(model, params, vocab=29, temperature=1.0)
    assert list(again.tokens(FIRST + drawn[0][:3])) == drawn[0][3:]
    assert drawn[0] != drawn[1]


def test_control_c_stops_the_answer_and_not_the_program():
    seen = []
    with signals.interrupted(lambda: seen.append(1)):
        signals._process.answer(signal.SIGINT)
    assert seen == [1] and signals._process.interrupt is None


@pytest.fixture
def talked(monkeypatch, capsys):
    def run(lines: str, *words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        capsys.readouterr()
        return main(["chat", *map(str, words)]), *capsys.readouterr()

    return run


def test_a_conversation(tiny, talked, tmp_path):  # noqa: F811
    pytest.importorskip("jinja2", reason="LAB_EXTRAS=chat")
    from lab.weights.tokenizer import tokenizer_of

    folder, model, params = tiny
    own = tokenizer_of(str(folder), model)
    status, out, _ = talked(f"hi\nwell\n/save {tmp_path}/talk.json\n/reset\nhi\n/nothing\n/exit\nnever\n", folder,
                            "--greedy", "--new-tokens", "5", "--context", "128")
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert status == 0 and [m["role"] for m in messages] == ["user", "assistant"] * 2
    text = ""
    for user, assistant in zip(messages[::2], messages[1::2], strict=True):
        text += f"<|im_start|>user\n{user['content']}<|im_end|>\n<|im_start|>assistant\n"
        ids = greedy(model, params, own.encode_prompt(text).tolist(), 5, own.size)
        ids = ids[:ids.index(own.eot)] if own.eot in ids else ids
        assert assistant["content"] == own.decode(ids)
        text += assistant["content"] + "<|im_end|>\n"
    assert "4 messages are in" in out and "/reset begins anew" in out
    first = messages[1]["content"]
    assert out.startswith(first) and out.count(first) >= 2  # again after /reset


def test_mistakes_are_sentences(tiny, talked):  # noqa: F811
    folder = tiny[0]
    for words, said in (((folder, "--new-tokens", "0"), "--new-tokens 0 is out of range"),
                        ((folder, "--best"), "are for run folders"), (("nowhere",), "nowhere"),
                        ((folder, "--new-tokens", "4", "--context", "8"), "more --context")):
        status, _, err = talked("a message that is far too long for it\n", *words)
        assert status == 2 and said in err and "Traceback" not in err
