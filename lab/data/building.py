"""Folders of the cache that several processes may want at once: each appears whole or not at all, and is never removed.

Where the file system has locks one process builds and the others wait. Where it has none the work may be done twice:
every process builds in a folder of its own, whose name says whose it is, and the first one to rename it wins.
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
    """What `check(folder)` finds, after `make` has filled the folder where there is none or a damaged one.

    `check` gives None for a folder that is missing or damaged; `make` gets an empty temporary folder; `task` says what
    it does ("tokenising the same text"), `advice` what else helps against a full disk.

    Raises:
      UserError: the disk is full, or what was written cannot be read back.
    """
    found = check(folder)
    if found is None:
        with _alone(folder, task):
            found = check(folder)  # perhaps another process has made it while this one waited
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
    """One process of this machine at a time; the operating system lets go of the lock when a process dies."""
    import fcntl

    with (cache_folder("locks") / f"{folder.parent.name}-{folder.name}").open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is %s: waiting for it", task)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
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
    """Rename `temporary` to `folder`, unless a good one is there already: same name, same content."""
    for attempt in range(100):
        try:
            os.rename(temporary, folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        if check(folder) is not None:
            return
        # A damaged one makes room. Should a good one have come between these two lines, ours, its equal, follows.
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, temporary.with_name(f"{temporary.name}-damaged-{attempt}"))


def _abandoned(owner: str) -> bool:
    """Whether a folder of this machine, whose name ends in PID-TOKEN, has lost the process that made it."""
    process = owner.partition("-")[0]
    if not process.isdigit():  # of a machine whose name begins with this one's
        return False
    try:
        os.kill(int(process), 0)  # signal 0 asks only
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False
