"""Selects the build of JAX for this machine: TPU, CUDA 13, CUDA 12, or CPU. Standard library only, see bootstrap.py."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lab import signals

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "lab"
PLATFORMS = {"cpu": "cpu", "cuda12": "gpu", "cuda13": "gpu", "tpu": "tpu"}    # accelerator -> LAB_PLATFORM
NVIDIA_PROC = Path("/proc/driver/nvidia")
WSL_SMI = Path("/usr/lib/wsl/lib/nvidia-smi")    # not always on WSL's PATH
PCI_DEVICES = Path("/sys/bus/pci/devices")
# The PCI ids that JAX uses. /dev/accel* is unreliable: newer TPUs use /dev/vfio, and other vendors use /dev/accel.
TPU_DEVICES = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}


class SetupError(Exception):
    """An error that the user can fix; prints only its message and exits with status 2."""


def digest(*parts: str | bytes) -> str:
    """Hash of the parts, as 12 hexadecimal digits."""
    return hashlib.sha256(b"\0".join(p if isinstance(p, bytes) else p.encode() for p in parts)).hexdigest()[:12]


class Choice(NamedTuple):
    """A build of JAX, and the reason for choosing it."""

    accelerator: str
    reason: str


def choose_accelerator(environ: Mapping[str, str]) -> Choice:
    """The build of JAX for this machine."""
    if wish := environ.get("LAB_ACCELERATOR"):
        if wish not in PLATFORMS:
            raise SetupError(f"LAB_ACCELERATOR={wish} is not one of {', '.join(PLATFORMS)}.")
        return Choice(wish, "LAB_ACCELERATOR asks for it")
    if environ.get("TPU_WORKER_HOSTNAMES"):    # TPU slices on Kubernetes
        return Choice("tpu", "TPU_WORKER_HOSTNAMES is set")
    for device in PCI_DEVICES.glob("*"):
        with contextlib.suppress(OSError):
            # Google's network cards share the vendor id, so check the device id too.
            vendor, kind = ((device / name).read_text("utf-8").strip() for name in ("vendor", "device"))
            if vendor == "0x1ae0" and kind in TPU_DEVICES:
                return Choice("tpu", "a TPU is on the PCI bus")
    return choose_nvidia()


def choose_nvidia() -> Choice:
    """The choice for NVIDIA GPUs, or the CPU without any. Caches nvidia-smi's answer, which can take seconds."""
    smi = shutil.which("nvidia-smi") or (str(WSL_SMI) if WSL_SMI.exists() else None)
    driver_text = ""
    with contextlib.suppress(OSError):
        driver_text = (NVIDIA_PROC / "version").read_text("utf-8")
    if not smi and not driver_text:
        return Choice("cpu", "no TPU or NVIDIA GPU was found")
    if not driver_text:    # WSL lacks this file, which the cache key needs
        return ask_nvidia_smi(smi)
    if not smi:    # a container without nvidia-smi: CUDA 12 supports every GPU that CUDA 13 does
        found = re.search(r"\s(\d{3,})\.\d+", driver_text)
        return cuda_for(int(found[1]) if found else 0, None)
    gpus = "".join(path.read_text("utf-8") for path in sorted(NVIDIA_PROC.glob("gpus/*/information")))
    note = CACHE / "nvidia" / digest(os.uname().nodename, driver_text, gpus)
    with contextlib.suppress(OSError, ValueError):
        return Choice(*note.read_text("utf-8").split("\t", 1))
    choice = ask_nvidia_smi(smi)
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text("\t".join(choice), "utf-8")
    return choice


def ask_nvidia_smi(smi: str) -> Choice:
    """The choice by driver version and oldest GPU, from nvidia-smi."""
    signals.heed()    # nvidia-smi can take seconds
    query = [smi, "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
        rows = [line.split(",") for line in answer.stdout.splitlines() if line.strip()]
        if answer.returncode or not rows:
            raise ValueError
        return cuda_for(int(rows[0][0].split(".")[0]), min(float(row[1]) for row in rows))
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return Choice("cpu", "nvidia-smi is there but reports no usable GPU")


def cuda_for(driver: int, capability: float | None) -> Choice:
    """CUDA 13 needs driver 580 and compute capability 7.5; CUDA 12 needs 525 and 5.2. `None`: unknown."""
    if driver < 525:
        return Choice("cpu", f"the NVIDIA driver is version {driver}, and JAX needs 525 or newer to use the GPU")
    if capability is not None and capability < 5.2:
        return Choice("cpu", f"the GPU has compute capability {capability}, and JAX needs 5.2 or newer")
    reason = f"NVIDIA driver {driver}, compute capability {capability or 'unknown'}"
    return Choice("cuda13" if driver >= 580 and capability is not None and capability >= 7.5 else "cuda12", reason)
