"""What a running cell writes into its folder: its log, begun.json, and cell.json at the end."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from lab.errors import CannotWrite, UserError
from lab.files import make_folder
from lab.study.run.cells import Cell
from lab.study.run.outcomes import _final
from lab.train.console import Screen
from lab.train.json_files import read_json, write_json


class CellScreen(Screen):
    """The screen of one cell: logs to a file in the cell's folder, shows progress on the study's screen."""

    def __init__(self, outer: Screen, label: str, folder: Path):
        super().__init__(quiet=True)
        self._outer, self._label = outer, label
        make_folder(folder / "logs")
        self.record(folder / "logs" / "screen.txt")

    def record(self, path: Path | None) -> None:
        """Keeps logging to the cell's file if `path` is None."""
        super().record(path or self._record)

    def progress(self, line: str) -> None:
        """Shows a line that the next progress line overwrites."""
        self._outer.progress(f"{self._label}  {line}" if line else "")


def begun(folder: Path) -> dict[str, str]:
    """Contents of begun.json; empty if missing or damaged, so that the cell starts over."""
    try:
        found = read_json(folder / "begun.json") if (folder / "begun.json").exists() else {}
    except UserError:
        found = {}
    return found if isinstance(found, dict) else {}


def begin(cell: Cell, folder: Path, anew: bool = False) -> bool:
    """Whether an earlier process began this cell. Deletes files of other code or data; all if `anew`."""
    if not anew and begun(folder).get("fingerprint") == cell.fingerprint:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "begun.json", cell.identity)
    return False


def end(cell: Cell, folder: Path, status: str, errors: Sequence[str], seconds: float | None, shown: str) -> str:
    """Writes cell.json, which marks the cell finished, or failed if there are errors; returns a line to print."""
    error = next(iter(errors), None)
    status = "failed" if error else status
    write_json(folder / "cell.json", cell.identity | {
        "status": status, "seconds": seconds and round(seconds, 3), "error": error})
    result = error or ("" if status == "diverged" else _final(folder, cell.experiment.evaluate.metric))
    return f"{cell.arm} seed {cell.seed}: {status} {result} ({shown})"


@contextlib.contextmanager
def failing(errors: list[str]) -> Iterator[None]:
    """Collects errors that fail only this unit, mainly out-of-memory. A full disk still fails the whole study."""
    try:
        yield
    except CannotWrite:
        raise
    except (UserError, jax.errors.JaxRuntimeError) as e:
        errors.append(str(e) if isinstance(e, UserError) else str(e).partition("\n")[0])
