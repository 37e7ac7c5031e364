"""A loaded table: what a run saves of it, new rows encoded as in training, and results of scikit-learn's models."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lab.data import log
from lab.data.dataset import Dataset, Incoming, without_blanks
from lab.data.pipeline import Arrays
from lab.data.tables.columns import Columns, labels
from lab.data.tables.csv_files import read_columns
from lab.data.tables.features import Category, Feature, Target, encode, gaps
from lab.data.tables.numbers import NumberFormat


@dataclass
class TableData(Dataset):
    """The result of `lab.data.tables.tables.Table.load`."""

    features: tuple[Feature, ...] = field(default=(), kw_only=True)
    target: Target = field(default=Target(""), kw_only=True)
    standardised: bool = field(default=True, kw_only=True)
    form: NumberFormat = field(default=NumberFormat(), kw_only=True)
    encoding: str = field(default="UTF-8", kw_only=True)

    @property
    def feature_names(self) -> list[str]:
        """A name for each input: the column, or column=category."""
        return [name for f in self.features
                for name in ([f"{f.name}={value}" for value in f.values] if isinstance(f, Category) else [f.name])]

    def saved(self) -> dict[str, Any]:
        """See `Dataset.saved`."""
        features = [[type(feature).__name__, asdict(feature)] for feature in self.features]
        return super().saved() | {"features": features, "target": asdict(self.target), "form": asdict(self.form),
                                  "encoding": self.encoding}

    def in_words(self, targets: np.ndarray) -> list[Any]:
        """See `Dataset.in_words`; numbers are in the units of the file."""
        if self.classes:
            return super().in_words(targets)
        return (targets.astype(np.float64) * self.target.scale + self.target.mean).tolist()

    def in_units(self, inputs: np.ndarray) -> dict[str, list[Any]]:
        """Decodes inputs (n, F): column -> numbers in the file's units, or categories."""
        found, at = {}, 0
        for feature in self.features:
            found[feature.name] = feature.decode(inputs[:, at : at + feature.width])
            at += feature.width
        return found

    def read(self, path: Path, id_column: str | None = None, strict: bool = False) -> Incoming:
        """The rows of a CSV file with the feature columns in any order; further columns are ignored.

        Missing values are filled as in training; a row without values is skipped. Raises UserError with line and
        column.
        """
        table = read_columns(path, self.form, self.encoding)
        ids = [] if id_column is None else [id_column]
        cells = [table.column(name) for name in (*ids, *(feature.name for feature in self.features))][len(ids):]
        blank = [row for row in range(len(table)) if all(map(self.form.is_missing, (column[row] for column in cells)))]
        without_blanks(path, [f"line {table.lines[row]}" for row in blank], len(table), strict)
        kept = [row for row in range(len(table)) if row not in set(blank)]
        table = table.rows(kept)
        for feature, n in gaps(self.features, table).items():
            log.warning("%s: %d of %d values are missing in column %r: set to %s", path, n, len(table), feature.name,
                        feature)
        inputs = {"inputs": encode(self.features, table)}
        return Incoming(Arrays(inputs | self.target.arrays(len(table))), kept, [f"line {n}" for n in table.lines],
                        {name: list(table.column(name)) for name in ids}, self._truth(table))

    def _truth(self, table: Columns) -> list[Any] | None:
        """The target column, if present: class names or numbers."""
        if self.target.column not in table.cells:
            return None
        if self.target.names:
            return labels(table, self.target.column)
        values, _ = self.form.parse(table.column(self.target.column))
        return ["" if np.isnan(value) else value for value in values.tolist()]

    def reference(self) -> list[str]:
        """Results of scikit-learn's linear models with the same training and evaluation rows."""
        from sklearn.linear_model import LinearRegression, LogisticRegression
        from sklearn.metrics import accuracy_score, r2_score, recall_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        name, records = ("validation", self.validation) if self.test is None else ("test", self.test)
        (x, y), (inputs, truth) = ((r.arrays["inputs"].astype(np.float64), r.arrays["targets"])
                                   for r in (self.train, records))
        if not self.classes:
            scale, offset = self.target.scale, self.target.mean
            guess = LinearRegression().fit(x, y.astype(np.float64)).predict(inputs) * scale + offset
            truth = truth.astype(np.float64) * scale + offset
            error = float(np.sqrt(np.mean((guess - truth) ** 2)))
            r2 = f", R2 {r2_score(truth, guess):.4f}" if len(truth) > 1 else ""
            return [f"scikit-learn LinearRegression (closed form): {name} RMSE {error:.6g}{r2}"]
        model = LogisticRegression(max_iter=10_000)
        guess = (model if self.standardised else make_pipeline(StandardScaler(), model)).fit(x, y).predict(inputs)
        recall = recall_score(truth, guess, labels=np.unique(truth), average="macro", zero_division=0)
        return [f"scikit-learn LogisticRegression (standardised, C=1): {name} accuracy "
                f"{accuracy_score(truth, guess):.4f}, macro recall {recall:.4f}"]
