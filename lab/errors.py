"""Exceptions for errors that the user can fix: the command line prints them without a traceback and exits with 2."""

import contextlib
import difflib
import errno
import inspect
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
LAB = Path(__file__).resolve().parent


class UserError(Exception):
    """An error in an experiment, flag, file or machine. The message contains the problem, its place and a remedy."""


class Absent(UserError):
    """Data is not on this machine. A dry run reports this and continues: the run may be for another machine."""


class CannotWrite(UserError):
    """A disk is full or not writable. A study stops, because its remaining runs would fail, too."""


# OS errors and advice.
_REFUSED = {
    errno.ENOSPC: "Free some space", errno.EDQUOT: "Free some space, or ask for a larger quota",
    errno.EROFS: "Choose a place that can be written", errno.EACCES: "Unlock it", errno.EPERM: "Unlock it",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f)", errno.EIO: "Check the disk for errors",
    errno.EMFILE: "Raise the limit on open files (ulimit -n)", errno.ENFILE: "Raise the limit on open files",
    errno.EISDIR: "Delete or rename what is there", errno.ENOTDIR: "Delete or rename what is there",
    errno.EEXIST: "Delete or rename what is there", errno.ENOTEMPTY: "Delete or rename what is there",
    errno.ENOMEM: "Free memory, or raise the limit on it (ulimit -v)", errno.ESTALE: "Mount the disk again",
}

# Out-of-memory messages of libraries: while loading, starting threads, or running in C++.
_NO_MEMORY = ("failed to map segment", "can't start new thread", "Cannot allocate memory", "std::bad_alloc")

# JAX appends places in lab's code to its messages; the text is cut there.
_OURS = re.compile(r"\n\n|\nThe error occurred while tracing|\nThis concrete value|\nSee https://")

# Errors caused by the path that the user typed.
_BAD_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)

# Packages imported where they are used, so that lab works without them: module -> package name.
_OPTIONAL = {"grain": "grain", "tensorflow_datasets": "tensorflow-datasets", "matplotlib": "matplotlib",
             "PIL": "pillow", "importlib_resources": "importlib_resources", "psutil": "psutil",
             "sklearn": "scikit-learn", "tokenizers": "tokenizers",
             "huggingface_hub": "huggingface-hub", "einops": "einops"}


def explain(error: BaseException) -> tuple[int, str] | None:
    """(exit status, message) of an exception that the user can fix; None for a bug in lab."""
    if isinstance(error, KeyboardInterrupt):
        return 130, ""
    if isinstance(error, BrokenPipeError):  # the reader of our output (head, less) has exited
        return 141, ""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, ModuleNotFoundError) and (package := _OPTIONAL.get((error.name or "").partition(".")[0])):
        return 2, f"This needs the package {package}, which is not installed: {sys.executable} -m pip install {package}"
    if isinstance(error, OSError) and error.errno in _REFUSED:
        place = error.filename or "A file"
        done = "opened" if error.errno in (errno.EMFILE, errno.ENFILE) else "written"
        return 2, (f"{place} cannot be {done}: {error.strerror}. {_REFUSED[error.errno]} and run the same "
                   f"command: a run resumes from its last checkpoint.")
    if isinstance(error, OSError) and error.errno in _BAD_PATHS:
        place = str(error.filename or "A path")
        return 2, f"{place if len(place) <= 200 else f'{place[:200]}...'}: {error.strerror}. Give another path."
    text = str(error)
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in text:  # raised by JAX for device memory
        return 2, (f"The device is out of memory ({text.splitlines()[0][:200]}). Use a larger "
                   f"--grad-accum-steps or a smaller --batch.")
    if isinstance(error, MemoryError) or (isinstance(error, ImportError | RuntimeError)
                                          and any(sign in text for sign in _NO_MEMORY)):
        return 2, ("There is not enough memory, or the limit on it is too low (ulimit -v). Raise it and run the same "
                   "command: a run resumes from its last checkpoint.")
    if isinstance(error, Exception) and (line := authors_line(error)):
        return 2, line
    return None


def where(thing: Any) -> str:
    """Location prefix "FILE, line N: " of a class or function outside lab, else ""."""
    try:
        file, line = inspect.getsourcefile(thing), inspect.getsourcelines(thing)[1]
    except (OSError, TypeError):
        return ""
    return "" if file is None or LAB in Path(file).resolve().parents else f"{file}, line {line}: "


def authors_line(error: BaseException) -> str | None:
    """"FILE, line N: Type: text" for an exception in user code, at the innermost frame outside lab and libraries. None
    if there is no such frame.
    """
    libraries = {str(Path(prefix).resolve()) for prefix in (sys.prefix, sys.base_prefix)} | {str(LAB)}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if frame.filename.startswith("<") or "site-packages" in file.parts or any(
                str(path).startswith(tuple(libraries)) for path in (file, file.resolve())):
            continue
        text = _OURS.split(str(error).strip())[0]
        return f"{frame.filename}, line {frame.lineno}: {type(error).__name__}{': ' if text else ''}{text}"
    return None


@contextlib.contextmanager
def naming(path: os.PathLike[str]) -> Iterator[None]:
    """Adds the file name to OSErrors of operations on an open file (disk full, size limit), which lack it."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or str(path)
        raise


@contextlib.contextmanager
def forgiving(what: str) -> Iterator[None]:
    """Context that logs an exception as one line (output and reason) instead of failing the run.

    For pictures, samples and comparisons, which libraries may fail to produce after the results are saved.
    """
    try:
        yield
    except Exception as e:
        reason = (str(e).splitlines() or [""])[0][:200]
        log.warning("warning: %s failed: %s", what, f"{type(e).__name__}: {reason}" if reason else type(e).__name__)


def nearest(word: str, known: Iterable[str], otherwise: str = "", cutoff: float = 0.6) -> str:
    """The end of a message on an unknown word: the known one that is most like it, else `otherwise`."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" Perhaps you meant {near[0]}." if near else otherwise


def check_words(args: Sequence[str]) -> None:
    """Raises UserError for a word that is not valid text and so cannot be printed or written to a file."""
    for word in args:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(f"{ascii(word)[:120]} is not UTF-8. Rename the file or folder, or type the text again in a "
                            f"terminal that writes UTF-8.") from None
