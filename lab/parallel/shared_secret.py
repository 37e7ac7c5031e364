"""The shared secret of a multi-process run, and the proof that a peer has it.

A launcher passes it to all processes in LAB_SECRET. Without a launcher (a bare `srun` or `mpirun`) it is a private file
in the user's cache folder, so the machines must share a home folder.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from lab.errors import UserError
from lab.files import cache_folder

LEAST = 16  # minimum length of LAB_SECRET


def new_secret(environ: Mapping[str, str] = os.environ) -> str:
    """The value that a launcher puts into LAB_SECRET: the user's own, else a random one."""
    return environ.get("LAB_SECRET") or secrets.token_hex(16)


def shared_secret(environ: Mapping[str, str] = os.environ) -> bytes:
    """LAB_SECRET, else the content of the user's secret file.

    Raises:
      UserError: LAB_SECRET is too short, or other users may read the file.
    """
    if text := environ.get("LAB_SECRET"):
        if len(text) < LEAST:
            raise UserError(f"LAB_SECRET has {len(text)} characters; give all processes the same {LEAST} or more.")
        return text.encode()
    path = cache_folder("secret") / "key"
    if not path.exists():
        _create(path)
    limit = time.monotonic() + 5  # a network file system may show the content late
    while len(found := path.read_bytes()) < LEAST and time.monotonic() < limit:
        time.sleep(0.1)
    about = path.lstat()
    if path.is_symlink() or about.st_uid != os.getuid() or about.st_mode & 0o077 or len(found) < LEAST:
        raise UserError(f"{path}, the secret of runs of several processes, is not a file that only you can read. "
                        f"Delete it, and start all processes again.")
    return found


def _create(path: Path) -> None:
    """Creates the file atomically: of several concurrent processes one wins, and all read its secret."""
    own = path.with_name(f"{secrets.token_hex(8)}.tmp")
    with open(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(secrets.token_hex(32))
    with contextlib.suppress(FileExistsError):
        os.link(own, path)
    own.unlink()


def proof(secret: bytes, *said: object) -> str:
    """HMAC-SHA256 of `said` with the secret."""
    return hmac.new(secret, repr(said).encode(), "sha256").hexdigest()


def proves(claim: object, secret: bytes, *said: object) -> bool:
    """Whether `claim` equals `proof(secret, *said)`; constant-time comparison."""
    return isinstance(claim, str) and hmac.compare_digest(claim.encode(), proof(secret, *said).encode())
