"""The cells of a study, arm x seed: what identifies one, what its folder says, and finished ones of other studies."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lab.errors import UserError
from lab.experiment import ROOT, Experiment, digest, flat, to_json
from lab.files import no_links
from lab.run_folder import read_json, write_json
from lab.study.preflight import Arm

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# Every run goes through these, besides the classes that its experiment names.
KITCHEN = ("lab.loop", "lab.program", "lab.report", "lab.study.stacked", "lab.study.together", "lab.study.forks")
# Imported along the way, and without influence on any number: a change of theirs makes no cell another one.
WITHOUT_NUMBERS = {"lab.console", "lab.plots", "lab.errors", "lab.run_folder", "lab.checkpoint", "lab.distributed",
                   "lab.channel", "lab.plan", "lab.study.cells", "lab.study.preflight", "lab.study.design"}
FINISHED = ("done", "diverged", "failed")


@dataclass(frozen=True)
class Cell:
    """One run of a study, and what it is a function of."""

    arm: str
    seed: int
    experiment: Experiment
    data: str
    """The data's fingerprint."""
    code: Mapping[str, str]
    """See `code_of`."""
    fork: tuple[int, str] | None = None
    """Where the arm says so: after how many updates it goes on from the base, and the base's fingerprint."""
    mode: str = "loop"
    """How it is carried out: cells of one arm one after another, sharing a program."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """12 hexadecimal digits: two cells that have the same compute the same."""
        fork = [self.fork] if self.fork else []
        return digest([self.experiment.fingerprint(), self.data, dict(self.code), self.mode, *fork])

    @property
    def name(self) -> str:
        """Of its lease."""
        return f"{self.arm}-{self.seed}"

    @property
    def identity(self) -> dict[str, Any]:
        """What cell.json and begun.json say of what the cell is a function of."""
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
    """What cell.json says; None where the cell is not finished.

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
    """Fingerprint -> folder, of every cell that is done or diverged in the other studies of a folder."""
    found = {}
    for path in sorted(studies.glob("*/cells/*/*/cell.json")):
        if not path.is_relative_to(but):
            try:
                cell = read_cell(path.parent)
            except UserError:  # not our study: whoever goes on with that one is told
                continue
            if cell["status"] != "failed":
                found[cell["fingerprint"]] = path.parent
    return found


def finished_folders(study: Path, cells: Sequence[Cell]) -> dict[str, Path]:
    """Name of a cell -> its folder, of those that are finished in this study or in another one beside it."""
    others = finished_elsewhere(study.parent, study)
    found = {cell.name: others[cell.fingerprint] for cell in cells if cell.fingerprint in others}
    return found | {cell.name: folder for cell in cells if read_cell(folder := cell.folder(study))}


def link(cell: Cell, source: Path, target: Path) -> None:
    """Makes a finished cell of another study one of this study: the same files under another name, no second copy."""
    no_links(source)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=_hard_link,
                    ignore=lambda folder, names: [n for n in ("cell.json", "begun.json", "lock") if n in names])
    write_json(target / "cell.json", read_json(source / "cell.json") | cell.identity | {"linked": str(source)})


def _hard_link(source: str, target: str) -> None:
    """Survives the deletion of the other study, unlike a symbolic link; a copy where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


# ------------------------------------------------------------------------------------------------------------ code


def code_of(experiment: Experiment) -> dict[str, str]:
    """What a run is a function of besides its experiment and data: file or package -> digest or version.

    The files are those of the classes in the experiment and of the kitchen, and what they import from lab: a change of
    one model does not make the cells of another one others.
    """
    classes = {value for path, value in flat(to_json(experiment)).items() if path.rpartition(".")[2] == "class"}
    modules = _closure({name.rpartition(".")[0] for name in classes} | set(KITCHEN))
    found = {name: digest_of for name, digest_of in map(_file_digest, sorted(modules)) if digest_of}
    found |= {package: importlib.metadata.version(package) for package in PACKAGES}
    return found | {"Python": platform.python_version()}


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The files and packages that two results of `code_of` do not share."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _closure(modules: set[str]) -> set[str]:
    """These modules and what they import from lab, directly or not."""
    found, open_ = set(), set(modules)
    while open_:
        module = open_.pop()
        found.add(module)
        open_ |= set(_imports(module)) - found - WITHOUT_NUMBERS
    return found


def _file_of(module: str) -> Path | None:
    """The file of a module of the project, or of a user's experiment."""
    inside = ROOT.joinpath(*module.split("."))
    for path in (inside.with_suffix(".py"), inside / "__init__.py"):
        if path.exists():
            return path
    spec = importlib.util.find_spec(module) if not module.startswith("lab.") else None
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).exists() else None


@functools.cache
def _imports(module: str) -> tuple[str, ...]:
    path = _file_of(module)
    if path is None or not module.startswith("lab"):
        return ()
    return tuple(name for name in _named(ast.parse(path.read_bytes())) if _file_of(name))


def _named(tree: ast.Module) -> Iterator[str]:
    """The modules of lab that a source imports anywhere; of ``from a import b`` both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lab":
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "lab")


@functools.cache
def _file_digest(module: str) -> tuple[str, str | None]:
    path = _file_of(module)
    if path is None:
        return module, None
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return name, hashlib.sha256(path.read_bytes()).hexdigest()[:12]
