"""Runs a study with one process per CPU core; each runs cells like any other process of the study.

A small model leaves most of a second core idle; two models, each bound to a core, use both.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.files import make_folder, open_file

CORE = "LAB_STUDY_CORE"
SHOWN = re.compile(r"(cell \d+/\d+  .*)|(\S+ seed \d+: (done|diverged|failed) .*)")


def pin() -> bool:
    """If this process is a worker, binds it to its core, makes it exit with its parent, and returns True. Call before
    importing JAX."""
    core = os.environ.get(CORE)
    if core is None:
        return False
    os.sched_setaffinity(0, {int(core)})
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(75)

    threading.Thread(target=watch, daemon=True).start()
    return True


def cores() -> list[int]:
    """The cores available to this process; empty on systems without CPU affinity."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []


def _start(core: int, module: str, args: Sequence[str]) -> subprocess.Popen:
    environ = os.environ | {CORE: str(core)}
    if kept := environ.get("JAX_COMPILATION_CACHE_DIR"):  # a program compiled on one core is slow on two
        environ["JAX_COMPILATION_CACHE_DIR"] = f"{kept}/one-core"
    return subprocess.Popen([sys.executable, "-P", "-m", module, *args], env=environ, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)


def seconds_per_step(file: Path | None, experiment: Any, numbers: Sequence[str], steps_per_call: int,
                     stops: Sequence[int], number: int) -> float | None:
    """Seconds per step of one cell while `number` cores run it at once; None if unknown. `experiment`: as JSON."""
    told = json.dumps({"file": str(file) if file else None, "experiment": experiment, "numbers": list(numbers),
                       "steps_per_call": steps_per_call, "stops": list(stops)})
    probes = [_start(core, "lab.study.run.probe", ()) for core in cores()[:number]]
    for probe in probes:  # start all before waiting for any
        probe.stdin.write(told)
        probe.stdin.close()
    outputs = [probe.stdout.read() for probe in probes]
    if any(probe.wait() for probe in probes):
        return None
    return max(json.loads(text.splitlines()[-1]) for text in outputs) / len(probes)


def run_workers(args: Sequence[str], number: int, folder: Path, screen: Any, stop: Any) -> list[int]:
    """Runs the command `args` on `number` cores until all processes have ended; returns their exit statuses.

    When `stop()` is true, they save and exit. Their stdout goes to files in `folder`, stderr to ours.
    """
    make_folder(folder)
    workers = [_start(core, "lab", args) for core in cores()[:number]]
    threads = [threading.Thread(target=_relay, args=(worker, folder / f"worker-{i}.txt", screen), daemon=True)
               for i, worker in enumerate(workers)]
    for worker, thread in zip(workers, threads, strict=True):
        worker.stdin.close()
        thread.start()
    told = False
    while any(worker.poll() is None for worker in workers):
        if stop() and not told:
            told = True
            for worker in workers:
                worker.terminate()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    return [worker.returncode for worker in workers]


def _relay(worker: subprocess.Popen, log: Path, screen: Any) -> None:
    with open_file(log) as file:
        for line in worker.stdout:
            with contextlib.suppress(OSError):  # full disk: the worker reports it
                file.write(line)
                file.flush()
            if found := SHOWN.fullmatch(line.rstrip("\n")):
                screen.progress(line.rstrip("\n")) if found[1] else screen.info(line.rstrip("\n"))
