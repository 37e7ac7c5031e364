"""Poisson sampling: which records are in the batch of a step, as a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

SALT = 0x706F6973  # so that no other use of NumPy's generators has this stream


def drawn(step: int, rate: float, size: int, batch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(records int64 (batch,), weight float32 (batch,)) of a step: each of `size` records with probability `rate`, in
    random order; behind them record 0 at weight 0. More than `batch` are cut off.
    """
    draw = np.random.Generator(np.random.Philox(np.random.SeedSequence((SALT, seed, step))))
    count = int(draw.binomial(size, rate))  # a binomial number of distinct records, any equally likely
    chosen = draw.choice(size, count, replace=False)[:batch]
    indices, weight = np.zeros(batch, np.int64), np.zeros(batch, np.float32)
    indices[: len(chosen)], weight[: len(chosen)] = chosen, 1
    return indices, weight


def reader(program: Any, rate: float) -> Callable[[int], dict[str, np.ndarray]]:
    """As `lab.data.pipeline.reader`."""
    experiment, records = program.experiment, program.train_records

    def one(step: int) -> dict[str, np.ndarray]:
        indices, weight = (x[program.rows] for x in drawn(step, rate, len(records), experiment.batch, experiment.seed))
        return records[indices] | {"weight": weight, "index": indices.astype(np.int32)}

    def several(call: int) -> dict[str, np.ndarray]:
        n = experiment.steps_per_call
        steps = [one(call * n + i) for i in range(n)]
        return {name: np.stack([step[name] for step in steps]) for name in steps[0]}

    return several if program.stacked else one


def fitted(data: Any) -> str:
    """What a data set of lab/data fits to its training records; empty if nothing."""
    from lab.data.dataset import Around
    from lab.data.tables.tables import Table
    from lab.data.tokenizers import BPE, Chars
    from lab.data.word_tokenizer import Words

    if isinstance(data, Around):
        return fitted(data.data)
    if isinstance(data, Table):
        return "means, standard deviations and categories" if data.standardise else "categories"
    return "a vocabulary" if isinstance(getattr(data, "tokenizer", None), BPE | Chars | Words) else ""
