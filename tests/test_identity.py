"""What makes a run the same run: its experiment, its data, and what its code means; nothing else."""

import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lab.errors import UserError
from lab.experiment import Checkpoint, Experiment, Mesh
from lab.models.cnn import ConvNet, ResNet
from lab.train import ending, loop, run_folder, source_code
from lab.train.experiment_file import load
from lab.train.metrics import read_rows
from lab.train.source_code import code_of, digests
from tests.conftest import ROOT
from tests.test_foreign_folders import OWN, forge, train_in
from tests.test_loop import Quiet
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)


def mixes_rows(experiment):
    return experiment.task.mixes_rows(experiment.model, experiment.data, experiment.precision)


@pytest.fixture(scope="module")

def place(tmp_path_factory) -> Path:
    """A folder with own.py, which defines a model."""
    folder = tmp_path_factory.mktemp("identity")
    (folder / "own.py").write_text(OWN)
    return folder


@pytest.fixture(scope="module")
def trained(place) -> Path:
    """The run folder of own.py."""
    train_in(place, "own.py", "run")
    return place / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def edited(place: Path, *pairs: tuple[str, str]) -> None:
    text = OWN
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    (place / "own.py").write_text(text)


RETURN = 'return nn.Dense(self.classes, name="head")(inputs)'
LAYER = (RETURN, "inputs = nn.Dense(8, name='more')(inputs)\n        " + RETURN)
FACTOR = (RETURN, RETURN.replace("return", "return 2 *"))
NOTHING = [('"""A classifier of our own."""', '"""Something else,\n\n    at length."""  # and a comment'),
           ("    def validate(self):\n", "\n\n    def validate(self):\n        \'\'\'Nothing.\'\'\'\n")]


# ------------------------------------------------------------------------------------------------------------- code


def meaning(text: str, tmp_path: Path) -> str:
    return source_code._read("x.py", text.encode())[1]


@pytest.mark.parametrize(("text", "same"), [
    ("def f(x):\n    # three\n    return x + 1\n", True),
    ("def f(x):\n    '''Doc.'''\n    return (x +\n            1)\n", True),
    ("'''Doc.'''\ndef f(x): return x + 1\n", True), ("def f(x):\n    return x + 2\n", False),
    ("def f(x, y=0):\n    return x + 1\n", False), ("def g(x):\n    return x + 1\n", False),
    ("def f(x):\n    return x - 1\n", False), ("def f(x: int):\n    return x + 1\n", False)])
def test_what_code_means(tmp_path, text, same):
    assert (meaning(text, tmp_path) == meaning("def f(x):\n    return x + 1\n", tmp_path)) == same


def test_strings_that_are_values_count(tmp_path):
    assert meaning("x = 'a'\n", tmp_path) != meaning("x = 'b'\n", tmp_path)
    assert meaning("def f():\n    return 'a'\n", tmp_path) != meaning("def f():\n    return 'b'\n", tmp_path)
    assert meaning("experiment = 1\nx = 2\n", tmp_path) == meaning("experiment = 3\nx = 2\n", tmp_path)  # in the JSON


def test_a_docstring_of_the_loop_changes_nothing(monkeypatch):
    before = digests({"lab.train.loop", "lab.models.gpt"})
    assert {
        "lab/train/loop.py",
        "lab/train/step.py",
        "lab/models/layers.py",
    } <= before.keys() and "lab/train/plots.py" not in before
    read = Path.read_bytes

    def with_(change):
        monkeypatch.setattr(Path, "read_bytes", lambda self: read(self).replace(*change)
                            if self in (ROOT / "lab/train/loop.py", ROOT / "lab/models/gpt.py") else read(self))
        found = digests({"lab.train.loop", "lab.models.gpt"})
        monkeypatch.setattr(Path, "read_bytes", read)
        return source_code.changed(before, found)

    assert with_((b'"""The training loop', b'"""Another docstring of the training loop')) == []
    line = b"from lab.data.prefetch import Prefetch\n"
    assert with_((line, line[:-1] + b"  # a comment\n\n")) == []
    assert with_((line, line + b"X = 1\n")) == ["lab/train/loop.py"]
    assert with_((b"class GPT(", b"X = 1\n\n\nclass GPT(")) == ["lab/models/gpt.py"]


def test_the_code_of_a_run_is_that_of_its_own_parts(tiny):
    found = code_of(tiny)
    assert {"lab/models/gpt.py", "lab/optim/optimizers.py", "lab/tasks/language.py", "jax", "Python"} <= found.keys()
    assert not {"lab/models/cnn.py", "lab/train/console.py", "lab/study/run/stacked.py"} & found.keys()
    assert all(re.fullmatch(r"lab/.*\.py", name) for name in found.keys() - {*source_code.PACKAGES, "Python"})


def test_files_that_the_users_file_imports_belong_to_it(tmp_path, monkeypatch):
    """A layer in a file beside the experiment's, which the class path does not name."""
    (tmp_path / "my_layers.py").write_text("SIZE = 2\n")
    (tmp_path / "mine.py").write_text(OWN.replace("import flax", "from my_layers import SIZE\nimport flax", 1))
    monkeypatch.syspath_prepend(tmp_path)
    experiment = load(tmp_path / "mine.py").experiment
    before = code_of(experiment)
    assert {"mine.py", "my_layers.py", "lab/tasks/supervised.py"} <= before.keys()
    (tmp_path / "my_layers.py").write_text("SIZE = 3\n")
    assert source_code.changed(before, code_of(experiment)) == ["my_layers.py"]
    sys.modules.pop("my_layers")


def test_edited_code_is_named_and_asked_for(place, run, typed, mistake):
    """A finished run: neither "already complete" nor a new run without a word."""
    words = ("own.py", "--run-dir", run)
    result = (run / "result.json").read_bytes()
    try:
        edited(place, *NOTHING)
        assert "already complete" in typed(*words)[1]
        edited(place, LAYER)
        assert re.search(r"^error: own.py changed since the run in .*run began. --accept .*--rerun", mistake(*words))
        assert "exclude each other" in mistake(*words, "--accept", "--rerun")
        assert (run / "result.json").read_bytes() == result
        assert "already complete" in typed(*words, "--accept")[1]
        assert "already complete" in typed(*words)[1]  # it was accepted
        assert json.loads((run / "experiment.json").read_text())["accepted"] == ["own.py"]
        edited(place)
        status, out, _ = typed(*words, "--rerun")
        assert status == 0 and "own.py changed: the run begins again." in out and "already complete" not in out
        again = json.loads((run / "result.json").read_text())
        assert again["final"] == json.loads(result)["final"] and (run / "experiment.py").read_text() == OWN
    finally:
        edited(place)


def test_edited_code_of_an_unfinished_run(place, run, typed, mistake):
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "4")
    words = ("own.py", "--run-dir", run)
    try:
        edited(place, FACTOR)
        assert "own.py changed since" in mistake(*words)
        status, out, _ = typed(*words, "--accept")
        assert status == 0 and "Continuing although own.py changed" in out and "Resuming from step 2 of 4" in out
        found = json.loads((run / "environment-2.json").read_text())
        assert found["accepted"] == ["own.py"] and found["how"]["grad_accum_steps"] == 1
        assert "already complete" in typed(*words)[1]
    finally:
        edited(place)


def test_commands_say_that_the_code_changed(place, run, typed):
    try:
        edited(place, FACTOR)
        status, _, err = typed("evaluate", run, "--experiment", "own.py")
        assert status == 0 and "own.py changed since this run was made" in err.replace("\n", " ")
        edited(place)
        assert "changed since" not in typed("evaluate", run, "--experiment", "own.py")[2]
    finally:
        edited(place)


def test_other_data_is_asked_for_in_the_same_way(run, typed, mistake):
    forge(run, data="of another time")
    assert "the data changed since the run" in mistake("own.py", "--run-dir", run)
    assert "already complete" in typed("own.py", "--run-dir", run, "--accept")[1]
    assert "already complete" in typed("own.py", "--run-dir", run)[1]


def test_a_rerun_keeps_what_is_not_the_runs(tmp_path, run):
    (run / "launch").mkdir()
    (run / "launch" / "slurm.sh").touch()
    (tmp_path / "elsewhere").mkdir()
    for name in ("100", "experiment.json", "notes.txt"):
        (tmp_path / "elsewhere" / name).touch() if "." in name else (tmp_path / "elsewhere" / name).mkdir()
    run_folder.clear(run)
    assert {p.name for p in run.iterdir()} == {"launch", "lock"}
    run_folder._clear_checkpoints(tmp_path / "elsewhere")
    assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == ["notes.txt"]


# ------------------------------------------------------------------------------------------------------ experiment


def test_an_edited_description_is_not_accepted(run, mistake):
    """`steps` changed by hand, and the fingerprint left: neither trained nor evaluated as the run that it is not."""
    forge(run, fits=False, experiment__steps=8)
    assert "was edited" in mistake("own.py", "--run-dir", run)
    forge(run, experiment__steps=8)  # and a digest that fits
    for words in (("own.py", "--run-dir", run), ("own.py", "--run-dir", run, "--steps", "8"),
                  ("evaluate", run, "--experiment", "own.py")):
        assert "experiment.json is of another experiment: its fingerprint is" in mistake(*words)
    forge(run, experiment__steps=4)
    assert "is the run of another experiment: steps is 4 there and 8 here." in mistake(
        "own.py", "--run-dir", run, "--steps", "8")
    forge(run, fingerprint="0123456789ab")
    assert "It was edited, or another version" in mistake("own.py", "--run-dir", run)


@pytest.mark.parametrize("text", ["{}", "[]", "5", "null", '{"experiment": []}', "", "\x00", '{"experiment": {}}'])
def test_a_description_that_describes_no_run(run, mistake, text):
    (run / "experiment.json").write_text(text)
    for words in (("own.py", "--run-dir", run), ("evaluate", run)):
        assert "experiment.json is damaged" in mistake(*words)


def test_how_a_run_is_carried_out_is_not_identity(tiny):
    same = [
        {"steps_per_call": 2},
        {"virtual_shards": 4},
        {"grad_accum_steps": 2},
        {"mesh": Mesh(data=1)},
        {"parallel": "pmap"},
        {"data_on_device": "never"},
    ]
    other = [{"exact": True}, {"batch": 16}, {"steps": 16}]
    assert {replace(tiny, **change).fingerprint() for change in same} == {tiny.fingerprint()}
    assert len({replace(tiny, **change).fingerprint() for change in other}) == 3
    exact = replace(tiny, exact=True)
    assert exact.fingerprint() != replace(exact, virtual_shards=4).fingerprint()


def test_what_belongs_to_a_part_of_the_batch_is_identity(tiny):
    """Dropout masks and batch statistics are those of a microbatch, and with pmap those of a device."""
    dropped = replace(tiny, model=tiny.model.clone(dropout=0.1))
    shapes = {"data": replace(load(ROOT / "experiments/mnist_cnn.py").local.data)}
    normed = replace(load(ROOT / "experiments/cifar_resnet.py").local, **shapes)
    plain = replace(load(ROOT / "experiments/mnist_cnn.py").local, batch=8)
    assert isinstance(normed.model, ResNet) and isinstance(plain.model, ConvNet)
    for experiment, mixes in ((tiny, False), (dropped, True), (normed, True), (plain, plain.model.dropout > 0)):
        assert mixes_rows(experiment) == mixes
        for change in ({"grad_accum_steps": 2}, {"parallel": "pmap"}):
            whole = replace(experiment, batch=8, steps_per_call=1)
            assert (replace(whole, **change).fingerprint() != whole.fingerprint()) == mixes, (experiment.model, change)


def losses(folder: Path) -> list[tuple[int, str, float]]:
    return [(row["step"], row["split"], row["loss"]) for row in read_rows(folder / "metrics.jsonl")]


@pytest.fixture
def lone(place, monkeypatch) -> Experiment:
    """own.py's experiment, of 8 updates; it draws no pictures."""
    monkeypatch.setattr(ending.plots, "curves", lambda *_: [])
    experiment = load(place / "own.py").experiment
    monkeypatch.setattr(type(experiment.task), "artifacts", lambda *_: [])
    return replace(experiment, steps=8)


def stopped(experiment: Experiment, folder: Path, at: int) -> None:
    with Quiet(at=at, action=lambda: os.kill(os.getpid(), signal.SIGTERM)) as screen:
        assert loop.train(experiment, folder, screen) == 75


@pytest.mark.parametrize(("first", "then"), [
    ({"grad_accum_steps": 1}, {"grad_accum_steps": 4}), ({"steps_per_call": 1}, {"steps_per_call": 2}),
    ({"steps_per_call": 2}, {"steps_per_call": 1, "grad_accum_steps": 2})])
def test_a_run_goes_on_in_another_way(lone, tmp_path, first, then):
    """After running out of memory, say: the rows agree to 1e-6 with those of a run that did not change; it is noted."""
    with Quiet() as screen:
        assert loop.train(lone, tmp_path / "whole", screen) == 0
    stopped(replace(lone, **first), tmp_path / "run", 4)
    with Quiet() as screen:
        assert loop.train(replace(lone, **then), tmp_path / "run", screen) == 0
    rows, wanted = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert [row[:2] for row in rows] == [row[:2] for row in wanted]
    assert [row[2] for row in rows] == pytest.approx([row[2] for row in wanted], abs=1e-6)
    found = json.loads((tmp_path / "run/environment-2.json").read_text())["how"]
    assert all(found[name] == value for name, value in then.items())
    told = any("Continuing with --grad-accum-steps" in line for line in screen.lines)
    assert told == (first.get("grad_accum_steps", 1) != then.get("grad_accum_steps", 1))


def test_dropout_does_not_go_on_with_other_microbatches(place, lone, tmp_path):
    """Negative control of the test above: here the rows differ, so it is another experiment."""
    (place / "dropped.py").write_text(OWN.replace(RETURN, RETURN.replace(
        "(inputs)", "(nn.Dropout(0.5, deterministic=not train, name='dropout')(inputs))")))
    dropped = replace(load(place / "dropped.py").experiment, steps=4)
    assert mixes_rows(dropped) and not mixes_rows(lone)
    for n in (1, 2):
        with Quiet() as screen:
            assert loop.train(replace(dropped, grad_accum_steps=n), tmp_path / str(n), screen) == 0
    one, two = ([row[2] for row in losses(tmp_path / str(n))] for n in (1, 2))
    assert np.max(np.abs(np.subtract(one, two))) > 1e-3
    with Quiet() as screen, pytest.raises(UserError, match="grad_accum_steps is 1 there and 2 here"):
        loop.train(replace(dropped, grad_accum_steps=2), tmp_path / "1", screen)


def test_a_step_between_two_calls(lone, tmp_path):
    """A run that stopped after an odd update cannot go on two updates a call; it says so, and with which it can."""
    every = replace(lone, checkpoint=Checkpoint(every=1, keep=9))
    stopped(every, tmp_path / "run", 5)
    for path in (tmp_path / "run/checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > 3:
            shutil.rmtree(path)
    with Quiet() as screen, pytest.raises(UserError, match="at step 3, .* resume with --steps-per-call 1"):
        loop.train(replace(every, steps_per_call=2, checkpoint=Checkpoint(every=2)), tmp_path / "run", screen)


def test_settings_of_jax_that_change_numbers_are_not_taken(place, tmp_path):
    """JAX_ENABLE_X64=1 and the like: the same losses under the same fingerprint, and a line that says so."""
    import subprocess

    def losses_with(**variables):
        folder = tmp_path / "-".join(["run", *variables])
        done = subprocess.run(
            [sys.executable, "-P", "-m", "lab", "own.py", "--run-dir", str(folder), "--steps", "2"], cwd=place,
            capture_output=True, text=True, env=os.environ | {
                "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"),
                "XLA_FLAGS": "--xla_force_host_platform_device_count=1"} | variables)
        assert done.returncode == 0, done.stderr
        return losses(folder), done.stderr

    plain, said = losses_with()
    assert "note:" not in said
    names = {"JAX_ENABLE_X64": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_THREEFRY_PARTITIONABLE": "0",
             "JAX_RANDOM_SEED_OFFSET": "7"}
    found, said = losses_with(**names)
    assert found == plain and all(name in said for name in names) and said.count("would change the numbers") == 1
