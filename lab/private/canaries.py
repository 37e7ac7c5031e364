"""Canaries: training records of which a coin decides, each by itself, whether a run learns them. An audit then compares
equal records, of which it knows who was in training (Steinke, Nasr & Jagielski, "Privacy auditing with one (1) training
run", 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lab.data import digest
from lab.data.dataset import Around, Dataset, Part
from lab.data.pipeline import Batch, Records
from lab.errors import UserError

SALT = 0x63616E61  # so that no other use of NumPy's generators has this stream


class _Chosen(Part):
    """`Part`. `shift` (n,): added to the classes of all records, modulo their number."""

    def __init__(self, records: Records, rows: np.ndarray, shift: np.ndarray, classes: int):
        super().__init__(records, rows)
        self.shift, self.classes = shift, classes

    def __getitem__(self, indices: np.ndarray) -> Batch:
        batch = super().__getitem__(indices)
        if not self.classes:
            return batch
        shifted = batch["targets"] + self.shift[self.rows[indices]]
        return batch | {"targets": (shifted % self.classes).astype(np.int32)}


@dataclass(frozen=True)
class Canaries(Around):
    """Another data set, less the canaries whose coin fell on tails. Validation and test are the same."""

    count: int | None = None
    """How many of its training records are canaries, evenly spaced; None: all."""
    mislabelled: bool = True
    """Canaries have a wrong class, drawn at random: what nothing but memory can know. False: their own."""
    seed: int = 0
    """Of the coins. Canaries and their classes are the same for each seed."""

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        if self.count is not None and self.count < 1:
            raise UserError(f"--data.count must be at least 1, not {self.count}.")
        super().validate()

    def load(self) -> Dataset:
        """The splits. Raises UserError for more canaries than records, or records that cannot be canaries."""
        whole = self.data.load()
        rows, inside = self._drawn(whole)
        stay = np.ones(len(whole.train), bool)
        stay[rows] = inside
        stay = np.flatnonzero(stay)
        summary = {name: line for name, line in whole.summary.items() if not name.startswith("train ")}
        summary = {"train records": len(stay), "train canaries": f"{inside.sum():,} of {len(rows):,}"} | summary
        origins: Mapping[str, Any] = {name: x.at(stay) if name == "train" else x for name, x in whole.origins.items()}
        return replace(whole, train=self._chosen(whole, stay), summary=summary, origins=origins, fingerprint=digest(
            "canaries", whole.fingerprint, self.count, self.mislabelled, self.seed))

    def canaries(self) -> tuple[Records, np.ndarray]:
        """The canaries, and of each whether it is in training, bool (n,)."""
        whole = self.data.load()
        rows, inside = self._drawn(whole)
        return self._chosen(whole, rows), inside

    def _drawn(self, whole: Dataset) -> tuple[np.ndarray, np.ndarray]:
        n = len(whole.train)
        count = n if self.count is None else self.count
        if count > n:
            raise UserError(f"--data.count {count:,} is above the {n:,} training records.")
        if hasattr(whole.train, "in_epoch"):
            raise UserError("Canaries need records that are the same in every epoch; the windows of this text move.")
        if self.mislabelled and "classes" not in whole.metadata:
            raise UserError("Mislabelled canaries need classes, which this data has not: --data.no-mislabelled.")
        coins = np.random.default_rng([SALT, self.seed]).random(count) < 0.5
        return np.arange(count) * n // count, coins

    def _chosen(self, whole: Dataset, rows: np.ndarray) -> _Chosen:
        if not self.mislabelled:
            return _Chosen(whole.train, rows, np.zeros(0), 0)
        shift, classes = np.zeros(len(whole.train), np.int64), whole.metadata["classes"]
        canaries, _ = self._drawn(whole)
        shift[canaries] = np.random.default_rng(SALT).integers(1, classes, len(canaries))
        return _Chosen(whole.train, rows, shift, classes)
