"""Arms compared item by item where the metric is one of lm-eval (lab/harness): the same questions, put to both.

Seeds and items are two sources of chance. The interval over seeds asks what another training run would give on these
items; the interval over items, what these runs would give on other items of the kind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import special

from lab.errors import UserError
from lab.harness import FOLDER
from lab.harness.run import file_name
from lab.study.report.analysis import Against, Section
from lab.study.report.render import Block, Table, Text
from lab.study.report.results import Results

RESAMPLES, LEVEL = 9_999, 0.95
NOTE = ("Item by item: both arms answer the same questions; per seed, McNemar's exact test of the questions that one "
        "arm alone answers right. The interval resamples the questions (bootstrap, percentiles), with the difference "
        "of each averaged over the seeds: it holds for these runs and other questions, the interval over seeds for "
        "these questions and other runs. A difference should hold in both.")


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p of the items that only one of two models has right (McNemar 1947): a fair coin would be as
    uneven. 1 without such items."""
    n = only_a + only_b
    return 1.0 if n == 0 else min(1.0, 2 * float(special.bdtr(min(only_a, only_b), n, 0.5)))


def item_interval(differences: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval (percentiles) of the mean of differences (items,). Deterministic for a given seed.

    A resample is the number of times that each distinct value is drawn: items of one value are alike.
    """
    values, counts = np.unique(differences, return_counts=True)
    n = len(differences)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, resamples)
    low, high = np.quantile(drawn @ values / n, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def read_items(run: Path, metric: str) -> dict[str, float]:
    """Item -> value of a metric such as blimp_causative.acc or gsm8k.exact_match,strict-match; for a group of tasks the
    items of all. Empty if it is no such metric, or no mean of its items.

    Raises:
      UserError: a file is damaged.
    """
    name, _, filtered = metric.partition(",")
    task, _, name = name.rpartition(".")  # lab.harness.tasks.named; a task's own name may have a point
    found: dict[str, float] = {}
    for leaf in _leaves(run / FOLDER, task):
        path = run / FOLDER / f"samples_{file_name(leaf)}.jsonl"
        if not path.is_file():
            return {}
        try:
            for line in path.read_text("utf-8").rstrip("\n").split("\n"):  # texts may have other separators
                item = json.loads(line)
                if item["filter"] == (filtered or "none") and isinstance(item.get(name), int | float):
                    found[f"{leaf} {item['doc_id']} {item['doc_hash']}"] = float(item[name])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path} is damaged ({e}).") from None
    return found


def _leaves(folder: Path, task: str) -> list[str]:
    """The tasks of a group, or the task itself."""
    groups: dict[str, list[str]] = {}
    for path in folder.glob("results-*.json"):
        try:
            groups |= json.loads(path.read_text("utf-8")).get("group_subtasks", {})
        except (OSError, ValueError, AttributeError) as e:
            raise UserError(f"{path} is damaged ({e}).") from None
    below = groups.get(task) or []
    return [leaf for child in below for leaf in _leaves(folder, child)] if below else [task]


def paired(arm: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Differences arm - other (seeds, items) of the items that all runs have, one mapping for each seed."""
    shared = sorted(set.intersection(*(set(run) for run in (*arm, *other))))
    return np.array([[a[i] - b[i] for i in shared] for a, b in zip(arm, other, strict=True)])


def by_item(results: Results, section: Section, found: Against) -> list[Block]:
    """A table of arms against their reference, paired by item and seed; nothing if the metric has no items."""
    base, rows = section.cells[found.reference], []
    there = {seed: read_items(cell.folder, results.metric) for seed, cell in base.items()}
    for arm in found.comparisons:
        own = {seed: read_items(cell.folder, results.metric) for seed, cell in section.cells[arm].items()}
        seeds = [s for s in own if own[s] and there.get(s)
                 and section.cells[arm][s].environment == base[s].environment]
        if not seeds:
            continue
        differences = paired([own[s] for s in seeds], [there[s] for s in seeds])
        if not differences.size:
            continue
        mean = differences.mean(0)
        binary = all(set(run[s].values()) <= {0.0, 1.0} for run in (own, there) for s in seeds)
        wins = [(int((d > 0).sum()), int((d < 0).sum())) for d in differences] if binary else []
        low, high = item_interval(mean)
        rows.append([arm, str(len(seeds)), str(mean.size), f"{mean.mean():.4f}", f"{low:.4f} to {high:.4f}",
                     ", ".join(f"{a}:{b}" for a, b in wins), ", ".join(f"{mcnemar(a, b):.2g}" for a, b in wins)])
    if not rows:
        return []
    return [Table(f"Each arm minus {found.reference}, paired by item",
                  ["arm", "seeds", "items", "difference", "95 % over items", "only arm : only base right",
                   "p (McNemar)"], rows), Text(NOTE, terminal=False)]
