"""Data ingredients: where records come from and how they become batches. Nothing here imports JAX at module level."""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import tempfile
from pathlib import Path

log = logging.getLogger("lab.data")


def digest(*parts: object) -> str:
    """A short, stable name (16 hex digits of sha256) for a sequence of plain values."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()[:16]


def cache_folder(kind: str) -> Path:
    """The writable folder `kind` under $LAB_CACHE, $XDG_CACHE_HOME/lab or ~/.cache/lab (the first that is set).

    Where that cannot be written, a private folder under the system's temporary one is used, and one line says so.
    """
    env = os.environ
    wanted = env.get("LAB_CACHE") or os.path.join(env.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "lab")
    folder = Path(wanted).expanduser() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        reason = error.strerror or str(error)
    # One folder per user, so that the next start finds it again; never one that somebody else prepared for us.
    spare = Path(tempfile.gettempdir()) / f"lab-cache-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        spare.mkdir(mode=0o700)
    if spare.is_symlink() or spare.stat().st_uid != os.getuid():
        spare = Path(tempfile.mkdtemp(prefix="lab-cache-"))
    (spare / kind).mkdir(exist_ok=True)
    log.warning("cannot write the cache folder %s (%s): using %s; LAB_CACHE chooses another", wanted, reason, spare)
    return spare / kind


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part; a link at `path` is replaced."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:  # x: never through a file or link that is there already
            file.write(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
