"""Dialogues: what is read, what is learned, how windows are filled, and that packing changes no result."""

import functools
import json
import lzma
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.commands import chat
from lab.data.dialogues import Dialogues, Jsonl, PythonDocs, QuestionsAnswers, Taskmaster
from lab.data.dialogues.dialogues import divided
from lab.data.dialogues.packing import first_fit
from lab.data.hugging_face import HuggingFaceTokenizer
from lab.data.tokenizers import BPE, Bytes, Chars
from lab.errors import UserError
from lab.models import generate
from lab.models.gpt import GPT
from lab.tasks.language import LanguageModel
from tests.test_step import compiled_in_haste  # noqa: F401

USER, ASSISTANT = "user", "assistant"
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def say(*texts: str) -> list[dict[str, str]]:
    """Messages by user and assistant in turn."""
    return [{"role": (USER, ASSISTANT)[i % 2], "content": text} for i, text in enumerate(texts)]


def write(path: Path, *rows: object) -> Path:
    """A file with an object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def orders(tmp_path) -> Jsonl:
    """200 dialogues of one to three turns, of different lengths."""
    rows = [say(*(f"{n}: {'tea ' * (1 + (n + i) % 5)}" for i in range(2 * (1 + n % 3)))) for n in range(200)]
    return Jsonl(str(write(tmp_path / "orders.jsonl", *({"messages": row} for row in rows))))


@pytest.fixture
def pretrained(tmp_path) -> Path:
    """A folder with a byte-level tokenizer that has a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    pytest.importorskip("jinja2", reason="LAB_EXTRAS=chat")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(["hello tea"], trainers.BpeTrainer(
        special_tokens=["<|im_start|>", "<|im_end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    folder = tmp_path / "pretrained"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": CHATML}))
    return folder


# --------------------------------------------------------------------------------------------------------- sources


def test_what_a_jsonl_file_may_hold(tmp_path):
    system = [{"role": "system", "content": "Be brief."}]
    path = write(tmp_path / "a.jsonl", {"messages": [*system, *say("a", "b", "thanks")], "id": 3},
                 {"prompt": "2 + 2?", "completion": "4"})
    path.write_text("\ufeff" + path.read_text() + "\n  \n")
    assert Jsonl(str(path)).read() == [(f"{path}:1", [*system, *say("a", "b")]), (f"{path}:2", say("2 + 2?", "4"))]
    path = write(tmp_path / "b.jsonl", {"q": "x", "a": "y"})
    assert Jsonl(str(path), prompt="q", completion="a").read() == [(f"{path}:1", say("x", "y"))]


def test_a_csv_of_questions_and_answers(tmp_path):
    path = tmp_path / "faq.csv"
    path.write_text('id,question,answer\n1,"Open, now?","Yes,\nuntil 6."\n2,Where?,Here.\n')
    source = QuestionsAnswers(str(path))
    assert source.read() == [(f"{path}:2", say("Open, now?", "Yes,\nuntil 6.")), (f"{path}:4", say("Where?", "Here."))]
    with pytest.raises(UserError, match="no column 'reply'"):
        replace(source, answer="reply").read()


def test_taskmaster_joins_what_one_speaker_says(tmp_path):
    said = [("CUSTOMER", "hi"), ("customer", "a latte"), ("barista", "ok"), ("user", "thanks")]
    row = {"conversation_id": "dlg-1", "utterances": [{"speaker": who, "text": text} for who, text in said]}
    with lzma.open(tmp_path / "data_00.json.xz", "wt") as file:
        json.dump([row], file)
    source = Taskmaster(str(tmp_path))
    assert source.read() == [("data_00.json.xz, dlg-1", say("hi\na latte", "ok"))]
    for content, said in ((json.dumps([{**row, "utterances": [{"speaker": "crowd", "text": "x"}]}]), "speaker 'crowd'"),
                          ("[1]", "not in Taskmaster's format"), ("[", "no readable JSON")):
        (tmp_path / "data_01.json").write_text(content)
        with pytest.raises(UserError, match=said):
            source.read()


def test_taskmaster_4(shared):
    folder = shared / "data" / "taskmaster4"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    found = Taskmaster(str(folder)).read()
    assert len(found) == 3710 and sum(len(messages) for _, messages in found) == 13_840
    parts = divided(found, "Taskmaster-4")
    assert {split: len(part) for split, part in parts.items()} == {"train": 2971, "validation": 344, "test": 395}


def test_functions_of_the_standard_library():
    found = dict(PythonDocs().read())
    assert len(found) > 1000
    assert found["textwrap.py, dedent(text)"] == say("textwrap.dedent(text)",
                                                     "Remove any common leading whitespace from every line in `text`.")


@pytest.mark.parametrize("content, said", [
    ("", "x.jsonl is empty"), ('{"messages": []}\n{"mess', "x.jsonl:1 has no assistant turn"),
    ('{"prompt": "a", "completion": "b"}\n{"mess', "x.jsonl:2 is not JSON"), ("[1]", "has neither"),
    ('{"text": "a"}', "has neither \"messages\" nor 'prompt' and 'completion', but 'text'"),
    ('{"messages": "hi"}', '"messages" is no list'), ('{"messages": [{"role": "user"}]}', 'message 1 needs "role"'),
    ('{"messages": [{"role": "user", "content": " "}]}', "not empty"),
    ('{"messages": [{"role": "human", "content": "a"}]}', "the role 'human'; the roles are system, user, assistant"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}', "only the first may be"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "x.jsonl:1 has no assistant turn"),
    ('{"prompt": "\\ud83d", "completion": "b"}', "message 1 has half of a surrogate pair"),
])
def test_a_wrong_line_is_named(tmp_path, content, said):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(UserError) as e:
        Jsonl(str(tmp_path / "x.jsonl")).read()
    assert said in str(e.value)


def test_copies_are_in_one_split_whatever_the_order():
    rows = [(str(n), say(f"{n % 40}", "b")) for n in range(120)]
    parts = divided(rows, "x")
    where = [{messages[0]["content"] for _, messages in part} for part in parts.values()]
    assert sum(map(len, where)) == 40 and set(parts) == {"train", "validation", "test"}
    again = divided(rows[::-1], "x")
    assert all([m for _, m in parts[split]] == [m for _, m in again[split]] for split in parts)
    with pytest.raises(UserError, match="x has 1 dialogues, and none falls into"):
        divided(rows[:1], "x")


# --------------------------------------------------------------------------------------------------- what is learned


def learned(data) -> list[str]:
    """The pieces that are learned in the first training dialogue."""
    return [text for text, learn in data.example() if learn]


def write_copies(path: Path, messages: list[dict[str, str]], n: int = 40) -> Jsonl:
    """The dialogue with a number before each question, so that all splits have some."""
    rows = [[m | {"content": f"{i % 10}{i // 10}{m['content']}"} if m["role"] == USER else m for m in messages]
            for i in range(n)]
    return Jsonl(str(write(path, *({"messages": row} for row in rows))))


@pytest.mark.parametrize("tokenizer, end", [(Bytes(), "\n"), (Chars(), "\n"), (BPE(300), "<|endoftext|>")], ids=repr)
@pytest.mark.parametrize("packing", [True, False])
def test_only_answers_and_their_end_are_learned(tmp_path, tokenizer, end, packing):
    source = write_copies(tmp_path / "a.jsonl", say("hi", "hello é", "tea?", "yes"))
    data = Dialogues(source, tokenizer, 200, packing).load()
    assert learned(data) == [f"hello é{end}", f"yes{end}"]
    stop = "" if end == "\n" else end
    whole = "".join(text for text, _ in data.example())
    assert whole[6:8].isdigit()
    assert whole.replace(whole[6:8], "") == (f"User:\nhi\nAssistant:\nhello é{stop}\nUser:\ntea?\nAssistant:\nyes"
                                             f"{end}")
    row = data.train[np.arange(1)]
    count = 1 if not packing else row["documents"].max()
    assert row["bytes"] == count * (len("hello é yes".encode()) - 1 + 2 * (end == "\n"))
    assert data.validation_bytes().startswith(b"hello " + "é".encode() + (b"\nyes\n" if end == "\n" else b"yes"))


def test_a_chat_template(pretrained, tmp_path):
    source = write_copies(tmp_path / "a.jsonl", say("hi", "hello", "tea?", "yes"))
    experiment = Dialogues(source, HuggingFaceTokenizer(str(pretrained)), 100)
    data = experiment.load()
    assert learned(data) == ["hello<|im_end|>", "yes<|im_end|>"]
    assert data.example()[2][0].startswith("\n<|im_start|>user\n")
    ids = data.prompt_ids(say("hi"))
    assert data.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert data.encode(data.decode(ids)).tolist() == ids
    again = experiment.restored(data.saved(), data.tokenizer_state)
    assert again.prompt_ids(say("hi")) == ids
    plain = replace(experiment, template="plain").load()
    assert plain.decode(plain.prompt_ids(say("hi"))) == "User:\nhi\nAssistant:\n"


def test_a_template_that_changes_what_was_said_before(pretrained, tmp_path):
    """As some do, which leave the thoughts of earlier answers out."""
    source = write_copies(tmp_path / "a.jsonl", say("hi", "hello", "tea?", "yes"))
    config = json.loads((pretrained / "tokenizer_config.json").read_text())
    config["chat_template"] = CHATML.replace("m['content'] +", "(m['content'] if loop.last else 'x') +")
    (pretrained / "tokenizer_config.json").write_text(json.dumps(config))
    data = Dialogues(source, HuggingFaceTokenizer(str(pretrained)), 100)
    with pytest.raises(UserError, match=r"a\.jsonl:\d+: .* message 2, an answer, .* --data.template plain"):
        data.load()
    del config["chat_template"]
    (pretrained / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no chat template: add a chat_template.jinja"):
        data.load()


# ---------------------------------------------------------------------------------------------------------- windows


def test_first_fit():
    assert first_fit([5, 4, 3, 6, 1, 7], 10) == [[0, 1, 4], [2, 3], [5]]
    assert first_fit([], 10) == []


def test_windows_hold_every_dialogue_once(orders):
    packed, alone = (Dialogues(orders, BPE(280), 96, packing).load() for packing in (True, False))
    for split in ("train", "validation"):
        whole, rows = (getattr(data, split)[np.arange(len(getattr(data, split)))] for data in (packed, alone))
        assert len(whole["tokens"]) < len(rows["tokens"])
        assert whole["learn"].sum() == rows["learn"].sum() and whole["bytes"].sum() == rows["bytes"].sum()
        found = []
        for tokens, learn, positions, documents in zip(*(whole[name] for name in (
                "tokens", "learn", "positions", "documents")), strict=True):
            for number in range(1, documents.max() + 1):
                own = documents == number
                assert np.array_equal(positions[own], np.arange(own.sum()))
                found.append((tokens[:-1][own].tolist(), learn[own].tolist()))
            assert not learn[documents == 0].any()
        expected = [(tokens.tolist(), learn.tolist()) for tokens, learn in zip(rows["tokens"], rows["learn"],
                                                                               strict=True)]
        assert len(found) == len(expected)
        for tokens, learn in found:
            assert any(row[: len(tokens)] == tokens and own[: len(learn) - 1] == learn[:-1] for row, own in expected)
    spec = {name: (x.shape[1:], x.dtype.type) for name, x in whole.items()}
    assert spec == Dialogues(orders, BPE(280), 96).record_spec()
    assert packed.fingerprint == Dialogues(orders, BPE(280), 96).load().fingerprint != alone.fingerprint


def test_long_dialogues_are_cut_and_counted(tmp_path):
    long = [say("x" * (30 + n), "y") for n in range(40)]
    short = [say("hi", f"{n} " + "z" * 40) for n in range(40)]
    source = Jsonl(str(write(tmp_path / "a.jsonl", *({"messages": row} for row in long + short))))
    data = Dialogues(source, Bytes(), 40).load()
    lines = {name.removeprefix("train "): value for name, value in data.summary.items()}
    dropped, cut = lines["dropped, without an answer in the window"], lines["cut at the end"]
    assert dropped + cut == lines["dialogues"] and dropped and cut == lines["windows"]
    assert data.train.arrays["documents"].all()
    with pytest.raises(UserError, match="No train dialogue has an answer within --data.length 3"):
        Dialogues(source, Bytes(), 3).load()


# ------------------------------------------------------------------------------------------------ equal to unpacked


@pytest.mark.parametrize("fields, chunk", [
    ({"position": "rotary", "attention": "einsum", "depth": 1}, None),
    # Without biases: that of the keys has no gradient but rounding errors.
    ({"position": "learned", "attention": "xla", "depth": 2, "scan": True, "remat": "blocks", "bias": False}, 32),
], ids=["rotary", "learned"])
def test_packing_changes_no_result(orders, fields, chunk):
    """Sums of losses and gradients over the same dialogues; each array's largest difference is 1e-5 of its largest."""
    packed, alone = (Dialogues(orders, BPE(280), 96, packing).load().validation for packing in (True, False))
    packed, alone = (records[np.arange(len(records))] for records in (packed, alone))
    assert len(packed["tokens"]) < len(alone["tokens"])
    model, task = GPT(width=16, heads=2, vocab=280, context=96, **fields), LanguageModel(chunk=chunk)
    params = jax.jit(functools.partial(task.init, model))(jax.random.key(0), packed)["params"]
    params = jax.tree.map(lambda x: 4 * x, params)  # so that attention is more than a mean

    @jax.jit
    def value_and_grad(params, batch):
        def loss(params):
            weights = {"weight": jnp.ones(len(batch["tokens"]))}
            total, weight, metrics, _ = task.loss(model, {"params": params}, {**batch, **weights}, {}, True)
            return total, (weight, metrics["bits_per_byte"][1])

        return jax.value_and_grad(loss, has_aux=True)(params)

    def distance(batch):
        (total, counts), grads = value_and_grad(params, batch)
        assert counts == wanted_counts
        both = zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True)
        return max(abs(total - wanted_total) / wanted_total, *(np.abs(a - b).max() / np.abs(b).max() for a, b in both))

    (wanted_total, wanted_counts), wanted = value_and_grad(params, alone)
    assert distance(packed) < 1e-5
    across = {**packed, "documents": np.ones_like(packed["documents"])}
    running = {**packed, "positions": np.broadcast_to(np.arange(96), packed["positions"].shape)}
    assert distance(across) > 1e-2
    if fields["position"] == "learned":  # rotary positions are relative
        assert distance(running) > 1e-2


# ----------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with an experiment on its own dialogues."""
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    write_copies(tmp_path / "a.jsonl", say("hi", "hello", "tea?", "yes"))
    (tmp_path / "x.py").write_text('''"""A test."""
from lab.data.dialogues import Dialogues, Jsonl
from lab.data.tokenizers import Bytes
from lab.experiment import Evaluate, Experiment, Mesh
from lab.models.gpt import GPT
from lab.optim import AdamW, Constant
from lab.tasks.language import LanguageModel

experiment = Experiment(data=Dialogues(Jsonl("a.jsonl"), Bytes(), length=64), task=LanguageModel(samples=1),
                        model=GPT(depth=1, width=16, heads=1, vocab=256, context=64), optim=AdamW(lr=Constant(1e-2)),
                        steps=2, batch=2, evaluate=Evaluate(every=0), mesh=Mesh(data=1))
''')
    return tmp_path


def test_a_dry_run_shows_what_is_learned(typed):
    status, out, _ = typed("x.py", "--dry-run")
    assert status == 0
    assert "One example: what is in [brackets] is learned" in out
    assert "  | Assistant:\n  | [hello\n  | ]User:\n" in out
    assert "of the tokens learned" in out and "of the windows filled" in out


def test_a_mistake_is_a_sentence(mistake, place):
    assert "must be at least 1 token" in mistake("x.py", "--data.length", "0")
    assert "has an answer within --data.length 2" in mistake("x.py", "--data.length", "2")
    (place / "a.jsonl").write_text("{\n")
    assert "a.jsonl:1 is not JSON" in mistake("x.py")


def test_train_and_chat(typed, monkeypatch):
    """A run continues from its own form of dialogues, without the data."""
    monkeypatch.setattr(generate, "sample_texts", lambda compute, context, text, prompts, **_: ["x"] * len(prompts))
    status, _, err = typed("x.py", "--run-dir", "run")
    assert status == 0, err
    sample = Path("run/samples/0.txt").read_text()
    assert re.match(r"--- prompt\nUser:\n\d\dhi\nAssistant:\n\n--- continuation\n", sample), sample
    Path("a.jsonl").unlink()
    asked = []
    monkeypatch.setattr(chat.Talk, "go", lambda self: asked.append(self.encode(say("x"))))
    assert typed("chat", "run")[0] == 0
    assert bytes(asked[0]) == b"User:\nx\nAssistant:\n"
