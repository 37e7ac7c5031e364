"""The variables that a process of lab starts with. Standard library only."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from lab.environment.accelerator import CACHE, PLATFORMS, digest

ROOT = Path(__file__).resolve().parents[2]


def cpu_kind() -> str:
    """A short name for this kind of CPU, from the first entry of /proc/cpuinfo, and the cores that may be used."""
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
    """`process_environ` for an environment that was built here."""
    result = process_environ(environ, accelerator)
    result.pop("PYTHONHOME", None)    # it would send the environment's Python to another one's library
    # What PYTHONPATH holds comes last, see `load` in lab/train/experiment_file.py: nothing there may
    # stand in for a module of ours.
    return result | {"VIRTUAL_ENV": str(folder), "PATH": f"{folder}/bin:{environ.get('PATH', os.defpath)}",
                     "PYTHONPATH": str(ROOT), "LAB_PYTHONPATH": environ.get("PYTHONPATH", "")}


def process_environ(environ: Mapping[str, str], accelerator: str) -> dict[str, str]:
    """The variables that must be set before the process starts. What the user has set stays as it is."""
    defaults = {
        "PYTHONPATH": str(ROOT),
        # Without it JAX falls back to the CPU with a warning when a GPU or TPU cannot be used.
        "JAX_PLATFORMS": {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}[PLATFORMS[accelerator]],
        # Compiled programs are kept, small and quick ones too: a study or a test run has hundreds of them. One folder
        # per kind of CPU, which JAX's key leaves out though a home folder may be shared by different machines, and per
        # number of cores: what was compiled on one takes 1.2 of the time on two.
        "JAX_COMPILATION_CACHE_DIR": str(CACHE / "xla" / cpu_kind()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # XLA's C++ log: errors only. Its warnings are notes to its developers.
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONUTF8": "1",    # files and streams are UTF-8, whatever the locale
    }
    first = environ.get("JAX_PLATFORMS", defaults["JAX_PLATFORMS"]).split(",")[0]
    # What was chosen, for lab to compare with what JAX really uses.
    defaults["LAB_PLATFORM"] = {"cuda": "gpu", "rocm": "gpu", "": PLATFORMS[accelerator]}.get(first, first)
    result = defaults | dict(environ)
    if "PYTHONPATH" in environ:
        result["PYTHONPATH"] = os.pathsep.join([str(ROOT), environ["PYTHONPATH"]])
    if defaults["LAB_PLATFORM"] != "cpu":
        return result
    # YNNPACK's convolutions use one thread. Without them mnist_cnn takes 27 ms an update instead of 47, a ResNet of
    # width 16 185 instead of 262, and toys 5-20 % more (2 cores, jax 0.10.2). Of the other flags tried (fast math,
    # oneDNN, vector width, fusion emitters, scheduler, XNNPACK graphs) none gained anything. Of a flag that is given
    # twice XLA takes the second, so the user's come last.
    ours = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
    result["XLA_FLAGS"] = f"{ours} {environ.get('XLA_FLAGS', '')}".strip()
    if sys.platform == "linux":
        # XLA's CPU programs allocate and free their temporaries at every step. glibc gives large blocks back to the
        # kernel, and faulting them in costs a quarter of the time. Read by malloc at process start, hence here.
        result = {
            "MALLOC_MMAP_MAX_": "0",    # large blocks come from the heap, not from mmap
            "MALLOC_TRIM_THRESHOLD_": str(2**40),    # the heap never shrinks
            "MALLOC_TOP_PAD_": "268435456",    # and grows by 256 MiB at a time
        } | result
    return result
