"""Statistics of generated texts, by hand and beside sacrebleu's own BLEU; the answers of an assistant's run."""

import json
from dataclasses import replace

import numpy as np
import pytest

from lab.data.dialogues import Dialogues, Jsonl, Taskmaster
from lab.data.tokenizers import BPE
from lab.errors import UserError
from lab.experiment import Checkpoint, Evaluate, Experiment, Mesh
from lab.models.gpt import GPT
from lab.optim import AdamW, Constant
from lab.tasks.assistant import Assistant
from lab.tasks.language import LanguageModel
from lab.tasks.text_quality import distinct, quality_table, repetition, self_bleu, slot_scores, slots, text_quality
from lab.train.console import Screen
from lab.train.loop import train


def test_distinct_and_repetition_by_hand():
    assert distinct(["a b a", "A c!"], 1) == 4 / 6  # a, b, c and !
    assert distinct(["a b a", "a b"], 2) == 2 / 3  # no pair crosses texts
    assert np.isnan(distinct(["", "a"], 2))
    assert repetition(["a b a b a", "x y"], 2) == (0.5 + 0) / 2
    assert repetition(["the cat the cat the cat"], 4) == pytest.approx(1 / 3)
    assert np.isnan(repetition(["too short"], 4))


def test_self_bleu_is_the_mean_of_sentence_bleu():
    sacrebleu = pytest.importorskip("sacrebleu", reason="needs the extra sacrebleu")
    texts = ["the cat sat on the mat", "the cat sat on a chair", "a dog slept in the house today"]
    expected = np.mean([sacrebleu.sentence_bleu(text, texts[:i] + texts[i + 1:]).score for i, text in enumerate(texts)])
    assert self_bleu(texts) == pytest.approx(expected)
    assert self_bleu(["one and the same text"] * 3) == pytest.approx(100)
    assert self_bleu(["one two three four", "five six seven eight"]) < 10
    assert self_bleu(["alone", ""]) is None


def test_slots_are_the_list_at_the_end():
    assert slots("Ready soon. [Mocha;  oat   milk] ") == {"mocha", "oat milk"}
    assert slots("[sic] is not at the end") == slots("none []") == slots("") == frozenset()


def test_slot_scores_by_hand():
    references = ["Soon. [latte; decaf; to go]", "No slots here", "Ok [mocha]"]
    answers = ["Soon. [latte; iced]", "[anything]", "A mocha is on its way"]
    found = slot_scores(references, answers)  # 4 slots wanted, 2 given, 1 right
    assert found == {"slots": 4, "slot_precision": 0.5, "slot_recall": 0.25, "slot_f1": 1 / 3, "slots_exact": 0.0,
                     "slots_mentioned": 0.5}
    assert slot_scores(references, references)["slots_exact"] == 1
    assert slot_scores(["no slots"], ["[latte]"]) == {}


def test_quality_table():
    assert text_quality(["", ""])["words"] == 0  # and no measure that has no value
    assert quality_table({"before": {"texts": 1200, "x": 0.5}, "after": {"texts": 3}}) == [
        "           before       after", "texts       1,200           3", "x           0.500           -"]


# ------------------------------------------------------------------------------------------------ the report of a run


def dialogues(folder, count=60):
    path = folder / "orders.jsonl"
    drinks = ("latte", "mocha", "espresso")
    path.write_text("".join(json.dumps({"prompt": f"{drink} {i}", "completion": f"ok [{drink}]"}) + "\n"
                            for i in range(count // 3) for drink in drinks))
    return Dialogues(Jsonl(str(path)), BPE(vocab=280), length=64)


@pytest.fixture
def experiment(tmp_path):
    data = dialogues(tmp_path)
    return Experiment(data=data, model=GPT(depth=1, width=32, heads=2, vocab=280, context=64, position="rotary"),
                      task=Assistant(answers=4, shown=2, new_tokens=24, samples=0), optim=AdamW(lr=Constant(1e-3)),
                      steps=2, batch=8, mesh=Mesh(data=1), evaluate=Evaluate(every=0), checkpoint=Checkpoint(every=0))


def test_a_run_answers_before_and_after(experiment, tmp_path, capsys):
    with Screen() as screen:
        assert train(experiment, tmp_path / "run", screen) == 0
    found = json.loads((tmp_path / "run/answers/answers.json").read_text())
    assert set(found["statistics"]) == {"before", "after", "real answers"}
    assert found["statistics"]["after"]["slots"] == len(found["answers"]) == 4
    assert found["answers"][0]["real"].endswith("]") and len(found["answers"][0]["messages"]) == 1
    page = (tmp_path / "run/answers/answers.md").read_text()
    assert page.count("| before |") == page.count("| real |") == 2
    assert "4 answers to held-out dialogues" in capsys.readouterr().out


def test_the_answers_are_those_of_the_state(experiment, tmp_path):
    """Greedy answers to the prompt that training saw; after enough steps they are the real ones."""
    long = replace(experiment, steps=150, batch=8, optim=AdamW(lr=Constant(1e-2)))
    with Screen(quiet=True) as screen:
        assert train(long, tmp_path / "run", screen) == 0
    found = json.loads((tmp_path / "run/answers/answers.json").read_text())["statistics"]
    assert found["after"]["slot_f1"] > 0.9 > found["before"]["slot_f1"]


def test_mistakes(experiment):
    for name in ("answers", "shown", "new_tokens"):
        with pytest.raises(UserError, match=f"--task.{name.replace('_', '-')} must be at least 1, not 0"):
            replace(experiment.task, **{name: 0}).validate()
    with pytest.raises(UserError, match="LanguageModel takes any text"):
        experiment.task.check(None, object())
    LanguageModel().check(None, object())


# ------------------------------------------------------------------------------------------------- Taskmaster's orders


def utterance(speaker, text, *responses):
    notes = [{"name": "response", "value": value if isinstance(value, str) else json.dumps(value)}
             for value in responses]
    return {"speaker": speaker, "text": text, "annotations": notes}


@pytest.fixture
def taskmaster(tmp_path):
    def write(*utterances):
        rows = [{"conversation_id": "one", "utterances": list(utterances)}]
        (tmp_path / "data_00.json").write_text(json.dumps(rows))
        return Taskmaster(str(tmp_path), orders=True)

    return write


def test_the_last_answer_ends_with_the_order(taskmaster):
    first = {"order_id": "1", "menu_items": [{"menu_item_id": "latte-12", "menu_item_name": "Latte"}]}
    last = {"order_id": "1", "attributes": [{"attribute_id": "name", "option": "ace of hearts"},
                                            {"attribute_id": "order-type", "option": "Togo"}],
            "menu_items": [{"menu_item_id": "chai-latte-77", "menu_item_name": "var_drink", "quantity": "2",
                            "attributes": [{"attribute_id": "milk-options", "option": "Oat  Milk"}],
                            "addons": [{"addon_id": "caramel-sauce-9", "option": "ADD"}]},
                           {"menu_item_id": "mocha-1", "menu_item_name": "Mocha", "quantity": "1"}]}
    source = taskmaster(utterance("user", "A latte."), utterance("assistant", "Right?"),
                        utterance("user", "No!", first, '{"order_id": "1", "menu_', last, {"success": True}),
                        utterance("assistant", "Soon."))
    [(_, messages)] = source.read()
    assert messages[1]["content"] == "Right?"
    assert messages[-1]["content"] == "Soon. [2 chai latte; oat milk; caramel sauce; mocha; to go]"
    [(_, plain)] = replace(source, orders=False).read()
    assert plain[-1]["content"] == "Soon."


def test_without_an_order_nothing_is_added(taskmaster):
    [(_, messages)] = taskmaster(utterance("user", "Tea?", {"menu_items": []}), utterance("assistant", "No.")).read()
    assert messages[-1]["content"] == "No."
    with pytest.raises(UserError, match="not in Taskmaster's format"):
        taskmaster(utterance("user", "Tea?", {"order_id": "1", "menu_items": [{"price": 1}]}),
                   utterance("assistant", "No.")).read()
