"""Signal handling from process start: an immediate response and a fixed exit status per signal.

Python runs a signal handler only when the main thread executes Python code, not while XLA compiles. An exception raised
by a handler during an import or in a C++ callback prints a traceback or aborts the process. Here a thread receives each
signal and prints the consequence at once. It ends the process if there is nothing to save, else notifies the training
loop. Imports nothing slow.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import os
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

# 75 (EX_TEMPFAIL) tells a launcher that the state is saved and to restart. SLURM and mpirun can send SIGUSR1, Grid
# Engine SIGUSR2 and SIGXCPU; a lost connection sends SIGHUP. SIGPIPE represents an output without a reader; the signal
# itself is ignored.
EXIT = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGUSR2: 75, signal.SIGXCPU: 75, signal.SIGHUP: 75,
        signal.SIGINT: 130, signal.SIGPIPE: 141}
HEARD = tuple(number for number in EXIT if number != signal.SIGPIPE)
URGENT = (signal.SIGTERM, signal.SIGINT)  # a second one stops at once; other signals may be sent twice automatically
TWICE = 0.2  # seconds; sooner repeats are one signal, sent to both process and group
FLUSH = 0.5  # seconds to flush buffered output
TO_SAVE = 30  # seconds of processor time, at most, between SIGXCPU and the limit (ulimit -t)


class _Process:
    """Signal state of this process. `listening` is set for commands only, not if lab is used as a library."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.listening = False
        self.first: int | None = None
        self.answered: float | None = None
        self.note: Callable[[int], None] | None = None
        self.noted = False
        self.status: int | None = None
        self.leave: Callable[[int], None] = _leave
        self.quiet = False
        self.interrupt: Callable[[], None] | None = None

    def begin(self, number: int) -> None:
        """Records the first signal (or loss of the output) once, and notifies the training loop if it is listening."""
        with self.lock:
            if self.first is None:
                self.first, self.noted = number, self.note is not None
                if self.note:
                    self.note(number)

    def handle(self, number: int, frame: Any) -> None:
        """Python's signal handler, in the main thread. The watching thread does the work."""

    def watch(self, pipe: int) -> None:
        """Body of the watching thread: reads a byte per signal, written when the operating system delivers it."""
        while True:
            if (number := os.read(pipe, 1)[0]) in EXIT:
                self.answer(number)

    def answer(self, number: int) -> None:
        """Prints the consequence of a signal and carries it out."""
        name, now = signal.Signals(number).name, time.monotonic()
        if number == signal.SIGINT and self.interrupt:
            return self.interrupt()
        if self.status is not None:  # already finished; only teardown remains
            self.leave(self.status)
        if self.answered is None:
            self.answered = now
            self.begin(number)
            if not self.noted:
                self.say(f"{name}: stopped; nothing had to be saved.")
                self.leave(EXIT[number])
            self.say(f"{name}: stopping after this step; again to stop at once.")
        elif number in URGENT and now - self.answered > TWICE:
            self.say(f"{name} again: stopped at once. Run the same command to resume from the last checkpoint.")
            self.leave(EXIT[number])

    def say(self, line: str) -> None:
        """Writes directly to stderr, bypassing buffers and locks that the main thread may hold."""
        clear = "\r\033[K" if os.isatty(2) else ""  # the live progress line
        if not self.quiet:
            with contextlib.suppress(OSError):
                os.write(2, f"{clear}{line}\n".encode())


def _leave(status: int) -> None:
    flushing = threading.Thread(target=sys.stdout.flush, daemon=True)  # the main thread may hold its lock
    flushing.start()
    flushing.join(FLUSH)
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\033[?25h")  # the live line hides the cursor
    os._exit(status)


_process = _Process()


def listen() -> None:
    """Handles signals until the process ends. Call it once, first, in the main thread.

    SIGHUP stays ignored under nohup. SIGINT is handled even in background jobs, where the shell ignores it, so that
    `kill -INT` saves there, too.
    """
    out, into = os.pipe()
    os.set_blocking(into, False)
    signal.set_wakeup_fd(into, warn_on_full_buffer=False)
    _process.listening = True
    atexit.register(_ignore)  # registered first, so runs last: Python has no handlers after it
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_process.watch, args=(out,), name="signals", daemon=True).start()
    install()
    _leave_time()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)  # the launcher blocks them while Python starts
    for name in ("stdout", "stderr"):
        if stream := getattr(sys, name):  # None if closed
            lines = stream.line_buffering
            setattr(sys, name, Output(stream.detach(), lines))
            setattr(sys, f"__{name}__", getattr(sys, name))


def _leave_time() -> None:
    """Lets SIGXCPU come before the limit on processor time: `ulimit -t` sets both, and the second one kills."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if soft == hard != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_CPU, (hard - max(1, min(TO_SAVE, hard // 10)), hard))


def heed() -> None:
    """For the launcher, which blocks signals at start: from here on they end it, with the right exit status."""
    if signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        for number in HEARD:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _exit)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)


def _exit(number: int, frame: Any) -> None:
    _process.say(f"{signal.Signals(number).name}: stopped.")
    sys.exit(EXIT[number])


def hold() -> None:
    """Blocks signals until the program that this process will exec calls `listen`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)


def install(leave: Callable[[int], None] | None = None, quiet: bool = False) -> None:
    """Installs our handlers, also after a library replaced them. `leave`: function that ends this process and its
    peers; `quiet`: print nothing, because another process does."""
    if not _process.listening:
        return
    _process.leave, _process.quiet = leave or _process.leave, quiet
    for number in HEARD:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _process.handle)


@contextlib.contextmanager
def interrupted(action: Callable[[], None]) -> Iterator[None]:
    """Inside, Ctrl-C calls `action`, in another thread, instead of ending the process."""
    _process.interrupt = action
    try:
        yield
    finally:
        _process.interrupt = None


def release() -> None:
    """Stops our handling: the caller has installed its own handlers."""
    if _process.listening:
        signal.set_wakeup_fd(-1)
        _process.listening = False


def _forget() -> None:
    """Resets the state in a forked child, which must not respond for its parent."""
    if _process.listening:
        release()
        for number in HEARD:
            if signal.getsignal(number) == _process.handle:
                signal.signal(number, signal.SIG_DFL)


def _ignore() -> None:
    for number in HEARD:
        signal.signal(number, signal.SIG_IGN)


def done(status: int) -> int:
    """Fixes the exit status of a finished command: later signals do not change it. Returns it."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except SystemExit:  # the output has no reader
        status = EXIT[signal.SIGPIPE]
    _process.status = status
    if status:  # teardown messages of libraries would bury the reason
        sys.unraisablehook = lambda *_: None
        warnings.simplefilter("ignore")
    return status


class Stop:
    """Records the first signal; a second one ends the process.

    All processes of a run stop at the same call, whichever received the signal, so all must call it at the same places.
    """

    def __init__(self, processes: Any) -> None:
        """`processes`: the `lab.parallel.processes.Processes` of this run."""
        self.processes = processes
        self.signal: int | None = None
        self._caught: int | None = None

    def __call__(self) -> bool:
        self.signal = self.signal or self.processes.stopping(self._caught)
        return self.signal is not None

    def _note(self, number: int) -> None:
        self._caught = number

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stop]:
        """Context in which a signal is recorded for `__call__` instead of ending the process."""
        before = _process.note
        if not _process.listening:  # used as a library: the caller has its own handlers
            with _borrowed(self._note):
                yield self
            return
        with _process.lock:
            _process.note = self._note
        try:
            yield self
        finally:
            with _process.lock:
                _process.note = before


@contextlib.contextmanager
def _borrowed(note: Callable[[int], None]) -> Iterator[None]:
    """Handles the first signal, then restores its previous handler; restores all handlers when the context ends."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only in the main thread
        yield
        return
    before: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        note(number)
        signal.signal(number, before[number])

    for number in HEARD:
        before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Output(io.TextIOWrapper):
    """A standard stream that is always UTF-8 and survives the loss of its reader.

    If the reader is gone (`| head`, a closed terminal), a run saves and stops as for a signal, with status 141; any
    other command exits with 141.
    """

    def __init__(self, buffer: Any, line_buffering: bool = False):
        super().__init__(buffer, encoding="utf-8", errors="backslashreplace", line_buffering=line_buffering)

    def write(self, text: str) -> int:
        """See `io.TextIOBase`."""
        try:
            return super().write(text)
        except OSError as e:
            self._lost(e)
        return len(text)

    def flush(self) -> None:
        """See `io.TextIOBase`."""
        try:
            super().flush()
        except OSError as e:
            self._lost(e)

    def _lost(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO):
            error.filename = error.filename or f"the output ({self.name})"
            raise error
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        _process.begin(signal.SIGPIPE)
        if _process.noted:
            _process.say("Nobody reads the output any more: stopping after this step.")
        elif threading.current_thread() is threading.main_thread():
            raise SystemExit(EXIT[_process.first])
        else:
            _process.leave(EXIT[_process.first])
