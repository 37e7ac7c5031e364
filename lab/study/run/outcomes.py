"""Estimates for pending cells from finished ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from lab.study.run.cells import Cell, finished_folders, read_cell
from lab.study.run.units import (
    MOST_STEPS,
    ExecutionPlan,
    How,
    read_plan,
)
from lab.train.json_files import read_json


def _ways(steps_per_call: int) -> list[ExecutionPlan]:
    """All execution plans of a study; `steps_per_call` is the base's."""
    return [ExecutionPlan(how, n) for how in get_args(How) for n in dict.fromkeys((steps_per_call, MOST_STEPS))]


def likeliest(folder: Path, cells: Sequence[Cell], steps_per_call: int) -> list[Cell]:
    """The cells with the execution mode they would get: that of the folder's plan, else that of most finished cells."""
    plan = read_plan(folder)
    modes = [plan.mode] if plan else list(dict.fromkeys(way.mode for way in _ways(steps_per_call)))
    ways = [[replace(cell, mode=mode) for cell in cells] for mode in modes]
    return max(ways, key=lambda way: len(finished_folders(folder, way)))


def mean_seconds(cells: Sequence[Cell], folders: Mapping[str, Path]) -> dict[str, float]:
    """Arm -> mean seconds of its done cells, where known. `folders`: from `finished_folders`."""
    found: dict[str, list[float]] = {}
    for cell in cells:
        cell_result = read_cell(folders[cell.name]) if cell.name in folders else None
        if cell_result and cell_result["status"] == "done" and cell_result["seconds"] is not None:
            found.setdefault(cell.arm, []).append(cell_result["seconds"])
    return {arm: sum(values) / len(values) for arm, values in found.items()}


def metric_values(cells: Sequence[Cell], folders: Mapping[str, Path], metric: str, split: str) -> dict[int, float]:
    """Seed -> final metric of the done cells. `folders`: from `finished_folders`."""
    found = {}
    for cell in cells:
        if cell.name in folders and read_cell(folders[cell.name])["status"] == "done":
            result = read_json(folders[cell.name] / "result.json")
            found[cell.seed] = result["final" if split == "validation" else "test"][metric]
    return found


def _final(folder: Path, metric: str) -> str:
    return f"{metric} {read_json(folder / 'result.json')['final'][metric]:.4f}"
