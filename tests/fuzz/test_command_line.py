"""Spoiled command lines: each ends in an answer or in a sentence, never in a traceback.

    LAB_FUZZ=40 ./launch.sh tests tests/fuzz/test_command_line.py    # 10,000 lines, others than the 250 of CI
"""

from __future__ import annotations

import functools
import inspect
import io
import os
import shlex
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import Any
from unittest import mock

import pytest

from lab.configuration.values import flat, to_json
from lab.errors import UserError
from lab.experiment import Experiment
from lab.train.experiment_file import load
from tests.conftest import ROOT
from tests.fuzz.lines import Lines, World
from tests.studies import make_study
from tests.test_cli import EXPERIMENT, WORDS
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

LINES = 250
TIMES = int(os.environ.get("LAB_FUZZ", "1"))
TRACED = ("GPT", "Linear", "MLP", "ConvNet")
PARTS = 2  # tests, so that several processes share the work
# Whatever costs more than a moment: a line that comes so far is a good one.
ENDS = (
    "lab.train.loop.train",
    "lab.commands.bench.measure",
    "lab.planning.tables.show",
    "lab.parallel.local_processes._Family",
    "lab.study.run.shared.Bench.prepared",
    "lab.study.run.command.Engine",
    "lab.launch.slurm.tool",
    "lab.launch.hosts.tool",
    "lab.launch.slurm.check_flags",
    "lab.launch.tpu.tool",
    "lab.launch.sky.tool",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A folder with a run that made four updates, a study, and a text; the process stands in it."""
    from lab.__main__ import main

    place = tmp_path_factory.mktemp("fuzz")
    (place / "corpus.txt").write_text("".join(WORDS[(i * 7) % 40:] for i in range(600))[:30_000])
    (place / "small.py").write_text(EXPERIMENT.format(corpus=str(place / "corpus.txt")))
    make_study(place / "studies" / "norms-1", {"rms": {"model.norm": "rmsnorm"}})
    files = {f"experiments/{path.name}": load(path) for path in sorted((ROOT / "experiments").glob("*.py"))}
    files["small.py"] = load(place / "small.py")
    plain = {name: flags(module.experiment) for name, module in files.items() if not hasattr(module, "study")}
    before = os.getcwd()
    os.chdir(place)
    try:
        with mock.patch.dict(os.environ):
            assert main(["small.py", "--steps", "4", "--run-dir", "run"]) == 0
        yield World(plain, [name for name, module in files.items() if hasattr(module, "study")], ["run"],
                    ["studies/norms-1"])
    finally:
        os.chdir(before)


def flags(experiment: Experiment) -> dict[str, object]:
    """The fields of an experiment and their values; the values are those of --full."""
    return {path: value for path, value in flat(to_json(experiment)).items() if path.rpartition(".")[2] != "class"}


def reached(*args: object, **named: object) -> None:
    """Stands for what would now begin."""
    raise UserError("Reached.")


def started(words: list[str]) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command line, in this process. What nobody catches is raised."""
    from lab.__main__ import main
    from lab.bootstrap import LAUNCHERS
    from lab.launch import start

    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    elsewhere = words and words[0].partition("=")[0] in LAUNCHERS
    with redirect_stdout(out), redirect_stderr(err), mock.patch.dict(os.environ):
        try:
            status = (start.main if elsewhere else main)(words)
        except SystemExit as e:  # tyro's way
            status = e.code
    return status, *(stream.buffer.getvalue().decode(errors="replace") for stream in (out, err))


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too long for a thousand lines is not done: training, and in CI the tracing of all but small models."""
    for name in ENDS:
        monkeypatch.setattr(name, reached)
    monkeypatch.setattr(inspect, "getsource", functools.cache(inspect.getsource))  # a third of the time of a --help
    if TIMES == 1:
        from lab.commands import dry_run
        from lab.study.run import command

        def show(experiment: Experiment, _real: Any = dry_run.show) -> None:
            (_real if type(experiment.model).__name__ in TRACED else reached)(experiment)

        def preflight(study: Any, _real: Any = command.preflight) -> Any:
            study.experiments()
            return (_real if type(study.base.model).__name__ in TRACED else reached)(study)

        monkeypatch.setattr(dry_run, "show", show)
        monkeypatch.setattr(command, "preflight", preflight)


@pytest.mark.parametrize("part", range(PARTS))
def test_no_command_line_ends_in_a_traceback(world: World, ends: None, part: int):
    """What fails is printed as a line to type."""
    lines, faults, statuses = Lines(world), {}, Counter()
    for number in range(part, LINES * TIMES, PARTS):
        words = lines.line(number)
        try:
            status, out, err = started(words)
        except Exception as e:
            last = traceback.extract_tb(e.__traceback__)[-1]
            faults.setdefault((type(e).__name__, last.filename, last.lineno), (number, words, str(e)))
            continue
        statuses["answered" if status == 0 or "error: Reached." in err else "refused"] += 1
        assert status in (0, 2), (number, words, status, out, err)
        assert "Traceback" not in out + err, (number, words, out, err)
        assert status == 0 or err.strip(), (number, words)
    assert not faults, "\n".join(f"{number}: {shlex.join(words)}\n    {kind} in {file}:{line}: {said[:200]}" for
                                 (kind, file, line), (number, words, said) in faults.items())
    assert min(statuses.values()) > LINES * TIMES / PARTS / 10, statuses  # not all are nonsense, nor all good


def test_a_traceback_is_seen(world: World, ends: None, monkeypatch: pytest.MonkeyPatch):
    """The negative control: a fault in one command of many is among the lines."""
    def broken(*args: object, **named: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("lab.commands.dry_run.show", broken)
    line = ["small.py", "--local", "--dry-run"]  # as `Lines` makes them
    made = filter(None, map(Lines(world).line, range(10 * LINES)))  # of 250 it may be none
    assert any((words[0], words[-1]) == (line[0], line[-1]) for words in made)
    with pytest.raises(ZeroDivisionError):
        started(line)
