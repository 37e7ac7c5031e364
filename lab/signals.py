"""Signals: heard from the first line of a process on, answered at once, and always ending in the same exit status.

Python runs a signal handler only when the main thread is back in Python, not while XLA compiles; and an exception that
a handler raises while a library is imported, or in a callback from C++, is a traceback or aborts the process. Here a
thread hears each signal. It says at once what follows; where there is nothing to save it ends the process, else it
tells the loop. Imports nothing slow.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

# 75 (EX_TEMPFAIL) tells a launcher: saved, start me again. SIGUSR1 is what SLURM and mpirun can be asked to send,
# SIGHUP what a lost connection sends. SIGPIPE stands for an output that nobody reads any more; the signal is ignored.
EXIT = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGHUP: 75, signal.SIGINT: 130, signal.SIGPIPE: 141}
HEARD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
URGENT = (signal.SIGTERM, signal.SIGINT)  # a second one of these stops at once; the others may come twice by themselves
TWICE = 0.2  # seconds; what comes sooner is the same signal, sent to a process and to its group
FLUSH = 0.5  # seconds for what was printed and not written yet


class _Process:
    """What this process knows of the signals it got. `listening` only for a command, not where lab is a library."""

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

    def begin(self, number: int) -> None:
        """Decides once who obeys the first signal, or the loss of the output: the loop, or nobody yet."""
        with self.lock:
            if self.first is None:
                self.first, self.noted = number, self.note is not None
                if self.note:
                    self.note(number)

    def handle(self, number: int, frame: Any) -> None:
        """Python's handler, in the main thread. The thread does the work."""

    def watch(self, pipe: int) -> None:
        """The thread. It gets a byte as soon as the operating system delivers a signal."""
        while True:
            if (number := os.read(pipe, 1)[0]) in EXIT:
                self.answer(number)

    def answer(self, number: int) -> None:
        """Says what follows, and sees to it."""
        name, now = signal.Signals(number).name, time.monotonic()
        if self.status is not None:  # done; what is left is tearing down
            self.leave(self.status)
        if self.answered is None:
            self.answered = now
            self.begin(number)
            if not self.noted:
                self.say(f"{name}: stopped; nothing had to be saved.")
                self.leave(EXIT[number])
            self.say(f"{name}: stopping after this step; again to stop at once.")
        elif number in URGENT and now - self.answered > TWICE:
            self.say(f"{name} again: stopped at once. The same command goes on from the last checkpoint.")
            self.leave(EXIT[number])

    def say(self, line: str) -> None:
        """Past all buffers and locks, which the main thread may hold."""
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
    """Hears signals from now until the process ends. Call it once, first thing, in the main thread.

    SIGHUP stays ignored under nohup. SIGINT is heard also where a shell started this in the background and has it
    ignored: `kill -INT` then saves, as everywhere.
    """
    out, into = os.pipe()
    os.set_blocking(into, False)
    signal.set_wakeup_fd(into, warn_on_full_buffer=False)
    _process.listening = True
    atexit.register(_ignore)  # the first to be registered is the last to run: from there on Python has no handlers
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_process.watch, args=(out,), name="signals", daemon=True).start()
    install()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)  # the launcher blocks them while Python starts
    for name in ("stdout", "stderr"):
        if stream := getattr(sys, name):  # None where it is closed
            lines = stream.line_buffering
            setattr(sys, name, Output(stream.detach(), lines))
            setattr(sys, f"__{name}__", getattr(sys, name))


def heed() -> None:
    """For the launcher, which holds signals back while it starts: from here on they end it, with the right status."""
    if signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        for number in HEARD:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _exit)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)


def _exit(number: int, frame: Any) -> None:
    sys.exit(EXIT[number])


def hold() -> None:
    """Holds signals back for the next program of this process, which is to call `listen`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)


def install(leave: Callable[[int], None] | None = None, quiet: bool = False) -> None:
    """Puts our handlers in place, again where a library took them. `leave`: ends this process and all that belong to
    it; `quiet`: another process says what happens."""
    if not _process.listening:
        return
    _process.leave, _process.quiet = leave or _process.leave, quiet
    for number in HEARD:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _process.handle)


def release() -> None:
    """Leaves all signals to handlers that the caller has put in place of ours."""
    if _process.listening:
        signal.set_wakeup_fd(-1)
        _process.listening = False


def _forget() -> None:
    """In a forked child, which must not speak for its parent."""
    if _process.listening:
        release()
        for number in HEARD:
            if signal.getsignal(number) == _process.handle:
                signal.signal(number, signal.SIG_DFL)


def _ignore() -> None:
    for number in HEARD:
        signal.signal(number, signal.SIG_IGN)


def done(status: int) -> int:
    """The command is through with this status, which no signal changes any more. Returns it."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except SystemExit:  # nobody reads
        status = EXIT[signal.SIGPIPE]
    _process.status = status
    if status:  # what libraries say of themselves while they are torn down would bury the reason
        sys.unraisablehook = lambda *_: None
        warnings.simplefilter("ignore")
    return status


class Stop:
    """Remembers the first signal; a second one ends the process.

    Of several processes all stop at the same call, whichever got the signal: all must ask at the same places.
    """

    def __init__(self, processes: Any) -> None:
        """`processes`: those of this run (`lab.parallel.processes.Processes`)."""
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
        """While inside, a signal is noted for whoever asks, instead of ending the process."""
        before = _process.note
        if not _process.listening:  # a library: whoever calls it has handlers of his own
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
    """Hears the first signal; the second one finds the handlers that were there before, which come back at the end."""
    if threading.current_thread() is not threading.main_thread():  # only that one may have handlers
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
    """A standard stream in UTF-8 whatever the locale, which outlives its reader.

    When nobody reads it any more (`| head`, a closed terminal), a run saves and stops as for a signal, with status 141;
    any other command ends with that.
    """

    def __init__(self, buffer: Any, line_buffering: bool = False):
        super().__init__(buffer, encoding="utf-8", errors="backslashreplace", line_buffering=line_buffering)

    def write(self, text: str) -> int:
        """As of any text stream."""
        try:
            return super().write(text)
        except OSError as e:
            self._lost(e)
        return len(text)

    def flush(self) -> None:
        """As of any text stream."""
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
