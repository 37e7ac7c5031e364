"""Keeps the folder of compiled programs small: what was not used for the longest time goes first.

Not by `jax_compilation_cache_max_size`, which fails for good where a process was killed while it wrote an entry, and
takes a lock for every read.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

MOST_BYTES = 5 * 10**9  # of all kinds of CPU together
PART = 0.8  # of it is left by a pruning
SECONDS = 3600.0  # between two looks


def prune(folder: Path, most: int = MOST_BYTES, seconds: float = SECONDS) -> int:
    """Deletes the files of a folder, at any depth, that were not used for the longest time, if all are more than `most`
    bytes; returns how many. Looks at most every `seconds`; what another process deletes meanwhile is no trouble."""
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
    """Prunes where the launcher put it; a folder that the user chose is the user's."""
    from lab.environment.accelerator import CACHE

    kept = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if kept and Path(kept).is_relative_to(CACHE / "xla") and (CACHE / "xla").is_dir():
        prune(CACHE / "xla")
