"""Console output of a run: a live progress line in a terminal, plain lines otherwise."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text


def human(value: float, digits: int = 3) -> str:
    """1234567 -> "1.23M"."""
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def facts(summary: Mapping[str, Any]) -> list[str]:
    """A data summary as lines, grouped by split."""
    lines: dict[str, list[str]] = {}
    for name, value in summary.items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        split, _, what = name.partition(" ")
        if what and split in ("train", "validation", "test"):
            lines.setdefault(split, []).append(f"{shown} {what}")
        else:
            lines[name] = [shown]
    return [f"  {name}: {', '.join(values)}" for name, values in lines.items()]


def clock(seconds: float) -> str:
    """Seconds as "1:02:03" or "2:03"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


class Screen:
    """Prints lines and progress: live at most 4 times per second, or a plain line every 10 seconds when piped.

    Use as a context manager. Pass ``quiet=True`` in every process except the first.
    """

    def __init__(self, quiet: bool = False, stderr: bool = False):
        """`stderr`: print to stderr, for commands that write their output to stdout."""
        self.console = RichConsole(file=sys.stderr if stderr else sys.stdout,
                                   quiet=quiet, highlight=False, soft_wrap=True)
        live = self.console.is_terminal
        self._live = Live(console=self.console, refresh_per_second=4, transient=True) if live else None
        self._handler, self._log = _SayLog(self), logging.getLogger("lab")
        self._said = time.monotonic()
        self._record: Path | None = None

    def record(self, path: Path | None) -> None:
        """Also writes all further lines to this file, with timestamps."""
        self._record = path

    def __enter__(self) -> Screen:
        self._log.addHandler(self._handler)
        self._before = self._log.level, self._log.propagate
        self._log.setLevel(logging.INFO)
        self._log.propagate = False  # else absl (imported by Orbax) prints every line again
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._log.removeHandler(self._handler)
        self._log.level, self._log.propagate = self._before
        if self._live:
            self._live.update(Text(""))
            self._live.stop()

    def info(self, line: str) -> None:
        """Prints a permanent line."""
        if self._record:
            with self._record.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        self.console.print(line, markup=False)

    def progress(self, line: str) -> None:
        """Shows a line that the next one replaces; rate-limited when piped."""
        if self._live:
            self._live.update(Text(line))
        elif line and time.monotonic() - self._said >= 10:
            self._said = time.monotonic()
            self.info(line)


class _SayLog(logging.Handler):
    """Logging handler that prints messages of lab's modules. Prints each once, because models are traced repeatedly."""

    def __init__(self, screen: Screen):
        super().__init__()
        self.screen, self.printed = screen, set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self.printed:
            self.printed.add(message)
            first = message.partition(" ")[0].rstrip(":,")  # capitalise a word, but not a file name
            self.screen.info(message[:1].upper() + message[1:] if first.isalpha() else message)
