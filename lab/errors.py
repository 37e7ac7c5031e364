"""The exceptions that mean "a person can fix this": the command line prints them and exits 2, without a traceback."""

import contextlib
import errno
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
LAB = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake in an experiment, a flag, a file or a machine. The text says what is wrong, where, and what to do."""


class Absent(UserError):
    """Data that is not on this machine; a dry run says so and goes on, since the run may be meant for another one."""


class CannotWrite(UserError):
    """A disk is full or not writable: it is no use to try another run of a study."""


# What the operating system refuses, and what helps.
_REFUSED = {
    errno.ENOSPC: "Free some space", errno.EDQUOT: "Free some space, or ask for a larger quota",
    errno.EROFS: "Choose a place that can be written", errno.EACCES: "Unlock it", errno.EPERM: "Unlock it",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f)", errno.EIO: "Look after the disk",
    errno.EMFILE: "Raise the limit on open files (ulimit -n)", errno.ENFILE: "Raise the limit on open files",
    errno.EISDIR: "Delete or rename what is there", errno.ENOTDIR: "Delete or rename what is there",
    errno.EEXIST: "Delete or rename what is there", errno.ENOTEMPTY: "Delete or rename what is there",
    errno.ENOMEM: "Free memory, or raise the limit on it (ulimit -v)", errno.ESTALE: "Mount the disk again",
}

# How libraries say that there is no memory: while they are loaded, started, or at work in C++.
_NO_MEMORY = ("failed to map segment", "can't start new thread", "Cannot allocate memory", "std::bad_alloc")

# Of whatever path was typed.
_BAD_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)

# Packages that are imported where they are used, so that an environment without them can do the rest: module -> name.
_OPTIONAL = {"grain": "grain", "tensorflow_datasets": "tensorflow-datasets", "matplotlib": "matplotlib",
             "PIL": "pillow", "importlib_resources": "importlib_resources", "psutil": "psutil",
             "sklearn": "scikit-learn", "tokenizers": "tokenizers", "einops": "einops"}


def explain(error: BaseException) -> tuple[int, str] | None:
    """(exit status, sentence for a person) of an exception; None for one that is a mistake of the program's."""
    if isinstance(error, KeyboardInterrupt):
        return 130, ""
    if isinstance(error, BrokenPipeError):  # the reader of our output (head, less) has seen enough
        return 141, ""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, ModuleNotFoundError) and (package := _OPTIONAL.get((error.name or "").partition(".")[0])):
        return 2, f"This needs the package {package}, which is not installed: {sys.executable} -m pip install {package}"
    if isinstance(error, OSError) and error.errno in _REFUSED:
        place = error.filename or "A file"
        done = "opened" if error.errno in (errno.EMFILE, errno.ENFILE) else "written"
        return 2, (f"{place} cannot be {done}: {error.strerror}. {_REFUSED[error.errno]} and run the same command: a "
                   f"run goes on from its last checkpoint.")
    if isinstance(error, OSError) and error.errno in _BAD_PATHS:
        place = str(error.filename or "A path")
        return 2, f"{place if len(place) <= 200 else f'{place[:200]}...'}: {error.strerror}. Give another path."
    text = str(error)
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in text:  # JAX's, of a device
        return 2, (f"The memory of the device does not hold this ({text.splitlines()[0][:200]}). A larger "
                   f"--grad-accum-steps or a smaller --batch needs less.")
    if isinstance(error, MemoryError) or (isinstance(error, ImportError | RuntimeError)
                                          and any(sign in text for sign in _NO_MEMORY)):
        return 2, ("There is not enough memory, or the limit on it is too low (ulimit -v). Raise it and run the same "
                   "command: a run goes on from its last checkpoint.")
    if isinstance(error, Exception) and (line := authors_line(error)):
        return 2, line
    return None


def where(thing: Any) -> str:
    """"FILE, line N: " of a class or function outside lab, else ""."""
    try:
        file, line = inspect.getsourcefile(thing), inspect.getsourcelines(thing)[1]
    except (OSError, TypeError):
        return ""
    return "" if file is None or LAB in Path(file).resolve().parents else f"{file}, line {line}: "


def authors_line(error: BaseException) -> str | None:
    """The author's exception in their words, "FILE, line N: Type: text": of the innermost frame that is neither lab's
    nor a library's. None where there is no such frame, so the error is not theirs.
    """
    libraries = {str(Path(prefix).resolve()) for prefix in (sys.prefix, sys.base_prefix)} | {str(LAB)}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if frame.filename.startswith("<") or "site-packages" in file.parts or any(
                str(path).startswith(tuple(libraries)) for path in (file, file.resolve())):
            continue
        text = str(error).strip().partition("\n\n")[0]
        return f"{frame.filename}, line {frame.lineno}: {type(error).__name__}{': ' if text else ''}{text}"
    return None


@contextlib.contextmanager
def naming(path: os.PathLike[str]) -> Iterator[None]:
    """An operation on an open file fails without its name (a full disk, a limit on sizes): this puts it in."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or str(path)
        raise


@contextlib.contextmanager
def forgiving(what: str) -> Iterator[None]:
    """What is inside may fail without failing the run that it describes: one line says what is missing, and why.

    For pictures, samples and comparisons: whatever a library raises there, the numbers are safe already.
    """
    try:
        yield
    except Exception as e:
        reason = (str(e).splitlines() or [""])[0][:200]
        log.warning("warning: %s failed: %s", what, f"{type(e).__name__}: {reason}" if reason else type(e).__name__)


def check_words(args: Sequence[str]) -> None:
    """Raises UserError for a word that is no text: it could be neither shown nor written to a file."""
    for word in args:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(f"{ascii(word)[:120]} is not UTF-8. Rename the file or folder, or type the text again in a "
                            f"terminal that writes UTF-8.") from None
