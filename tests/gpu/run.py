"""Everything to be measured on a GPU, in order of worth, within the minutes that a GPU is lent for.

    python tests/gpu/run.py --results results.json            # a Python with JAX for the GPU, see README.md
    python tests/gpu/run.py --results results.json --only kernels,sampling
    python tests/gpu/run.py --rehearse                        # each step, tiny, on a CPU

Each step is a process of its own with its own limit. What a step finds is written at once, so that a step which is
stopped keeps what it had. A step that ended well before is skipped: in --results, or in a copy of it named by --before.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
MARK = "RESULT "  # begins a line of a step that is one finding, as JSON


class Step(NamedTuple):
    """A process, by the name of its function in steps.py."""

    name: str
    seconds: int
    """Its limit."""


STEPS = (Step("devices", 20), Step("prepare", 150), Step("checks", 180), Step("gpt_small", 90), Step("kernels", 45),
         Step("gpt_medium", 50), Step("torch", 120), Step("main_job", 110), Step("fashion", 60), Step("sampling", 60),
         Step("images", 60), Step("studies", 90))


def main(arguments: Sequence[str]) -> int:
    """Runs the steps that are not done yet; the exit status is 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("gpu-results.json"))
    parser.add_argument("--before", type=Path, help="results of an earlier call, whose finished steps are skipped")
    parser.add_argument("--only", default="", help="names of steps, with commas")
    parser.add_argument("--seconds", type=int, default=530, help="for all steps together")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU, without limits")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",") if options.only else [step.name for step in STEPS]
    if unknown := set(wanted) - {step.name for step in STEPS}:
        parser.error(f"there is no step {', '.join(sorted(unknown))}: {', '.join(step.name for step in STEPS)}")
    rows = read(options.before) or read(options.results)
    began, environ = time.monotonic(), environment(options.rehearse)
    with tempfile.TemporaryDirectory(prefix="lab-gpu-") as scratch:
        for step in STEPS:
            if step.name not in wanted or any(row["step"] == step.name and row["status"] == "done" for row in rows):
                continue
            left = options.seconds - (time.monotonic() - began)
            if left < 10 and not options.rehearse:
                print(f"{step.name}: no time left", flush=True)
                continue
            limit = 600.0 if options.rehearse else min(step.seconds, left)
            more = {"LAB_GPU_SCRATCH": scratch, "LAB_GPU_SECONDS": str(limit)}
            row = run(step, limit, environ | more, options.rehearse)
            rows = [r for r in rows if r["step"] != step.name] + [row]
            write(options.results, rows)
    print(table(rows))
    return int(any(row["status"] != "done" for row in rows if row["step"] in wanted))


def environment(rehearse: bool) -> dict[str, str]:
    """What a process of lab has on this machine; the Python is the one that runs this file."""
    sys.path.insert(0, str(ROOT))
    from lab.environment import existing, variables
    from lab.environment.accelerator import Choice, choose_accelerator

    choice = Choice("cpu", "rehearsal") if rehearse else choose_accelerator(os.environ)
    plain = variables.process_environ(os.environ, choice.accelerator)
    found = existing.check(sys.executable, "", ROOT / "pyproject.toml", plain)
    choice = existing.accelerator_there(choice, found, sys.executable)
    more = {"LAB_PYTHON": sys.executable, "LAB_ACCELERATOR": choice.accelerator, "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if rehearse:
        more |= {"LAB_GPU_TINY": "1", "LAB_PLATFORM": "cpu", "JAX_PLATFORMS": "cpu"}
    return plain | more


def run(step: Step, limit: float, environ: Mapping[str, str], rehearse: bool) -> dict[str, Any]:
    """One step, stopped with all its processes at its limit: {"step", "status", "seconds", "found", "log"}."""
    began, found, log = time.monotonic(), [], []
    print(f"{step.name} ...", flush=True)
    process = subprocess.Popen([sys.executable, "-P", "-m", "tests.gpu.steps", step.name], cwd=ROOT, env=environ,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                               start_new_session=True)
    late = threading.Event()

    def stop() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, stop)
    timer.start()
    for line in process.stdout:
        if line.startswith(MARK):
            found.append(json.loads(line.removeprefix(MARK)))
            print(f"  {time.monotonic() - began:5.1f} s  {shown(found[-1])}", flush=True)
        else:
            log.append(line.rstrip()[:400])
    status = process.wait()
    timer.cancel()
    state = "done" if status == 0 else f"stopped after {limit:.0f} s" if late.is_set() else f"failed ({status})"
    if status:
        print("\n".join(f"  | {line}" for line in log[-30:]), flush=True)
    return {"step": step.name, "status": state, "seconds": round(time.monotonic() - began, 1), "found": found,
            "rehearsal": rehearse, "log": log[-40:] if status else []}


def shown(found: Mapping[str, Any]) -> str:
    """A finding on one line: figures to four digits, nothing that is long."""
    def short(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "  ".join(f"{name} {short(value)}" for name, value in found.items()
                     if isinstance(value, int | float | str) and len(str(value)) <= 100)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All that was found."""
    lines = [""]
    for row in rows:
        rehearsal = ", rehearsal" if row["rehearsal"] else ""
        lines.append(f"{row['step']}: {row['status']}, {row['seconds']:.0f} s{rehearsal}")
        lines += [f"    {shown(found)}" for found in row["found"]]
    return "\n".join(lines)


def read(path: Path | None) -> list[dict[str, Any]]:
    """The rows of a results file; none where there is no such file."""
    return json.loads(path.read_text())["steps"] if path and path.exists() else []


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the results file in one move, so that a stop leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".tmp")
    new.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "steps": rows}, indent=1) + "\n")
    new.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
