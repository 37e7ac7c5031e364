"""`./launch.sh sample LOCATION`: pretrained weights continue a text and answer."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from tokenizers.processors import TemplateProcessing

from lab.__main__ import main
from lab.commands.sample import _judged
from lab.models import generate
from lab.models.gpt import GPT
from lab.weights.read import parameter_shapes
from lab.weights.tokenizer import tokenizer_of
from lab.weights.write import write
from tests.test_chat import CHATML
from tests.test_hugging_face_tokenizer import EOT, byte_level

HUGE = 1 << 24  # rows of a key/value cache that would need 4 GB


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, GPT, dict]:
    """A random Llama with a tokenizer, in a folder as Hugging Face has it."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    tokenizer = byte_level()
    model = GPT(depth=1, width=32, heads=4, kv_heads=2, vocab=tokenizer.get_vocab_size() + 3, context=HUGE,
                position="rotary", norm="rmsnorm", mlp="swiglu", bias=False)
    draw = np.random.default_rng(0)
    params = {path: draw.normal(0, 0.5, shape).astype(np.float32) for path, shape in parameter_shapes(model).items()}
    write(model, params, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": EOT, "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder, model, unflatten_dict(params, sep="/")


@pytest.fixture
def typed(capsys) -> Callable[..., tuple[int, str, str]]:
    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return main(["sample", *map(str, words)]), *capsys.readouterr()

    return run


def greedy(model: GPT, params: dict, ids: list[int], new: int, size: int) -> list[int]:
    """Without a cache."""
    apply = jax.jit(lambda x: model.apply({"params": params}, x, train=False))
    found = list(ids)
    for _ in range(new):
        logits = apply(jnp.asarray([found + [0] * (128 - len(found))]))[0, len(found) - 1, :size]
        found.append(int(logits.argmax()))
    return found[len(ids):]


def test_it_continues_and_answers(tiny, typed, monkeypatch):
    pytest.importorskip("jinja2", reason="LAB_EXTRAS=chat")
    folder, model, params = tiny
    contexts, whole = [], generate.sample_texts
    monkeypatch.setattr(generate, "sample_texts", lambda compute, context, *rest, **named:
                        contexts.append(context) or whole(compute, context, *rest, **named))
    own = tokenizer_of(str(folder), model)
    status, out, err = typed(folder, "--prompt", "the quick", "--greedy", "--new-tokens", "8")
    expected = greedy(model, params, own.encode("the quick").tolist(), 8, own.size)
    assert status == 0 and out == "the quick" + own.decode(expected) + "\n" and own.eot not in expected
    assert "ead 0.0 M parameters in" in err and "peak host memory" in err
    status, out, _ = typed(folder, "--prompt", "hi", "--chat", "--system", "~", "--greedy", "--new-tokens", "8")
    prompt = "<|im_start|>system\n~<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    answer = greedy(model, params, own.encode_prompt(prompt).tolist(), 8, own.size)
    answer = answer[: answer.index(own.eot)] if own.eot in answer else answer
    assert status == 0 and out == own.decode(answer) + "\n"
    text = greedy(model, params, own.encode(prompt).tolist(), 8, own.size)  # negative control: tags as plain text
    assert text[: len(answer)] != answer
    assert all(context < 300 for context in contexts) and len(contexts) == 2


def test_bad_input_is_a_sentence(tiny, typed, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tiny[0]
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copy / name).symlink_to(folder / name)
    mistakes = [((tmp_path / "x.gguf",), "There is no .*x.gguf"), (("hf:no/where",), "neither in the cache"),
                (("package:no_such_thing/x",), "not installed"), ((copy,), "has no tokenizer.json"),
                ((tmp_path / "run", "--chat"), "--chat needs pretrained weights"), ((folder, "--best"), "run folders"),
                ((folder, "--system", "x"), "--system needs --chat")]
    for words, said in mistakes:
        status, out, err = typed(*words)
        assert status == 2 and not out and "Traceback" not in err
        assert re.search(said, err), err
    (copy / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    assert "has no chat template" in typed(copy, "--chat")[2]
    large = json.loads((folder / "tokenizer.json").read_text())
    large["added_tokens"] += [dict(large["added_tokens"][0], id=420 + i, content=f"<{i}>") for i in range(500)]
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").write_text(json.dumps(large))
    status, out, err = typed(copy, "--prompt", "x")
    assert status == 2 and "tokens and the model" in err and "do not belong together" in err


def test_several_texts_of_a_prompt_and_their_report(tiny, typed, tmp_path, monkeypatch):
    folder, *_ = tiny
    monkeypatch.chdir(tmp_path)
    how = (folder, "--prompt", "one two", "--new-tokens", "6", "--temperature", "2")
    status, out, _ = typed(*how, "--n", "3", "--seed", "4")
    assert status == 0
    alone = [typed(*how, "--seed", seed)[1] for seed in (4, 5, 6)]
    assert out == "".join(f"{text}---\n" for text in alone) and len(set(alone)) > 1
    status, out, _ = typed(*how, "--n", "3", "--seed", "4", "--report")
    assert status == 0 and "distinct_1" in out and "one two" not in out
    written = json.loads((tmp_path / f"samples-{folder.name}.json").read_text())
    assert [f"{row['prompt']}{row['text']}\n" for row in written["samples"]] == alone
    assert [row["seed"] for row in written["samples"]] == [4, 5, 6]
    assert written["statistics"]["texts"] == 3 and written["settings"]["temperature"] == 2
    assert typed(*how, "--report", "--output", tmp_path / "mine.json")[0] == 0 and (tmp_path / "mine.json").is_file()
    for words, message in ((("--n", "0"), "--n 0 is out of range"), (("--output", "x"), "--output needs --report"),
                           (("--judge", "x"), "--judge needs --report"),
                           (("--report", "--judge", "nowhere"), "nowhere is not a run folder")):
        assert message in typed(*how, *words)[2]


def test_the_likeliest_of_several_texts(tiny, typed):
    """Beside a forward pass of each text without padding."""
    folder, model, params = tiny
    fitted = tokenizer_of(str(folder), model)
    how = (folder, "--prompt", "one two", "one two", "--new-tokens", "5", "--temperature", "2", "--json")
    drawn = [json.loads(line) for line in typed(*how, "--n", "4")[1].splitlines()]
    assert [row["seed"] for row in drawn] == [0, 1, 2, 3] * 2
    means = {}
    for row in drawn[:4]:
        before, ids = (fitted.encode(text) for text in (row["prompt"], row["prompt"] + row["text"]))
        logits = model.apply({"params": params}, jnp.asarray(ids[None, :-1]), train=False)[0]
        log = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]
        means[row["seed"]] = log[len(before) - 1:].mean()
    best = sorted(means, key=means.get, reverse=True)[:2]
    found = [json.loads(line) for line in typed(*how, "--n", "2", "--best-of", "4")[1].splitlines()]
    assert [row["seed"] for row in found] == best * 2
    assert [row["log_prob"] for row in found[:2]] == pytest.approx([means[i] for i in best], rel=1e-5)
    assert [row["text"] for row in found[:2]] == [drawn[i]["text"] for i in best]
    for words, message in ((("--n", "3", "--best-of", "2"), "--best-of 2 must be at least --n 3"),
                           (("--report",), "--json does not go with --report")):
        status, _, err = typed(*how, *words)
        assert status == 2 and message in err


def test_a_judge_gives_the_perplexity_of_the_texts(tiny, typed, tmp_path):
    """Beside a forward pass of each text without padding."""
    folder, model, params = tiny
    fitted = tokenizer_of(str(folder), model)
    status, out, _ = typed(folder, "--prompt", "one two", "three", "--n", "2", "--new-tokens", "5", "--report",
                           "--judge", folder, "--output", tmp_path / "report.json")
    assert status == 0 and "judge_perplexity" in out
    written = json.loads((tmp_path / "report.json").read_text())
    own, whole = [], []
    for row in written["samples"]:
        before = fitted.encode(row["prompt"])
        ids = np.concatenate([before, fitted.encode(row["text"])])
        logits = model.apply({"params": params}, jnp.asarray(ids[None, :-1]), train=False)[0]
        losses = -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]
        own, whole = [*own, *losses[len(before) - 1:]], [*whole, *losses]
    found = written["statistics"]["judge_perplexity"]
    assert found == pytest.approx(np.exp(np.mean(own)), rel=1e-5)
    assert found != pytest.approx(np.exp(np.mean(whole)), rel=1e-3)  # negative control: with the prompts


def test_a_judge_that_marks_the_beginning_does_not_within_a_text(tiny, tmp_path):
    folder, *_ = tiny
    marking = shutil.copytree(folder, tmp_path / "marking")
    tokenizer = byte_level()
    tokenizer.post_processor = TemplateProcessing(single=f"{EOT} $A", special_tokens=[
        (EOT, tokenizer.token_to_id(EOT))])
    tokenizer.save(str(marking / "tokenizer.json"))
    # The mark stands for the beginning, as the end-of-text token does for the other judge where there is no prompt.
    samples = [{"prompt": "", "text": text} for text in ("three", "one two")]
    found, expected = (_judged(judge, samples) for judge in (marking, folder))
    assert found == pytest.approx(expected, rel=1e-6)
    begun = [{"prompt": EOT, "text": "three"}]
    assert _judged(marking, begun) != pytest.approx(_judged(folder, begun), rel=1e-3)


def test_the_texts_outlive_a_mistake_about_the_judge(tiny, typed, tmp_path):
    folder, *_ = tiny
    status, _, err = typed(folder, "--report", "--new-tokens", "3", "--judge", "nowhere",
                           "--output", tmp_path / "new" / "x.json")
    assert status == 2 and "nowhere is not a run folder" in err
    assert len(json.loads((tmp_path / "new" / "x.json").read_text())["samples"]) == 1
