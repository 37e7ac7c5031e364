"""A study as a value: a base experiment, arms (changes of the base), seeds, and the metric to compare by.

    Study(base, {"rms": {"model.norm": "rmsnorm"}, "muon": {"optim": Muon(lr=Cosine(4e-3))}}, seeds=5)

`grid`, `one_at_a_time`, `leave_one_out` and `factorial` generate the arms of the usual designs, `Stack` those of
stacking.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lab.configuration.field_types import fields
from lab.configuration.values import digest, override, to_json, value_at
from lab.errors import UserError
from lab.experiment import Experiment

BASE = "base"
MOST_SEEDS, MOST_FOLDS = 10_000, 1000
Changes = Mapping[str, Any]
"""Dotted field of the experiment -> new value: {"optim.lr.peak": 3e-4, "data": Text(...)}; applied in order."""
Kind = Literal["list", "grid", "one_at_a_time", "leave_one_out", "factorial", "stack"]
FOLD = "data.fold"  # the field of lab.data.folds.Folds that a stack varies


@dataclass(frozen=True)
class Fork:
    """An arm that starts from the base's state after some steps and continues with its own changes."""

    after: int
    """Step of the base's run (same seed) whose state the arm starts from."""
    changes: Changes


@dataclass(frozen=True)
class Design:
    """Arms, and the rule that generated them."""

    arms: Mapping[str, Changes | Fork]
    kind: Kind = "list"
    factors: Mapping[str, Any] = field(default_factory=dict)
    """The factors: field -> values (grid, one_at_a_time) or edit -> changes (leave_one_out, factorial)."""


def grid(values: Mapping[str, Sequence[Any]]) -> Design:
    """Every combination of the fields' values. The combination equal to the base becomes the arm "base"."""
    _check_values(values)
    names = {path: _short(path, values) for path in values}
    arms: dict[str, Changes] = {}
    for combination in itertools.product(*values.values()):
        changes = dict(zip(values, combination, strict=True))
        _add(arms, ",".join(f"{names[path]}={_label(value)}" for path, value in changes.items()), changes)
    return Design(arms, "grid", {path: list(options) for path, options in values.items()})


def one_at_a_time(values: Mapping[str, Sequence[Any]]) -> Design:
    """Changes one field at a time, to each of its values. The base's own values become the arm "base"."""
    _check_values(values)
    arms: dict[str, Changes] = {}
    for path, options in values.items():
        for value in options:
            _add(arms, f"{_short(path, values)}={_label(value)}", {path: value})
    return Design(arms, "one_at_a_time", {path: list(options) for path, options in values.items()})


def leave_one_out(edits: Mapping[str, Changes]) -> Design:
    """All edits together (the arm "all"), then all except one, for each edit ("all-rotary")."""
    _check_edits("leave_one_out", edits)
    arms = {"all": _union(edits.values())}
    for left in edits:
        arms[f"all-{left}"] = _union(changes for name, changes in edits.items() if name != left)
    return Design(arms, "leave_one_out", dict(edits))


def factorial(edits: Mapping[str, Changes]) -> Design:
    """2^k: every subset of the k edits ("rms+rotary"); the empty set is the base (Box, Hunter & Hunter 2005, ch. 5)."""
    _check_edits("factorial", edits)
    arms = {"+".join(chosen): _union(edits[name] for name in chosen)
            for size in range(1, len(edits) + 1) for chosen in itertools.combinations(edits, size)}
    return Design(arms, "factorial", dict(edits))


@dataclass(frozen=True)
class Stack:
    """Stacking of classifiers (Wolpert 1992): a logistic regression learns from the members' out-of-fold predictions.

    Each member is trained on all training records, and k times on those of all folds but one, whose records it then
    predicts. The base's data is `Folds`, which has the number of folds. The report compares the members, their mean,
    the arms `beside` and the stack on the study's split: see lab/study/README.md.
    """

    members: Mapping[str, Changes]
    """Name -> changes of the base, not of its data; {}: the base itself."""
    l2: float = 1.0
    """L2 penalty of the logistic regression: l2 / 2 times the sum of its squared weights, beside the sum of losses."""
    beside: Mapping[str, Changes] = field(default_factory=dict)
    """Further arms to compare with, which are not stacked: name -> changes."""

    def design(self, base: Experiment) -> Design:
        """The arms, of which MEMBER.fold-I learns all folds but I. Raises UserError for a stack that cannot be."""
        folds = getattr(base.data, "folds", None)
        if folds is None:
            raise UserError("A stack needs data in folds: data=Folds(...) of lab.data.folds in its base.")
        base.data.validate()
        if base.data.fold is not None:
            raise UserError(f"--data.fold {base.data.fold}: a stack holds out every fold in turn; leave it out.")
        if not self.members or not all(isinstance(x, Mapping) for x in (self.members, self.beside)):
            raise UserError("A stack needs members, name -> changes of the base, such as "
                            "members={'narrow': {}, 'wide': {'model.width': 256}}; so has beside=.")
        if alike := [name for name, changes in self.members.items() if not changes][1:]:
            raise UserError(f"The stack's member {alike[0]!r} changes nothing, and another member is the base already.")
        if folds * len(self.members) > MOST_FOLDS:
            raise UserError(f"--data.folds {folds:,}: a stack trains each of its {len(self.members)} members as often; "
                            f"more than {MOST_FOLDS} runs for each seed are too many.")
        if not (math.isfinite(self.l2) and self.l2 > 0):
            raise UserError(f"The penalty l2 of a stack must be above 0, not {self.l2}.")
        whole = {name: changes for name, changes in self.members.items() if changes}
        parts = {f"{name}.fold-{i}": {**changes, FOLD: i} for name, changes in self.members.items()
                 for i in range(folds)}
        names = Counter([*self.members, *self.beside, *parts, "mean", "stack"])
        if twice := [name for name, n in names.items() if n > 1]:
            raise UserError(f"Two rows of the stack's table would be called {min(twice)!r}: choose another name.")
        for name, changes in {**self.members, **self.beside}.items():
            if other := [path for path in changes if path.split(".")[0] == "data"]:
                raise UserError(f"{name} changes {other[0]}: the members of a stack and the arms beside it share the "
                                f"base's data, so that no member learns a record that it then predicts.")
        arms = {name: BASE if not changes else name for name, changes in self.members.items()}
        return Design({**whole, **self.beside, **parts}, "stack",
                      {"members": arms, "beside": list(self.beside), "folds": folds, "l2": self.l2})


@dataclass(frozen=True)
class Study:
    """Arms x seeds. The base is always included, as the arm "base"."""

    base: Experiment
    arms: Mapping[str, Changes | Fork] | Design | Stack
    """Name -> changes of the base (a `Fork` applies them after some steps), a `Design` from `grid` etc., a `Stack`."""
    seeds: int | tuple[int, ...] = 3
    """The seeds of every arm; a number n means 0 ... n-1."""
    metric: str | None = None
    """The metric to compare arms by; None: that of `base.evaluate`."""
    mode: Literal["min", "max"] | None = None
    """Whether to minimize or maximize the metric; None: as in `base.evaluate`."""
    split: Literal["validation", "test"] = "validation"
    """The split on which the metric is measured at the end of a run."""
    tuning_seeds: tuple[int, ...] = ()
    """Seeds that were used to tune the arms: they run, but are excluded from the tests."""

    def __post_init__(self) -> None:
        if isinstance(self.seeds, int) and self.seeds > MOST_SEEDS:
            raise UserError(f"A study has at most {MOST_SEEDS:,} seeds, not {self.seeds:,}.")
        seeds = tuple(range(self.seeds)) if isinstance(self.seeds, int) else tuple(self.seeds)
        object.__setattr__(self, "seeds", seeds)
        metric, evaluate = self.metric or self.base.evaluate.metric, self.base.evaluate
        object.__setattr__(self, "metric", metric)
        if self.mode is None and metric == evaluate.metric:
            object.__setattr__(self, "mode", evaluate.mode)

    @property
    def design(self) -> Design:
        """The arms, with the rule that generated them."""
        if isinstance(self.arms, Stack):
            return self.arms.design(self.base)
        return self.arms if isinstance(self.arms, Design) else Design(self.arms)

    def validate(self) -> None:
        """Checks seeds, mode and arm names, without building the arms. Raises UserError."""
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"A study needs seeds, each of them once; there are {list(self.seeds)}.")
        if self.mode not in ("min", "max"):
            raise UserError(f"Say whether a small or a large {self.metric} is good: mode='min' or 'max' (--mode).")
        for seed in self.seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
                raise UserError(f"The seeds of a study are whole numbers in [0, 2^32), not {seed!r}.")
        if strange := set(self.tuning_seeds) - set(self.seeds):
            raise UserError(f"The tuning seeds {sorted(strange)} are not among the seeds of the study.")
        for name in self.design.arms:
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]*", name) or len(name) > 120:
                raise UserError(f"The arm's name {name!r} becomes a folder: use at most 120 letters, digits and _.,=+- "
                                f"and begin with a letter, digit or _.")
        if BASE in self.design.arms:
            raise UserError(f"No arm may be called {BASE!r}: that is the base itself, which is always there.")

    def experiments(self) -> dict[str, tuple[Changes, Experiment]]:
        """Arm -> (changes, experiment with seed 0), the base first. Drops changes to values the base already has.

        In `grid` and `one_at_a_time` the combination that changes nothing is the base, not a separate arm.

        Raises:
          UserError: a field or value is wrong, an arm equals the base, or two arms are equal; names the arm.
        """
        self.validate()
        left = replace(self.base, seed=0)  # fields left at None are filled in per arm
        base = left.filled()
        found = {BASE: ({}, base)}
        names = {(base.fingerprint(), 0): BASE}
        for name, arm in self.design.arms.items():
            changes, after = (arm.changes, arm.after) if isinstance(arm, Fork) else (arm, 0)
            try:
                real, experiment = {}, left
                for path, value in changes.items():
                    if path == "seed":
                        raise UserError("the seed is an axis of every study: give the study seeds instead.")
                    before, experiment = experiment, override(experiment, {path: value})
                    _check_kind(path, value_at(before, path), value)
                    real |= {path: value} if experiment != before else {}
                experiment.validate()
                experiment = experiment.filled()
            except UserError as e:
                raise UserError(f"Arm {name}: {e}") from e
            after = after if experiment.fingerprint() != base.fingerprint() else 0
            same = names.setdefault((experiment.fingerprint(), after), name)
            if same == BASE and self.design.kind in ("grid", "one_at_a_time"):
                continue
            if same == BASE:
                raise UserError(f"Arm {name} is equal to the base: its changes ({_listed(changes)}) change nothing.")
            if same != name:
                raise UserError(f"The arms {same} and {name} are the same experiment: leave one of them out.")
            found[name] = (real, experiment)
        if len(found) == 1:
            raise UserError("The study has no arm besides the base: give it one, for example --vary optim.lr.peak="
                            "1e-3,3e-3.")
        return found

    def forked(self, arm: str) -> int | None:
        """The step at which an arm forks from the base; None if the arm is not a `Fork`."""
        found = self.design.arms.get(arm)
        return found.after if isinstance(found, Fork) else None

    def describe(self) -> dict[str, Any]:
        """Everything that determines the cells and their comparison, as JSON; without the arms' costs."""
        factors = {name: {path: to_json(v) for path, v in value.items()} if isinstance(value, Mapping)
                   else to_json(value) for name, value in self.design.factors.items()}
        arms = [{"name": name, "changes": {path: to_json(v) for path, v in changes.items()},
                 "fingerprint": experiment.fingerprint()} | ({"fork": fork} if (fork := self.forked(name)) else {})
                for name, (changes, experiment) in self.experiments().items()]
        return {"metric": self.metric, "mode": self.mode, "split": self.split,
                "design": {"kind": self.design.kind, "factors": factors}, "base": to_json(replace(self.base, seed=0)),
                "seeds": list(self.seeds), "tuning_seeds": list(self.tuning_seeds), "arms": arms}

    def fingerprint(self) -> str:
        """12 hexadecimal digits that identify what this study compares."""
        description = self.describe()
        return digest({**description, "base": description["arms"][0]["fingerprint"]})  # ignores execution settings


def _check_kind(path: str, before: Any, value: Any) -> None:
    """An object may only be replaced by another object, because other code calls its methods."""
    if dataclasses.is_dataclass(before) and not dataclasses.is_dataclass(value):
        inner = next((f.name for f in fields(before)), None)
        such = f", such as {path}.{inner}" if inner else ""
        raise UserError(f"{path} is {type(before).__name__}(...), which {value!r} cannot replace. Vary one of its "
                        f"fields{such}; another object is a line of Python in a file with a `study`.")


def _check_values(values: Mapping[str, Sequence[Any]]) -> None:
    for path, options in values.items():
        if isinstance(options, str) or not options:
            raise UserError(f"{path} needs a list of values, not {options!r}.")


def _check_edits(what: str, edits: Mapping[str, Changes]) -> None:
    if len(edits) < 2:
        raise UserError(f"{what} needs at least two edits: name -> changes.")
    paths = [path for changes in edits.values() for path in changes]
    if twice := {a for a in paths for b in paths if b.startswith(f"{a}.") or paths.count(a) > 1}:
        raise UserError(f"{what}: several edits change {', '.join(sorted(twice))}, so they cannot be combined.")


def _union(several: Any) -> dict[str, Any]:
    return {path: value for changes in several for path, value in changes.items()}


def _short(path: str, among: Mapping[str, Any]) -> str:
    """The shortest suffix of a dotted path that is unique among all paths: optim.lr.peak -> peak."""
    names = path.split(".")
    ends = (".".join(names[-n:]) for n in range(1, len(names) + 1))
    return next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in among) == 1), path)


def _label(value: Any) -> str:
    """A value as part of an arm's name, and therefore of a folder name."""
    shown = type(value).__name__ if dataclasses.is_dataclass(value) else f"{value:g}" if isinstance(value, float) \
        and math.isclose(float(f"{value:g}"), value, rel_tol=1e-12) else str(value)
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", shown).strip("_") or "empty"


def _add(arms: dict[str, Changes], name: str, changes: Changes) -> None:
    """Adds an arm. Two values can have the same label (two optimizers of one class): the second gets a number."""
    number = next(n for n in itertools.count(1) if (name if n == 1 else f"{name}.{n}") not in arms)
    arms[name if number == 1 else f"{name}.{number}"] = changes


def _listed(changes: Changes) -> str:
    return ", ".join(f"{path}={value}" for path, value in changes.items())
