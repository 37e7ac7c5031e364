"""Models of ours as .gguf files: read back by ourselves and, with LAB_TRANSFORMERS=1, compared with transformers."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from lab.data.tokenizers import BPE
from lab.errors import UserError
from lab.models.attention import RopeScaling
from lab.models.gpt import GPT
from lab.weights import find, read
from lab.weights.gguf_write import check, vocabulary, write_gguf
from lab.weights.read import parameter_shapes
from tests.test_cli import WORDS

pytest.importorskip("gguf", reason="LAB_EXTRAS=gguf")
SIZE = 300
LLAMA = GPT(depth=2, width=48, heads=4, kv_heads=2, hidden_multiple=2.0, vocab=SIZE, context=24, position="rotary",
            norm="rmsnorm", mlp="swiglu", bias=False, tied=False, head_width=16)
EXPERIMENT = '''from lab.data.text.sources import TextFiles
from lab.data.text.text import Text
from lab.data.tokenizers import BPE
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.gpt import GPT
from lab.optim import SGD
from lab.tasks.language import LanguageModel

experiment = Experiment(
    Text(TextFiles("corpus.txt"), BPE(280), length=16),
    GPT(depth=1, width=32, heads=2, vocab=288, context=32, position="rotary", norm="rmsnorm", mlp="swiglu", bias=False),
    LanguageModel(samples=0), SGD(lr=0.1), steps=1, batch=8,
    evaluate=Evaluate(every=0, records=8), checkpoint=Checkpoint(every=0))
'''


@pytest.fixture(scope="module")
def tokenizer() -> str:
    return BPE(280).fit(lambda split: iter([WORDS * 20]), 2000).state


@pytest.fixture
def place(tmp_path) -> Path:
    (tmp_path / "corpus.txt").write_text(WORDS * 200)
    (tmp_path / "llama.py").write_text(EXPERIMENT)
    return tmp_path


QWEN = LLAMA.clone(head_width=None, tied=True)


@pytest.mark.parametrize("kind, model", [("F32", LLAMA), ("F16", LLAMA), ("Q8_0", LLAMA),
                                         ("F16", QWEN.clone(qkv_bias=True)), ("F16", QWEN.clone(qk_norm=True))],
                         ids=["F32", "F16", "Q8_0", "qwen2", "qwen3"])
def test_what_is_written_reads_back(kind, model, tokenizer, tmp_path):
    rng = np.random.default_rng(0)
    params = {path: rng.normal(size=shape).astype(np.float32) for path, shape in parameter_shapes(model).items()}
    write_gguf(model, params, tmp_path / "x.gguf", kind, tokenizer, {"eos_token_id": 0}, "a name")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]
    found = find(str(tmp_path / "x.gguf"))
    assert found.model == model.clone(qkv_bias=bool(model.qkv_bias), out_bias=False, mlp_bias=False)
    back = found.arrays()
    assert back.keys() == params.keys()
    for path, x in params.items():
        half = x if x.ndim == 1 or kind == "F32" else x.astype(np.float16).astype(np.float32)
        if kind != "Q8_0" or x.ndim == 1 or not path.endswith(("ffn/down/kernel", "attn/out/kernel")):
            same = np.array_equal(back[path], half)  # the rows of most have 48 values, which 32 does not divide
            assert same, path
        else:  # 96 or 64 inputs: 8 bits of the largest of 32
            error = np.abs(back[path] - x).max()
            assert 0.001 < error <= np.abs(x).max() / 127 * 0.51, path


def test_the_vocabulary(tokenizer, tmp_path):
    words = vocabulary(tokenizer, SIZE)
    assert words.tokens[0] == "<|endoftext|>" and words.types[0] == 3 and words.pre == "gpt-2"
    assert len(words.merges) == 280 - 257 and words.tokens[280:282] == ["[PAD280]", "[PAD281]"]
    assert words.types[280:] == [5] * 20 and all("".join(pair.split(" ")) in words.tokens for pair in words.merges)
    other = json.loads(tokenizer)
    other["pre_tokenizer"] = {"type": "Whitespace"}
    with pytest.raises(UserError, match="as GPT-2 or SmolLM2, not with BPE and Whitespace"):
        vocabulary(json.dumps(other), SIZE)


def test_models_of_another_shape_are_a_sentence():
    for model in (GPT(vocab=SIZE), LLAMA.clone(rope_scaling=RopeScaling())):
        with pytest.raises(UserError, match="is for a GPT of the shape of Llama"):
            check(model)
    with pytest.raises(UserError, match="No class of transformers"):
        check(LLAMA.clone(softcap=3.0))


def test_a_run_is_exported(typed, mistake, place):
    assert typed("llama.py", "--run-dir", "run")[0] == 0
    status, out, _ = typed("export", "run", "--to", "new/run.gguf", "--type", "F32")
    assert status == 0 and "F32" in out
    model, params, _ = read("new/run.gguf")
    from lab.api import open_run

    there = open_run("run").params
    assert np.array_equal(params["params"]["block_0"]["attn"]["query"]["kernel"],
                          there["block_0"]["attn"]["query"]["kernel"]) and model.context == 32
    assert "new/run.gguf is there already" in mistake("export", "run", "--to", "new/run.gguf")
    assert "--type F16 is for a .gguf file, such as --to out.gguf" in mistake("export", "run", "--to", "out",
                                                                              "--type", "F16")
    if "LAB_TRANSFORMERS" in os.environ:
        for kind in ("F16", "Q8_0"):
            assert typed("export", "run", "--to", f"{kind}.gguf", "--type", kind)[0] == 0
            status, out, _ = typed("parity", f"{kind}.gguf")
            assert status == 0 and "real text" in out and "key/value cache" in out
        from transformers import AutoTokenizer

        ours, theirs = open_run("run").data, AutoTokenizer.from_pretrained(".", gguf_file="F16.gguf")
        for text in (WORDS, "Ein Ärger: 1234 + 5 = 1239,\n\n  don't!", "日本語"):
            assert theirs(text)["input_ids"] == list(ours.encode(text))
