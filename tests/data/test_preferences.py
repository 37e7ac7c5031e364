"""Pairs of answers: what a file may hold, what is learned, which split; and what a wrong line says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lab.data.dialogues import JsonlPairs, Preferences, PythonDocsPairs
from lab.data.dialogues.pairs import Pair
from lab.data.hugging_face import HuggingFaceTokenizer
from lab.data.tokenizers import BPE, Bytes
from lab.errors import UserError
from tests.data.test_dialogues import pretrained, say, write  # noqa: F401 (a fixture)


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def pairs_of(path: Path, n: int = 60, **more: Any) -> JsonlPairs:
    """Pairs of answers of different lengths."""
    rows = [{"prompt": f"{i}?", "chosen": "yes" + "!" * (i % 4), "rejected": "no" * (1 + i % 3)} | more
            for i in range(n)]
    return JsonlPairs(str(write(path, *rows)))


def test_what_a_line_may_hold(tmp_path):
    """Text and messages, with and without a prompt; the forms of Hugging Face and trl."""
    system = [{"role": "system", "content": "Be brief."}]
    long = say("a", "b", "c")
    path = write(tmp_path / "a.jsonl",
                 {"prompt": "a", "chosen": "b", "rejected": "c", "score": 3},
                 {"prompt": long, "chosen": "d", "rejected": answer("e")},
                 {"chosen": [*system, *say("a", "b")], "rejected": [*system, *say("a", "c")]},
                 {"prompt": "a", "chosen": [*system, *say("a", "b")], "rejected": [*system, *say("a", "c")]},
                 {"prompt": long, "chosen": [*long, *answer("d")], "rejected": [*long, *answer("e")]})
    before = [*system, *say("a")]
    assert JsonlPairs(str(path)).read() == [
        Pair(f"{path}:1", say("a"), "b", "c"), Pair(f"{path}:2", long, "d", "e"), Pair(f"{path}:3", before, "b", "c"),
        Pair(f"{path}:4", before, "b", "c"), Pair(f"{path}:5", long, "d", "e")]
    path = write(tmp_path / "b.jsonl", {"q": "x", "good": "y", "bad": "z"})
    assert JsonlPairs(str(path), "q", "good", "bad").read() == [Pair(f"{path}:1", say("x"), "y", "z")]


@pytest.mark.parametrize("row, said", [
    ("", "x.jsonl is empty: it needs a JSON object per line, with a prompt and two answers"),
    ("{", "x.jsonl:1 is not JSON"), ("[1]", "x.jsonl:1 has no 'chosen', but no keys"),
    ({"prompt": "a", "chosen": "b"}, "x.jsonl:1 has no 'rejected', but 'prompt', 'chosen': --data.source.rejected"),
    ({"chosen": "b", "rejected": "c"}, "x.jsonl:1, chosen: there is no prompt"),
    ({"prompt": 3, "chosen": "b", "rejected": "c"}, "x.jsonl:1: the prompt must be text or a list"),
    ({"prompt": "a", "chosen": 3, "rejected": "c"}, "x.jsonl:1, chosen: an answer must be text or a list"),
    ({"prompt": "a", "chosen": "b", "rejected": " "}, "x.jsonl:1, rejected: message 2 needs"),
    ({"prompt": "a", "chosen": "b", "rejected": [{"text": "c"}]}, 'x.jsonl:1, rejected: message 2 needs "role"'),
    ({"prompt": "a", "chosen": "b", "rejected": "b "}, "x.jsonl:1: chosen and rejected are the same"),
    ({"prompt": say("a", "b"), "chosen": "c", "rejected": "d"}, "x.jsonl:1: the prompt must end with a message"),
    ({"prompt": [], "chosen": "c", "rejected": "d"}, "x.jsonl:1: the prompt must end with a message of the user"),
    ({"chosen": say("a", "b", "c"), "rejected": say("a", "d")}, "x.jsonl:1, chosen: the last message must be"),
    ({"chosen": say("a", "b"), "rejected": say("x", "d")}, "x.jsonl:1: chosen and rejected must be answers to one"),
    ({"prompt": "q", "chosen": say("a", "b"), "rejected": say("a", "c")}, "chosen: the messages before the answer are"),
])
def test_a_wrong_line_is_named(tmp_path, row, said):
    (tmp_path / "x.jsonl").write_text(row if isinstance(row, str) else json.dumps(row))
    with pytest.raises(UserError) as e:
        JsonlPairs(str(tmp_path / "x.jsonl")).read()
    assert said in str(e.value)
    with pytest.raises(UserError, match="three of its keys"):
        JsonlPairs("x", prompt="chosen").validate()


@pytest.mark.parametrize("tokenizer, end", [(Bytes(), "\n"), (BPE(300), "<|endoftext|>")], ids=repr)
def test_only_the_last_answers_are_learned(tmp_path, tokenizer, end):
    rows = [{"prompt": say(f"{i} hi", "hello", "tea?"), "chosen": "yes é", "rejected": "no"} for i in range(60)]
    data = Preferences(JsonlPairs(str(write(tmp_path / "a.jsonl", *rows))), tokenizer, 100)
    loaded = data.load()
    assert [text for text, learned in loaded.example() if learned] == [f"yes é{end}", f"no{end}"]
    row = loaded.train[np.arange(1)]
    chosen = row["pair"][0, 0, 1:][row["learn"][0, 0] == 1]
    assert loaded.decode(chosen).startswith("yes é") and not row["reference"].any()
    assert {name: (x.shape[1:], x.dtype.type) for name, x in row.items()} == data.record_spec()
    again = data.restored(loaded.saved(), loaded.tokenizer_state)
    assert again.prompt_ids(say("x")) == loaded.prompt_ids(say("x"))


def test_a_chat_template(pretrained, tmp_path):  # noqa: F811
    source = pairs_of(tmp_path / "a.jsonl", chosen="yes", rejected="no")
    data = Preferences(source, HuggingFaceTokenizer(str(pretrained)), 60).load()
    assert [text for text, learned in data.example() if learned] == ["yes<|im_end|>", "no<|im_end|>"]


def test_a_prompt_is_in_one_split_whatever_the_order(tmp_path):
    rows = [{"prompt": f"{n % 60}", "chosen": f"yes {n}", "rejected": "no"} for n in range(180)]
    data, again = (Preferences(JsonlPairs(str(write(tmp_path / name, *own))), Bytes(), 60).load()
                   for name, own in (("a", rows), ("b", rows[::-1])))
    prompts = [{bytes(ids[0][learn[0].argmax() - 14:][:3]) for ids, learn in zip(x["pair"], x["learn"], strict=True)}
               for x in (records[np.arange(len(records))] for records in (data.train, data.validation, data.test))]
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and sum(map(len, prompts)) == 60
    assert data.fingerprint == again.fingerprint


def test_pairs_longer_than_a_window_are_dropped_and_counted(tmp_path):
    source = pairs_of(tmp_path / "a.jsonl", 200)
    whole, part = (Preferences(source, Bytes(), length).load() for length in (60, 26))
    dropped = part.summary["train dropped, longer than a window"]
    assert dropped and len(part.train) + dropped == len(whole.train)
    assert whole.summary["train dropped, longer than a window"] == 0
    with pytest.raises(UserError, match=r"No train pair fits --data.length 20: the shortest, .*l:\d+, needs 2[34]"):
        Preferences(source, Bytes(), 20).load()
    with pytest.raises(UserError, match="has 2 pairs, and none falls into .* by a hash of each prompt"):
        Preferences(pairs_of(tmp_path / "b.jsonl", 2), Bytes(), 60).load()
    with pytest.raises(UserError, match="The template of Preferences writes all special tokens"):
        replace(Preferences(source, HuggingFaceTokenizer("x", special_tokens=True), 60)).validate()


def test_pairs_that_every_machine_has():
    found = {pair.name: pair for pair in PythonDocsPairs().read()}
    assert len(found) > 1000
    pair = found["textwrap.py, dedent(text)"]
    assert pair.prompt == say("textwrap.dedent(text)")
    assert (pair.chosen, pair.rejected) == ("Remove any common leading whitespace from every line in `text`.",
                                            "`text`. in line every from whitespace leading common any Remove")
