"""For the whole suite: 8 fake CPU devices, set before JAX is imported, and a cache folder that the tests share.

LAB_TEST_PLATFORM=gpu is for the tests marked `gpu` only (tests/gpu/run.py starts them): they run on the first GPU.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

if os.environ.get("LAB_TEST_PLATFORM", "cpu") == "gpu":
    os.environ["JAX_PLATFORMS"] = "cuda,cpu"
else:
    os.environ["JAX_PLATFORMS"] = "cpu"
    # XLA aborts if a device is 40 s late at a collective, as after a pause of a virtual machine.
    os.environ["XLA_FLAGS"] = ("--xla_force_host_platform_device_count=8 "
                               "--xla_cpu_collective_call_terminate_timeout_seconds=600")
os.environ.setdefault("LAB_CACHE", str(Path(tempfile.gettempdir()) / f"lab-test-cache-{os.getuid()}"))
os.environ.pop("LAB_PLATFORM", None)

import pytest

from tests.launching import checkout, environ  # noqa: F401 (fixtures)

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("LAB_SHARED", ROOT.parent / "shared"))


# File -> its mark. `./launch.sh tests` runs files without a mark, `--all` every file; test_experiments keeps a few.
MARKS = {
    "test_experiments": "slow",
    "test_cli": "slow",
    "test_study": "slow",
    "test_stacking": "slow",
    "test_together": "slow",
    "test_benchmarks": "slow",
    "test_command_line": "slow",
    "test_run_folders": "slow",
    "test_run": "slow",
    "test_reports": "slow",
    "test_parallel": "slow",
    "test_matrices": "slow",
    "test_gan": "slow",
    "test_groups": "slow",
    "test_pretrained": "slow",
    "test_lora": "slow",
    "test_harness": "slow",
    "test_prefer": "slow",
    "test_continue": "slow",
    "test_launch": "slow",
    "test_api": "slow",
    "test_chunks": "slow",
    "test_forks": "slow",
    "test_translate": "slow",
    "test_weights_real": "slow",
    "test_harness_study": "slow",
    "test_serve_command": "slow",
    "test_serve_predict": "slow",
    "test_export_function": "slow",
    "test_export_onnx": "slow",
    "test_explain_command": "slow",
    "test_distributed": "processes",
    "test_launch_slurm": "clusters",
    "test_launch_hosts": "clusters",
    "test_topologies": "tpu_compile",
    "test_tpu": "tpu_compile",
    "test_cudnn": "tpu_compile",
}
KEPT = ("gpt_small", "mnist_cnn", "linear_regression")
# Single tests of half a minute and more, which CI leaves to `./launch.sh tests -m long`.
LONG = {
    "test_cli": ("test_killed_at_random_moments", "test_told_to_stop_at_random_moments"),
    "test_distributed": ("test_exact_updates_do_not_depend_on_the_processes",),
    "test_forks": ("test_a_forked_arm_is_the_whole_run_bit_for_bit",),
    "test_run": ("test_some_steps_rehearse",),
    "test_serve_replicas": ("test_tokens_are_those_of_one_device",),
    "test_study": ("test_two_processes_share_a_folder_and_one_is_killed",),
    "test_together": ("test_a_cell_on_each_core", "test_killed_and_going_on_together",
                      "test_workers_end_with_the_study"),
}
# What matters most and takes longest starts first, then what is quick. Where a machine is slow, the last have no time.
FIRST = ("test_experiments", "test_cli", "test_study", "test_parallel", "test_distributed", "test_optim")
LAST = ("test_together", "test_explain_command", "test_export_function", "test_cudnn", "test_topologies",
        "test_forks", "test_command_line", "test_run_folders", "test_study_folder")
UNTIL = float(os.environ.get("LAB_TEST_UNTIL", "inf"))
"""Seconds since 1970, after which no test begins: CI's way to end in time on any machine."""
NO_TIME = "no time left (LAB_TEST_UNTIL)"


def pytest_configure(config: pytest.Config) -> None:
    """The marks of this suite."""
    for line in ("gpu: needs a GPU; tests/gpu/run.py starts them", "slow: whole runs, studies, fuzzers, benchmarks",
                 "processes: several processes train together", "clusters: SLURM and ssh on this machine",
                 "tpu_compile: compiles for TPUs and GPUs that are not here",
                 "long: half a minute and more, left to developers"):
        config.addinivalue_line("markers", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks files and tests, and sorts the files."""
    for item in items:
        mark = MARKS.get(item.path.stem)
        kept = item.path.stem == "test_experiments" and any(f"[{name}]" in item.nodeid for name in KEPT)
        if mark and not kept:
            item.add_marker(mark)
        if getattr(item, "originalname", item.name) in LONG.get(item.path.stem, ()):
            item.add_marker("long")

    def place(item: pytest.Item) -> tuple[int, int]:
        name = item.path.stem
        if name in FIRST or name in LAST:
            return (0, FIRST.index(name)) if name in FIRST else (3, LAST.index(name))
        return (2 if name in MARKS else 1), 0

    items.sort(key=place)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what has no time left."""
    if time.time() > UNTIL:
        pytest.skip(NO_TIME)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says how many tests had no time left."""
    skipped = [report for report in terminalreporter.stats.get("skipped", ()) if NO_TIME in str(report.longrepr)]
    if skipped:
        files = sorted({report.nodeid.partition("::")[0] for report in skipped})
        terminalreporter.write_line(f"{len(skipped)} tests had no time left, in {', '.join(files)}")


# Files whose runs draw their pictures, which takes longer than a small model's training; test_cli's do, in processes.
DRAWN = ("test_errors", "test_gan", "test_loop", "test_multitask", "test_plots", "test_reports", "test_supervised",
         "test_translate")


@pytest.fixture(scope="module", autouse=True)
def pictures(request: pytest.FixtureRequest):
    """The curves, confusions and grids of other files' runs are pictures of one pixel."""
    if request.path.stem in DRAWN:
        yield
        return
    from PIL import Image

    from lab.train import plots

    figure = MagicMock()
    figure.savefig = lambda buffer, format: Image.new("L", (1, 1)).save(buffer, format)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "new_figure", lambda *size, **layout: figure)
        yield


def computing(model: Any, variables: Any) -> Callable[..., Any]:
    """`lab.tasks.base.EvalResult.compute` for variables that are at hand."""
    import jax

    def compute(f: Callable, *arrays: Any, **static: Any) -> Any:
        return jax.device_get(f(model, variables, *arrays, **static))

    return compute


@pytest.fixture
def shared() -> Path:
    """The folder with recorded real data, which only a developer's machine has."""
    if not SHARED.is_dir():
        pytest.skip(f"there is no recorded data in {SHARED}")
    return SHARED


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A small text that a model can learn something from: 30,000 characters, 27 distinct."""
    words = "the pure function of a seed and a step decides everything that the run computes "
    path = tmp_path / "corpus.txt"
    path.write_text("".join(words[(i * 7) % 40:] for i in range(600))[:30_000])
    return path


@pytest.fixture
def tiny(text_file: Path):
    """A language model that trains in seconds on 8 fake devices: 2 blocks, width 16, 8 records of 16 bytes."""
    from lab.data.text.sources import TextFiles
    from lab.data.text.text import Text
    from lab.data.tokenizers import Bytes
    from lab.experiment import Checkpoint, Evaluate, Experiment
    from lab.models.gpt import GPT
    from lab.optim import AdamW, Cosine
    from lab.tasks.language import LanguageModel

    return Experiment(
        data=Text(TextFiles(str(text_file)), Bytes(), length=16),
        model=GPT(depth=2, width=16, heads=2, vocab=256, context=16),
        task=LanguageModel(samples=1),
        optim=AdamW(lr=Cosine(1e-2, warmup=2, end=0.1)),
        steps=8, batch=8, evaluate=Evaluate(every=4, records=16), checkpoint=Checkpoint(every=2),
    )


@pytest.fixture
def typed(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """typed(*args) -> (exit status, stdout, stderr), in `place`, a fixture of the file that uses it."""
    from lab.__main__ import main

    monkeypatch.chdir(place)

    def run(*args: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(a) for a in args])
        except SystemExit as e:  # tyro's way
            status = e.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def mistake(typed: Callable) -> Callable[..., str]:
    """mistake(*args): stderr of a command that a person typed wrong: one or two sentences, exit status 2."""
    def run(*args: str | Path) -> str:
        status, out, err = typed(*args)
        assert status == 2, (status, out, err)
        assert "Traceback" not in out + err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return run
