"""Cache folders that several processes may build concurrently: each is published atomically and never removed.

On a file system with locks, one process builds and the rest wait. Without locks the work may be done twice: every
process builds in its own temporary folder, named after the process, and the first one to rename it wins.
"""

import contextlib
import errno
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from lab.data import cache_folder, log
from lab.errors import UserError

T = TypeVar("T")


def built(folder: Path, check: Callable[[Path], T | None], make: Callable[[Path], None], task: str,
          advice: str = "") -> T:
    """Returns `check(folder)`, after `make` has filled the folder if it was missing or damaged.

    `check` returns None for a missing or damaged folder. `make` fills an empty temporary folder. `task` describes the
    work in messages ("tokenising the same text"). `advice`: a further remedy to suggest when the disk is full.

    Raises:
      UserError: the disk is full, or the new folder fails `check`.
    """
    found = check(folder)
    if found is None:
        with _alone(folder, task):
            found = check(folder)  # another process may have built it during the wait
            if found is None:
                if folder.exists():
                    log.warning("the cached files in %s are damaged: making them again", folder)
                _build(folder, check, make, advice)
                found = check(folder)
    if found is None:
        raise UserError(f"The files in {folder}, written a moment ago, cannot be read: look at that disk.")
    return found


@contextlib.contextmanager
def _alone(folder: Path, task: str) -> Iterator[None]:
    """Lock for one process per machine; the operating system releases it when the process dies."""
    import fcntl

    with (cache_folder("locks") / f"{folder.parent.name}-{folder.name}").open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is %s: waiting for it", task)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # the file system has no locks
        yield


def _build(folder: Path, check: Callable[[Path], T | None], make: Callable[[Path], None], advice: str) -> None:
    own = f".tmp-{folder.name}-{socket.gethostname()}-"
    for junk in folder.parent.glob(f"{own}*"):
        if _abandoned(junk.name.removeprefix(own)):
            shutil.rmtree(junk, ignore_errors=True)
    temporary = folder.with_name(f"{own}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        make(temporary)
        _publish(temporary, folder, check)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder.parent).free
        raise UserError(f"The disk of the cache folder {folder.parent} is full ({free / 1e6:.0f} MB free): make room, "
                        f"or set LAB_CACHE to a folder on another disk{advice}.") from None
    finally:
        for left in folder.parent.glob(f"{temporary.name}*"):
            shutil.rmtree(left, ignore_errors=True)


def _publish(temporary: Path, folder: Path, check: Callable[[Path], T | None]) -> None:
    """Rename `temporary` to `folder`, unless an undamaged one exists: the same name means the same content."""
    for attempt in range(100):
        try:
            os.rename(temporary, folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        if check(folder) is not None:
            return
        # Move the damaged folder away. If an undamaged one has just replaced it, publishing our equal copy is fine.
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, temporary.with_name(f"{temporary.name}-damaged-{attempt}"))


def _abandoned(owner: str) -> bool:
    """Whether the process that made a temporary folder on this machine (`owner`: PID-TOKEN) has died."""
    process = owner.partition("-")[0]
    if not process.isdigit():  # of another machine, whose host name starts with this one's
        return False
    try:
        os.kill(int(process), 0)  # signal 0 only tests for existence
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False
