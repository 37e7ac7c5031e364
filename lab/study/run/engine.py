"""Runs the cells of a study, each exactly once, from any number of processes sharing one folder."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from lab.errors import UserError
from lab.files import make_folder, no_links
from lab.parallel.processes import ALONE
from lab.signals import EXIT, Stop
from lab.study.design.arms import BASE
from lab.study.run import leases, workers
from lab.study.run.cell_files import CellScreen, begin, begun, end, failing
from lab.study.run.cells import Cell, finished_elsewhere, link, read_cell
from lab.study.run.forks import take_over
from lab.study.run.grouping import Group
from lab.study.run.outcomes import _ways
from lab.study.run.preflight import Arm
from lab.study.run.shared import Bench
from lab.study.run.together import run_together
from lab.study.run.units import (
    FEW_FLOPS,
    MOST_STEPS,
    ExecutionPlan,
    How,
    Unit,
    cannot,
    choose,
    chunk_size,
    make_units,
    read_plan,
)
from lab.train import loop
from lab.train.console import Screen, clock
from lab.train.json_files import write_json
from lab.train.program import Program
from lab.train.source_code import changed
from lab.train.step import State

STOPPED = set(EXIT.values())
WAIT_SECONDS = 0.5


class Engine:
    """Runs the cells of one study folder in this process."""

    def __init__(self, folder: Path, cells: Sequence[Cell], arms: Mapping[str, Arm], groups: Sequence[Group],
                 screen: Screen, bench: Bench, file: Path | None):
        """`arms`: all arms of the study, the base first."""
        self.folder, self.cells, self.arms, self.groups = folder, list(cells), arms, groups
        self.screen, self.bench, self.file = screen, bench, file
        self.leases = folder / "leases"
        no_links(folder)
        make_folder(self.leases)
        make_folder(folder / "cells")
        self.plan: ExecutionPlan

    def settle(self, how: How | None, accept: bool, rerun: bool) -> int:
        """Loads or creates the execution plan; returns how many finished cells were reused from other studies in the
        same parent folder. `how`: the requested mode. `accept`, `rerun`: see `_check_code`.

        Raises:
          UserError: cells of this folder ran in another mode than requested; or see `_check_code`.
        """
        while not (lease := leases.claim(self.leases, "plan")):
            self.screen.progress("Waiting for another process, which decides how to run the cells.")
            time.sleep(WAIT_SECONDS)
        try:
            plan = read_plan(self.folder)
            if plan and how and not any((self.folder / "cells").iterdir()):
                plan = None  # no cell has started under it
            if plan and how not in (None, plan.how):
                raise UserError(f"The cells of {self.folder} run as {plan.how!r}, and two ways cannot be compared. "
                                f"Leave out --execution, or choose another folder with --studies.")
            self.plan = plan or self._new_plan(how)
            self.cells = [replace(cell, mode=self.plan.mode) for cell in self.cells]
            self._check_code(accept, rerun)
            taken = self._adopt()
            self._add_units()
            self.plan.write(self.folder)
            return taken
        finally:
            lease.release()

    def _new_plan(self, how: How | None) -> ExecutionPlan:
        elsewhere, own = finished_elsewhere(self.folder.parent, self.folder), self.arms[BASE].experiment.steps_per_call
        impossible = {each: why for each in get_args(How) if (why := cannot(each, list(self.arms.values())))}
        if how in impossible:
            raise UserError(f"--execution {how}: {impossible[how]} Leave it out, or use --execution loop.")
        known = [plan for plan in _ways(own) if how in (None, plan.how) and plan.how not in impossible]
        found = [sum(replace(cell, mode=plan.mode).fingerprint in elsewhere for cell in self.cells) for plan in known]
        if any(found):  # the mode of most finished cells
            return known[found.index(max(found))]
        if how is not None:
            return ExecutionPlan(how, MOST_STEPS if self.arms[BASE].flops < FEW_FLOPS else own)
        seeds = sorted({cell.seed for cell in self.cells})
        return choose(self.groups, self.arms, seeds, self.bench, self.file, self.screen.info)

    def _add_units(self) -> None:
        """Assigns a unit to every unfinished cell without one."""
        known = {name for unit in self.plan.units for name in unit.cells}
        new = [c for c in self.cells if c.name not in known and not self._finished(c)]

        def size(group: Group) -> int:
            first = next(c for c in new if c.arm in group.arms)
            program = self.bench.prepared(first.experiment, group.numbers, self.plan.steps_per_call).program
            return chunk_size(len(new), program.compiled.memory_analysis())

        units = make_units(self.groups, new, self.plan.how, size, len(self.plan.units))
        self.plan = replace(self.plan, units=(*self.plan.units, *units))

    def _finished(self, cell: Cell) -> bool:
        return (cell.folder(self.folder) / "cell.json").exists()

    def _lease(self, cell: Cell) -> leases.Lease | None:
        """The lease that grants write access to the cell; None while another process has it."""
        unit = next((unit.name for unit in self.plan.units if cell.name in unit.cells), cell.name)
        return leases.claim(self.leases, unit)

    def _adopt(self) -> int:
        """Reuses finished cells of other studies in the same parent folder; returns how many."""
        others, taken = finished_elsewhere(self.folder.parent, self.folder), 0
        for cell in self.cells:
            source = others.get(cell.fingerprint)
            if source is None or self._finished(cell) or not self._keeps(source, cell) or not (
                    lease := self._lease(cell)):
                continue
            try:
                link(cell, source, cell.folder(self.folder))
                taken += 1
            finally:
                lease.release()
        return taken

    def _keeps(self, source: Path, cell: Cell) -> bool:
        """Whether `source` has the checkpoints that this study's `Fork` arms start from."""
        needed = {arm.after for arm in self.arms.values() if arm.stated and cell.arm == BASE}
        return all((source / "checkpoints" / str(step)).exists() for step in needed)

    def _check_code(self, accept: bool, rerun: bool) -> None:
        """Checks that finished cells were computed with the current code and data.

        `accept`: keep outdated cells. `rerun`: delete outdated and failed cells.

        Raises:
          UserError: some are outdated, and neither option is set; names the files.
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
        if lease := self._lease(cell):
            try:
                (cell.folder(self.folder) / "cell.json").unlink()  # first: the cell must not count as finished
                shutil.rmtree(cell.folder(self.folder))
            finally:
                lease.release()

    def follow(self) -> None:
        """Loads the plan that another process wrote to this folder."""
        self.plan = read_plan(self.folder)
        self.cells = [replace(cell, mode=self.plan.mode) for cell in self.cells]

    def run_on_cores(self, args: Sequence[str]) -> int:
        """`run`, with one process per core; `args`: the command's arguments for these processes.

        Raises:
          UserError: processes died.
        """
        left = sum(not self._finished(cell) for cell in self.cells)
        number = min(self.plan.workers, left)
        with Stop(ALONE).listening() as stop:
            statuses = workers.run_workers(args, number, self.folder / "logs", self.screen, stop)
            left = sum(not self._finished(cell) for cell in self.cells)
            if left and stop():
                self.screen.info(f"Stopped and saved: {left} cells are left. Run the same command to resume.")
                return EXIT[stop.signal]
        if left:
            raise UserError(f"{left} cells are left, but the processes for them have ended (exit statuses {statuses}, "
                            f"see above and {self.folder / 'logs'}). Run the same command to resume.")
        return 0

    def run(self) -> int:
        """Runs cells until all are finished, by this process or others; returns the exit status.

        0: finished. 75 / 130: stopped by a signal, the running cell is saved. Raises OSError when the disk is full.
        """
        cells, group = {cell.name: cell for cell in self.cells}, None
        while pending := [unit for unit in self.plan.units if any(
                name in cells and not self._finished(cells[name]) for name in unit.cells)]:
            claimed = self._claim(pending, cells, group)
            if claimed is None:
                self.screen.progress(f"Waiting for {len(pending)} cells that other processes work on.")
                time.sleep(WAIT_SECONDS)
                continue
            unit, lease = claimed
            own = [cells[name] for name in unit.cells if name in cells and not self._finished(cells[name])]
            self._compile_next([u for u in pending if u.group != unit.group], cells)
            try:
                status = self._run_together(unit, own) if self.plan.how == "vmap" else self._run(unit, own)
            finally:
                lease.release()
            if status in STOPPED:
                left = sum(not self._finished(cell) for cell in self.cells)
                self.screen.info(f"Stopped and saved: {left} cells are left. Run the same command to resume.")
                return status
            group = unit.group
        return 0

    def _claim(self, pending: Sequence[Unit], cells: Mapping[str, Cell], group: int | None) -> (
            tuple[Unit, leases.Lease] | None):
        """The next free unit: preferably of the group already compiled, then of a group no process works on."""
        taken = {unit.group for unit in pending if leases.busy(self.leases, unit.name)}
        ready = [unit for unit in pending if all(self._ready(cells[name]) for name in unit.cells if name in cells)]
        for unit in sorted(ready, key=lambda u: (u.group != group, u.group in taken)):
            if lease := leases.claim(self.leases, unit.name):
                if not all(self._finished(cells[name]) for name in unit.cells if name in cells):  # may just have ended
                    return unit, lease
                lease.release()
        return None

    def _base_of(self, cell: Cell) -> Cell | None:
        """The base cell that this cell forks from, if the study has it."""
        forks = self.plan.how != "vmap" and self.arms[cell.arm].after
        return next((c for c in self.cells if forks and (c.arm, c.seed) == (BASE, cell.seed)), None)

    def _ready(self, cell: Cell) -> bool:
        base = self._base_of(cell)
        return base is None or self._finished(base)

    def _shared(self, unit: Unit, cell: Cell) -> loop.Shared:
        found = self.bench.prepared(cell.experiment, unit.numbers, self.plan.steps_per_call)
        if cell.arm == BASE:
            return replace(found, keep=tuple(sorted({arm.after for arm in self.arms.values() if arm.after})))
        if base := self._base_of(cell):
            arm = self.arms[cell.arm]

            def from_base(program: Program, own: Path) -> State | None:
                state = take_over(base.folder(self.folder), arm.after, cell.experiment, base.experiment, program, own)
                if state is None and arm.stated:
                    raise UserError(f"The base has no state after step {arm.after} with seed {cell.seed}: it "
                                    f"diverged or failed before.")
                return state

            return replace(found, begin=from_base)
        return found

    def _compile_next(self, later: Sequence[Unit], cells: Mapping[str, Cell]) -> None:
        """Compiles the next unit in the background. Skips units with unknown or finished cells: the program differs."""
        unit = next((u for u in later if all(n in cells and not self._finished(cells[n]) for n in u.cells)), None)
        if unit:
            self.bench.ahead([cells[name].experiment for name in unit.cells], unit.numbers, self.plan.steps_per_call,
                             together=self.plan.how == "vmap")

    def _run(self, unit: Unit, cells: Sequence[Cell]) -> int:
        """Runs or resumes the single cell of a unit and writes its cell.json; returns the loop's status."""
        (cell,) = cells
        folder, start = cell.folder(self.folder), time.monotonic()
        again = begin(cell, folder)
        errors, status = [], 0
        if not (folder / "result.json").exists():  # else only cell.json is missing
            screen = CellScreen(self.screen, f"cell {self._number()}/{len(self.cells)}  {cell.arm} {cell.seed}", folder)
            with failing(errors):
                status = loop.train(cell.experiment, folder, screen, self.file, shared=self._shared(unit, cell))
        if status not in STOPPED:
            seconds = time.monotonic() - start
            self.screen.info(end(cell, folder, "diverged" if status == 1 else "done", errors,
                                 None if again else seconds, clock(seconds)))
        return status

    def _run_together(self, unit: Unit, cells: Sequence[Cell]) -> int:
        """Runs or resumes the cells of a unit as one program and writes their cell.json; returns the status."""
        home, start = self.folder / "together" / unit.name, time.monotonic()
        started = begun(home)
        members = {c.name: c for c in self.cells}
        if started and all(n in members and members[n].fingerprint == f for n, f in started.items()):
            cells = [members[name] for name in started]  # includes cells whose cell.json is already written
        else:
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            for cell in cells:
                begin(cell, cell.folder(self.folder), anew=True)
            write_json(home / "begun.json", {c.name: c.fingerprint for c in cells})
        again, errors, lives, status = bool(started), [], [False] * len(cells), 0
        label = f"cells {self._number()} to {self._number() + len(cells) - 1} of {len(self.cells)}"
        screen = CellScreen(self.screen, label, home)
        with failing(errors):
            stacked = self.bench.stacked([c.experiment for c in cells], unit.numbers, self.plan.steps_per_call)
            status, lives = run_together(stacked, cells, [c.folder(self.folder) for c in cells], home,
                                         self.bench.data(cells[0].experiment), screen, self.file, Stop(ALONE))
        if status not in STOPPED:
            seconds = (time.monotonic() - start) / len(cells)
            for cell, alive in zip(cells, lives, strict=True):
                if not self._finished(cell):
                    self.screen.info(end(cell, cell.folder(self.folder), "done" if alive else "diverged", errors,
                                         None if again else seconds,
                                         f"{clock(seconds * len(cells))} for {len(cells)} together"))
            shutil.rmtree(home, ignore_errors=True)
        return status

    def _number(self) -> int:
        return 1 + sum(self._finished(cell) for cell in self.cells)

    def summary(self) -> dict[str, int]:
        """Counts of done, diverged and failed cells; they add up to all planned cells.

        Raises:
          UserError: a cell is damaged.
        """
        for unit in self.plan.units if any(self.leases.iterdir()) else ():  # left by processes that died at the end
            if lease := leases.claim(self.leases, unit.name):
                lease.release()
        found = Counter(cell["status"] for c in self.cells if (cell := read_cell(c.folder(self.folder))))
        assert sum(found.values()) == len(self.cells), (found, len(self.cells))
        return {status: found[status] for status in ("done", "diverged", "failed")}
