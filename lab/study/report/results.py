"""Reads the results of studies from their folders alone: needs no device, model or experiment code. Writes CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import typeguard

from lab.errors import UserError
from lab.train.metrics import read_rows

STATUSES = ("done", "diverged", "failed", "missing")
PACKAGES = ("jax", "flax", "optax")
UNLISTED = ("CACHE", "COORDINATOR", "PLATFORMS")  # JAX_ settings that cannot affect results


@dataclass(frozen=True)
class ArmResults:
    """One arm: its changes to the base, and its costs, which the comparison does not control."""

    name: str
    changes: dict[str, Any]
    fingerprint: str
    parameters: float | None
    flops: float | None
    """FLOPs per step."""
    memory: float | None
    """Bytes."""
    fork: int = 0
    """Step of the base at which it forks; 0: it does not fork."""
    shared: int = 0
    """Steps reused from the base's run to save time."""

    @property
    def difference(self) -> str:
        """The changes, written as flags."""
        changes = ", ".join(f"{path}={short(value)}" for path, value in self.changes.items()) or "(base)"
        return f"after step {self.fork}: {changes}" if self.fork else changes


@dataclass(frozen=True)
class CellResult:
    """One run of one arm with one seed."""

    arm: str
    seed: int
    folder: Path
    status: str = "missing"
    running: bool = False
    """Its status is "missing", but a process holds its lease."""
    value: float | None = None
    """The study's metric; None unless done."""
    environment: str = "unknown"
    """Text that must be equal for runs to be comparable."""
    seconds: float | None = None
    error: str | None = None
    fingerprint: str | None = None
    code: dict[str, str] = field(default_factory=dict)
    """File or package -> digest or version; empty if not recorded."""
    result: dict[str, Any] = field(default_factory=dict)
    unit: str = ""
    """The unit (one cell, or several run together) that it was part of; unique across merged studies."""
    program: str = ""
    """The compiled program that its unit used."""

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(step, metric) on the validation split, or on training if validation lacks the metric."""
        rows = read_rows(self.folder / "metrics.jsonl")
        for split in ("validation", "train"):
            found = [(r["step"], r[metric]) for r in rows if r["split"] == split and metric in r]
            if len(found) > 1:
                return found
        return []


@dataclass(frozen=True)
class Results:
    """One study, or several that were merged."""

    name: str
    metric: str
    mode: str
    split: str
    kind: str
    factors: dict[str, Any]
    base: dict[str, Any]
    """The base experiment's JSON value."""
    arms: list[ArmResults]
    """All arms, the base first."""
    seeds: list[int]
    tuning_seeds: list[int]
    cells: list[CellResult]
    notes: list[str] = field(default_factory=list)

    def count(self, arm: str | None = None) -> dict[str, int]:
        """Counts planned cells and cells of each status, for one arm or all.

        A cell present in two merged folders counts once, with its better status.
        """
        best: dict[tuple[str, int], int] = {}
        for cell in self.cells:
            if arm in (None, cell.arm):
                key, rank = (cell.arm, cell.seed), STATUSES.index(cell.status)
                best[key] = min(rank, best.get(key, rank))
        counts = {status: list(best.values()).count(i) for i, status in enumerate(STATUSES)}
        assert sum(counts.values()) == len(best), (counts, len(best))
        return {"planned": len(best), **counts}


def short(value: Any) -> str:
    """Formats a changed value for a table: an object by its class and plain fields."""
    if isinstance(value, dict) and "class" in value:
        plain = ", ".join(f"{k}={short(v)}" for k, v in value.items() if k != "class" and v is not None)
        return f"{value['class'].rpartition('.')[2]}({plain if len(plain) < 60 else plain[:57] + '...'})"
    return f"{value:g}" if isinstance(value, float) else str(value)


Number = int | float
# Field of a study's files -> required type, if the field is present.
STUDY = {"name": str, "metric": str, "mode": str, "split": str, "design": dict[str, Any], "base": dict[str, Any],
         "arms": list[dict[str, Any]], "seeds": list[int], "tuning_seeds": list[int] | None}
DESIGN = {"kind": str, "factors": dict[str, Any] | None}
ARM = {"name": str, "changes": dict[str, Any], "fingerprint": str, "fork": int | None, "forked_after": int | None,
       **dict.fromkeys(("parameters", "flops_per_step", "memory_bytes"), Number | None)}
CELL = {"arm": str, "seed": int, "status": str, "mode": str | None, "seconds": Number | None, "error": str | None,
        "fingerprint": str | None, "code": dict[str, str] | None}
RESULT = {"final": dict[str, Any], "best": dict[str, Any], "test": dict[str, Any], "seconds_per_step": Number,
          "harness": dict[str, Number]}
ENVIRONMENT = {"devices": list[str] | None, "versions": dict[str, Any] | None, "settings": dict[str, Any] | None}
UNIT = {"name": str, "cells": list[str], "group": int}


def _json(path: Path, remedy: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Reads an object from a JSON file. Raises UserError if there is none, or a field has the wrong type."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing. {remedy}") from None
    except (ValueError, IsADirectoryError) as e:
        raise UserError(f"{path} is damaged ({e}). {remedy}") from None
    return _checked(value, path, remedy, kinds)


def _checked(value: Any, path: Path, remedy: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (no JSON object). {remedy}")
    for name in kinds.keys() & value.keys():
        try:
            typeguard.check_type(value[name], kinds[name],
                                 collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
        except typeguard.TypeCheckError:
            raise UserError(f"{path} is damaged ({name} is {str(value[name])[:60]}). {remedy}") from None
    return value


def read_study(folder: Path) -> Results:
    """Reads a study folder. The results include every planned cell, whatever its status.

    Raises:
      UserError: not a study folder, or a file in it is damaged.
    """
    if not (folder / "study.json").is_file():
        near = sorted(str(p.parent) for p in (Path("studies"), folder) for p in p.glob("*/study.json"))
        what = "is not a study folder: it has no study.json" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {what}." + (f" There are {', '.join(near[:5])}." if near else ""))
    path, remedy = folder / "study.json", "Run the study again; finished cells are kept."
    study = _json(path, remedy, STUDY)
    try:
        for part, kinds in ((study["design"], DESIGN), *((arm, ARM) for arm in study["arms"])):
            _checked(part, path, remedy, kinds)
        arms = [ArmResults(a["name"], a["changes"], a["fingerprint"], a.get("parameters"), a.get("flops_per_step"),
                    a.get("memory_bytes"), a.get("fork") or 0, a.get("forked_after") or 0)
                for a in study["arms"]]
        found = Results(study["name"], study["metric"], study["mode"], study["split"], study["design"]["kind"],
                        study["design"].get("factors") or {}, study["base"], arms, sorted(study["seeds"]),
                        sorted(study.get("tuning_seeds") or []), [])
        code = {"the study's code": str(study.get("code"))}
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{folder / 'study.json'} is damaged (it lacks {e}). Run the study again; finished cells are "
                        f"kept.") from None
    units = _units(folder)
    cells = [read_cell(folder, found, arm.name, seed, code, units) for arm in arms for seed in found.seeds]
    notes = [f"Not finite although finished, counted as diverged: {c.arm}, seed {c.seed}." for c in cells
             if c.status == "diverged" and c.result]
    planned = {c.folder for c in cells}
    other = [p.parent for p in folder.glob("cells/*/*/cell.json") if p.parent not in planned]
    if other:
        notes.append(f"{len(other)} finished cells belong to no planned arm and seed and are left out, such as "
                     f"{other[0].relative_to(folder)}.")
    return replace(found, cells=cells, notes=notes)


def _units(folder: Path) -> dict[str, tuple[str, str]]:
    """Cell name -> (name of its unit, name of the unit's program), from plan.json."""
    if not (folder / "plan.json").exists():
        return {}
    remedy = "Run the study again; finished cells are kept."
    plan = _json(folder / "plan.json", remedy, {"units": list[dict[str, Any]]})
    try:
        for unit in plan["units"]:
            _checked(unit, folder / "plan.json", remedy, UNIT)
        return {name: (unit["name"], f"program {unit['group']}") for unit in plan["units"] for name in unit["cells"]}
    except (KeyError, TypeError) as e:
        raise UserError(f"{folder / 'plan.json'} is damaged (it lacks {e}). {remedy}") from None


def read_cell(study_folder: Path, study: Results, arm: str, seed: int, code: dict[str, str],
              units: Mapping[str, tuple[str, str]]) -> CellResult:
    """Reads one cell of a study folder; `code` is the default if the cell recorded none; `units`: see `_units`.

    Raises:
      UserError: a file of a finished cell is damaged.
    """
    folder = study_folder / "cells" / arm / str(seed)
    if not (folder / "cell.json").is_file():
        lease = units.get(f"{arm}-{seed}", (f"{arm}-{seed}", ""))[0]
        return CellResult(arm, seed, folder, running=(study_folder / "leases" / f"{lease}.json").exists())
    remedy = f"Delete {folder} and run the study again: it reruns this cell."
    cell = _json(folder / "cell.json", remedy, CELL)
    status = cell.get("status")
    # A cell linked from another study may have another arm name there.
    if status not in STATUSES[:3] or (cell.get("arm"), cell.get("seed")) != (arm, seed) and not folder.is_symlink():
        raise UserError(f"{folder / 'cell.json'} is damaged (status {status!r}, arm {cell.get('arm')!r}, seed "
                        f"{cell.get('seed')!r}). {remedy}")
    own, (unit, program) = cell.get("code"), units.get(f"{arm}-{seed}", (f"{arm}-{seed}", f"of {arm}"))
    made = CellResult(arm, seed, folder, status, environment=_environment(folder, cell.get("mode"), remedy),
                seconds=cell.get("seconds"), error=cell.get("error"), fingerprint=cell.get("fingerprint"),
                code=own if isinstance(own, dict) else code, unit=f"{study_folder}: {unit}",
                program=f"{study_folder}: {program}")
    if status != "done":
        return made
    result = _json(folder / "result.json", remedy, RESULT)
    value = _metric(result, study, folder)
    status = "done" if math.isfinite(value) else "diverged"
    return replace(made, status=status, value=value if status == "done" else None, result=result)


def _metric(result: dict[str, Any], study: Results, folder: Path) -> float:
    """The study's metric, at the end of the run, on the test split or of a benchmark; accepts NaN as JSON writes it."""
    row = result.get("final" if study.split == "validation" else study.split)
    row = row | result.get("harness", {}) if isinstance(row, dict) else row
    if not isinstance(row, dict) or not isinstance(row.get(study.metric), int | float):
        raise UserError(f"{folder / 'result.json'} has no {study.metric} of the {study.split} split; it has "
                        f"{', '.join(k for k in (row or result) if k not in ('step', 'split'))}. Name one of these as "
                        f"the study's metric.")
    return float(row[study.metric])


def _environment(folder: Path, mode: str | None, remedy: str) -> str:
    """Device kind, versions, compiler settings and execution mode, of every machine that the run used."""
    found = []
    for path in sorted(folder.glob("environment*.json")):
        there = _json(path, remedy, ENVIRONMENT)
        kinds = sorted(set(there.get("devices") or ["unknown device"]))
        versions = [f"{p} {(there.get('versions') or {}).get(p)}" for p in PACKAGES]
        settings = [f"{k}={v}" for k, v in sorted((there.get("settings") or {}).items())
                    if k.startswith(("XLA_", "JAX_")) and not any(word in k for word in UNLISTED)]
        line = ", ".join([" and ".join(kinds), *versions, *settings])
        if line not in found:
            found.append(line)
    return ", ".join([" then ".join(found) or "unknown", f"mode {mode}"])


def merge(studies: Sequence[Results]) -> Results:
    """Merges studies of one base. Arms with equal fingerprints become one arm, under the first study's name for it.

    Raises:
      UserError: their metrics or bases differ.
    """
    first = studies[0]
    arms, names, cells, notes = list(first.arms), {}, {}, []
    for number, study in enumerate(studies):
        for what in ("metric", "mode", "split"):
            if getattr(study, what) != getattr(first, what):
                raise UserError(f"{study.name} has {what} {getattr(study, what)}, {first.name} has "
                                f"{getattr(first, what)}: they cannot be merged. Report them one by one.")
        if study.arms[0].fingerprint != first.arms[0].fingerprint:
            raise UserError(f"{study.name} and {first.name} have different bases ({study.arms[0].fingerprint} and "
                            f"{first.arms[0].fingerprint}): differences to them cannot be compared. Report them one "
                            f"by one.")
        for arm in study.arms:
            same = next((a for a in arms if (a.fingerprint, a.fork) == (arm.fingerprint, arm.fork)), None)
            if same is None:
                taken = any(a.name == arm.name for a in arms)
                same = replace(arm, name=f"{arm.name} ({arm.fingerprint[:6]})" if taken else arm.name)
                arms.append(same)
            names[number, arm.name] = same.name
        for cell in study.cells:
            cell = replace(cell, arm=names[number, cell.arm])
            place = (cell.arm, cell.seed, cell.environment if cell.status != "missing" else cell.status)
            before = cells.setdefault(place, cell)
            if before is not cell and cell.status != "missing" and before.fingerprint != cell.fingerprint:
                notes.append(f"{cell.arm}, seed {cell.seed} ran more than once: the run of the first folder is used.")
        notes += study.notes
    there = {(arm, seed) for arm, seed, status in cells if status != "missing"}
    kept = [c for c in cells.values() if c.status != "missing" or (c.arm, c.seed) not in there]
    same_design = all((s.kind, s.factors) == (first.kind, first.factors) for s in studies)
    return replace(first, name=" + ".join(dict.fromkeys(s.name for s in studies)), arms=arms, cells=kept, notes=notes,
                   kind=first.kind if same_design else "list", factors=first.factors if same_design else {},
                   seeds=sorted({s for study in studies for s in study.seeds}),
                   tuning_seeds=sorted({s for study in studies for s in study.tuning_seeds}))


def changed_code(cells: Sequence[CellResult]) -> list[str]:
    """Files and packages that differ between the cells that recorded them."""
    versions: dict[str, set[str]] = {}
    for cell in cells:
        for name, version in cell.code.items():
            versions.setdefault(name, set()).add(version)
    return sorted(name for name, found in versions.items() if len(found) > 1)


def cells_csv(results: Results) -> str:
    """One row per planned cell, enough to repeat the statistics.

    `changes` holds all changes as JSON. Then follow the study's metric, every number in result.json (the run's end
    such as "final.loss", its best evaluation, the test split), and the run folder.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    numbers = {id(c): {f"{part}.{name}": value for part in ("final", "best", "test", "harness")
                       if isinstance(c.result.get(part), dict)
                       for name, value in c.result[part].items() if isinstance(value, int | float)}
               for c in results.cells}
    names = list(dict.fromkeys(name for found in numbers.values() for name in found))
    writer.writerow(["arm", "changes", "seed", "tuning", "status", results.metric, "seconds", "seconds_per_step",
                     *names, "environment", "folder", "error"])
    changes = {arm.name: json.dumps(arm.changes | ({"fork after step": arm.fork} if arm.fork else {}))
               for arm in results.arms}
    for c in results.cells:
        row: list[Any] = [c.arm, changes[c.arm], c.seed, c.seed in results.tuning_seeds, c.status, c.value, c.seconds,
                          c.result.get("seconds_per_step"), *(numbers[id(c)].get(name) for name in names)]
        writer.writerow([*row, c.environment if c.status != "missing" else "", c.folder, c.error])
    return buffer.getvalue()
