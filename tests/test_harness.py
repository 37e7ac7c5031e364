"""lab/harness: answers do not depend on the batch, lm-eval's requests, its tasks on data of this machine, mistakes."""

import gzip
import io
import json
import lzma
import math
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from lab.data.tokenizers import Bytes
from lab.errors import UserError
from lab.harness import tasks as tasks_file
from lab.harness.generation import continue_greedily
from lab.harness.local_data import read_local
from lab.harness.perplexity import exp, perplexity, windows
from lab.harness.scoring import Language, padded_length, score, together
from lab.harness.value import text_of
from lab.models.bert import BERT
from lab.models.gpt import GPT
from lab.weights.read import parameter_shapes
from lab.weights.write import write
from tests.launching import free_port
from tests.test_cli import furnished
from tests.test_hugging_face_tokenizer import EOT, byte_level

PAIRS = [("the quick brown fox jumps", "the quick brown foxes jump"), ("she sees herself", "she sees himself"),
         ("no cat has ever slept", "a cat has ever slept"), ("who has he seen that left", "that left who has he seen")]


def random_params(model: GPT, scale: float = 0.3) -> dict:
    draw = np.random.default_rng(0)
    shapes = parameter_shapes(model)
    return {path: draw.normal(0, scale, shape).astype(np.float32) for path, shape in shapes.items()}


@pytest.fixture(scope="module")
def language() -> Language:
    """A random model of real shape, but small, that sees 256 bytes."""
    model = GPT(depth=2, width=64, heads=4, kv_heads=2, vocab=260, context=256, position="rotary", norm="rmsnorm",
                mlp="swiglu", bias=False)
    fitted = Bytes().fit(None, 0)
    return Language(model, {"params": unflatten_dict(random_params(model), sep="/")}, fitted)


def rows_of(lengths: list[int]) -> list[list[int]]:
    draw = np.random.default_rng(1)
    return [draw.integers(0, 256, n).tolist() for n in lengths]


ROWS = rows_of([5, 18, 90, 257, 2, 97, 8, 200, 17, 16, 25, 24, 23, 85])  # padded to 8, 16, 24, 96 and 256


def on(language: Language, devices: int, batch: int | None = None) -> Language:
    """The same model on the first devices."""
    found = Language(language.model, language.variables, language.text, batch)
    vars(found)["mesh"] = Mesh(np.array(jax.local_devices()[:devices]), ("rows",))
    return found


def bits(found: list[tuple[np.ndarray, np.ndarray]]) -> list[bytes]:
    return [logs.tobytes() + greedy.tobytes() for logs, greedy in found]


def test_an_answer_depends_on_its_text_alone(language):
    """Bit for bit in float32 (lm-evaluation-harness#3055)."""
    expected = bits(score(on(language, 1), ROWS))
    for other in (on(language, 1, batch=200), on(language, 2), on(language, 2, batch=300)):
        assert bits(score(other, ROWS)) == expected
    order = np.random.default_rng(2).permutation(len(ROWS))
    assert bits(score(on(language, 1), [ROWS[i] for i in order])) == [expected[i] for i in order]
    for i, row in enumerate(ROWS[:6]):  # each length that there is
        alone, = bits(score(on(language, 1), [row]))
        crowd = bits(score(on(language, 1), [*rows_of([len(row)] * 7), row, *rows_of([3, 4, 5])]))[7]
        assert alone == crowd == expected[i], (i, len(row))


def test_a_naive_batch_changes_the_bits(language):
    """Negative control: rows padded to the longest of their batch, as batches are usually made."""
    apply = jax.jit(lambda x: jax.nn.log_softmax(language.model.apply(language.variables, x, train=False)))

    def naive(rows: list[list[int]]) -> np.ndarray:
        tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for one, row in zip(tokens, rows, strict=True):
            one[: len(row)] = row
        return np.asarray(apply(tokens))[0, : len(rows[0])]

    row, rest = ROWS[0], ROWS[1:]
    whole, alone = naive([row, *rest]), naive([row])
    np.testing.assert_allclose(whole, alone, atol=1e-4)
    assert whole.tobytes() != alone.tobytes()
    logs = score(language, [row])[0][0]
    np.testing.assert_allclose(logs, alone[np.arange(4), row[1:]], atol=1e-4)


def test_shapes_are_few_and_follow_from_the_length(language):
    lengths = {padded_length(n, 1000) for n in range(1, 1001)}
    assert sorted(lengths) == [8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000]
    assert all(padded_length(n, 1000) >= n for n in range(1, 1001))
    sizes = [together(language, length) for length in sorted(lengths)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 64 and sizes[-1] == 1


@pytest.mark.parametrize(("stats", "memory"), [({"bytes_limit": 64 << 30}, 8 << 30), (None, 4 << 30)])
def test_rows_follow_from_the_memory_of_a_gpu(language, stats, memory):
    def of(width: int) -> Language:
        found = Language(language.model.clone(vocab=2**17, width=width), None, None)
        device = SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
        vars(found)["mesh"] = SimpleNamespace(devices=np.array([device]), local_devices=[device])
        return found

    rows, one = together(of(4096), 512), 4 * 512 * (3 * 2**17 + 16 * 4096 + 2 * 4 * 512)
    assert of(4096).memory == memory and rows * one <= memory < 2 * rows * one
    assert together(of(2**17), 512) < rows and language.memory <= 512 << 20


TWO = """
import pickle, sys
from lab.parallel import processes
group = processes.start()
import jax
from lab.data.tokenizers import Bytes
from lab.harness.generation import continue_greedily
from lab.harness.scoring import Language, score
model, variables, rows = pickle.load(open(sys.argv[1], "rb"))
language = Language(model, variables, Bytes().fit(None, 0))
assert language.mesh.size == 2 and len(jax.local_devices()) == 1
texts = continue_greedily(language, rows[:2], 20, lambda ids: False)
pickle.dump((score(language, rows), texts), open(sys.argv[2] + str(jax.process_index()), "wb"))
group.close()
"""


def test_processes_share_the_rows(language, tmp_path):
    """Two processes with a device each: both get all answers, with the bits of one device."""
    given, out = tmp_path / "given", tmp_path / "out"
    given.write_bytes(pickle.dumps((language.model, language.variables, ROWS[:2])))
    env = os.environ | {"LAB_COORDINATOR": f"127.0.0.1:{free_port()}", "LAB_PROCESSES": "2", "JAX_PLATFORMS": "cpu",
                        "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    both = [subprocess.Popen([sys.executable, "-c", TWO, str(given), str(out)], env=env | {"LAB_PROCESS_ID": str(k)})
            for k in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    alone = on(language, 1)
    for k in range(2):
        scores, texts = pickle.loads((tmp_path / f"out{k}").read_bytes())
        assert bits(scores) == bits(score(alone, ROWS[:2]))
        assert texts == continue_greedily(alone, ROWS[:2], 20, lambda ids: False)


def greedy(language: Language, apply: Callable, ids: list[int], new: int) -> list[int]:
    """Without a cache."""
    found = list(ids)
    for _ in range(new):
        logits = apply(jnp.asarray([found + [0] * (256 - len(found))]))[0, len(found) - 1, : language.text.size]
        found.append(int(logits.argmax()))
    return found[len(ids):]


def test_greedy_texts_depend_on_their_prompt_alone(language):
    prompts = rows_of([3, 15, 250, 240, 7])
    never = lambda ids: False
    apply = jax.jit(lambda x: language.model.apply(language.variables, x, train=False))
    expected = [greedy(language, apply, ids[-(256 - 20):], 20) for ids in prompts]
    assert continue_greedily(on(language, 1), prompts, 20, never) == expected
    assert continue_greedily(on(language, 2), prompts[::-1], 20, never) == expected[::-1]
    stopped = continue_greedily(on(language, 1), prompts[:2], 20, lambda ids: expected[0][3] in ids)
    assert len(stopped[0]) == 16 and stopped[0] == expected[0][:16]  # whole calls; the text is cut by the caller


# ------------------------------------------------------------------------------------------------------ perplexity


def recipe(language: Language, ids: list[int], context: int, stride: int) -> tuple[float, float, int]:
    """(mean negative log-likelihood, transformers' average of means, tokens), window by window, as its page says."""
    apply = jax.jit(lambda x: jax.nn.log_softmax(language.model.apply(language.variables, x, train=False)))
    before, nlls, weighted, weights = 0, [], 0.0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        labels = np.array(ids[begin:end])
        labels[: len(labels) - (end - before)] = -100
        logs, valid = np.asarray(apply(jnp.asarray([ids[begin:end]])))[0], int((labels != -100).sum())
        own = [-logs[i, label] for i, label in enumerate(labels[1:]) if label != -100]
        nlls += own
        weighted, weights = weighted + np.mean(own) * (valid - 1), weights + valid - 1
        before = end
        if end == len(ids):
            break
    return float(np.mean(nlls)), weighted / weights, len(nlls)


@pytest.mark.parametrize(("context", "stride"), [(64, 16), (64, 64), (100, 30), (256, 256)])
def test_perplexity_is_that_of_the_recipe(language, context, stride):
    ids = rows_of([301])[0]
    found = perplexity(language, ids, 301, context, stride)
    mean, averaged, tokens = recipe(language, ids, context, stride)
    assert found["tokens"] == tokens and found["bytes"] == tokens  # a byte a token
    assert found["loss"] == pytest.approx(mean, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["perplexity_recipe"] == pytest.approx(math.exp(averaged), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(mean / math.log(2), rel=1e-5)
    assert stride < context or found["perplexity"] == found["perplexity_recipe"]


def test_bytes_are_those_of_the_scored_tokens(language):
    for tokens in (16, 17):  # the last window of 17 has one token, of which nothing is scored
        found = perplexity(language, rows_of([tokens])[0], tokens, 8, 8)
        assert found["bytes"] == found["tokens"] == 14
    assert exp(710) == math.inf and exp(1) == math.e and math.isnan(exp(math.nan))


def test_perplexity_is_that_of_transformers(place):
    """Live, where transformers is installed: its page's loop on the same files."""
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from lab.weights import read

    theirs = hf.AutoModelForCausalLM.from_pretrained(place / "llama", dtype=torch.float32)
    model, variables, fitted = read(str(place / "llama"))
    text = "the quick brown fox jumps over a lazy dog, " * 20
    ids = torch.tensor(fitted.encode(text).tolist())[None]
    before, total, tokens = 0, 0.0, 0
    for begin in range(0, ids.shape[1], 32):
        end = min(begin + 64, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = theirs(ids[:, begin:end], labels=labels).loss
        weight = int((labels != -100).sum()) - 1
        total, tokens, before = total + float(loss) * weight, tokens + weight, end
        if end == ids.shape[1]:
            break
    found = perplexity(Language(model, variables, fitted), ids[0].numpy(), len(text), 64, 32)
    assert found["perplexity_recipe"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert found["perplexity"] != pytest.approx(found["perplexity_recipe"], rel=1e-5)  # negative control


def test_windows_score_each_position_once():
    assert windows(10, 4, 2) == [(0, 4, 0), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    assert windows(3, 8, 4) == [(0, 3, 0)] and windows(9, 4, 4) == [(0, 4, 0), (4, 8, 4)]  # one token alone is none


# ------------------------------------------------------------------------------------------------------ local data


def test_data_is_found_in_the_usual_layouts(tmp_path):
    row = lambda i: json.dumps({"n": i})
    (tmp_path / "sets").mkdir()
    with tarfile.open(tmp_path / "sets" / "all.tar.xz", "w:xz") as archive:
        for name in ("one", "two"):
            content = f"{row(name)}\n".encode()
            member = tarfile.TarInfo(f"data/{name}.jsonl")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert read_local(tmp_path, "org/sets", "two") == {"": [{"n": "two"}]}
    assert read_local(tmp_path / "sets", "org/sets", "one") == {"": [{"n": "one"}]}
    assert read_local(tmp_path, "org/sets", "three") is None and read_local(tmp_path, "org/other", None) is None
    math_ = tmp_path / "math"
    math_.mkdir()
    (math_ / "test.jsonl.xz").write_bytes(lzma.compress(f"{row(1)}\n\n{row(2)}".encode()))
    (math_ / "train.json").write_text(json.dumps([{"n": 3}]))
    (math_ / "dev-00000-of-00001.csv.gz").write_bytes(gzip.compress(b"n,m\n4,x\n"))
    (math_ / "README.md").write_text("no data")
    assert read_local(tmp_path, "math", "main") == {"test": [{"n": 1}, {"n": 2}], "train": [{"n": 3}],
                                                    "validation": [{"n": "4", "m": "x"}],
                                                    "dev": [{"n": "4", "m": "x"}]}
    (math_ / "other").mkdir()
    (math_ / "other" / "test.jsonl").write_text(row(6))
    assert read_local(tmp_path, "math", "main")["test"] == [{"n": 1}, {"n": 2}]  # nothing of another configuration
    assert read_local(tmp_path, "math", "other") == {"test": [{"n": 6}]}
    (math_ / "other" / "validation.jsonl").write_text(row(7))
    (math_ / "other" / "dev.jsonl").write_text(row(8))
    found = read_local(tmp_path, "math", "other")
    assert found["validation"] == [{"n": 7}] and found["dev"] == [{"n": 8}]  # as MMLU has them
    (math_ / "main").mkdir()
    (math_ / "main" / "test.jsonl").write_text(row(5))
    assert read_local(tmp_path, "math", "main") == {"test": [{"n": 5}]}
    (math_ / "main" / "test.jsonl").write_text("{")
    with pytest.raises(UserError, match="test.jsonl is damaged"):
        read_local(tmp_path, "math", "main")
    (math_ / "main" / "test.jsonl").rename(math_ / "main" / "test.txt")
    with pytest.raises(UserError, match="is none of .jsonl"):
        read_local(tmp_path, "math", "main")


# ---------------------------------------------------------------------------------------------- lm-eval, commands


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """small.py; a random Llama and a BERT with tokenizers; data of BLiMP, GSM8K and WikiText of a few rows."""
    folder = furnished(tmp_path_factory.mktemp("harness"))
    tokenizer = byte_level()
    sizes = {"depth": 1, "width": 32, "heads": 4, "vocab": tokenizer.get_vocab_size()}
    models = {"llama": GPT(context=512, position="rotary", norm="rmsnorm", mlp="swiglu", bias=False, **sizes),
              "bert": BERT(norm_place="post", norm_epsilon=1e-12, mlp="gelu_exact", context=64, **sizes)}
    for name, model in models.items():
        write(model, random_params(model), folder / name)
        tokenizer.save(str(folder / name / "tokenizer.json"))
        (folder / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOT}))
    lines = {"blimp/causative.jsonl": [{"sentence_good": a, "sentence_bad": b} for a, b in PAIRS],
             "gsm8k/test.jsonl": [{"question": f"{i} + {i}?", "answer": f"so\n#### {2 * i}"} for i in range(3)],
             "gsm8k/train.jsonl": [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(6)],
             "wikitext_document_level/test.jsonl": [{"page": f"{a} , and {b} " * 9} for a, b in PAIRS[:2]],
             "arc_easy/x.jsonl": []}
    for name, rows in lines.items():
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data" / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "text.txt").write_text("the quick brown fox " * 40)
    return folder


def direct(folder: Path, context: list[int], ids: list[int]) -> float:
    """The log-likelihood of ids after a context, by the model alone."""
    from lab.weights import read

    model, variables, _ = read(str(folder))
    logs = jax.nn.log_softmax(model.apply(variables, jnp.asarray([context + ids]), train=False))[0]
    return float(sum(logs[len(context) + i - 1, token] for i, token in enumerate(ids)))


@pytest.fixture
def one_device(monkeypatch):
    """Eight fake devices of two cores only compute more empty rows."""
    devices = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.usefixtures("one_device")
def test_tasks_of_lm_eval(typed, place):
    pytest.importorskip("lm_eval", reason="LAB_EXTRAS=lm-eval")
    status, out, err = typed("evaluate", "llama", "--tasks", "blimp_causative,gsm8k,wikitext", "--data", "data",
                             "--limit", "3", "--batch", "2")
    assert status == 0, err
    folder = place / "evaluation-llama"
    result = json.loads((folder / "results-blimp_causative+gsm8k+wikitext.json").read_text())
    items = [json.loads(line) for line in (folder / "samples_blimp_causative.jsonl").read_text().splitlines()]
    assert len(items) == 3 and result["results"]["blimp_causative"]["acc,none"] == np.mean([i["acc"] for i in items])
    assert result["results"]["blimp_causative"]["acc_stderr,none"] >= 0 and "blimp_causative.acc_stderr" in out
    encode = lambda text: byte_level().encode(text).ids
    eot = encode(EOT)
    for item, pair in zip(items, PAIRS, strict=False):
        for (value, _), sentence in zip(item["filtered_resps"], pair, strict=True):
            # An empty context is the end-of-text token; lm-eval puts a space between context and choice.
            assert value == pytest.approx(direct(place / "llama", eot, encode(f" {sentence}")), abs=1e-3)
        assert item["acc"] == float(item["filtered_resps"][0][0] > item["filtered_resps"][1][0])
    lines = (folder / "samples_gsm8k.jsonl").read_text().splitlines()
    assert {json.loads(line)["filter"] for line in lines} == {"strict-match", "flexible-extract"}
    assert "gsm8k.exact_match,strict-match" in out and "wikitext.bits_per_byte" in out
    assert set(tasks_file.metric_names(["blimp_causative", "gsm8k", "wikitext"])) <= {
        line.split()[0] for line in out.splitlines()}


@pytest.mark.usefixtures("one_device")
def test_a_run_is_evaluated_into_its_folder(typed, place):
    status, _, err = typed("small.py", "--run-dir", "run", "--steps", "4")
    assert status == 0, err
    status, out, err = typed("evaluate", "run", "--text", "text.txt", "--stride", "8")
    assert status == 0, err
    row = json.loads((place / "run" / "evaluations" / "step-4" / "text-text.json").read_text())
    assert row["context"] == 16 and row["tokens"] == 799 == row["bytes"] and f"{row['perplexity']:.6f}" in out
    pytest.importorskip("lm_eval", reason="LAB_EXTRAS=lm-eval")
    status, out, err = typed("evaluate", "run", "--tasks", "blimp_causative", "--data", "data")
    assert status == 0, err
    assert (place / "run" / "evaluations" / "step-4" / "samples_blimp_causative.jsonl").read_text().count("\n") == 4
    assert "asks for 256 new tokens, and the model's context has 16" in typed(
        "evaluate", "run", "--tasks", "gsm8k", "--data", "data")[2]


def test_mistakes(mistake, typed, place, monkeypatch):
    def late(*words: str) -> str:
        """After the weights were read."""
        status, out, err = typed(*words)
        assert status == 2 and "Traceback" not in out + err
        return err

    text = ("evaluate", "llama", "--text", "text.txt")
    assert "--tasks and --text exclude each other" in mistake(*text, "--tasks", "blimp")
    assert "--experiment does not go with --text" in mistake(*text, "--experiment", "small.py")
    assert "--records does not go with --text" in mistake(*text, "--records", "3")
    assert "--limit needs --tasks." in mistake(*text, "--limit", "3")
    assert "--stride needs --tasks or --text" in mistake("evaluate", "llama", "--stride", "3")
    assert "--batch must be at least 1, not 0" in mistake(*text, "--batch", "0")
    assert "--stride 65 is not between 1 and the window's 64" in late(*text, "--context", "64", "--stride", "65")
    assert "--context 513 is not between 2 and the model's context of 512" in late(*text, "--context", "513")
    assert "--step, --best and --experiment are for run folders" in mistake(*text, "--best")
    assert "absent.txt cannot be read" in mistake("evaluate", "llama", "--text", "absent.txt")
    assert "bert is a BERT, which continues no text" in mistake("evaluate", "bert", "--text", "text.txt")
    with pytest.raises(UserError, match="A BERT continues no text"):  # of a run
        text_of(BERT(), SimpleNamespace(fitted=Bytes().fit(None, 0)))
    (place / "short.txt").write_text("a")
    assert "has 1 tokens: nothing can be predicted" in late("evaluate", "llama", "--text", "short.txt")
    tasks = ("evaluate", "llama", "--data", "data", "--tasks")
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert "LAB_EXTRAS=lm-eval ./launch.sh" in mistake(*tasks, "blimp")


def test_mistakes_with_tasks(mistake, place, monkeypatch):
    pytest.importorskip("lm_eval", reason="LAB_EXTRAS=lm-eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tasks = ("evaluate", "llama", "--data", "data", "--tasks")
    assert "no task 'blimp_causativ'. Perhaps you meant blimp_causative." in mistake(*tasks, "blimp_causativ")
    assert "--limit must be at least 1, not 0" in mistake(*tasks, "blimp", "--limit", "0")
    assert "--stride needs --text" in mistake(*tasks, "blimp", "--stride", "3")
    assert "--tasks needs names" in mistake(*tasks, " , ")
    assert "--experiment does not go with --tasks" in mistake(*tasks, "blimp", "--experiment", "small.py")
    assert "--data nowhere is no folder" in mistake("evaluate", "llama", "--data", "nowhere", "--tasks", "blimp")
    assert "download the data set Rowan/hellaswag from huggingface.co" in mistake(*tasks, "hellaswag")
    assert "blimp_adjunct_island is not in --data data and cannot be downloaded" in mistake(*tasks, "blimp")
    assert "bert is a BERT, which continues no text" in mistake("evaluate", "bert", *tasks[2:], "gsm8k")
    (place / "data" / "gsm8k" / "train.jsonl").rename(place / "train.jsonl")
    try:
        whole = place / "data" / "gsm8k" / "main.jsonl"  # of which the five examples would be the questions
        whole.write_bytes((place / "train.jsonl").read_bytes())
        assert "takes its examples from the split train, and --data has one file" in mistake(*tasks, "gsm8k")
        whole.unlink()
        assert "needs the split train; --data has test of openai/gsm8k" in mistake(*tasks, "gsm8k")
    finally:
        (place / "train.jsonl").rename(place / "data" / "gsm8k" / "train.jsonl")


def test_requests_of_lm_eval(language):
    """A long context loses its beginning; a rolling text is scored once per token; a stop text is left out."""
    pytest.importorskip("lm_eval", reason="LAB_EXTRAS=lm-eval")
    from lab.harness.adapter import HarnessModel

    lm = HarnessModel(language)
    ask = lambda *args: SimpleNamespace(args=args)
    long, short = "x" * 300, "abcd"
    (value, greedy_), = lm.loglikelihood([ask(long, short)])
    rows = score(language, [list((long + short).encode())[-257:]])[0]
    assert value == float(rows[0][-4:].sum(dtype=np.float64)) and greedy_ == bool(rows[1][-4:].all())
    text = "".join(chr(97 + i % 26) for i in range(600))
    prefix, ids = lm.prefix_token_id, list(text.encode())
    assert prefix == ord("\n")
    first, second = ([prefix, *ids[:256]], ids[255:512]), ids[343:600]
    expected = [score(language, [row])[0][0] for row in (first[0], first[1], second)]
    total = sum(float(logs[-n:].sum(dtype=np.float64)) for logs, n in zip(expected, (256, 256, 88), strict=True))
    assert lm.loglikelihood_rolling([ask(text)]) == [pytest.approx(total, abs=1e-9)]
    whole, = lm.generate_until([ask("hello", {"until": [], "max_gen_toks": 20})])
    stop = whole[5:8]
    cut, = lm.generate_until([ask("hello", {"until": [stop], "max_gen_toks": 20})])
    assert stop and cut == whole.split(stop)[0]
    with pytest.raises(UserError, match="sampled"):
        lm.generate_until([ask("hello", {"do_sample": True, "temperature": 0.7})])
