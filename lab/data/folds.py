"""k-fold cross-validation: one fold of the training records is held out, as a value of the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lab.data import digest
from lab.data.dataset import Around, Dataset, Origin, part
from lab.data.order import shuffled
from lab.errors import UserError

SALT = 0x666F6C64  # so that the division has nothing to do with the order of records in an epoch


@dataclass(frozen=True)
class Folds(Around):
    """Another data set, one fold of whose training records is the validation split, and the rest is learned.

    The test split is the same; its own validation split is unused. Every training record is in one fold; their sizes
    differ by one record at most. Values fitted to training records use all folds: a table's means, a vocabulary, and
    the mean and scale of a regression's target.
    """

    folds: int = 5
    """Number of folds k."""
    fold: int | None = None
    """The fold to hold out, from 0; None: none, the data as it is."""
    seed: int = 0
    """Of the division; independent of the experiment's seed, so that all seeds of a study have the same folds."""

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        if self.folds < 2:
            raise UserError(f"--data.folds must be at least 2, not {self.folds}.")
        if self.fold is not None and not 0 <= self.fold < self.folds:
            raise UserError(f"--data.fold {self.fold} is not one of the {self.folds} folds, 0 to {self.folds - 1}.")
        super().validate()

    def of(self, records: int) -> np.ndarray:
        """The fold of each of so many training records, int (records,). UserError for more folds than records."""
        if self.folds > records:
            raise UserError(f"--data.folds {self.folds:,} is above the {records:,} training records.")
        return shuffled(np.arange(records), 0, self.seed ^ SALT, records).astype(np.int64) % self.folds

    def load(self) -> Dataset:
        """The splits. Raises UserError for more folds than records, or records that move between epochs."""
        whole = self.data.load()
        if hasattr(whole.train, "in_epoch"):
            raise UserError("Folds need records that are the same in every epoch; the windows of this text move.")
        folds = self.of(len(whole.train))
        if self.fold is None:
            return whole
        rows = {"train": np.flatnonzero(folds != self.fold), "validation": np.flatnonzero(folds == self.fold)}
        origin = whole.origins.get("train") or Origin(np.arange(len(whole.train)))
        origins: Mapping[str, Any] = {split: origin.at(own) for split, own in rows.items()}
        counts = {f"{split} records": len(own) for split, own in rows.items()}
        lines = {name: line for name, line in whole.summary.items() if not name.startswith(("train ", "validation "))}
        return replace(whole, **{split: part(whole.train, own) for split, own in rows.items()},
                       origins={**whole.origins, **origins},
                       summary=counts | {"fold": f"{self.fold} of {self.folds} is validation"} | lines,
                       fingerprint=digest("folds", whole.fingerprint, self.folds, self.fold, self.seed))
