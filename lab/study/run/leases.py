"""Leases on cells: files in a folder shared by several processes and machines.

A lease is the file ``NAME.json``; after its holder dies, the next holder creates ``NAME.json.1``, then ``NAME.json.2``,
and so on. Files are created atomically and never replaced, so that only one process can succeed a dead holder. A holder
on this machine is dead when its process is gone; on another machine, when the file has not been touched for
STALE_SECONDS by the file system's clock.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import platform
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

BEAT_SECONDS = 15.0
STALE_SECONDS = 120.0
EXIT_LOST = 75  # restart the command, as after SIGTERM


def process_identity() -> dict[str, Any]:
    """Unique identifiers of this process and its machine (or container)."""
    machine, started = platform.node(), None
    with contextlib.suppress(OSError):  # Linux only; elsewhere only the heartbeat counts
        machine += ":" + Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip() + ":" + os.readlink(
            "/proc/self/ns/pid")
        started = _started(os.getpid())
    return {"machine": machine, "pid": os.getpid(), "started": started}


def _started(pid: int) -> str | None:
    """Start time in clock ticks of a local process, to detect a reused process id."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


class Lease:
    """A lease held by this process. Created by `claim`, ended by `release`."""

    def __init__(self, path: Path, before: list[Path]):
        self.path, self._before = path, before
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _lost(self) -> bool:
        later = [path for path in _leases(self.path) if _number(path) > _number(self.path)]
        return bool(later) or not self.path.exists()

    def _beat(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the disk may be unavailable briefly
                os.utime(self.path)
            # Check twice: a competing `claim` may create a later file and remove it at once.
            if self._lost() and not self._done.wait(1) and self._lost():
                # This machine slept, or lost the disk, for so long that another process took over the cell. Further
                # writes would damage its files, and everything saved so far is valid: exit immediately.
                print(f"error: {self.path} was taken over by another process. Run the same command again.",
                      file=sys.stderr, flush=True)
                os._exit(EXIT_LOST)

    def release(self) -> None:
        """Lets another process claim the cell."""
        self._done.set()
        self._thread.join()
        for path in [*self._before, self.path]:  # our own last, so that the lease looks alive until the end
            path.unlink(missing_ok=True)


def claim(folder: Path, name: str) -> Lease | None:
    """The lease on `name`, or None while another process holds it.

    Raises:
      OSError: the folder is not writable.
    """
    before = _leases(folder / f"{name}.json")
    if any(alive(path) for path in before):
        return None
    number = _number(before[-1]) + 1 if before else 0
    path = folder / f"{name}.json{f'.{number}' if number else ''}"
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(process_identity(), file)
    except FileExistsError:
        return None
    if any(alive(other) for other in _leases(path) if other != path):  # two processes claimed at once
        path.unlink()
        return None
    return Lease(path, before)


def busy(folder: Path, name: str) -> bool:
    """Whether a living process holds the lease on `name`."""
    return any(alive(path) for path in _leases(folder / f"{name}.json"))


def alive(path: Path) -> bool:
    """Whether the holder of a lease file is alive."""
    try:
        age = _now(path.parent) - path.stat().st_mtime
        holder = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return False  # just released
    except ValueError:
        return age < STALE_SECONDS  # incomplete: being written, or its writer died
    here = process_identity()
    if holder["machine"] == here["machine"] and here["started"] is not None:
        return _started(holder["pid"]) == holder["started"]
    return age < STALE_SECONDS


def _now(folder: Path) -> float:
    """The current time by the file system's clock, which may be another machine's."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _number(path: Path) -> int:
    return 0 if path.suffix == ".json" else int(path.suffix[1:])


def _leases(path: Path) -> list[Path]:
    """All files of a lease, oldest first."""
    first = path if path.suffix == ".json" else path.with_suffix("")
    later = [p for p in path.parent.glob(f"{glob.escape(first.name)}.*") if p.suffix[1:].isdigit()]
    return ([first] if first.exists() else []) + sorted(later, key=_number)
