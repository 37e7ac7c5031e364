"""What finished cells tell about cells that are to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from lab.study.run.cells import Cell, finished_folders, read_cell
from lab.study.run.units import (
    MOST_UPDATES,
    ExecutionPlan,
    How,
    read_plan,
)
from lab.train.json_files import read_json


def _ways(updates: int) -> list[ExecutionPlan]:
    """All ways to carry out a study whose base makes so many updates in a call."""
    return [ExecutionPlan(how, n) for how in get_args(How) for n in dict.fromkeys((updates, MOST_UPDATES))]


def likeliest(folder: Path, cells: Sequence[Cell], updates: int) -> list[Cell]:
    """The cells as they would be carried out, for a study that is not: as the plan of its folder says, or as most of
    those that are finished were."""
    plan = read_plan(folder)
    modes = [plan.mode] if plan else list(dict.fromkeys(way.mode for way in _ways(updates)))
    ways = [[replace(cell, mode=mode) for cell in cells] for mode in modes]
    return max(ways, key=lambda way: len(finished_folders(folder, way)))


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
