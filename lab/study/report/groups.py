"""Metrics by group of records (`Classify(groups="sex")`) in the report of a study, and the gaps compared."""

from __future__ import annotations

import numpy as np

from lab.study.report import stats
from lab.study.report.analysis import Section
from lab.study.report.render import Block, Table, Text
from lab.study.report.results import CellResult, Results
from lab.tasks.group_report import FEW
from lab.tasks.groups import SIZE

NOTE = ("A gap is the difference between the groups with the highest and the lowest value, so it is above 0 by chance, "
        "too. All intervals here are over seeds, for these records; ./launch.sh evaluate RUN writes a run's intervals "
        "over records.")
WIDE = ("objective", "top5_accuracy", "member_accuracy", "precision", "recall", "mse", "loss")  # not in the terminal
GAPS = {"demographic_parity_difference": "demographic parity", "equalized_odds_difference": "equalized odds"}


def by_group(results: Results, section: Section) -> list[Block]:
    """Tables of the metrics of every group, and of the gaps between groups, paired with the base by seed; nothing if
    the runs have no groups."""
    rows = {arm.name: {seed: _row(results, cell) for seed, cell in section.cells[arm.name].items()}
            for arm in results.arms}
    first = next((row for found in rows.values() for row in found.values()), {})
    groups = [name.removeprefix(f"{SIZE}/") for name in first if name.startswith(f"{SIZE}/")]
    if not groups:
        return []
    metrics = list(dict.fromkeys(name.partition("/")[0] for name in first if "/" in name and SIZE not in name))
    own = {f"{name}_gap": name for name in metrics if name not in WIDE}
    table = []
    for arm, found in rows.items():
        for group in groups if found else ():
            cells = [_mean([row.get(f"{metric}/{group}", np.nan) for row in found.values()]) for metric in metrics]
            table.append([arm, group, f"{first[f'{SIZE}/{group}']:,.0f}", *cells])
    few = [f"{group} ({first[f'{SIZE}/{group}']:,.0f})" for group in groups if first[f"{SIZE}/{group}"] < FEW]
    blocks: list[Block] = [
        Table(f"By group, {results.split} split: mean over seeds and half its 95 % interval (t)",
              ["arm", "group", "records", *metrics], table, wide=[name for name in metrics if name in WIDE]),
        _gaps(section, rows, {name: short for name, short in (GAPS | own).items() if name in first})]
    if few:
        blocks.append(Text(f"Groups with few records, whose figures say little: {', '.join(few)}."))
    return [*blocks, Text(NOTE, terminal=False)]


def _gaps(section: Section, rows: dict[str, dict[int, dict[str, float]]], names: dict[str, str]) -> Table:
    """Each gap of each arm, and its difference to the base."""
    base, table = next(iter(rows)), []
    for name, short in names.items():
        values = {arm: {seed: row.get(name, np.nan) for seed, row in found.items()} for arm, found in rows.items()}
        for arm in (arm for arm, found in values.items() if found):
            there = section.cells[base]
            pairs = [seed for seed, cell in section.cells[arm].items()
                     if seed in there and cell.environment == there[seed].environment]
            c = stats.compare(values[arm], values[base], "min", pairs)
            difference = "" if arm == base or not np.isfinite(c.difference) else f"{c.difference:+.4f}"
            ends = f"{c.t[0]:+.4f} to {c.t[1]:+.4f}" if difference and np.isfinite(c.t).all() else ""
            table.append([short, arm, str(len(values[arm])), _mean(list(values[arm].values())), difference, ends])
    return Table("Gaps between groups, each arm minus the base paired by seed",
                 ["gap in", "arm", "n", "mean", "difference", "95 % (t)"], table, wide=("n",))


def _row(results: Results, cell: CellResult) -> dict[str, float]:
    row = cell.result.get("final" if results.split == "validation" else results.split)
    return {name: float(value) for name, value in (row or {}).items() if isinstance(value, int | float)}


def _mean(values: list[float]) -> str:
    found = np.array(values)
    if not np.isfinite(found).all():
        return ""
    half = float(np.ptp(stats.interval(found))) / 2
    return f"{found.mean():.4g}" + (f" ± {half:.2g}" if np.isfinite(half) else "")
