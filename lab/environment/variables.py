"""Environment variables for lab processes. Standard library only."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from lab.environment.accelerator import CACHE, PLATFORMS, SetupError, digest
from lab.environment.build import ROOT


def cpu_kind() -> str:
    """A short name for the CPU model (first entry of /proc/cpuinfo) and the number of usable cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [os.uname().machine, str(cores)]
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if not line.strip():
                break
            if line.startswith(("model name", "flags", "Features", "CPU part")):
                lines.append(line)
    return digest(*lines)


def built_environ(environ: Mapping[str, str], folder: Path, accelerator: str) -> dict[str, str]:
    """`process_environ` for an environment built by lab."""
    result = process_environ(environ, accelerator)
    result.pop("PYTHONHOME", None)    # would point Python at another installation's library
    # The user's PYTHONPATH comes last, so that it cannot shadow lab's modules; see `load` in
    # lab/train/experiment_file.py.
    return result | {"VIRTUAL_ENV": str(folder), "PATH": f"{folder}/bin:{environ.get('PATH', os.defpath)}",
                     "PYTHONPATH": str(ROOT), "LAB_PYTHONPATH": environ.get("PYTHONPATH", "")}


def process_environ(environ: Mapping[str, str], accelerator: str) -> dict[str, str]:
    """Variables that must be set before the process starts. Keeps the user's values."""
    defaults = {
        "PYTHONPATH": str(ROOT),
        # Otherwise JAX only warns and falls back to the CPU if a GPU or TPU fails.
        "JAX_PLATFORMS": {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}[PLATFORMS[accelerator]],
        # Cache even small programs: a study or test run compiles hundreds. One folder per CPU model, because JAX's key
        # omits it and machines may share a home folder, and per number of cores: a program compiled on one core takes
        # 1.2 times as long on two.
        "JAX_COMPILATION_CACHE_DIR": str(CACHE / "xla" / cpu_kind()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # XLA's C++ log: errors only. Its warnings address XLA developers.
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONUTF8": "1",    # UTF-8 files and streams in any locale
    }
    first = environ.get("JAX_PLATFORMS", defaults["JAX_PLATFORMS"]).split(",")[0]
    # The chosen platform, which lab compares with the one that JAX uses.
    defaults["LAB_PLATFORM"] = {"cuda": "gpu", "rocm": "gpu", "": PLATFORMS[accelerator]}.get(first, first)
    result = defaults | dict(environ)
    if "PYTHONPATH" in environ:
        result["PYTHONPATH"] = os.pathsep.join([str(ROOT), environ["PYTHONPATH"]])
    if defaults["LAB_PLATFORM"] != "cpu":
        return result
    # YNNPACK's convolutions use one thread. Disabling them cuts mnist_cnn from 47 to 27 ms/step and a ResNet of width
    # 16 from 262 to 185, and slows toy models by 5-20 % (2 cores, jax 0.10.2). Other flags tried did not help (fast
    # math, oneDNN, vector width, fusion emitters, scheduler, XNNPACK graphs). XLA uses the last value of a repeated
    # flag, so the user's come last.
    ours = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
    result["XLA_FLAGS"] = f"{ours} {environ.get('XLA_FLAGS', '')}".strip()
    if sys.platform == "linux":
        # XLA's CPU programs allocate and free temporaries every step. glibc returns large blocks to the kernel, and
        # faulting them in again costs a quarter of the time. malloc reads these variables at process start.
        result = {
            "MALLOC_MMAP_MAX_": "0",    # large blocks come from the heap, not from mmap
            "MALLOC_TRIM_THRESHOLD_": str(2**40),    # the heap never shrinks
            "MALLOC_TOP_PAD_": "268435456",    # the heap grows by 256 MiB at a time
        } | result
    return result


def check_flags(python: str, environ: Mapping[str, str]) -> None:
    """Lets XLA read its flags in a process of its own: at a wrong one it ends the process.

    Raises:
      SetupError: a flag that XLA does not know, or a value that it cannot read.
    """
    code = "from jaxlib import xla_client; xla_client.CompileOptions()"
    done = subprocess.run([python, "-P", "-c", code], env=dict(environ), capture_output=True, text=True)
    wrong = r"(?:Unknown flags? in XLA_FLAGS|Couldn't interpret value).*"
    if done.returncode and (found := re.search(wrong, done.stderr)):
        raise SetupError(f"XLA does not take these flags: {found[0].rstrip('. ')}. Correct or unset XLA_FLAGS.")
