"""API for notebooks and scripts: train an experiment, open a run, inspect its parameters, metrics and data.

    run = lab.fit(experiment)               # or lab.open_run("runs/mnist_cnn-...")
    run.metrics("validation")                 # a DataFrame if pandas is installed
    run.apply(run.batch(8)["inputs"])         # model outputs for eight validation records
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from lab.errors import UserError
from lab.files import user_path

if TYPE_CHECKING:
    from lab.experiment import Experiment
    from lab.train.program import Program
    from lab.train.step import State

Split = Literal["train", "validation", "test"]


class Run:
    """A run folder and one of its checkpoints. All attributes are loaded lazily."""

    def __init__(self, folder: str | Path, experiment: Experiment | None = None, step: int | None = None,
                 best: bool = False):
        """`experiment`: the trained experiment, needed if its classes cannot be imported (defined in a notebook)."""
        self.folder = user_path(folder)
        self._experiment, self._step, self._best = experiment, step, best

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @functools.cached_property
    def experiment(self) -> Experiment:
        """The experiment, rebuilt from the folder. Raises UserError if the folder is not a run folder."""
        from lab.train.description import read_folder

        return self._experiment or read_folder(self.folder)

    @functools.cached_property
    def _opened(self) -> tuple[Program, State]:
        from lab.train.restore import open_run as restore

        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs verbosely
        _, program, state = restore(self.folder, self._step, self._best, self.experiment)
        return program, state

    @property
    def state(self) -> State:
        """Step, parameters, other model variables and optimizer state, from the checkpoint.

        Raises:
          UserError: no such checkpoint, or only damaged ones.
        """
        return self._opened[1]

    @property
    def step(self) -> int:
        """Completed steps of the checkpoint."""
        return int(self.state.step)

    @functools.cached_property
    def params(self) -> Any:
        """Parameters for evaluation, a tree of arrays by module name, in the compute dtype: averaged if the optimizer
        keeps an average."""
        from lab.train.step import eval_params

        return eval_params(self.experiment, self.state)

    def apply(self, inputs: Any, *, params: Any = None, **named: Any) -> Any:
        """Model outputs for `inputs` (B, ...), in evaluation mode (no dropout).

        With a `batch()`, pass `batch["inputs"]`, or for language models `batch["tokens"][:, :-1]`. `params`: replaces
        the run's parameters. `named`: further arguments of the model, such as `mask`. Compiled for the run's mesh, as
        evaluation is; can be differentiated by `params` and `inputs`.
        """
        import jax

        program, state = self._opened
        traced = {name: x for name, x in named.items() if isinstance(x, np.ndarray | jax.Array)}
        static = {name: x for name, x in named.items() if name not in traced}
        out = program.computing(_apply, **static)(state, (inputs, params, traced), program.given)
        # On several CPU devices the next compilation waits for the threads that this computation waits with: forever.
        return jax.block_until_ready(out)

    @functools.cached_property
    def data(self) -> Any:
        """The loaded data: `train`, `validation` and `test` (or None), each with a length and `[indices]`, and fitted
        values. Raises UserError if the data is missing or has changed."""
        from lab.train.description import check_same

        data = self.experiment.data.load()
        check_same(self.folder, self.experiment, data.fingerprint)
        if not getattr(self.experiment.task, "reference", None):
            return data
        from lab.train.reference import with_reference

        return with_reference(self.experiment, self._opened[0], data, self.folder)

    def batch(self, records: int | Sequence[int] = 32, split: Split = "validation") -> dict[str, Any]:
        """Records of a split after the data's transform: the first `records`, or those with these indices.

        Returns name -> (B, ...). Raises UserError if the split does not exist or is too short.
        """
        from lab.train.step import prepare

        source = getattr(self.data, _known(split))
        chosen = np.arange(records) if isinstance(records, int) else np.asarray(records, np.int64)
        if source is None or not len(chosen) or chosen.min() < 0 or chosen.max() >= len(source):
            size = "no" if source is None else f"{len(source):,}"
            raise UserError(f"The {split} split has {size} records: ask for at least one of them.")
        ones = np.ones(len(chosen), np.float32)
        numbered = {**source[chosen], "index": chosen.astype(np.int32), "weight": ones}
        return dict(prepare(self.experiment, numbered, False))

    def metrics(self, split: Split | None = None) -> Any:
        """The rows of metrics.jsonl, of one split or all, as a pandas.DataFrame if pandas is installed, else as a list
        of dictionaries."""
        from lab.train.metrics import read_rows

        self.experiment  # noqa: B018 (raises if this is not a run folder)
        split = split and _known(split)
        rows = [row for row in read_rows(self.folder / "metrics.jsonl") if split in (None, row["split"])]
        with contextlib.suppress(ImportError):
            import pandas

            return pandas.DataFrame(rows)
        return rows

    @property
    def result(self) -> dict[str, Any] | None:
        """result.json: final and best metrics, and times; None if the run is not finished."""
        from lab.train.description import finished

        return finished(self.folder)


def _known(split: Split) -> Split:
    if split not in get_args(Split):
        raise UserError(f"{split!r} is not a split; the splits are {', '.join(get_args(Split))}.")
    return split


def _apply(model: Any, variables: Any, inputs: Any, params: Any, named: Any, **static: Any) -> Any:
    variables = variables if params is None else {**variables, "params": params}
    return model.apply(variables, inputs, train=False, **named, **static)


def open_run(folder: str | Path, *, step: int | None = None, best: bool = False,
             experiment: Experiment | None = None) -> Run:
    """Opens a run folder with its latest checkpoint, its best, or that of `step`.

    `experiment`: the trained experiment, needed if its classes cannot be imported (defined in a notebook).

    Raises:
      UserError: not a run folder, or the code that made it is not available.
    """
    run = Run(folder, experiment, step, best)
    run.experiment  # noqa: B018 (raises errors here, not at first use)
    return run


def fit(experiment: Experiment, folder: str | Path | None = None, *, quiet: bool = False) -> Run:
    """Trains in this process, resuming an interrupted run. Opens a finished run without training.

    Args:
      experiment: the experiment; use `dataclasses.replace` to change fields.
      folder: the run folder; by default runs/notebook-<fingerprint>.
      quiet: print nothing.

    Returns:
      The finished run. After an interrupt, the same call resumes from the last checkpoint.

    Raises:
      UserError: a problem with the experiment, data or folder, or the run diverged.
    """
    from lab.parallel.backend import start_jax
    from lab.train import loop
    from lab.train.console import Screen

    logging.getLogger("absl").setLevel(logging.ERROR)
    experiment.validate()
    experiment = experiment.filled()
    start_jax()
    place = user_path(folder or f"runs/notebook-{experiment.fingerprint()}")
    run = Run(place, experiment)
    with Screen(quiet=quiet) as screen:
        if run.result is not None:
            run.data  # noqa: B018 (raises if the folder has another experiment or the data changed)
            screen.info(f"{place}: run already complete.")
            return run
        status = loop.train(experiment, place, screen)
    if status == 1:
        raise UserError(f"The run in {place} diverged: see diverged.json there.")
    if status:
        raise SystemExit(status)
    return run
