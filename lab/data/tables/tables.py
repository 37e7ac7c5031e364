"""Tables: columns to standardised features and a target, with statistics from the training rows only."""

import functools
import hashlib
import json
import re
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from lab.data import digest
from lab.data.dataset import Origin, class_names, restored
from lab.data.order import fixed_order
from lab.data.pipeline import Arrays, Batch
from lab.data.tables.bundled import Sklearn
from lab.data.tables.columns import Columns, class_targets, is_numeric, refuse_doubts, some
from lab.data.tables.csv_files import Csv
from lab.data.tables.features import Category, Feature, Number, Target, encode, fit, gaps, known_numbers, moments
from lab.data.tables.groups import counted, group_fields
from lab.data.tables.numbers import NumberFormat
from lab.data.tables.table_data import TableData
from lab.errors import UserError

Lines = dict[str, str | int | float]
FEW = 20  # a target with at most this many distinct integers is taken as classes


@dataclass(frozen=True)
class Table:
    """A table, one record per row, for regression or classification.

    A record is one row: `inputs` float32 (F,), and for classification `targets` int32 (), the class. For regression,
    `targets` float32 () is standardised on the training rows; targets * `scale` + sum(`offset`), in float64, is in the
    units of the file (`scale` float32 (), `offset` float32 (2,)).

    All statistics come from the training rows only. A numeric column is standardised by its mean and standard
    deviation; its median replaces missing values. A text column is one-hot encoded, categories in sorted order; its
    most frequent category replaces missing values. A column is numeric if all values in the training rows are numbers;
    if only more than 90 % are, the rest are errors. Numbers in another format (1,200 or 3,5 or $10, or - for a missing
    value) are an error; see `Csv`.

    A fixed shuffle of the rows, independent of the experiment's seed and of the classes, decides the splits.
    """

    source: Sklearn | Csv
    """Where the rows come from."""
    test: float = 0.2
    """Fraction of the rows in the test split, if the source has none of its own; 0: no test split."""
    validation: float = 0.1
    """Fraction of the remaining rows in the validation split."""
    standardise: bool = True
    """Standardise numeric columns to mean 0 and standard deviation 1; a regression target always is."""
    unseen: Literal["error", "zeros"] = "error"
    """Handling of a category that no training row has: stop with an error, or encode it as all zeros."""
    categories: int = 100
    """A text column with more categories than this is an error: it probably holds names or sentences."""
    groups: tuple[str, ...] | None = field(default=None, metadata={"fingerprint": "if set"})
    """Columns whose values are fields of a record, too, such as sex=female. Set by the `groups` of a task."""

    unit = "rows"
    units_per_record = 1

    def validate(self) -> None:
        """UserError for values out of range; nothing is read."""
        self.source.validate()
        if not 0 <= self.test < 1:
            raise UserError(f"Table(test={self.test}) must be at least 0 and less than 1: a part of all rows.")
        if not 0 < self.validation < 1:
            raise UserError(f"Table(validation={self.validation}) must be between 0 and 1: a part of the rows.")
        if self.categories < 2:
            raise UserError(f"Table(categories={self.categories}) must be at least 2.")
        if isinstance(self.source, Csv) and self.source.text is not None:
            raise UserError(f"Csv(text={self.source.text!r}) is for the classification of texts: leave text= out of a "
                            f"Table, and drop that column if it holds sentences.")
        if isinstance(self.source, Sklearn) and self.source.name == "20newsgroups":
            raise UserError('Sklearn("20newsgroups") holds texts, not rows of a table.')

    def metadata(self) -> dict[str, Any]:
        """Empty: nothing is known without reading."""
        return {}

    def record_spec(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Name -> (shape, type) of the arrays of one record; reads the table. Raises as `load`."""
        return {name: (array.shape[1:], array.dtype.type) for name, array in self.load().train.arrays.items()}

    def transform(self, batch: dict[str, Any], train: bool) -> dict[str, Any]:
        """The batch as it is."""
        return batch

    def describe(self) -> Lines:
        """Lines about the loaded table. Raises as `load`."""
        return self.load().summary

    def load(self) -> TableData:
        """Read, split and encode the table (kept in memory until a file changes).

        Raises:
          UserError: names file, line and column of what is wrong.
        """
        self.validate()
        return _load(self, self.source.state())

    def restored(self, saved: dict[str, Any], tokenizer: str) -> TableData:
        """The result of a run's `load`, without records; see `Dataset.saved`."""
        kinds = {kind.__name__: kind for kind in (Number, Category)}
        features = tuple(kinds[kind](**fields | ({"values": tuple(fields["values"])} if "values" in fields else {}))
                         for kind, fields in saved["features"])
        target = Target(**saved["target"] | {"names": tuple(saved["target"]["names"])})
        tuples = {name: tuple(saved["form"][name]) for name in ("units", "missing")}
        return TableData(**restored(saved), features=features, target=target, standardised=self.standardise,
                         form=NumberFormat(**saved["form"] | tuples), encoding=saved["encoding"])


# ------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True, eq=False)
class _Part:
    """A loaded source, or its test split: the cells of the features, and the target's values."""

    table: Columns
    target: str
    names: tuple[str, ...]
    values: np.ndarray  # int32 classes, or float64 numbers without names


def _parts(source: Sklearn | Csv) -> list[_Part]:
    """The source's rows, and those of its test split if it has one."""
    if isinstance(source, Sklearn):
        bunch = source.load()
        cells = dict(zip(bunch.feature_names, np.asarray(bunch.inputs).T, strict=True))
        lines = list(range(1, len(bunch.targets) + 1))
        return [_Part(Columns(bunch.title, cells, lines), "target", bunch.class_names, bunch.targets)]
    tables = [table for table in source.read() if table is not None]
    if _is_regression(tables[0], source):
        names, values = (), [known_numbers(table, source.target) for table in tables]
    else:
        names, values = class_targets(tables, source.target)
    for table in tables:
        del table.cells[source.target]
    if not tables[0].cells:
        raise UserError(f"{source.path} has no column besides the target {source.target!r} and what drop= leaves out.")
    return [_Part(table, source.target, names, own) for table, own in zip(tables, values, strict=True)]


def _is_regression(table: Columns, source: Csv) -> bool:
    if source.task != "auto":
        return source.task == "regression"
    if not is_numeric(table, source.target):
        refuse_doubts(table, [source.target] if source.target not in source.categorical else [])
        return False
    values = known_numbers(table, source.target)
    return (len(np.unique(values)) > FEW or bool((values != np.round(values)).any())
            or table.form.counted(table.column(source.target)))


def split(n: int, test: float, validation: float) -> dict[str, np.ndarray]:
    """The indices of "train", "validation" and "test" (empty if `test` is 0) among n rows, each sorted.

    The first rows of a fixed shuffle are the test split, the next ones validation. UserError if there are too few.
    """
    first = max(round(test * n), 1) if test else 0
    second = first + max(round(validation * (n - first)), 1)
    if n - second < 2:
        raise UserError(f"{n} rows are too few for a split with test={test} and validation={validation}.")
    order = fixed_order(n)
    parts = {"train": order[second:], "validation": order[first:second], "test": order[:first]}
    return {name: np.sort(rows) for name, rows in parts.items()}


@functools.lru_cache(maxsize=4)
def _load(options: Table, _state: tuple[int, ...]) -> TableData:
    parts = _parts(options.source)
    main = parts[0]
    try:
        rows = split(len(main.table), options.test if len(parts) == 1 else 0.0, options.validation)
    except UserError as error:
        raise UserError(f"{main.table.title}: {error}") from None
    train = rows["train"]
    text = getattr(options.source, "categorical", ())
    refuse_doubts(main.table, [name for name in main.table.names if name not in text], train)
    features = tuple(fit(main.table, name, train, standardise=options.standardise, unseen=options.unseen,
                         categories=options.categories, text=name in text) for name in main.table.names)
    target = Target(main.target, main.names, *(() if main.names else moments(main.values[train])))
    if main.names and len(np.unique(main.values[train])) < 2:
        raise UserError(f"{main.table.title}: all {len(train)} training rows are of one class; give more rows.")
    if not main.names and np.ptp(main.values[train]) == 0:
        raise UserError(f"{main.table.title}, column {main.target!r}: the target is {main.values[train[0]]:g} in all "
                        f"{len(train)} training rows, so there is nothing to learn; is it the right column?")
    everything = [{"inputs": encode(features, part.table)} | target.arrays(len(part.table), part.values)
                  for part in parts]
    for column in options.groups or ():
        for arrays, own in zip(everything, group_fields([part.table for part in parts], column), strict=True):
            arrays.update(own)
    records = {name: Arrays({key: array[at] for key, array in everything[0].items()}) for name, at in rows.items()}
    if len(parts) == 2:
        records["test"] = Arrays(everything[1])
    width = everything[0]["inputs"].shape[1]
    return TableData(
        train=records["train"], validation=records["validation"], test=records["test"] if records["test"] else None,
        fingerprint=_fingerprint(options, parts, rows, everything), unit="rows", units_per_record=1, classes=main.names,
        metadata={"features": width} | ({"classes": len(main.names)} if main.names else {}),
        summary=_summary(parts, features, target, main.values[train])
        | {f"{name} rows": len(array) for name, array in records.items() if array} | {"split": _rule(options, parts)}
        | {key: line for name in options.groups or () for key, line in counted(records["train"].arrays, name).items()},
        features=features, target=target, standardised=options.standardise, form=main.table.form,
        encoding=getattr(options.source, "encoding", "UTF-8"), origins=_origins(parts, rows),
    )


def _origins(parts: list[_Part], rows: dict[str, np.ndarray]) -> dict[str, Origin]:
    """Split -> its rows in the file, with the dropped columns and the numbers to predict as they are there."""
    whole = [Origin(np.arange(len(part.table)), part.table.dropped, None if part.names else part.values.tolist())
             for part in parts]
    return {name: whole[0].at(at) for name, at in rows.items()} | ({"test": whole[1]} if len(parts) == 2 else {})


def _fingerprint(options: Table, parts: list[_Part], rows: dict[str, np.ndarray], arrays: list[Batch]) -> str:
    """Hash of cells, split, groups and settings. Encoded numbers (in `arrays`) are left out: their last bits depend on
    the machine."""
    total = hashlib.sha256()
    for part in parts:
        for name, cells in part.table.cells.items():
            total.update(json.dumps([name, len(cells)]).encode())
            total.update(cells.tobytes() if isinstance(cells, np.ndarray) else json.dumps(cells).encode())
        total.update(json.dumps([part.target, part.names]).encode() + part.values.tobytes())
    for at in rows.values():
        total.update(at.tobytes() + b";")
    for own in arrays:
        for name in own if options.groups else ():
            total.update(name.encode() + own[name].tobytes() if own[name].dtype == np.uint8 else b"")
    form = parts[0].table.form
    settings = [] if form == NumberFormat() else [asdict(form)]
    settings += [categorical] if (categorical := getattr(options.source, "categorical", ())) else []
    return digest("table", 1, total.hexdigest(), options.standardise, options.unseen, *settings)


def _summary(parts: list[_Part], features: tuple[Feature, ...], target: Target, train: np.ndarray) -> Lines:
    """Lines to print about the table. `train` (n,): the targets of the training rows."""
    texts = [f for f in features if isinstance(f, Category)]
    lines: Lines = {"source": parts[0].table.title, "task": "regression", "target": target.column}
    if target.names:
        count = np.bincount(train, minlength=len(target.names))
        lines |= {"task": f"classification, {len(target.names)} classes", **class_names(target.names)}
        lines["largest class"] = f"{target.names[int(count.argmax())]}, {count.max() / len(train):.1%} of training"
    else:
        lines["target"] = f"{target.column}, in training {target.mean:.6g} with standard deviation {target.scale:.6g}"
    lines |= parts[0].table.notes | ({"read as missing": missing} if (missing := _marks(parts[0].table)) else {})
    alike = _alike([target.names, *(f.values for f in texts)])
    lines |= {"categories that look alike": alike} if alike else {}
    lines |= _doubtful_numbers(parts[0].table, [f.name for f in features if not isinstance(f, Category)])
    numeric = [f.name for f in features if not isinstance(f, Category)]
    lines |= {"features": sum(f.width for f in features), "columns of numbers": len(numeric)}
    lines |= {"numbers": ", ".join(numeric[:FEW]) + (", ..." if len(numeric) > FEW else "")} if numeric else {}
    lines |= {f"column {f.name}": f"{f.width} categories: {some(f.values)}" for f in texts}
    for part in parts:
        for feature, n in gaps(features, part.table).items():
            where = "" if part is parts[0] else " of the test file"
            lines[f"imputed {feature.name}{where}"] = f"{n:,} of {len(part.table):,} missing, set to {feature}"
    return lines


def _alike(columns: list[tuple[str, ...]]) -> str:
    """Values of one column that differ in case or Unicode form only."""
    found = []
    for values in columns:
        same: dict[str, list[str]] = {}
        for value in values:
            same.setdefault(unicodedata.normalize("NFKC", value).casefold(), []).append(value)
        found += [some(group) for group in same.values() if len(group) > 1]
    return "; ".join(found[:3])


def _doubtful_numbers(table: Columns, numeric: list[str]) -> dict[str, str]:
    """Columns of numbers that may be codes (leading zeros), or whose extreme value may stand for a missing one."""
    codes, marks = [], []
    for name in numeric:
        cells = table.column(name)
        if isinstance(cells, np.ndarray):
            continue
        if any(re.fullmatch(r"0\d+", cell.strip()) for cell in cells):
            codes.append(name)
        values = table.form.parse(cells)[0]
        values = values[~np.isnan(values)]
        for end in {values.min(), values.max()} if len(values) else ():
            rest = values[values != end]
            times = len(values) - len(rest)
            if times < 2 or len(rest) < 2:
                continue
            far = re.fullmatch(r"-?9{2,}", f"{end:g}") and abs(end - rest.mean()) > 6 * rest.std()
            if far or end == -1 and rest.min() >= 0:
                marks.append(f"{name} has {end:.0f} {times:,} times (--data.source.missing {end:.0f})")
    return ({"numbers with leading zeros": f"{some(codes)}; codes: --data.source.categorical {' '.join(codes[:5])}"}
            if codes else {}) | ({"numbers that may mean a missing value": "; ".join(marks[:5])} if marks else {})


def _marks(table: Columns) -> str:
    """The words for missing values that occur, with counts; the empty field is "nothing"."""
    cells = (cell.strip() for column in table.cells.values() if not isinstance(column, np.ndarray) for cell in column)
    count = Counter(cell for cell in cells if table.form.is_missing(cell))
    return ", ".join(f"{mark or 'nothing'} {n:,} times" for mark, n in count.most_common(6))


def _rule(options: Table, parts: list[_Part]) -> str:
    if len(parts) == 2:
        rule = f"test is {parts[1].table.title}, validation is {options.validation:.0%} of the rows"
    elif options.test:
        rule = f"test is {options.test:.0%} of the rows, validation {options.validation:.0%} of the others"
    else:
        rule = f"validation is {options.validation:.0%} of the rows"
    return f"{rule}, by a fixed shuffle: not stratified, the same for every seed"
