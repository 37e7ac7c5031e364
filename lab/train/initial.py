"""Loads the initial arrays that `Experiment.init_from` names: from another run, or word vectors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from lab.errors import UserError
from lab.files import user_path
from lab.pretrained import Continue, Pretrained, WordVectors
from lab.train.continued import take_over
from lab.train.restore import leaves, open_run

Given = dict[str, Any]
Report = dict[str, Any]
NUMBER = re.compile(r"[-+.]?\d")


def initial_arrays(start: Any, state: Any, data: Any) -> tuple[Given, Report]:
    """Arrays by path for this (abstract) state, and a report of loaded and missing paths.

    Raises:
      UserError: the source named by `start` does not exist or does not fit.
    """
    for kind, read in ((Pretrained, from_run), (Continue, from_checkpoint), (WordVectors, from_word_vectors)):
        if isinstance(start, kind):
            return read(start, state, data)
    return start.load(state, data)


def describe(report: Report, frozen: list[str], file: Path) -> str:
    """A summary of the report in a line or two. `file` has the full lists."""
    lines = [f"Frozen: {_shortly(frozen)}. The whole list is in {file}."]
    if report:
        lines.insert(0, f"Parameters from {report['from']}: {len(report['loaded'])} loaded "
                        f"({_shortly(report['loaded'])}); at random: {_shortly(report['random'])}; not taken: "
                        f"{_shortly(report['not taken'])}.")
    return "\n".join(lines)


def _shortly(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "") if paths else "nothing"


def _place(run: str) -> tuple[Path, int | None]:
    """The run folder, and the checkpoint's step if the path names one."""
    folder = user_path(run)
    if folder.parent.name == "checkpoints" and folder.name.isdigit():
        return folder.parent.parent, int(folder.name)
    return folder, None


def _same_tokenizer(folder: Path, data: Any) -> None:
    """Raises UserError if the tokenizers differ. No later check would notice that token ids mean something else."""
    saved, here = folder / "tokenizer.json", getattr(data, "tokenizer_state", None)
    if here is not None and saved.exists() and saved.read_text("utf-8") != here:
        raise UserError(f"The tokenizer of {folder} is another one, so its parameters would be read with wrong "
                        f"ids. Use its own: tokenizer=Saved({str(folder)!r}) in the experiment's data.")


def from_run(start: Pretrained, state: Any, data: Any) -> tuple[Given, Report]:
    """Arrays for this (abstract) state, and a report.

    Raises:
      UserError: no such run, no matching path, shapes differ (names the path), or tokenizers differ.
    """
    if start.run is None:
        return {}, {}
    folder, step = _place(start.run)
    _same_tokenizer(folder, data)
    experiment, _, found = open_run(folder, step, file=user_path(start.experiment) if start.experiment else None)
    averaged = experiment.optim.eval_params(found.opt_state, found.params)
    model_state = experiment.optim.eval_model_state(found.opt_state, found.model_state)
    there, wanted = leaves(averaged) | leaves(model_state), leaves(state.params) | leaves(state.model_state)
    given, new = {}, []
    for path, x in wanted.items():
        chosen = any(re.search(r, path) for r in start.include) and not any(re.search(r, path) for r in start.exclude)
        if not chosen or path not in there:
            new.append(path)
            continue
        if there[path].shape != x.shape:
            raise UserError(f"{path} is {there[path].shape} in {start.run} and {x.shape} here. Make them equal, or "
                            f"initialise it at random with --init-from.exclude {path}.")
        given[path] = np.asarray(there[path])
    if not given:
        raise UserError(f"Nothing in {start.run} fits: it has {', '.join(list(there)[:3])}, ..., here are "
                        f"{', '.join(list(wanted)[:3])}, ... (rules: include {start.include}, exclude "
                        f"{start.exclude}).")
    report = {"from": str(folder), "step": int(found.step), "fingerprint": experiment.fingerprint(),
              "loaded": list(given), "random": new, "not taken": [p for p in there if p not in given]}
    return given, report


def from_checkpoint(start: Continue, state: Any, data: Any) -> tuple[Given, Report]:
    """Arrays for this (abstract) state, including optimizer state and step (see `lab.train.step.init_state`), and a
    report.

    Raises:
      UserError: no such run or checkpoint, shapes differ (names the path), or tokenizers differ.
    """
    folder, step = _place(start.run)
    if step is not None and start.step not in (None, step):
        raise UserError(f"--init-from.step {start.step} and --init-from.run {start.run} name two checkpoints.")
    _same_tokenizer(folder, data)
    file = user_path(start.experiment) if start.experiment else None
    experiment, _, found = open_run(folder, start.step if step is None else step, file=file)
    there, wanted = leaves(found.params) | leaves(found.model_state), leaves(state.params) | leaves(state.model_state)
    if wrong := [path for path, x in wanted.items() if path in there and there[path].shape != x.shape]:
        raise UserError(f"{wrong[0]} is {there[wrong[0]].shape} in {start.run} and {wanted[wrong[0]].shape} here: "
                        f"continuing a run needs the same model.")
    given: Given = {path: np.asarray(there[path]) for path in wanted if path in there}
    steps = int(found.step)
    moments, fresh, left = take_over(found.opt_state, state.opt_state, steps)
    given |= {f"state/opt_state/{path}": x for path, x in moments.items()}
    given["state/step"] = np.asarray(steps, np.int32)
    report = {"from": str(folder), "step": steps, "fingerprint": experiment.fingerprint(), "loaded": list(given),
              "random": [p for p in wanted if p not in there] + [f"opt_state/{path}" for path in fresh],
              "not taken": [p for p in there if p not in wanted] + [f"opt_state/{path}" for path in left]}
    return given, report


def from_word_vectors(start: WordVectors, state: Any, data: Any) -> tuple[Given, Report]:
    """The embedding filled with the file's vectors, and the number of words found.

    Raises:
      UserError: no such file or parameter, a line that is not a vector of the right size, or no known word.
    """
    path, wanted = start.parameter, leaves(state.params)
    if path not in wanted:
        raise UserError(f"--init-from.parameter {start.parameter}: the model has no such parameter; it has "
                        f"{', '.join(list(wanted)[:5])}, ...")
    words = getattr(data, "vocabulary", None)
    if not words:
        raise UserError("Word vectors need data with a vocabulary of words: tokenizer=Words(...).")
    if wanted[path].ndim != 2:
        raise UserError(f"--init-from.parameter {path} has shape {wanted[path].shape}: it is not an embedding.")
    size, dimension = wanted[path].shape
    place = {word: i for i, word in enumerate(words[:size])}
    # Normal like torch.nn.Embedding, but small compared with GloVe's vectors. Depends only on the shape.
    rows = np.random.default_rng(0).normal(0, 0.1, (size, dimension)).astype(np.float32)
    found = _read_vectors(start.path, place, rows)
    if not found:
        raise UserError(f"{start.path} has none of the {len(words)} words of this data.")
    return {path: rows}, {"from": start.path, "loaded": [f"{path}: {found:,} of {len(words):,} words"],
                          "random": [p for p in wanted if p != path], "not taken": []}


def _read_vectors(path: str, place: dict[str, int], rows: np.ndarray) -> int:
    """Writes the file's vectors of the words in `place` to `rows` (vocabulary, dimension); returns their number."""
    found, number, dimension = 0, 0, rows.shape[1]
    try:
        with user_path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                first, *values = line.rstrip().split(" ")
                if number == 1 and len(values) == 1 and dimension > 1 and first.isdigit() and values[0].isdigit():
                    if int(values[0]) != dimension:
                        raise UserError(f"{path} has vectors of {values[0]} numbers, as its first line says, "
                                        f"and the embedding has {dimension}.")
                    continue
                spaced = values[:-dimension]  # some words of glove.840B contain spaces
                if len(values) < dimension or (spaced and NUMBER.match(spaced[-1])):
                    raise UserError(f"{path}, line {number}: {len(values)} numbers after {first[:30]!r}, and "
                                    f"the embedding has {dimension}.")
                if first in place and not spaced:
                    row = np.array(values, np.float64)
                    if not (good := np.abs(row) < 1e30).all():  # also False for NaN
                        bad = values[int(np.argmin(good))]
                        raise UserError(f"{path}, line {number}: the vector of {first[:30]!r} contains "
                                        f"{bad!r}. Correct or delete the line.")
                    rows[place[first]] = row
                    found += 1
    except OSError as e:
        raise UserError(f"Cannot read the word vectors {path}: {e.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}, after line {number}, is not UTF-8 text.") from None
    except ValueError as e:
        raise UserError(f"{path}, line {number} is not a word and {dimension} numbers ({e}).") from None
    return found
