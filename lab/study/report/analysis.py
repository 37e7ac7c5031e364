"""Selects which cells of a study can be compared, pairs them by seed, and computes the comparisons."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lab.study.report import stats
from lab.study.report.results import ArmResults, CellResult, Results, short

AXIS_LEVELS = 3  # a numeric factor with at least this many levels is an axis


@dataclass(frozen=True)
class Section:
    """Cells that can be compared with each other."""

    environment: str
    cells: dict[str, dict[int, CellResult]]
    """Arm -> seed -> finished cell, without tuning seeds. Includes every arm of the study."""

    def values(self, arm: str) -> dict[int, float]:
        """Seed -> metric."""
        return {seed: cell.value for seed, cell in self.cells[arm].items()}


@dataclass(frozen=True)
class Against:
    """All arms compared with one reference arm."""

    reference: str
    comparisons: dict[str, stats.Comparison]
    """Arm -> comparison, for every other arm with a finished cell."""
    excluded: dict[str, list[str]]
    """Arm -> the excluded pairs, each with its reason."""


def sections(results: Results, pool: bool) -> list[Section]:
    """Groups the finished cells by environment, the largest group first; with `pool`, into one group.

    When pooled, a seed that ran in several environments counts once: its runs share batches and initial weights, so
    they are not independent.
    """
    done = [c for c in results.cells if c.status == "done" and c.seed not in results.tuning_seeds]
    names = list(dict.fromkeys(c.environment for c in done))
    groups = [names] if pool and names else [[name] for name in names]
    found = []
    for group in groups:
        cells: dict[str, dict[int, CellResult]] = {arm.name: {} for arm in results.arms}
        for cell in done:
            if cell.environment in group:
                cells[cell.arm].setdefault(cell.seed, cell)
        found.append(Section(" | ".join(group), {a: dict(sorted(c.items())) for a, c in cells.items()}))
    return sorted(found, key=lambda s: -sum(map(len, s.cells.values())))


def against(results: Results, section: Section, reference: str) -> Against:
    """Compares every arm that has cells with `reference`, paired by seed; p is adjusted for all comparisons."""
    arms = [a.name for a in results.arms if a.name != reference and section.cells[a.name]]
    other, comparisons, excluded = section.cells[reference], [], {}
    for arm in arms:
        own = section.cells[arm]
        pairs = [s for s in own.keys() & other.keys() if own[s].environment == other[s].environment]
        comparisons.append(stats.compare(section.values(arm), section.values(reference), results.mode, pairs))
        reasons = [_reason(results, section, arm, reference, seed) for seed in results.seeds if seed not in pairs]
        excluded[arm] = [r for r in reasons if r]
    return Against(reference, dict(zip(arms, stats.adjust(comparisons), strict=True)), excluded)


def _reason(results: Results, section: Section, arm: str, reference: str, seed: int) -> str | None:
    """Why this seed has no pair; None for a tuning seed, which is never paired."""
    if seed in results.tuning_seeds:
        return None
    words = []
    for name in (arm, reference):
        if seed not in section.cells[name]:
            there = {c.status for c in results.cells if (c.arm, c.seed) == (name, seed)}
            status = "ran in another environment" if "done" in there else " and ".join(sorted(there)) or "not planned"
            words.append(f"{name} {status}")
    return f"seed {seed}: {', '.join(words) or 'the two ran in different environments'}"


def whole(results: Results) -> str | None:
    """The arm with all edits in a leave-one-out study; None for other designs."""
    if results.kind != "leave_one_out" or len(results.arms) < 3:
        return None
    most = max(results.arms, key=lambda a: len(a.changes))
    return most.name if all(a.changes.items() <= most.changes.items() for a in results.arms) else None


def step_seconds(section: Section, arm: str) -> tuple[float, float, float]:
    """Seconds per step of an arm: geometric mean and its 95 % interval; NaN if unknown.

    Averages over all runs of the arm's compiled programs, since a program's speed does not depend on its numeric
    arguments. Runs executed together as one program (`vmap`) count once.
    """
    programs = {cell.program for cell in section.cells[arm].values()}
    runs = {cell.unit: cell.result.get("seconds_per_step") for cells in section.cells.values()
            for cell in cells.values() if cell.program in programs}
    logs = np.log([s for s in runs.values() if isinstance(s, int | float) and s > 0])
    mean, (low, high) = stats.mean_sd(logs)[0], stats.interval(logs)
    return float(np.exp(mean)), float(np.exp(low)), float(np.exp(high))


# ------------------------------------------------------------------------------------------------------ factors


def value_at(results: Results, arm: ArmResults, path: str) -> Any:
    """The arm's value of a dotted field: from its changes to the field or a parent of it, else the base's value."""
    for start in (p for p in (path.rsplit(".", n)[0] for n in range(path.count(".") + 1)) if p in arm.changes):
        return _inside(arm.changes[start], path[len(start) + 1:])
    return _inside(results.base, path)


def _inside(value: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        value = value.get(name) if isinstance(value, dict) else None
    return value


def level(results: Results, arm: ArmResults, factor: str) -> Any:
    """An arm's level of a factor: the field's value, or for a named edit whether the arm has it."""
    values = results.factors[factor]
    if isinstance(values, dict):
        return all(_key(value_at(results, arm, path)) == _key(value) for path, value in values.items())
    return value_at(results, arm, factor)


def levels_of(results: Results, factor: str) -> list[Any]:
    """The levels of a factor, in the order of the design."""
    values = results.factors[factor]
    return [False, True] if isinstance(values, dict) else list(values) if isinstance(values, list | tuple) else []


def base_is_extra(results: Results) -> bool:
    """Whether the base is not one of the design's combinations and was added only as the reference."""
    if results.kind not in ("grid", "one_at_a_time") or not results.factors:
        return False
    own = [_key(level(results, results.arms[0], f)) in map(_key, levels_of(results, f)) for f in results.factors]
    return not (all(own) if results.kind == "grid" else any(own))


@dataclass(frozen=True)
class Block:
    """A complete crossing of factors."""

    levels: dict[str, list[str]]
    values: np.ndarray
    """(levels of factor 0, ..., n)"""
    seeds: list[int]
    """Seeds that every arm finished."""


def block(results: Results, section: Section) -> Block | None:
    """The crossing of all factors, for seeds that every arm finished; None if the design is not a full crossing.

    With no common seed, `seeds` is empty.
    """
    if results.kind not in ("factorial", "grid") or len(results.factors) < 2:
        return None
    keys = {name: [_key(v) for v in levels_of(results, name)] for name in results.factors}
    if min(map(len, keys.values())) < 2:
        return None
    at = {tuple(_key(level(results, arm, f)) for f in keys): arm.name for arm in reversed(results.arms)}
    cross = list(itertools.product(*keys.values()))
    if any(place not in at for place in cross):
        return None
    cells = [section.values(at[place]) for place in cross]
    seeds = sorted(set.intersection(*(set(c) for c in cells)))
    shape = [len(k) for k in keys.values()] + [len(seeds)]
    names = {f: ["no", "yes"] if isinstance(results.factors[f], dict) else [short(v) for v in levels_of(results, f)]
             for f in keys}
    return Block(names, np.array([[c[s] for s in seeds] for c in cells], float).reshape(shape), seeds)


def _key(value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return json.dumps(float(value) if number else value, sort_keys=True)


def effects(found: Block) -> dict[str, tuple[stats.Comparison, str]]:
    """Main effects and interactions of a two-level block: name -> (comparison with 0, explanation)."""
    names = list(found.levels)
    made, meanings = {}, []
    for chosen, values in stats.factorial_effects(found.values).items():
        per_seed = dict(zip(found.seeds, values.tolist(), strict=True))
        made[" x ".join(names[i] for i in chosen)] = stats.compare(per_seed, dict.fromkeys(per_seed, 0.0), "max")
        low, high = found.levels[names[chosen[0]]]
        meanings.append(f"{high} minus {low}" if len(chosen) == 1 else "half the difference of the effects")
    adjusted = stats.adjust(list(made.values()))
    return dict(zip(made, zip(adjusted, meanings, strict=True), strict=True))


@dataclass(frozen=True)
class Axis:
    """A sweep over a numeric factor: one line per setting of the other factors."""

    factor: str
    lines: dict[str, tuple[list[float], list[np.ndarray]]]
    """Line -> (x ascending, per-seed values at each x)."""
    optima: dict[str, float]
    """Line -> vertex of the fitted parabola, or the best x if it is at either end."""
    words: dict[str, str]
    """Line -> a description of its optimum."""


def axes(results: Results, section: Section) -> list[Axis]:
    """A sweep for each numeric factor with three or more levels."""
    found = []
    for factor in results.factors:
        values = [v for v in levels_of(results, factor) if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(set(values)) < AXIS_LEVELS or len(values) < len(levels_of(results, factor)):
            continue
        lines: dict[str, dict[float, dict[int, float]]] = {}
        for arm in results.arms:
            x = level(results, arm, factor)
            if section.cells[arm.name] and isinstance(x, int | float) and math.isfinite(x):
                line = ", ".join(f"{f}={short(level(results, arm, f))}" for f in results.factors if f != factor)
                lines.setdefault(line, {}).setdefault(float(x), section.values(arm.name))
        lines = {name: dict(sorted(points.items())) for name, points in lines.items() if len(points) >= AXIS_LEVELS}
        if lines:
            ends = {name: _optimum(points, results.mode) for name, points in lines.items()}
            drawn = {name: (list(p), [np.array(list(v.values())) for v in p.values()]) for name, p in lines.items()}
            found.append(Axis(
                factor, drawn,
                {name: x for name, (x, _) in ends.items()}, {name: words for name, (_, words) in ends.items()}))
    return found


def _optimum(points: Mapping[float, Mapping[int, float]], mode: str) -> tuple[float, str]:
    x = list(points)
    best, vertex = stats.sweep_optimum(x, [np.mean(list(v.values())) for v in points.values()], mode)
    seeds = set.intersection(*(set(v) for v in points.values()))
    sign = 1 if mode == "max" else -1
    agree = sum(max(x, key=lambda at: sign * points[at][s]) == x[best] for s in seeds)
    words = f"{x[best]:g} is the best that was tried, for {agree} of {len(seeds)} seeds that ran all"
    if vertex is None:
        return x[best], f"{words}; it is at the edge of the sweep, so the optimum may lie outside"
    return vertex, f"{words}; a parabola through it and its neighbours has its optimum at {vertex:.3g}"
