"""The secret that the processes of one run share, and how two of them prove to each other that they have it.

A launcher hands it to all of them in LAB_SECRET. Where none does (a bare `srun` or `mpirun`), it is a file of the
user's in the cache folder, which the processes of one machine, or of machines with one home folder, all read.
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

LEAST = 16  # characters of LAB_SECRET


def new_secret(environ: Mapping[str, str] = os.environ) -> str:
    """What a launcher puts into LAB_SECRET: what the user has put there, else something new."""
    return environ.get("LAB_SECRET") or secrets.token_hex(16)


def shared_secret(environ: Mapping[str, str] = os.environ) -> bytes:
    """LAB_SECRET, or else the user's own file.

    Raises:
      UserError: LAB_SECRET is too short, or others may read the file.
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
    """Of several who come at once one wins, and all read its secret."""
    own = path.with_name(f"{secrets.token_hex(8)}.tmp")
    with open(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(secrets.token_hex(32))
    with contextlib.suppress(FileExistsError):
        os.link(own, path)
    own.unlink()


def proof(secret: bytes, *said: object) -> str:
    """What only somebody with the secret can say about `said`."""
    return hmac.new(secret, repr(said).encode(), "sha256").hexdigest()


def proves(claim: object, secret: bytes, *said: object) -> bool:
    """Whether a claim is `proof(secret, *said)`, compared in constant time."""
    return isinstance(claim, str) and hmac.compare_digest(claim.encode(), proof(secret, *said).encode())
