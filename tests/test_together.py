"""Many cells in one program: each is what it would have been alone, and a dead one disturbs nobody."""

import functools
import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lab.configuration.values import override
from lab.data.text.sources import TextFiles
from lab.data.text.text import Text
from lab.data.tokenizers import Bytes
from lab.experiment import Checkpoint, Evaluate, Experiment, Mesh
from lab.models.gpt import GPT
from lab.optim import SGD, AdamW, Cosine
from lab.parallel.processes import ALONE
from lab.study.design.arms import Study
from lab.study.run import units
from lab.study.run.cells import Cell
from lab.study.run.grouping import Group, groups
from lab.study.run.preflight import preflight
from lab.study.run.shared import Bench
from lab.study.run.stacked import Stacked, common_dispatch
from lab.study.run.together import run_together
from lab.study.run.units import chunk_size, make_units
from lab.study.run.workers import cores
from lab.tasks.language import LanguageModel
from lab.train import loop
from lab.train.checkpoint import Checkpoints
from lab.train.console import Screen
from lab.train.metrics import read_rows
from lab.train.program import Program
from tests.studies import told_to_stop
from tests.test_cli import finish, start, wait_for
from tests.test_step import compiled_in_haste, toy  # noqa: F401 (a fixture)
from tests.test_study import FILE, ran
from tests.test_study import cells as cells_in

RATES = {"optim.lr.peak": 1e-3}, {"optim.lr.peak": 1e-2}, {"optim.lr.peak": 1e-2, "optim.b2": 0.9}
NUMBERS = ("optim.lr.peak", "optim.b2")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a linear classifier, which compiles fast."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "small.py").write_text(FILE)
    return folder


def train(experiment: Experiment, folder: Path, checkpoints: Path | None = None) -> list[dict]:
    """The rows of a run on one device."""
    experiment = replace(experiment, mesh=Mesh(data=1))
    assert loop.train(experiment, folder, Screen(quiet=True), checkpoints=checkpoints and str(checkpoints)) == 0
    return read_rows(folder / "metrics.jsonl")


def together(experiments: list[Experiment], root: Path, steps_per_call: int) -> tuple[list[Path], list[bool]]:
    """Runs them as one program, and returns their folders and which lived."""
    data = experiments[0].data.load()
    cells = [Cell(f"arm{i}", e.seed, e, data.fingerprint, {}) for i, e in enumerate(experiments)]
    folders = [root / "cells" / c.name for c in cells]
    stacked = Stacked([replace(e, steps_per_call=steps_per_call) for e in experiments], NUMBERS, data.train)
    with loop.Stop(ALONE).listening() as stop:
        status, lives = run_together(stacked, cells, folders, root / "home", data, Screen(quiet=True), None, stop)
    assert status == 0
    return folders, lives


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Experiment:
    """A language model with dropout: what is drawn at random is drawn per cell."""
    text = tmp_path_factory.mktemp("text") / "corpus.txt"
    text.write_text("the pure function of a seed and a step decides everything that it computes " * 300)
    return Experiment(
        data=Text(TextFiles(str(text)), Bytes(), length=16), task=LanguageModel(samples=0),
        model=GPT(depth=1, width=16, heads=2, vocab=256, context=16, dropout=0.1, bias=False),
        optim=AdamW(lr=Cosine(1e-2, warmup=2), b2=0.95), steps=50, batch=8, evaluate=Evaluate(every=20, records=16),
        checkpoint=Checkpoint(every=0))


@pytest.fixture(scope="module")
def grown(base, tmp_path_factory):
    """Eight of nine cells (three arms, three seeds) after 50 updates, on eight devices; and two of them alone."""
    root = tmp_path_factory.mktemp("grown")
    experiments = [replace(override(base, arm), seed=seed) for seed in range(3) for arm in RATES][:8]
    folders, lives = together(experiments, root, steps_per_call=10)
    assert all(lives)
    alone = {i: root / "alone" / str(i) for i in (2, 4)}
    for i, folder in alone.items():
        train(experiments[i], folder)
    return experiments, folders, alone


def test_a_cell_together_is_the_cell_alone(grown):
    """To 1e-5 over 50 updates, metrics and parameters, best state included; and no cell is like another."""
    experiments, folders, alone = grown
    for i, folder in alone.items():
        ours, theirs = read_rows(folders[i] / "metrics.jsonl"), read_rows(folder / "metrics.jsonl")
        assert len(ours) == 50 + 4
        for a, b in zip(ours, theirs, strict=True):
            assert list(a) == list(b) and a["split"] == b["split"]
            np.testing.assert_allclose([a[k] for k in a if k != "split"], [b[k] for k in a if k != "split"], rtol=1e-5,
                                       atol=1e-5, err_msg=str(a))
        target = Program(replace(experiments[i], mesh=Mesh(data=1))).abstract
        kept = [Checkpoints(f / "checkpoints") for f in (folders[i], folder)]
        assert kept[0].steps()[-1] == kept[1].steps()[-1] == 50
        for a, b in zip(*(jax.tree.leaves(c.restore(target)) for c in kept), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
        result, expected = (json.loads((f / "result.json").read_text()) for f in (folders[i], folder))
        assert result["best"]["step"] == expected["best"]["step"] and result["best"]["step"] in kept[0].steps()
    last = [read_rows(folder / "metrics.jsonl")[-1]["loss"] for folder in folders]
    assert len({round(loss, 4) for loss in last}) == 8  # 1e-5 could tell the cells apart


def test_a_cell_goes_on_alone(grown, tmp_path):
    """From its checkpoint, as if it had never been with others."""
    experiments, folders, alone = grown
    longer = replace(experiments[4], steps=60)
    rows = []
    for name, source in (("together", folders[4]), ("alone", alone[4])):
        shutil.copytree(source / "checkpoints", tmp_path / name / "kept")
        rows.append([row["loss"] for row in train(longer, tmp_path / name / "run", tmp_path / name / "kept")])
    assert len(rows[0]) == 10 + 1  # the updates from 51 on, and the evaluation at the end
    np.testing.assert_allclose(*rows, rtol=1e-5)


def test_cells_together_get_the_compiler_options_of_a_cell_alone(base, monkeypatch):
    """--deterministic too: an option that XLA does not know shows that options arrive."""
    monkeypatch.setattr("lab.study.run.stacked.compiler_options", lambda experiment, mesh: {"xla_no_such": True})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such"):
        Stacked([base, replace(base, seed=1)], NUMBERS, base.data.load().train).init()


def test_a_dead_cell_stops_changing(tmp_path):
    """At the update and with the report that it would have alone; its neighbours are what they are without it."""
    base = toy(optim=AdamW(lr=Cosine(1e-2, warmup=6), b2=0.95), checkpoint=Checkpoint(every=0))
    dead, good = override(base, {"optim.lr.peak": 1e9}), override(base, {"optim.lr.peak": 3e-3})
    folders, lives = together([good, dead], tmp_path / "both", steps_per_call=4)
    assert lives == [True, False]
    assert loop.train(replace(dead, mesh=Mesh(data=1)), tmp_path / "dead", Screen(quiet=True)) == 1
    ours, theirs = (json.loads((f / "diverged.json").read_text()) for f in (folders[1], tmp_path / "dead"))
    assert ours["step"] == theirs["step"] and ours["batch_indices"] == theirs["batch_indices"]
    assert 1 < ours["step"] < 4  # amid a call
    assert not (folders[1] / "result.json").exists()
    kept = Checkpoints(folders[1] / "checkpoints")
    state = kept.restore(Program(replace(dead, mesh=Mesh(data=1))).abstract)
    assert int(state.step) == ours["step"] - 1 and all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    rows = [r["step"] for r in read_rows(folders[1] / "metrics.jsonl") if r["split"] == "train"]
    assert rows == list(range(1, ours["step"]))
    alone, _ = together([good], tmp_path / "one", steps_per_call=4)
    a, b = (read_rows(f / "metrics.jsonl") for f in (folders[0], alone[0]))
    np.testing.assert_allclose([r["loss"] for r in a], [r["loss"] for r in b], rtol=1e-6)


# ------------------------------------------------------------------------------------------------- who together


def test_groups(base):
    """What the step computes with may differ in a group; not what Python looks at, nor what changes the state."""
    arms = {"base": base}
    for name, changes in {
        "rate": {"optim.lr.peak": 3e-3},
        "clip": {"optim.grad_clip_norm": 0.5},
        "clip2": {"optim.grad_clip_norm": 0.7},
        "decay": {"optim.weight_decay": 0.2},
        "decay0": {"optim.weight_decay": 0.0},
        "deep": {"model.depth": 2},
        "deep_rate": {"model.depth": 2, "optim.lr.peak": 3e-3},
        "plain": {"optim": SGD(lr=Cosine(1e-2, warmup=2))},
        "heavy": {"optim": SGD(lr=Cosine(1e-2, warmup=2), momentum=0.9)},
        "heavier": {"optim": SGD(lr=Cosine(1e-2, warmup=2), momentum=0.99)},
    }.items():
        arms[name] = override(base, changes)
    assert groups(arms) == [
        Group(("optim.lr.peak", "optim.weight_decay"), ("base", "rate", "decay")),
        Group(("optim.grad_clip_norm",), ("clip", "clip2")), Group((), ("decay0",)),
        Group(("optim.lr.peak",), ("deep", "deep_rate")), Group((), ("plain",)),
        Group(("optim.momentum",), ("heavy", "heavier"))]


def test_units_of_a_group_have_about_one_size():
    cells = [Cell(arm, seed, None, "", {}) for arm in "abc" for seed in range(4)]
    found = make_units([Group(("x",), ("a", "b")), Group((), ("c",))], cells, "vmap", lambda group: 5, first=3)
    assert [unit.name for unit in found] == ["together-3", "together-4", "together-5"]
    assert [unit.cells for unit in found] == [("a-0", "b-0", "a-1", "b-1"), ("a-2", "b-2", "a-3", "b-3"),
                                              ("c-0", "c-1", "c-2", "c-3")]
    alone = make_units([Group(("x",), ("a", "b"))], cells, "loop", lambda group: 5, first=0)
    assert len(alone) == 8 and all(unit.cells == (unit.name,) and unit.numbers == ("x",) for unit in alone)


def test_cells_at_once_fit_the_memory(monkeypatch):
    """By what the compiler says that one cell needs, against half of what is free; at least one."""
    need = SimpleNamespace(temp_size_in_bytes=(3 << 20) // jax.local_device_count(), argument_size_in_bytes=1 << 19)
    for free, expected in ((64 << 20, 8), (1 << 40, 32), (1 << 20, 1)):
        monkeypatch.setattr(os, "sysconf", lambda name, free=free: 1 if name == "SC_PAGE_SIZE" else free)
        assert chunk_size(32, need) == expected


def test_the_next_program_compiles_meanwhile(base, monkeypatch):
    """In another thread; asked for, it is not compiled again, and other seeds and numbers are served by it."""
    compiled, property_ = [], Program.compiled

    def compile_(program):
        compiled.append(threading.current_thread().name)
        return property_.func(program)

    recorded = functools.cached_property(compile_)
    recorded.__set_name__(Program, "compiled")
    monkeypatch.setattr(Program, "compiled", recorded)
    bench, base = Bench(), replace(base, mesh=Mesh(data=1))
    bench.ahead([base], NUMBERS, 1, together=False)
    assert not compiled  # its data is another's: that comes when it is needed
    bench.data(base)
    bench.ahead([base], NUMBERS, 1, together=False)
    other = replace(override(base, RATES[2]), seed=3)
    first, second = (bench.prepared(e, NUMBERS, 1).program for e in (base, other))
    assert compiled == ["compile_0"] and first.compiled is second.compiled
    assert second.experiment.seed == 3 and float(second.given["optim.b2"]) == pytest.approx(0.9)
    bench.close()


def test_updates_in_a_call_divide_what_is_due(base):
    assert common_dispatch(base, 10) == 10 and common_dispatch(replace(base, evaluate=Evaluate(every=8)), 10) == 2
    assert common_dispatch(replace(base, steps=49), 10) == 1


def test_the_faster_way_is_chosen(base, monkeypatch):
    """By what is measured, and only where it is worth the time; never for what cannot be stacked."""
    study = Study(base, {"rate": RATES[0]}, seeds=2)
    arms = {arm.name: arm for arm in preflight(study)}
    found = groups({name: arm.experiment for name, arm in arms.items()})

    def chosen(arms, alone, both):
        monkeypatch.setattr(units, "time_alone", lambda e, g, n, bench: alone)
        monkeypatch.setattr(units, "_time_together", lambda e, g, n, bench: both)
        return units.choose(found, arms, (0, 1), Bench(), None, lambda line: None)

    assert chosen(arms, 1e-3, 1e-6).how == "loop"  # 0.2 s in all
    plan = chosen(arms, 1.0, 0.5)
    assert plan.how == "vmap" and plan.seconds[plan.mode] == 0.5 and len(plan.seconds) == 3
    assert chosen(arms, 1.0, 1.5).how == "loop"
    waiting = {n: replace(a, experiment=replace(a.experiment, evaluate=Evaluate(patience=2))) for n, a in arms.items()}
    assert chosen(waiting, 1.0, 0.5).how == "loop"


# -------------------------------------------------------------------------------------------------- command line


def test_killed_and_going_on_together(place):
    """kill -9 in mid-study: the same command goes on, and everything is as if nothing had happened."""
    command = ("small.py", "--vary", "optim.lr.peak=1e-2,3e-2,1e30", "--seeds", "2", "--steps", "40",
               "--evaluate.every", "20", "--checkpoint.every", "4", "--execution", "vmap", "--studies")
    whole = start(place, *command, "whole")
    killed = start(place, *command, "killed")
    assert wait_for(killed, lambda: list((place / "killed").glob("*/together/*/checkpoints/[0-9]*")))
    killed.send_signal(signal.SIGKILL)
    finish(killed)
    assert not list((place / "killed").glob("*/cells/*/*/cell.json"))
    assert finish(whole)[0] == 0
    status, out, err = finish(start(place, *command, "killed"))
    assert status == 0 and "6 cells planned = 4 done + 2 diverged + 0 failed." in out, err
    for path in (place / "whole").glob("*/cells/*/*/metrics.jsonl"):
        assert path.read_text() == (place / "killed" / path.relative_to(place / "whole")).read_text()
    a, b = (next((place / name).glob("*/report.md")).read_text() for name in ("whole", "killed"))
    assert _without_times(a) == _without_times(b)
    assert {c["status"] for c in cells_in(place / "killed").values()} == {"done", "diverged"}
    plan = json.loads(next((place / "killed").glob("*/plan.json")).read_text())
    assert plan["how"] == "vmap" and len(plan["units"]) == 1


def _without_times(report: str) -> list[str]:
    """Without the table of costs."""
    return report.partition("Cost (not matched)")[0].splitlines()


def test_told_to_stop_together(typed, place, monkeypatch):
    told_to_stop(monkeypatch, "step      2/4")
    command = ("small.py", "--vary", "optim.lr.peak=1e-2,3e-2", "--seeds", "2", "--execution", "vmap", "--studies",
               "told")
    status, out, _ = typed(*command)
    assert status == 75 and "4 cells are left. Run the same command to resume." in out
    status, out, _ = typed(*command)
    assert status == 0 and "4 cells planned = 4 done" in out
    assert "ran as" not in out and typed(*command)[1].count("done loss") == 0
    status, _, err = typed(*command[:-4], "--execution", "loop", "--studies", "told")
    assert status == 2 and "two ways cannot be compared" in err


@pytest.mark.skipif(len(cores()) < 2, reason="processes cannot be bound to two cores here")
def test_a_cell_on_each_core(place):
    """What it says and writes is what the cells say and write one after another."""
    command = ("small.py", "--vary", "optim.lr.peak=1e-2,3e-2", "--seeds", "2", "--studies")
    both = [start(place, *command, f"on-{how}", "--execution", how) for how in ("cores", "loop")]
    for process in both:
        status, out, err = finish(process)
        assert status == 0 and "4 cells planned = 4 done + 0 diverged + 0 failed." in out, err
        assert len(ran(out)) == 4
    spread, alone = (next((place / f"on-{how}").glob("small-*")) for how in ("cores", "loop"))
    assert json.loads((spread / "plan.json").read_text())["how"] == "cores"
    assert len(list((spread / "logs").iterdir())) == 2
    for path in alone.glob("cells/*/*/metrics.jsonl"):
        a, b = read_rows(path), read_rows(spread / path.relative_to(alone))
        np.testing.assert_allclose([r["loss"] for r in a], [r["loss"] for r in b], rtol=1e-5)
    modes = {json.loads(p.read_text())["mode"] for s in (spread, alone) for p in s.glob("cells/*/*/cell.json")}
    assert {mode.partition(",")[0] for mode in modes} == {"cores", "loop"}


@pytest.mark.skipif(len(cores()) < 2, reason="processes cannot be bound to two cores here")
def test_workers_end_with_the_study(place):
    """Told to stop they save; when the process that started them is killed they do not live on."""
    command = ("small.py", "--vary", "optim.lr.peak=1e-2,3e-2", "--seeds", "2", "--steps", "20000", "--evaluate.every",
               "0", "--execution", "cores", "--studies", "ending")

    def working() -> set[int]:
        found = (path.read_text() for path in (place / "ending").glob("*/leases/*-*"))
        return {json.loads(text)["pid"] for text in found if text} - {os.getpid()}

    for number, expected in ((signal.SIGTERM, 75), (signal.SIGKILL, -9)):
        study = start(place, *command)
        assert wait_for(study, lambda: len(working()) == 2)
        pids = working()
        study.send_signal(number)
        status, out, err = finish(study)
        assert status == expected, err
        assert ("4 cells are left. Run the same command to resume." in out) == (expected == 75)
        end = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
            time.sleep(0.1)
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
