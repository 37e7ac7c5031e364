"""The command line: processes that are killed and told to stop, what is printed, and a sentence for every mistake.

LAB_KILLS=20 kills twenty times instead of three, and sends as many signals.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lab.commands.arguments import experiments
from lab.signals import EXIT, HEARD
from lab.train.checkpoint import Checkpoints
from lab.train.experiment_file import load
from lab.train.program import Program
from tests.conftest import ROOT
from tests.launching import children_hear
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

KILLS = int(os.environ.get("LAB_KILLS", 3))
EXPERIMENT = '''"""A small language model for the tests of the command line.

The second paragraph.
"""

from dataclasses import replace

from lab.data.text.sources import TextFiles
from lab.data.text.text import Text
from lab.data.tokenizers import Bytes
from lab.experiment import Checkpoint, Evaluate, Experiment, Mesh
from lab.models.gpt import GPT
from lab.optim import AdamW, Cosine
from lab.tasks.language import LanguageModel

experiment = Experiment(
    data=Text(TextFiles({corpus!r}), Bytes(), length=16),
    model=GPT(depth=1, width=16, heads=2, vocab=256, context=16, bias=False),  # Adam makes noise of a key's bias
    task=LanguageModel(samples=1),
    optim=AdamW(lr=Cosine(1e-2, warmup=2, end=0.1)),
    steps=20, batch=8, evaluate=Evaluate(every=10, records=16), checkpoint=Checkpoint(every=2),
)
'''
ROWS = 20 + 3  # in metrics.jsonl of a whole run
WORDS = "the pure function of a seed and a step decides everything that the run computes "


# -------------------------------------------------------------------------------------------------- processes


def furnished(folder: Path) -> Path:
    """The folder, with small.py and its text in it."""
    (folder / "corpus.txt").write_text("".join(WORDS[(i * 7) % 40:] for i in range(600))[:30_000])
    (folder / "small.py").write_text(EXPERIMENT.format(corpus=str(folder / "corpus.txt")))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with small.py and its text."""
    return furnished(tmp_path_factory.mktemp("cli"))


def start(place: Path, *args: str, devices: int = 1) -> subprocess.Popen:
    """`python -m lab args` in `place`, piped, with compiled programs kept for the next one. Signals are held back until
    it hears them, as the launcher does, and none is ignored, whatever these tests were started by."""
    env = os.environ | {
        "PYTHONPATH": str(ROOT), "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(place / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    with children_hear(held=True):
        return subprocess.Popen([sys.executable, "-m", "lab", *args], cwd=place, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def wait_for(process: subprocess.Popen, condition) -> bool:
    """Until the condition holds; False when the process ended first."""
    limit = time.monotonic() + 240
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < limit, "the process neither goes on nor ends"
        time.sleep(0.002)
    return True


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def reference(place) -> tuple[Path, str, float]:
    """(folder, what was printed, seconds) of a run that nobody disturbed."""
    begin = time.monotonic()
    status, out, err = finish(start(place, "small.py", "--run-dir", "reference"))
    assert status == 0, err
    assert err == ""
    return place / "reference", out, time.monotonic() - begin


def weights(folder: Path, place: Path) -> dict:
    checkpoints = Checkpoints(folder / "checkpoints")
    state = checkpoints.restore(Program(load(place / "small.py").experiment).abstract)
    checkpoints.close()
    assert int(state.step) == 20
    return jax.device_get(state)


def bits(state) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def test_killed_at_random_moments(place, reference):
    """kill -9, again and again, until a run is through: the same bytes as when nobody had touched it."""
    chance, kills, runs = random.Random(int(os.environ.get("LAB_KILLS_SEED", 7))), 0, 0
    whole = weights(reference[0], place)
    while kills < KILLS:
        folder, runs = place / f"killed-{runs}", runs + 1
        while True:
            process = start(place, "small.py", "--run-dir", folder.name)
            if kills < KILLS:
                if chance.random() < 0.3:  # anywhere in the life of the process
                    delay = chance.uniform(0, reference[2])
                else:  # somewhere in its updates, evaluations and saves
                    first = lines_in(folder / "metrics.jsonl")
                    rows = first + chance.randrange(1, max(2, ROWS - first))
                    wait_for(process, lambda rows=rows, folder=folder: lines_in(folder / "metrics.jsonl") >= rows)
                    delay = chance.uniform(0, 0.1)
                end = time.monotonic() + delay
                wait_for(process, lambda end=end: time.monotonic() > end)
                process.kill()
            status, out, err = finish(process)
            kills += status == -signal.SIGKILL
            assert status in (0, -signal.SIGKILL), err
            if status == 0:
                break
        assert (folder / "metrics.jsonl").read_bytes() == (reference[0] / "metrics.jsonl").read_bytes()
        assert bits(weights(folder, place)) == bits(whole)
    assert kills >= KILLS


def test_told_to_stop_at_random_moments(place, reference):
    """Any signal at any moment of a process's life: its status, one line at once, and in the end the same bytes."""
    chance, told, runs = random.Random(int(os.environ.get("LAB_KILLS_SEED", 7))), 0, 0
    while told < KILLS:
        folder, runs, status = place / f"told-{runs}", runs + 1, None
        while status != 0:
            process, number = start(place, "small.py", "--run-dir", folder.name), chance.choice(HEARD)
            end = time.monotonic() + chance.uniform(0, reference[2])
            if told < KILLS and wait_for(process, lambda end=end: time.monotonic() > end):
                process.send_signal(number)
                told += 1
            else:
                number = None
            status, out, err = finish(process)
            if number is None or status == 0:  # it was through already
                assert status == 0 and err == "", err
            else:
                assert status == EXIT[number] and err.startswith(f"{signal.Signals(number).name}: stop"), err
                assert err.count("\n") == 1, err
        assert (folder / "metrics.jsonl").read_bytes() == (reference[0] / "metrics.jsonl").read_bytes()
        assert bits(weights(folder, place)) == bits(weights(reference[0], place))


def test_a_lost_terminal_and_a_reader_that_goes_away_save(place, reference):
    """SIGHUP as SIGTERM; `| head -1` ends with 141; both go on from where they were."""
    process, rows = start(place, "small.py", "--run-dir", "lost"), place / "lost" / "metrics.jsonl"
    assert wait_for(process, lambda: lines_in(rows) >= 3)
    process.send_signal(signal.SIGHUP)
    status, out, err = finish(process)
    assert status == 75 and re.search(r"SIGHUP: saved after step \d+ of 20", out), (out, err)
    process = start(place, "small.py", "--run-dir", "lost")
    while "Compiled" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=240) == 141, err
    assert err == "Nobody reads the output any more: stopping after this step.\n"
    status, out, err = finish(start(place, "small.py", "--run-dir", "lost"))
    assert status == 0, err
    assert rows.read_bytes() == (reference[0] / "metrics.jsonl").read_bytes()


def test_sigterm_saves_and_another_machine_goes_on(place, reference):
    process = start(place, "small.py", "--run-dir", "stopped")
    assert wait_for(process, lambda: lines_in(place / "stopped" / "metrics.jsonl") >= 5)
    process.terminate()
    status, out, err = finish(process)
    assert status == 75, err
    assert re.search(r"SIGTERM: saved after step \d+ of 20. Run the same command to resume.", out)
    assert "Traceback" not in err and not (place / "stopped" / "result.json").exists()
    status, out, err = finish(start(place, "small.py", "--run-dir", "stopped", devices=4))
    assert status == 0 and "Resuming from step" in out, err
    rows, whole = ([json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()]
                   for f in (place / "stopped", reference[0]))
    assert [(r["step"], r["split"]) for r in rows] == [(r["step"], r["split"]) for r in whole]
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in whole], abs=1e-5)
    a, b = weights(place / "stopped", place), weights(reference[0], place)
    assert max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a.params, b.params))) < 1e-5


def test_control_c_and_another_seed(place, reference):
    process = start(place, "small.py", "--run-dir", "control-c", "--seed", "1")
    assert wait_for(process, lambda: lines_in(place / "control-c" / "metrics.jsonl") >= 3)
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert status == 130 and "SIGINT: saved after step" in out and "Traceback" not in err
    # The negative control of the tests of equal bytes: another seed shows in each row and in the weights.
    rows, whole = ((f / "metrics.jsonl").read_text().splitlines() for f in (place / "control-c", reference[0]))
    assert len(rows) >= 3 and len(whole) == ROWS and not set(rows) & set(whole)


def test_control_c_before_the_first_update(place):
    process = start(place, "small.py", "--run-dir", "early")
    assert process.stdout.readline().startswith("Run folder")
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert status == 130 and "Traceback" not in err


def test_piped_output_is_plain_lines(reference):
    out = reference[1]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out)  # no carriage return, no escape sequence
    for expected in ("Run folder: reference", "step      0  validation  loss", "step     20  validation",
                     "Finished after 20 steps", "bits per byte", "Sample", "plots/loss.png",
                     "Everything is in reference"):
        assert expected in out
    assert out.count("Attention: einsum") == 1


def test_what_a_run_leaves(reference):
    names = {p.name for p in reference[0].iterdir()}
    assert {"experiment.json", "environment.json", "metrics.jsonl", "plots", "samples", "checkpoints",
            "result.json", "lock", "tokenizer.json", "fitted.json", "experiment.py"} == names
    assert {p.name for p in (reference[0] / "plots").iterdir()} == {"loss.png", "learning_rate.png", "norms.png"}
    losses = [json.loads(line)["loss"] for line in (reference[0] / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 1


def test_the_overview_starts_without_jax(place):
    code = "import sys; from lab.__main__ import main; main(['--help']); sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True, cwd=place)
    assert done.returncode == 0, done.stderr
    for name, summary in experiments().items():
        assert name in done.stdout and summary in done.stdout
    for command in ("sample RUN", "eval RUN", "bench EXPERIMENT", "tests", "prepare", "EXPERIMENT.py"):
        assert re.search(command.replace(" ", r"\s+") if command[0].isupper() else command.split()[0], done.stdout)


# ------------------------------------------------------------------------------------ in this process: what is said


def test_nothing_typed(typed):
    assert typed() == typed("--help") == typed("help")
    assert "usage: ./launch.sh" in typed()[1]


def test_help_lists_the_knobs_of_this_experiment(typed):
    status, out, _ = typed("small.py", "--help")
    assert status == 0 and "A small language model for the tests of the command line." in out
    for flag in ("--steps", "--optim.lr.peak", "--model.depth", "--model.norm", "--data.source.pattern",
                 "--data.length", "--task.label-smoothing", "--evaluate.patience", "--checkpoint.permanent",
                 "--mesh.data", "--dry-run", "--run-dir", "--precision {float32,bfloat16}"):
        assert flag in out, flag
    assert "(default: 0.01)" in out and "Highest learning rate." in out  # this value, and its docstring


@pytest.mark.parametrize("flag, value, words", [
    ("--step", "5", ["--step", "--steps"]), ("--optim.lr.peek", "1", ["--optim.lr.peek", "--optim.lr.peak"]),
    ("--steps", "many", ["--steps", "many"]), ("--model.norm", "batchnorm", ["--model.norm", "layernorm"]),
    ("--steps", "1.5", ["--steps", "1.5"])])
def test_flags_that_tyro_refuses(typed, flag, value, words):
    status, out, err = typed("small.py", flag, value)
    assert status == 2 and "Traceback" not in out + err
    assert all(word in err for word in words)


@pytest.mark.parametrize("args, words", [
    (["--batch", "9", "--grad-accum-steps", "2"], "--batch 9 is not divisible by --grad-accum-steps 2"),
    (["--model.heads", "3"], "--model.width 16 is not divisible by --model.heads 3"),
    (["--model.kv-heads", "3"], "--model.heads 2 is not divisible by --model.kv-heads 3"),
    (["--batch", "12", "--run-dir", "no"], "--batch 12 is not divisible by 8 devices. Use a multiple of 8"),
    (["--mesh.data", "9", "--run-dir", "no"], "--mesh.data 9 needs 9 devices; this machine has 8"),
    (["--steps", "0"], "--steps must be at least 1, not 0"),
    (["--steps", "1"], "optim.lr.warmup is 2 steps, more than the run's 1"),
    (["--steps-per-call", "3"], "--steps 20 is not a multiple of --steps-per-call 3"),
    (["--model.dropout", "1.5"], "--model.dropout must be in"),
    (["--optim.lr.peak", "nan"], "optim.lr.peak is nan"),
    (["--model.vocab", "100", "--run-dir", "no"], "The vocabulary is too small: the tokenizer has 256 tokens and the "
     "model 100. Use --model.vocab 256"),
    (["--data.length", "32", "--run-dir", "no"], "--data.length 32 is longer than --model.context 16"),
    (["--data.length", "5000", "--model.context", "5000", "--run-dir", "no"], "A window of 5000 tokens does not fit"),
    (["--data.source.pattern", "nowhere/*.txt", "--run-dir", "no"], "nowhere/*.txt does not exist"),
    (["--data.source.pattern", "", "--run-dir", "no"], "TextFiles needs a file"),
    (["--model.attention", "cudnn", "--run-dir", "no"], "cudnn runs on NVIDIA GPUs only"),
    (["--full", "--local"], "--full and --local exclude each other"),
    (["--steps", str(2**63)], f"--steps {2**63} is too large: at most {2**31 - 1}"),
    (["--batch", "9" * 400], "--batch 999999999999... is too large"),
    (["--mesh.tensor", str(2**31)], f"--mesh.tensor {2**31} is too large"),
    (["--mesh.tensor", "65536", "--mesh.fsdp", "65536"], "--mesh.fsdp 65536, --mesh.tensor 65536: a mesh has at most"),
    (["--evaluate.records", str(2**40)], f"--evaluate.records {2**40} is too large"),
    (["--optim.b2", "inf"], "--optim.b2 is inf: it must be a finite number"),
    (["--seed", str(2**32)], f"--seed must be in [0, 2^32), not {2**32}"),
    (["--seed", "-1"], "--seed must be in [0, 2^32), not -1"),
    (["--run-dir", "x" * 5000], "File name too long"),
    (["--run-dir", "caf\udce9"], "is not UTF-8"),
])
def test_values_that_cannot_be(mistake, place, args, words):
    assert words in mistake("small.py", *args)
    assert not (place / "no" / "result.json").exists()
    shutil.rmtree(place / "no", ignore_errors=True)


@pytest.mark.parametrize("content, words", [
    (b"", "empty"), (b"caf\xe9 " * 500, "is not UTF-8 text: byte 3"), (b"too short", "does not fit")])
def test_bad_text_files(mistake, place, content, words):
    (place / "bad.txt").write_bytes(content)
    err = mistake("small.py", "--data.source.pattern", str(place / "bad.txt"), "--run-dir", "no")
    assert words in err and "bad.txt" in err


def test_names_that_are_not_there(mistake):
    assert "Perhaps you meant experiments/gpt_small.py" in mistake("experiments/gpt_smal.py")
    assert "Perhaps you meant experiments/gpt_char.py" in mistake("gpt_chars.py")
    assert "There is no command 'sampel'. Perhaps you meant sample" in mistake("sampel", "runs/x")
    assert "Perhaps you meant experiments/gpt_xl.py" in mistake("gpt_xl")
    assert "There is no command 'qqqq'. ./launch.sh --help" in mistake("qqqq")
    assert "There is no experiment zzz.py" in mistake("bench", "zzz.py")
    assert "Say which experiment to measure" in mistake("bench")


@pytest.mark.parametrize("content, words", [
    ("experiment = (\n", "line 1: '(' was never closed"),
    ("x = 1\n", "defines no `experiment = Experiment(...)`"),
    ("experiment = 3\n", "defines no `experiment = Experiment(...)`"),
    ("import sys\nexperiment = 1 / 0\n", "broken.py"),
    ("from lab.models import gtp\n", "broken.py"),
    ("from lab.optim.optimizers import AdamV\n", "broken.py"),
])
def test_broken_experiment_files(mistake, place, content, words):
    (place / "broken.py").write_text(content)
    err = mistake("broken.py")
    assert words in err and "broken.py" in err


def test_a_field_of_another_type_is_no_traceback(mistake, place):
    (place / "typed.py").write_text(EXPERIMENT.format(corpus="x").replace("steps=20", 'steps="twenty"'))
    assert "--steps" in mistake("typed.py")


def test_the_platform_must_be_the_chosen_one(mistake, monkeypatch):
    monkeypatch.setenv("LAB_PLATFORM", "gpu")
    err = mistake("small.py", "--run-dir", "no")
    assert "The launcher chose gpu, but JAX uses cpu" in err and "LAB_ACCELERATOR" in err


def test_a_dry_run_prices_the_evaluations(typed):
    """3 times 16 records, a third of an update's work for as many: 2 updates beside 20."""
    out = typed("small.py", "--dry-run")[1]
    assert re.search(r"Evaluation: 3 times 16 records of the validation split, .* 10% of those of training", out)
    assert "--evaluate.records N" not in out
    out = typed("small.py", "--dry-run", "--evaluate.every", "1")[1]
    assert "Evaluation: 21 times 16 records" in out and ", 70% of those of training" in out
    assert "Less: --evaluate.records N, or a larger --evaluate.every." in out


def test_a_dry_run_fits_80_columns(typed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    tables = [line for line in typed("small.py", "--dry-run", "--mesh.data", "2", "--mesh.fsdp", "4")[1].splitlines()
              if line[:1] in "│┃┏└"]
    assert len(tables) > 40 and max(map(len, tables)) <= 80
    assert any("block_*/attn/query/kernel" in line and "fsdp" in line for line in tables)


@pytest.mark.parametrize("platforms, words", [
    ("cuda", ["small.py", "--dry-run"]), ("cuda,rocm", ["small.py", "--run-dir", "no"]), ("x", ["bench", "small.py"])])
def test_a_platform_that_this_jax_has_not(monkeypatch, place, platforms, words):
    """In a process of its own: JAX looks for its platforms once."""
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    done = start(place, *words)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 2 and "Traceback" not in out + err
    assert re.search(rf"^error: JAX found no device with JAX_PLATFORMS={platforms}: .*LAB_ACCELERATOR=cpu", err, re.M)


def test_what_is_no_run(mistake, place):
    (place / "empty").mkdir(exist_ok=True)
    for command in ("sample", "evaluate"):
        assert "not a run folder" in mistake(command, "empty")
        assert "not a run folder" in mistake(command, "not-there")
    (place / "thesis").mkdir(exist_ok=True)
    (place / "thesis" / "thesis.tex").write_text("precious")
    assert "is not empty and is not a run folder" in mistake("small.py", "--run-dir", "thesis")
    assert "cannot be written" in mistake("small.py", "--run-dir", "corpus.txt")
    assert "cannot be written" in mistake("small.py", "--run-dir", "corpus.txt/run")
    assert "--run-dir is a folder on the machine of process 0" in mistake("small.py", "--run-dir", "gs://b/x")
    assert not (place / "gs:").exists()


def test_runs_that_are_there_already(typed, mistake, reference):
    before = sorted((p, p.stat().st_mtime_ns) for p in (reference[0] / "checkpoints").rglob("*"))
    status, out, err = typed("small.py", "--run-dir", "reference")
    assert status == 0 and "Run already complete" in out and "Finished after 20 steps" in out
    assert sorted((p, p.stat().st_mtime_ns) for p in (reference[0] / "checkpoints").rglob("*")) == before
    err = mistake("small.py", "--run-dir", "reference", "--model.width", "32", "--seed", "3")
    assert "is the run of another experiment: " in err
    assert "model.width is 16 there and 32 here" in err and "seed is 0 there and 3 here" in err
    assert typed("small.py", "--run-dir", "reference", "--checkpoint.keep", "5")[0] == 0  # says how, not what


def test_damaged_checkpoints(typed, mistake, place, reference):
    folder = Path(shutil.copytree(reference[0], place / "damaged", dirs_exist_ok=True))
    (folder / "result.json").unlink()
    for checkpoint in (folder / "checkpoints").iterdir():
        shutil.rmtree(checkpoint / "state", ignore_errors=True)
    assert "Every checkpoint in" in mistake("small.py", "--run-dir", "damaged", "--mesh.data", "1")
    status, _, err = typed("sample", "damaged")  # which names each damaged one on stderr first
    *damaged, error = err.splitlines()
    assert status == 2 and error.startswith("error: Every checkpoint in") and "Traceback" not in err
    assert len(damaged) == 2 and all(line.endswith(").") and "is damaged" in line for line in damaged), err


def test_an_override_that_changes_nothing_is_said(typed):
    status, out, _ = typed("small.py", "--steps", "20", "--optim.lr.peak=0.01", "--seed", "4", "--model.tied",
                           "--help")
    assert status == 0
    status, out, err = typed("small.py", "--steps", "20", "--optim.lr.peak=0.01", "--seed", "4", "--model.tied",
                             "--mesh.data", "99")
    assert "Note: --steps is already 20: no effect." in out
    assert "Note: --optim.lr.peak is already 0.01" in out and "Note: --model.tied is already True" in out
    assert "--seed" not in out and "--mesh.data was" not in out


def test_the_twin(typed, place, monkeypatch):
    text = EXPERIMENT.format(corpus=str(place / "corpus.txt")) + "local = replace(experiment, steps=4)\n"
    (place / "twins.py").write_text(text)
    bad = ["--mesh.data", "99"]  # parsed, and stopped before any work
    assert "No accelerator found: running the local config" in typed("twins.py", *bad)[1]
    assert "Running the local config (--local)." in typed("twins.py", "--local", *bad)[1]
    assert "local config" not in typed("twins.py", "--full", *bad)[1]
    monkeypatch.setenv("LAB_PLATFORM", "gpu")
    assert "local config" not in typed("twins.py", *bad)[1]


# --------------------------------------------------------------------------------------------------- the commands


def test_dry_run(typed, place):
    begin = time.monotonic()
    status, out, err = typed("small.py", "--dry-run", "--run-dir", "dry")
    assert status == 0 and time.monotonic() - begin < 15
    parameters = sum(x.size for x in jax.tree.leaves(Program(load(place / "small.py").experiment).abstract.params))
    assert f"{parameters:,}" in out and "FLOPs/step" in out and "optimizer state" in out
    assert "128 (8 records x 16)" in out and not (place / "dry").exists()


def test_sample(typed, mistake, reference):
    six = ("sample", "reference", "--prompt", "the pure ", "--new-tokens", "6")
    typed(*six)  # what a process says only once, the attention backend, is said here
    greedy = typed(*six, "--greedy")
    assert greedy[0] == 0 and greedy[1].startswith("the pure ") and len(greedy[1]) == len("the pure ") + 6 + 1
    assert typed(*six, "--greedy", "--seed", "9") == greedy
    warm = [typed(*six, "--temperature", "5", "--seed", seed) for seed in "112"]
    assert warm[0] == warm[1] != warm[2]
    two = typed("sample", "reference", "--prompt", "the ", "a ", "--new-tokens", "4", "--greedy")[1]
    assert two.count("---\n") == 2
    rows = [json.loads(line) for line in typed(*six, "--n", "2", "--seed", "1", "--json")[1].splitlines()]
    assert [row["seed"] for row in rows] == [1, 2]
    alone = [typed(*six, "--seed", str(row["seed"]))[1] for row in rows]
    assert alone == ["the pure " + row["text"] + "\n" for row in rows]
    best = json.loads(typed(*six, "--best-of", "2", "--seed", "1", "--json")[1])
    assert best.pop("log_prob") < 0 and best in rows
    for seed, more in (("-1", ()), ("4294967296", ()), ("4294967295", ("--n", "2"))):
        assert f"--seed {seed}: the samples' seeds" in mistake(*six, "--seed", seed, *more)
    assert "leave out --greedy" in mistake(*six, "--best-of", "2", "--greedy")
    assert "--top-p 2" in mistake("sample", "reference", "--top-p", "2")
    assert "has no checkpoint of step 3" in mistake("sample", "reference", "--step", "3").splitlines()[-1]


def test_eval(typed, reference):
    status, out, _ = typed("evaluate", "reference", "--records", "16")
    last = json.loads((reference[0] / "result.json").read_text())["final"]
    assert status == 0
    written = json.loads((reference[0] / "evaluation-validation-20.json").read_text())
    (reference[0] / "evaluation-validation-20.json").unlink()
    assert written["step"] == 20 and written["loss"] == pytest.approx(last["loss"], abs=1e-5)
    assert f"{written['loss']:.6f}" in out
    assert typed("evaluate", "reference", "--step", "18")[0] == 0  # the whole split of another state: another number
    other = reference[0] / "evaluation-validation-18.json"
    assert abs(json.loads(other.read_text())["loss"] - last["loss"]) > 1e-6
    other.unlink()


def test_commands_warn_of_nothing(typed, reference, caplog):
    assert typed("sample", "reference", "--prompt", "the pure ", "--new-tokens", "6", "--greedy")[0] == 0
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []


def test_bench(typed):
    status, out, _ = typed("bench", "small.py", "--timed-steps", "4", "--model.depth", "1")
    assert status == 0
    found = json.loads(out.splitlines()[-1])
    assert found["ms_per_step"] > 0 and found["tokens_per_second"] > 0 and found["data_wait_ms"] >= 0
    assert found["device"].startswith("8 x ")


def test_the_help_of_bench_is_its_own(typed):
    status, _, err = typed("bench", "small.py", "--timed-step", "4")
    assert status == 2 and re.search(r"run ./launch.sh bench \S*small.py --help", " ".join(re.findall(r"[^\s│]+", err)))


def test_a_closed_pipe_is_no_traceback(place):
    process = start(place, "small.py", "--help")
    process.stdout.close()
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))
    reader.start()
    process.wait(timeout=240)
    reader.join()
    assert "Traceback" not in errors[0]
