"""A checkout from which launch.sh can be started without downloading anything; for the tests of lab/launch."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.signals import HEARD

ROOT = Path(__file__).resolve().parent.parent
SBIN = os.environ["PATH"] + ":/usr/sbin:/sbin"
DISTRIBUTED = (ROOT / "lab/parallel/processes.py").exists()
# `python -m lab` without training: prints its role and arguments; on SIGTERM "saves" and exits 75; goes on afterwards.
STAND_IN = '''
import os, pathlib, signal, sys, time
rank = os.environ.get("SLURM_PROCID") or os.environ.get("LAB_PROCESS_ID") or os.uname().nodename[-1]
words = sys.argv[sys.argv.index("lab") + 1:]
if "--dry-run" in words:    # lab/launch looks at the flags
    sys.exit("error: " + words[words.index("--wrong") + 1] if "--wrong" in words else 0)
folder = pathlib.Path(words[words.index("--run-dir") + 1])
place = pathlib.Path(words[words.index("--checkpoint-dir") + 1]) if "--checkpoint-dir" in words else folder
saved = place / f"saved-{rank}"
def save(*_):
    saved.touch()
    time.sleep(2 * float(rank))    # processes never end at the same moment
    print("saved", rank, flush=True)
    os._exit(75)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGUSR1, save)
signal.pthread_sigmask(signal.SIG_SETMASK, ())    # as lab does, once it hears them: lab/bootstrap.py blocks them
print("rank", rank, "of", os.environ.get("SLURM_NTASKS") or os.environ.get("LAB_PROCESSES"), "arguments", words,
      "restored" if saved.exists() else "fresh", os.environ.get("LAB_COORDINATOR", ""), flush=True)
folder.mkdir(parents=True, exist_ok=True)
place.mkdir(parents=True, exist_ok=True)
(folder / f"ran-{rank}").touch()
if "--fail" in words and rank == "1":
    os._exit(7)
if "--hang" in words and not saved.exists():
    (folder / f"up-{rank}").touch()
    time.sleep(120)
'''
# Stands for uv, so that nothing is downloaded: the environment it makes is the Python that runs the tests.
UV = """#!/bin/sh
if [ "$1" = venv ]; then
  for folder; do :; done
  mkdir -p "$folder/bin"
  cp "$(dirname "$0")/python" "$folder/bin/python"
fi
"""
PYTHON = """#!/bin/sh
case " $* " in
  " -I -c "*) exit 0 ;;    # the warm-up of a new environment
  *" -m lab "*) if [ -n "$STAND_IN" ]; then exec {python} {folder}/stand_in.py "$@"; fi ;;
esac
exec {python} "$@"
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return min(s.getsockname()[1], 65000)  # a run also takes ports above its coordinator's


def wait_for(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.1)


def write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git checkout of the tracked files, in a folder with a space, and one tiny experiment."""
    parts = tmp_path_factory.mktemp("launch")
    folder = parts / "my checkout"
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True,
                            text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "corpus.txt").write_text("the pure function of a seed and a step " * 400)
    (folder / "experiments/tiny.py").write_text('''"""Tiny."""
from lab.data.text.sources import TextFiles
from lab.data.text.text import Text
from lab.data.tokenizers import Bytes
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.gpt import GPT
from lab.optim import AdamW
from lab.tasks.language import LanguageModel

experiment = Experiment(
    data=Text(TextFiles("corpus.txt"), Bytes(), length=16),
    model=GPT(depth=1, width=16, heads=2, vocab=256, context=16),
    task=LanguageModel(samples=0), optim=AdamW(lr=1e-2), steps=4, batch=8, evaluate=Evaluate(every=4, records=8),
    checkpoint=Checkpoint(every=2),
)
''')
    write_script(parts / "uv", UV)
    write_script(parts / "python", PYTHON.format(python=sys.executable, folder=parts))
    (parts / "stand_in.py").write_text(STAND_IN)
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "t"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    return folder


@pytest.fixture
def environ(checkout: Path) -> dict[str, str]:
    """Variables for launch.sh; STAND_IN decides whether tasks train or only say what they are."""
    return {"PATH": os.environ["PATH"], "HOME": str(checkout.parent), "LAB_UV": str(checkout.parent / "uv"),
            "LAB_ACCELERATOR": "cpu", "PYTHON": sys.executable, "STAND_IN": "1",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


def start(checkout: Path, environ: dict[str, str], *words: str) -> subprocess.Popen:
    return subprocess.Popen([str(checkout / "launch.sh"), *words], cwd=checkout, env=environ, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def run(checkout: Path, environ: dict[str, str], *words: str) -> subprocess.CompletedProcess:
    process = start(checkout, environ, *words)
    try:
        out, err = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        err += "(killed after 150 s)"
    return subprocess.CompletedProcess(words, process.returncode, out, err)


@contextlib.contextmanager
def children_hear(ignored: tuple[int, ...] = (), held: bool = False) -> Iterator[None]:
    """Processes that are started inside hear all signals but the `ignored` ones, whatever these tests were started by:
    nohup ignores SIGHUP, a shell SIGINT in the background. `held`: they come once the process lets them, as launch.sh
    arranges it. Without `preexec_fn`, which could deadlock beside JAX's threads."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    handlers = {n: signal.signal(n, signal.SIG_IGN if n in ignored else signal.SIG_DFL) for n in HEARD}
    if not held:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
