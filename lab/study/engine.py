"""Runs the cells of a study, each exactly once, with any number of processes on one folder."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from lab import loop
from lab.console import Screen, clock
from lab.errors import UserError
from lab.experiment import Experiment, digest, to_json
from lab.program import Program
from lab.run_folder import read_json, write_json
from lab.study import leases
from lab.study.cells import Cell, changed, finished_elsewhere, link, read_cell

STOPPED = set(loop.EXIT.values())
WAIT_SECONDS = 0.5


class Bench:
    """What the cells of one arm share: data, and the compiled program. It holds one of each, the last ones used."""

    def __init__(self) -> None:
        self._data: tuple[str, Any] = ("", None)
        self._program: tuple[str, Program | None] = ("", None)

    def data(self, experiment: Experiment) -> Any:
        """The experiment's data, loaded. Raises UserError."""
        key = digest(to_json(experiment.data))
        if self._data[0] != key:
            self._data, self._program = ("", None), ("", None)  # the old must go before the new comes
            self._data = (key, experiment.data.load())
        return self._data[1]

    def prepared(self, experiment: Experiment) -> loop.Prepared:
        """Data and program; compiled by the first cell of an arm. Raises UserError."""
        data, key = self.data(experiment), digest(to_json(replace(experiment, seed=0)))
        if self._program[0] != key:
            self._program = ("", None)
            self._program = (key, Program(experiment, data.train))
        program = self._program[1]
        same = program.experiment.seed == experiment.seed
        return loop.Prepared(data, program if same else program.reseeded(experiment.seed))


class CellScreen(Screen):
    """The screen of one cell: what it says goes to a file in its folder, its progress to the study's screen."""

    def __init__(self, outer: Screen, label: str, folder: Path):
        super().__init__(quiet=True)
        self._outer, self._label = outer, label
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self.record(folder / "logs" / "screen.txt")

    def record(self, path: Path | None) -> None:
        """The loop has no file for one process alone; ours stays."""
        super().record(path or self._record)

    def progress(self, line: str) -> None:
        """A line that the next one replaces."""
        self._outer.progress(f"{self._label}  {line}" if line else "")


class Engine:
    """The cells of one study folder, as this process sees and works on them."""

    def __init__(self, folder: Path, cells: Sequence[Cell], screen: Screen, bench: Bench, file: Path | None):
        self.folder, self.cells, self.screen, self.bench, self.file = folder, list(cells), screen, bench, file
        self.leases = folder / "leases"
        self.leases.mkdir(parents=True, exist_ok=True)
        self.ran = 0

    def adopt(self) -> int:
        """Takes over finished cells of the other studies beside this one; returns how many."""
        others, taken = finished_elsewhere(self.folder.parent, self.folder), 0
        for cell in self.cells:
            source = others.get(cell.fingerprint)
            if source is None or read_cell(cell.folder(self.folder)) or not (
                    lease := leases.claim(self.leases, cell.name)):
                continue
            try:
                if read_cell(cell.folder(self.folder)) is None:
                    link(cell, source, cell.folder(self.folder))
                    taken += 1
            finally:
                lease.release()
        return taken

    def check_code(self, accept: bool, rerun: bool) -> None:
        """Finished cells must come from this code and data.

        `accept`: they count as they are. `rerun`: those that do not, and those that failed, are deleted.

        Raises:
          UserError: some do not, and it was not said what to do; names the files.
        """
        other: Counter[str] = Counter()
        for cell in self.cells:
            found = read_cell(cell.folder(self.folder))
            if found is None or (found["fingerprint"] == cell.fingerprint and found["status"] != "failed"):
                continue
            if rerun:
                self._delete(cell)
            elif found["fingerprint"] != cell.fingerprint:
                names = changed(found["code"], cell.code) + ["the data"] * (found.get("data") != cell.data)
                other.update(names or ["the experiment"])
        if other and not accept:
            cells = f"{max(other.values())} finished cell{'s' * (max(other.values()) > 1)}"
            raise UserError(f"{', '.join(other)} changed since {cells} of this study ran. --accept takes them as they "
                            f"are, --rerun runs them again.")

    def _delete(self, cell: Cell) -> None:
        if lease := leases.claim(self.leases, cell.name):
            try:
                shutil.rmtree(cell.folder(self.folder))
            finally:
                lease.release()

    def run(self) -> int:
        """Works until every cell is finished, by this process or another; returns the exit status.

        0: finished. 75 / 130: told to stop, the running cell is saved. Raises OSError when the disk is full.
        """
        arm = None
        while pending := [c for c in self.cells if not (c.folder(self.folder) / "cell.json").exists()]:
            claimed = self._claim(pending, arm)
            if claimed is None:
                self.screen.progress(f"Waiting for {len(pending)} cells that other processes work on.")
                time.sleep(WAIT_SECONDS)
                continue
            cell, lease = claimed
            try:
                status = self._run(cell)
            finally:
                lease.release()
            if status in STOPPED:
                self.screen.say(f"Stopped and saved: {len(pending)} cells are left. The same command goes on.")
                return status
            arm = cell.arm
        return 0

    def _claim(self, pending: Sequence[Cell], arm: str | None) -> tuple[Cell, leases.Lease] | None:
        """The next cell that nobody works on: of the arm that is compiled already, else of one that nobody has."""
        taken = {c.arm for c in pending if leases.busy(self.leases, c.name)}
        for cell in sorted(pending, key=lambda c: (c.arm != arm, c.arm in taken)):
            if lease := leases.claim(self.leases, cell.name):
                if not (cell.folder(self.folder) / "cell.json").exists():  # finished while we looked
                    return cell, lease
                lease.release()
        return None

    def _run(self, cell: Cell) -> int:
        """Runs one cell that is ours, from wherever it was, and writes its cell.json; returns the loop's status."""
        folder, start = cell.folder(self.folder), time.monotonic()
        again = self._begin(cell, folder)
        error, status = None, 0
        if not (folder / "result.json").exists():  # else only its cell.json was missing
            done = len(self.cells) - sum(not (c.folder(self.folder) / "cell.json").exists() for c in self.cells)
            screen = CellScreen(self.screen, f"cell {done + 1}/{len(self.cells)}  {cell.arm} {cell.seed}", folder)
            try:
                status = loop.train(cell.experiment, folder, screen, self.file,
                                    prepared=self.bench.prepared(cell.experiment))
            except UserError as e:
                error = str(e)
            except jax.errors.JaxRuntimeError as e:  # out of memory, above all: the other arms may be smaller
                error = str(e).partition("\n")[0]
        if status in STOPPED:
            return status
        self.ran += 1
        seconds = time.monotonic() - start
        said = "failed" if error else "diverged" if status == 1 else "done"
        write_json(folder / "cell.json", cell.identity | {
            "status": said, "seconds": None if again else round(seconds, 3), "error": error})
        result = error or ("" if said == "diverged" else _final(folder, cell.experiment.evaluate.metric))
        self.screen.say(f"{cell.arm} seed {cell.seed}: {said} {result} ({clock(seconds)})")
        return status

    def _begin(self, cell: Cell, folder: Path) -> bool:
        """Whether an earlier process began this very cell. What other code or data left there is deleted."""
        begun = folder / "begun.json"
        if begun.exists() and read_json(begun)["fingerprint"] == cell.fingerprint:
            return True
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(begun, cell.identity)
        return False

    def summary(self) -> dict[str, int]:
        """How many cells are done, diverged and failed; together they are all that were planned.

        Raises:
          UserError: a cell is damaged.
        """
        for cell in self.cells if any(self.leases.iterdir()) else ():  # of processes that died with their last word
            if lease := leases.claim(self.leases, cell.name):
                lease.release()
        found = Counter(cell["status"] for c in self.cells if (cell := read_cell(c.folder(self.folder))))
        assert sum(found.values()) == len(self.cells), (found, len(self.cells))
        return {status: found[status] for status in ("done", "diverged", "failed")}


def mean_seconds(cells: Sequence[Cell], folders: Mapping[str, Path]) -> dict[str, float]:
    """Arm -> mean seconds of its cells that are done, where they are known. `folders`: as `finished_folders` says."""
    found: dict[str, list[float]] = {}
    for cell in cells:
        said = read_cell(folders[cell.name]) if cell.name in folders else None
        if said and said["status"] == "done" and said["seconds"] is not None:
            found.setdefault(cell.arm, []).append(said["seconds"])
    return {arm: sum(values) / len(values) for arm, values in found.items()}


def metric_values(cells: Sequence[Cell], folders: Mapping[str, Path], metric: str, split: str) -> dict[int, float]:
    """Seed -> the metric at the end, of the cells that are done. `folders`: as `finished_folders` says."""
    found = {}
    for cell in cells:
        if cell.name in folders and read_cell(folders[cell.name])["status"] == "done":
            result = read_json(folders[cell.name] / "result.json")
            found[cell.seed] = result["final" if split == "validation" else "test"][metric]
    return found


def _final(folder: Path, metric: str) -> str:
    return f"{metric} {read_json(folder / 'result.json')['final'][metric]:.4f}"
