"""File writes: atomic, and never through a symbolic link. Standard library only.

A run folder may come from somebody else: a link in it (``lock -> ~/.ssh/config``) must not redirect a write.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from lab.errors import UserError, naming

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[1]
"""The checkout: the folder of `launch.sh`, `lab/` and `experiments/`."""


def user_path(text: str | Path) -> Path:
    """Expands a leading ~ or ~name in a path typed by the user, if that home folder exists."""
    return Path(os.path.expanduser(text))


def expand_home(words: Sequence[str]) -> list[str]:
    """Expands a leading ~ in command-line words, also after the = of --flag=~/file.

    The shell does not expand ~ there or within quotes. The texts of --prompt and --system are not expanded.
    """
    found, flag = [], ""
    for word in words:
        flag = word.partition("=")[0] if word.startswith("--") else flag
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if value.startswith("~") and flag not in ("--prompt", "--system"):
            word = name + equals + os.path.expanduser(value)
        found.append(word)
    return found


def _link(path: Path) -> UserError:
    return UserError(f"{path} is a symbolic link, and nothing is written through one. Delete it, or put what it points "
                     f"to in its place (checkpoints on another disk: --checkpoint-dir).")


def no_links(folder: Path) -> None:
    """Raises UserError if a folder contains a symbolic link, or what `no_pipes` refuses, at any depth; names it."""
    for path in _inside(folder):
        if os.path.islink(path):
            raise _link(path)
    no_pipes(folder)


def no_pipes(folder: Path) -> None:
    """Raises UserError if a folder contains, at any depth, what is neither a file nor a folder: a reader of a named
    pipe waits forever."""
    for path in _inside(folder):
        with contextlib.suppress(OSError):  # such as a link to nowhere
            if not (stat.S_ISREG(mode := os.stat(path).st_mode) or stat.S_ISDIR(mode)):
                raise UserError(f"{path} is neither a file nor a folder (a pipe, socket or device). Delete it.")


def _inside(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        yield from (Path(place, name) for name in (*folders, *files))


def make_folder(path: Path) -> Path:
    """Creates a folder and its parents, if missing. Raises UserError if the folder is a symbolic link."""
    if path.is_symlink():
        raise _link(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def open_file(path: Path, mode: str = "a") -> IO[str]:
    """Opens a text file to append ("a") or overwrite ("w"). Raises UserError if it is a symbolic link."""
    how = {"a": os.O_APPEND, "w": os.O_TRUNC}[mode]
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | how, 0o666)
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise _link(path) from None
        raise
    return open(number, mode, encoding="utf-8")


def replace_file(path: Path, content: str | bytes) -> None:
    """Atomically replaces a file's content, and syncs it to disk.

    Replaces a symbolic link at `path` instead of following it. Text is written as UTF-8.
    """
    # Text may contain file or class names with undecodable bytes: escape those.
    content = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with naming(path), temporary.open("xb") as file:  # x: fails on an existing file or link
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # sync the folder entry, too
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def cache_folder(kind: str) -> Path:
    """The writable folder `kind` under $LAB_CACHE, $XDG_CACHE_HOME/lab or ~/.cache/lab (the first that is set).

    If that is not writable, prints a line and uses a private folder under the system's temporary folder.
    """
    env = os.environ
    wanted = env.get("LAB_CACHE") or os.path.join(env.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "lab")
    folder = user_path(wanted) / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        reason = error.strerror or str(error)
    # One fixed folder per user, so that the next start finds it; refuse one that another user created.
    spare = Path(tempfile.gettempdir()) / f"lab-cache-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        spare.mkdir(mode=0o700)
    if spare.is_symlink() or spare.stat().st_uid != os.getuid():
        spare = Path(tempfile.mkdtemp(prefix="lab-cache-"))
    (spare / kind).mkdir(exist_ok=True)
    log.warning("cannot write the cache folder %s (%s): using %s; LAB_CACHE chooses another", wanted, reason, spare)
    return spare / kind
