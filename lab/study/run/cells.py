"""The cells (arm x seed) of a study: their identity, their folders, and reuse of finished cells of other studies."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lab.configuration.values import digest
from lab.errors import UserError
from lab.experiment import Experiment
from lab.files import no_links
from lab.study.run.preflight import Arm
from lab.train import source_code
from lab.train.json_files import read_json, write_json

# Code that cells depend on, besides the training loop.
STUDY = ("lab.study.run.stacked", "lab.study.run.together", "lab.study.run.forks")
FINISHED = ("done", "diverged", "failed")


@dataclass(frozen=True)
class Cell:
    """One run of a study, and everything that determines its result."""

    arm: str
    seed: int
    experiment: Experiment
    data: str
    """The data's fingerprint."""
    code: Mapping[str, str]
    """See `code_of`."""
    fork: tuple[int, str] | None = None
    """For a `Fork` arm: the step at which it forks, and the base's fingerprint."""
    mode: str = "loop"
    """Execution mode; "loop" runs the cells of an arm one after another with a shared program."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """12 hexadecimal digits; cells with equal fingerprints compute the same result."""
        fork = [self.fork] if self.fork else []
        return digest([self.experiment.fingerprint(), self.data, dict(self.code), self.mode, *fork])

    @property
    def name(self) -> str:
        """Name of its lease."""
        return f"{self.arm}-{self.seed}"

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the cell's result, as recorded in cell.json and begun.json."""
        return {"arm": self.arm, "seed": self.seed, "fingerprint": self.fingerprint, "mode": self.mode,
                "data": self.data, "code": dict(self.code)}

    def folder(self, study: Path) -> Path:
        """Its run folder."""
        return study / "cells" / self.arm / str(self.seed)


def cells_of(arm: Arm, base: Arm, seeds: tuple[int, ...], data: str, code: Mapping[str, str]) -> list[Cell]:
    """The cells of one arm."""
    fork = (arm.after, base.experiment.fingerprint()) if arm.stated else None
    return [Cell(arm.name, seed, replace(arm.experiment, seed=seed), data, code, fork) for seed in seeds]


def read_cell(folder: Path) -> dict[str, Any] | None:
    """Contents of cell.json; None if the cell is not finished.

    Raises:
      UserError: the folder is damaged.
    """
    path = folder / "cell.json"
    if not path.exists():
        return None
    try:
        found = read_json(path)
        good = found["status"] in FINISHED and found["fingerprint"] and isinstance(found["code"], dict)
        if found["status"] == "done":
            good = good and "final" in read_json(folder / "result.json")
    except (UserError, KeyError, TypeError, OSError):
        good = False
    if not good:
        raise UserError(f"The cell {folder} is damaged. Delete that folder and type the same command: only this cell "
                        f"runs again.")
    return found


def finished_elsewhere(studies: Path, but: Path) -> dict[str, Path]:
    """Fingerprint -> folder of every done or diverged cell in the studies of a folder, except study `but`."""
    found = {}
    for path in sorted(studies.glob("*/cells/*/*/cell.json")):
        if not path.is_relative_to(but):
            try:
                cell = read_cell(path.parent)
            except UserError:  # not this study: resuming that one reports the damage
                continue
            if cell["status"] != "failed":
                found[cell["fingerprint"]] = path.parent
    return found


def finished_folders(study: Path, cells: Sequence[Cell]) -> dict[str, Path]:
    """Cell name -> folder, for cells finished in this study or in another study in the same parent folder."""
    others = finished_elsewhere(study.parent, study)
    found = {cell.name: others[cell.fingerprint] for cell in cells if cell.fingerprint in others}
    return found | {cell.name: folder for cell in cells if read_cell(folder := cell.folder(study))}


def link(cell: Cell, source: Path, target: Path) -> None:
    """Reuses a finished cell of another study by hard-linking its files."""
    no_links(source)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=_hard_link,
                    ignore=lambda folder, names: [n for n in ("cell.json", "begun.json", "lock") if n in names])
    write_json(target / "cell.json", read_json(source / "cell.json") | cell.identity | {"linked": str(source)})


def _hard_link(source: str, target: str) -> None:
    """Unlike a symbolic link, survives deletion of the other study. Copies if the disk has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def code_of(experiment: Experiment) -> dict[str, str]:
    """The code and packages that determine a cell's result, see `lab.train.source_code`."""
    return source_code.code_of(experiment, STUDY)
