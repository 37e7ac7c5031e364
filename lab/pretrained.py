"""Parameters to begin with: those of another run (transfer learning), or word vectors from a file.

A value for `Experiment.init_from` has `validate()`, `freeze` (regexes of parameters that are not updated) and
``load(state, data) -> (arrays by path, report)``. Paths are those within the state's parameters and mutable
collections: ``block_0/attn/query/kernel``, ``batch_stats/stem_norm/mean``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lab.errors import UserError
from lab.files import user_path

Given = dict[str, Any]
Report = dict[str, Any]
NUMBER = re.compile(r"[-+.]?\d")


def _check_rules(**rules: tuple[str, ...]) -> None:
    for name, expressions in rules.items():
        for rule in expressions:
            try:
                re.compile(rule)
            except re.error as e:
                raise UserError(f"--init-from.{name}: {rule!r} is not a regular expression ({e}).") from None


def describe(report: Report, frozen: list[str], file: Path) -> str:
    """What a run begins with, in a line or two. `file` has the whole lists."""
    lines = [f"Frozen: {_shortly(frozen)}. The whole list is in {file}."]
    if report:
        lines.insert(0, f"Parameters from {report['from']}: {len(report['loaded'])} loaded "
                        f"({_shortly(report['loaded'])}); at random: {_shortly(report['random'])}; not taken: "
                        f"{_shortly(report['not taken'])}.")
    return "\n".join(lines)


def _shortly(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "") if paths else "nothing"


def _place(run: str) -> tuple[Path, int | None]:
    """The run folder, and the step of the checkpoint where one is named."""
    folder = user_path(run)
    if folder.parent.name == "checkpoints" and folder.name.isdigit():
        return folder.parent.parent, int(folder.name)
    return folder, None


def _same_tokenizer(folder: Path, data: Any) -> None:
    """Ids must mean the same there and here; nothing else would ever say so."""
    saved, here = folder / "tokenizer.json", getattr(data, "tokenizer_state", None)
    if here is not None and saved.exists() and saved.read_text("utf-8") != here:
        raise UserError(f"The tokenizer of {folder} is another one, so its parameters would be read with wrong "
                        f"ids. Use its own: tokenizer=Saved({str(folder)!r}) in the experiment's data.")


@dataclass(frozen=True)
class Pretrained:
    """The parameters of another run, where paths agree; what that run lacks begins at random.

    Averaged parameters are taken where that run's optimizer averages. Optimizer state is never taken.
    """

    run: str | None = None
    """A run folder (its latest checkpoint), or one of its checkpoints, RUN/checkpoints/STEP; None: begin at random."""
    include: tuple[str, ...] = (".*",)
    """Regular expressions searched in the paths: what to take."""
    exclude: tuple[str, ...] = ()
    """Regular expressions searched in the paths: what not to take after all (an output layer for other classes)."""
    freeze: tuple[str, ...] = ()
    """Regular expressions searched in the paths of parameters that training leaves as they are."""
    experiment: str | None = field(default=None, metadata={"fingerprint": False})
    """That run's experiment file, if it defines classes of its own and was not run on this machine."""

    def validate(self) -> None:
        """Raises UserError for what is not a regular expression."""
        _check_rules(include=self.include, exclude=self.exclude, freeze=self.freeze)

    def load(self, state: Any, data: Any) -> tuple[Given, Report]:
        """The arrays for this (abstract) state, and what was taken and what was not.

        Raises:
          UserError: there is no such run, nothing fits, shapes differ (names the path), or the tokenizers differ.
        """
        from lab.restore import leaves, open_run

        if self.run is None:
            return {}, {}
        folder, step = _place(self.run)
        _same_tokenizer(folder, data)
        experiment, _, found = open_run(folder, step, file=user_path(self.experiment) if self.experiment else None)
        averaged = experiment.optim.eval_params(found.opt_state, found.params)
        extra = experiment.optim.eval_extra(found.opt_state, found.extra)
        there, wanted = leaves(averaged) | leaves(extra), leaves(state.params) | leaves(state.extra)
        given, new = {}, []
        for path, x in wanted.items():
            chosen = any(re.search(r, path) for r in self.include) and not any(re.search(r, path) for r in self.exclude)
            if not chosen or path not in there:
                new.append(path)
                continue
            if there[path].shape != x.shape:
                raise UserError(f"{path} is {there[path].shape} in {self.run} and {x.shape} here. Make them equal, or "
                                f"begin at random there with --init-from.exclude {path}.")
            given[path] = np.asarray(there[path])
        if not given:
            raise UserError(f"Nothing in {self.run} fits: it has {', '.join(list(there)[:3])}, ..., here are "
                            f"{', '.join(list(wanted)[:3])}, ... (rules: include {self.include}, exclude "
                            f"{self.exclude}).")
        report = {"from": str(folder), "step": int(found.step), "fingerprint": experiment.fingerprint(),
                  "loaded": list(given), "random": new, "not taken": [p for p in there if p not in given]}
        return given, report


@dataclass(frozen=True)
class Continue:
    """Another run at one of its checkpoints, to go on from under other settings: its parameters, the state of its
    optimizer, and its number of updates. That run stays as it is; this is a new one.

    `steps` counts all updates, those of the other run too, and the schedule is evaluated anew for that number. The data
    goes on with the batch of the next update. What does not fit (a new layer, another optimizer's moments) begins
    afresh and is named.
    """

    run: str
    """A run folder, or one of its checkpoints, RUN/checkpoints/STEP."""
    step: int | None = None
    """The checkpoint after this many updates; None: the latest."""
    freeze: tuple[str, ...] = ()
    """Regular expressions searched in the paths of parameters that training leaves as they are."""
    experiment: str | None = field(default=None, metadata={"fingerprint": False})
    """That run's experiment file, if it defines classes of its own and was not run on this machine."""

    def validate(self) -> None:
        """Raises UserError for a step below 1, and for what is not a regular expression."""
        if self.step is not None and self.step < 1:
            raise UserError(f"--init-from.step must be at least 1, not {self.step}.")
        _check_rules(freeze=self.freeze)

    def load(self, state: Any, data: Any) -> tuple[Given, Report]:
        """The arrays for this (abstract) state, those of its optimizer and its step too (see `lab.step.init_state`),
        and what was taken and what was not.

        Raises:
          UserError: there is no such run or checkpoint, shapes differ (names the path), or the tokenizers differ.
        """
        from lab.continued import take_over
        from lab.restore import leaves, open_run

        folder, step = _place(self.run)
        if step is not None and self.step not in (None, step):
            raise UserError(f"--init-from.step {self.step} and --init-from.run {self.run} name two checkpoints.")
        _same_tokenizer(folder, data)
        file = user_path(self.experiment) if self.experiment else None
        experiment, _, found = open_run(folder, self.step if step is None else step, file=file)
        there, wanted = leaves(found.params) | leaves(found.extra), leaves(state.params) | leaves(state.extra)
        if wrong := [path for path, x in wanted.items() if path in there and there[path].shape != x.shape]:
            raise UserError(f"{wrong[0]} is {there[wrong[0]].shape} in {self.run} and {wanted[wrong[0]].shape} here: a "
                            f"run goes on with the model that it has.")
        given: Given = {path: np.asarray(there[path]) for path in wanted if path in there}
        updates = int(found.step)
        moments, fresh, left = take_over(found.opt_state, state.opt_state, updates)
        given |= {f"state/opt_state/{path}": x for path, x in moments.items()}
        given["state/step"] = np.asarray(updates, np.int32)
        report = {"from": str(folder), "step": updates, "fingerprint": experiment.fingerprint(), "loaded": list(given),
                  "random": [p for p in wanted if p not in there] + [f"opt_state/{path}" for path in fresh],
                  "not taken": [p for p in there if p not in wanted] + [f"opt_state/{path}" for path in left]}
        return given, report


@dataclass(frozen=True)
class WordVectors:
    """Pretrained word vectors in GloVe's text format (a word and its numbers on each line) for an embedding.

    The first line may be a header as word2vec and fastText write it: the numbers of words and of dimensions. Rows of
    words that the file lacks begin at random. Source of the format: Pennington et al. 2014.
    """

    path: str
    """The text file, such as glove.6B.100d.txt or wiki.en.vec."""
    parameter: str = "embedding/embedding"
    """Path of the embedding, (vocabulary, dimension)."""
    freeze: tuple[str, ...] = ()
    """Regular expressions of parameters that training leaves as they are: ("^embedding/",) keeps the vectors."""

    def validate(self) -> None:
        """Raises UserError for what is not a regular expression."""
        _check_rules(freeze=self.freeze)

    def load(self, state: Any, data: Any) -> tuple[Given, Report]:
        """The embedding with the file's rows in it, and how many words were found.

        Raises:
          UserError: no such file or parameter, a line that is not a vector of the right size, or no word known.
        """
        from lab.restore import leaves

        path, wanted = self.parameter, leaves(state.params)
        if path not in wanted:
            raise UserError(f"--init-from.parameter {self.parameter}: the model has no such parameter; it has "
                            f"{', '.join(list(wanted)[:5])}, ...")
        words = getattr(data, "vocabulary", None)
        if not words:
            raise UserError("Word vectors need data with a vocabulary of words: tokenizer=Words(...).")
        if wanted[path].ndim != 2:
            raise UserError(f"--init-from.parameter {path} has shape {wanted[path].shape}: it is no embedding.")
        size, dimension = wanted[path].shape
        place = {word: i for i, word in enumerate(words[:size])}
        # As torch.nn.Embedding would begin, and small beside GloVe's rows; a function of the file's dimension alone.
        rows = np.random.default_rng(0).normal(0, 0.1, (size, dimension)).astype(np.float32)
        found = self._read(place, rows)
        if not found:
            raise UserError(f"{self.path} has none of the {len(words)} words of this data.")
        return {path: rows}, {"from": self.path, "loaded": [f"{path}: {found:,} of {len(words):,} words"],
                              "random": [p for p in wanted if p != path], "not taken": []}

    def _read(self, place: dict[str, int], rows: np.ndarray) -> int:
        """Puts the file's vectors of the words of `place` into `rows` (vocabulary, dimension); returns how many."""
        found, number, dimension = 0, 0, rows.shape[1]
        try:
            with user_path(self.path).open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    first, *values = line.rstrip().split(" ")
                    if number == 1 and len(values) == 1 and dimension > 1 and first.isdigit() and values[0].isdigit():
                        if int(values[0]) != dimension:
                            raise UserError(f"{self.path} has vectors of {values[0]} numbers, as its first line says, "
                                            f"and the embedding has {dimension}.")
                        continue
                    spaced = values[:-dimension]  # some words of glove.840B have spaces in them
                    if len(values) < dimension or (spaced and NUMBER.match(spaced[-1])):
                        raise UserError(f"{self.path}, line {number}: {len(values)} numbers after {first[:30]!r}, and "
                                        f"the embedding has {dimension}.")
                    if first in place and not spaced:
                        row = np.array(values, np.float64)
                        if not (good := np.abs(row) < 1e30).all():  # NaN is not below anything
                            bad = values[int(np.argmin(good))]
                            raise UserError(f"{self.path}, line {number}: the vector of {first[:30]!r} has {bad!r} in "
                                            f"it, which is no number to train with. Correct or delete the line.")
                        rows[place[first]] = row
                        found += 1
        except OSError as e:
            raise UserError(f"Cannot read the word vectors {self.path}: {e.strerror}.") from None
        except UnicodeDecodeError:
            raise UserError(f"{self.path}, after line {number}, is not UTF-8 text.") from None
        except ValueError as e:
            raise UserError(f"{self.path}, line {number} is not a word and {dimension} numbers ({e}).") from None
        return found
