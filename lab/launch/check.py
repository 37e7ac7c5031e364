"""Checks a command's flags locally with --dry-run before launching it elsewhere."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from lab.errors import UserError
from lab.files import ROOT
from lab.launch.job import Job, forwarded


def python(job: Job) -> Path | None:
    """The Python of an environment already built here, for LAB_ACCELERATOR or the CPU; None if there is none."""
    from lab.environment import accelerator, build

    environ = os.environ | forwarded(job)
    for kind in (environ.get("LAB_ACCELERATOR"), "cpu"):
        if kind not in accelerator.PLATFORMS:
            continue
        try:
            asked = build.asked_extras(environ)
        except accelerator.SetupError as e:
            raise UserError(str(e)) from None
        for extras in (asked, []):
            name = build.plan_environment([kind, *extras], "").name
            for store in build.stores():
                if build.finished(store / name):
                    return store / name / "bin/python"
    return None


def check_flags(job: Job, accelerator: bool) -> str:
    """Checks the flags of an experiment or a study: "" if they are valid, else why they could not be checked.

    `accelerator`: whether the target has one, so that the real experiment is the default. Runs on the local CPU.

    Raises:
      UserError: a flag or a value is wrong; the message is that of `EXPERIMENT --dry-run`.
    """
    if not job.words[0].endswith(".py"):
        return "only those of experiments can be looked at"
    interpreter = python(job)
    if interpreter is None:
        return "no environment is built here yet (./launch.sh env)"
    full = ["--full"] if accelerator and not {"--full", "--local"} & set(job.words) else []
    environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "LAB_PLATFORM": "cpu", "COLUMNS": "100"}
    done = subprocess.run([str(interpreter), "-P", "-m", "lab", *job.words, *full, "--dry-run"], env=environ,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return ""
    lines = [line.strip("│╭╰─╮╯ ") for line in done.stderr.splitlines()]  # tyro draws a box around an unknown flag
    lines = [line for line in lines if line]
    message = " ".join(line for line, after in zip(lines, [*lines[1:], ""], strict=True) if not after.startswith(line))
    message = message.removeprefix("error: ")
    raise UserError(message[:600] or f"--dry-run of this command ends with status {done.returncode}.")
