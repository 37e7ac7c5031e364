"""Reopens a run folder: its experiment, the program for this machine's devices, and a state. The arrays that a run
starts from, which may be those of another run (`Experiment.init_from`)."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from lab.adapt.lora import without_adapters
from lab.compress import folder as compressed
from lab.compress.model import reading
from lab.errors import UserError
from lab.experiment import Experiment, Mesh
from lab.files import user_path
from lab.parallel.sharding import path_of
from lab.pretrained import Continue, Pretrained, WordVectors
from lab.train.checkpoint import Checkpoints, stored
from lab.train.continued import take_over
from lab.train.description import read_folder
from lab.train.fitted import without_data
from lab.train.metrics import best_row, marked_rows
from lab.train.program import Program
from lab.train.run_folder import checkpoint_folder
from lab.train.step import State, eval_params
from lab.train.word_vectors import from_word_vectors

Given = dict[str, Any]
Report = dict[str, Any]


def leaves(tree: Any) -> dict[str, Any]:
    """path -> array of a tree."""
    return {path_of(path): x for path, x in jax.tree.leaves_with_path(tree)}


def open_run(run: Path, step: int | None = None, best: bool = False, experiment: Experiment | None = None,
             file: Path | None = None) -> tuple[Experiment, Program, State]:
    """The program of a run and the state of its checkpoint: the latest, the best, or that of `step`.

    `experiment`: the run's experiment, if the caller has it; by default it is rebuilt from the folder. `file`: the
    experiment's file, if the user named it.

    Raises:
      UserError: no run, no such checkpoint, or only damaged ones.
    """
    experiment = experiment or read_folder(run, file)
    opened = without_data(run, experiment)
    opened.validate()
    if best and step is not None:
        raise UserError("--best and --step exclude each other.")
    if compressed.is_stored(run):
        return _open_compressed(run, step, best, experiment, opened)
    folder = checkpoint_folder(run)
    if not folder.exists():
        raise UserError(f"{run} has no checkpoint yet.")
    checkpoints = Checkpoints(folder)
    if best:
        step = _best_step(run, experiment, checkpoints)
    program = fitting_program(opened)
    state = checkpoints.restore(program.abstract, step)
    checkpoints.close()
    if state is None:
        raise UserError(f"{run} has no checkpoint yet.")
    return experiment, program, with_base(opened, program, state)


def _open_compressed(run: Path, step: int | None, best: bool, *same: Experiment) -> tuple[Experiment, Program, State]:
    """`open_run` for a folder that `quantize` wrote. `same`: its experiment, and the same without its data."""
    if best or step is not None:
        raise UserError(f"--best and --step are for run folders; {run} holds the quantised weights of one checkpoint.")
    stored = compressed.read(run)
    experiment, opened = (replace(each, model=reading(each.model)) for each in same)
    program = fitting_program(opened)
    variables = jax.device_put(unflatten_dict(stored.arrays, sep="/"), program.everywhere)
    step = jax.device_put(np.int32(stored.about["step"]), program.everywhere)
    return experiment, program, State(step, variables.pop("params"), variables, ())


def with_base(experiment: Experiment, program: Program, state: State, data: Any = None) -> State:
    """A state from a checkpoint, with the frozen base of its adapters (lab/adapt), which is read again from where the
    run began. Other states are returned as they are. `data`: the loaded data; by default it is loaded.

    Raises:
      UserError: the base is missing or not the same.
    """
    if experiment.adapt is None:
        return state
    try:
        arrays, _ = initial_arrays(experiment.init_from, program.abstract, data or experiment.data.load())
    except UserError as e:
        raise UserError(f"A checkpoint of adapters does not hold their base, which is missing: {e}") from None
    whole = program.init(arrays)._replace(step=state.step)
    if not np.array_equal(*(jax.device_get(s.base) for s in (state, stored(whole)))):
        raise UserError(f"The base that these adapters were trained on is no longer what {experiment.init_from} gives: "
                        f"bring back its former files.")
    return state._replace(base=whole.base)


def fitting_program(experiment: Experiment) -> Program:
    """The program on the experiment's mesh; if that is of another number of devices, on those that divide the batch."""
    try:
        return Program(experiment)
    except UserError:
        devices = math.gcd(experiment.batch // experiment.grad_accum_steps, jax.device_count())
        return Program(replace(experiment, mesh=Mesh(devices)))


def _best_step(run: Path, experiment: Experiment, checkpoints: Checkpoints) -> int:
    """The step with the best validation metric. Raises UserError if there is none or the rows were changed."""
    path = run / "metrics.jsonl"
    rows = marked_rows(path, checkpoints.beside())  # rows after the last checkpoint have none
    rows = [row for row in rows if row["split"] == "validation" and row["step"]]
    step = best_row(rows, experiment.evaluate.metric, experiment.evaluate.mode)["step"]
    if step is None:
        raise UserError(f"{run} has no evaluation after a step yet, so no checkpoint is its best.")
    return step


def initial_arrays(start: Any, state: Any, data: Any) -> tuple[Given, Report]:
    """Arrays by path for this (abstract) state, and a report of loaded and missing paths.

    Raises:
      UserError: the source named by `start` does not exist or does not fit.
    """
    state = without_adapters(state)
    for kind, read in ((Pretrained, from_run), (Continue, from_checkpoint), (WordVectors, from_word_vectors)):
        if isinstance(start, kind):
            return read(start, state, data)
    return start.load(state, data)


def run_and_step(run: str) -> tuple[Path, int | None]:
    """The run folder, and the checkpoint's step if the path names one."""
    folder = user_path(run)
    if folder.parent.name == "checkpoints" and folder.name.isdigit():
        return folder.parent.parent, int(folder.name)
    return folder, None


def same_tokenizer(folder: Path, data: Any) -> None:
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
    folder, step = run_and_step(start.run)
    compressed.refuse(folder, "trained")
    same_tokenizer(folder, data)
    experiment, _, found = open_run(folder, step, file=user_path(start.experiment) if start.experiment else None)
    averaged = eval_params(replace(experiment, precision="float32"), found)
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
    folder, step = run_and_step(start.run)
    if step is not None and start.step not in (None, step):
        raise UserError(f"--init-from.step {start.step} and --init-from.run {start.run} name two checkpoints.")
    compressed.refuse(folder, "trained")
    same_tokenizer(folder, data)
    file = user_path(start.experiment) if start.experiment else None
    experiment, _, found = open_run(folder, start.step if step is None else step, file=file)
    if experiment.adapt is not None:
        raise UserError(f"{start.run} trained adapters beside a frozen base: init_from=Pretrained({start.run!r}) "
                        f"begins with both merged.")
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
