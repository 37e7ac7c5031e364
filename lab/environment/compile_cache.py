"""Limits the size of JAX's compilation cache, deleting the least recently used files first.

`jax_compilation_cache_max_size` does not work here: it fails permanently after a process is killed while writing an
entry, and it locks on every read.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

MOST_BYTES = 5 * 10**9  # total over all kinds of CPU
PART = 0.8  # fraction of the limit to keep
SECONDS = 3600.0  # between checks


def prune(folder: Path, most: int = MOST_BYTES, seconds: float = SECONDS) -> int:
    """If the files below a folder exceed `most` bytes, deletes the least recently used ones; returns how many. Checks
    at most every `seconds`. Safe if other processes delete files at the same time."""
    stamp, now = folder / "pruned", time.time()
    with contextlib.suppress(OSError):
        if now - stamp.stat().st_mtime < seconds:
            return 0
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.stat(path := os.path.join(place, name), follow_symlinks=False)
                found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    left, deleted = sum(size for _, size, _ in found), 0
    if left > most:
        for _, size, path in sorted(found):
            if left <= PART * most:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
                left, deleted = left - size, deleted + 1
    with contextlib.suppress(OSError):
        stamp.touch()
    return deleted


def prune_ours() -> None:
    """Prunes the cache folder only if the launcher chose it, not the user."""
    from lab.environment.accelerator import CACHE

    kept = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if kept and Path(kept).is_relative_to(CACHE / "xla") and (CACHE / "xla").is_dir():
        prune(CACHE / "xla")
