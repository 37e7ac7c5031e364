"""The shared secret of a multi-process run, which its processes prove to one another that they hold.

A launcher passes it to all processes in LAB_SECRET. Without a launcher (a bare `srun` or `mpirun`) it is a private file
in the user's cache folder, so the machines must share a home folder.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
import time
from collections.abc import Mapping

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
    if not path.exists():  # atomically: of several concurrent processes one wins, and all read its secret
        number, own = tempfile.mkstemp(dir=path.parent)
        with open(number, "w", encoding="utf-8") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):
            os.link(own, path)
        os.unlink(own)
    limit = time.monotonic() + 5  # a network file system may show the content late
    while len(found := path.read_bytes()) < LEAST and time.monotonic() < limit:
        time.sleep(0.1)
    about = path.lstat()
    if path.is_symlink() or about.st_uid != os.getuid() or about.st_mode & 0o077 or len(found) < LEAST:
        raise UserError(f"{path}, the secret of runs of several processes, is not a file that only you can read. "
                        f"Delete it, and start all processes again.")
    return found

