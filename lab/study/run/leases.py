"""Who works on which cell: files in a folder that several processes and machines share.

A lease is ``NAME.json``; one whose holder is gone is succeeded by ``NAME.json.1``, that by ``NAME.json.2``, and so on.
Each is created atomically and none is ever replaced, so that of several who want to succeed a dead holder one does. A
holder on this machine is dead when its process is gone; one elsewhere when the file has not been touched for
STALE_SECONDS, by the clock of the disk.
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
EXIT_LOST = 75  # as after SIGTERM: start me again


def process_identity() -> dict[str, Any]:
    """What tells this process from every other one, and its machine (or container) from every other one."""
    machine, started = platform.node(), None
    with contextlib.suppress(OSError):  # Linux; elsewhere another process is only known by its heartbeat
        machine += ":" + Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip() + ":" + os.readlink(
            "/proc/self/ns/pid")
        started = _started(os.getpid())
    return {"machine": machine, "pid": os.getpid(), "started": started}


def _started(pid: int) -> str | None:
    """When a process of this machine was started, in clock ticks: the same number may be another process by now."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


class Lease:
    """One cell, held by this process. Made by `claim`, given back by `release`."""

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
            with contextlib.suppress(OSError):  # the disk is away for a moment; if for longer, somebody takes over
                os.utime(self.path)
            # Twice: one that looks at the same moment as another may be there shortly, and goes away.
            if self._lost() and not self._done.wait(1) and self._lost():
                # This machine slept, or the disk was away, for so long that another process took the cell over. Writing
                # on would damage its files, and everything that we saved is good: end here and now.
                print(f"error: {self.path} was taken over by another process. The same command goes on.",
                      file=sys.stderr, flush=True)
                os._exit(EXIT_LOST)

    def release(self) -> None:
        """Lets others have the cell."""
        self._done.set()
        self._thread.join()
        for path in [*self._before, self.path]:  # ours last: as long as one of them is there it is a living one
            path.unlink(missing_ok=True)


def claim(folder: Path, name: str) -> Lease | None:
    """The lease on `name`, or None while another process has it.

    Raises:
      OSError: the folder cannot be written.
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
    if any(alive(other) for other in _leases(path) if other != path):  # two came at once, and saw different files
        path.unlink()
        return None
    return Lease(path, before)


def busy(folder: Path, name: str) -> bool:
    """Whether a living process holds the lease on `name`."""
    return any(alive(path) for path in _leases(folder / f"{name}.json"))


def alive(path: Path) -> bool:
    """Whether the holder of a lease file still works."""
    try:
        age = _now(path.parent) - path.stat().st_mtime
        holder = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return False  # given back this moment
    except ValueError:
        return age < STALE_SECONDS  # being written, or its writer died over it
    here = process_identity()
    if holder["machine"] == here["machine"] and here["started"] is not None:
        return _started(holder["pid"]) == holder["started"]
    return age < STALE_SECONDS


def _now(folder: Path) -> float:
    """The time by the clock that dates files in this folder, which may be another machine's."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _number(path: Path) -> int:
    return 0 if path.suffix == ".json" else int(path.suffix[1:])


def _leases(path: Path) -> list[Path]:
    """All files of the same lease, oldest first."""
    first = path if path.suffix == ".json" else path.with_suffix("")
    later = [p for p in path.parent.glob(f"{glob.escape(first.name)}.*") if p.suffix[1:].isdigit()]
    return ([first] if first.exists() else []) + sorted(later, key=_number)
