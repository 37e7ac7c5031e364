"""For notebooks and scripts: train an experiment, open a run, look at its parameters, metrics and data.

    run = lab.fit(experiment)               # or lab.open_run("runs/mnist_cnn-...")
    run.metrics("validation")                 # a DataFrame where pandas is installed
    run.apply(run.batch(8)["inputs"])         # what the model says of eight validation records
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lab.errors import UserError
from lab.files import user_path

if TYPE_CHECKING:
    from lab.experiment import Experiment
    from lab.train.program import Program
    from lab.train.step import State

Split = Literal["train", "validation", "test"]


class Run:
    """A run folder and one of its checkpoints. Everything is read when it is first asked for."""

    def __init__(self, folder: str | Path, experiment: Experiment | None = None, step: int | None = None,
                 best: bool = False):
        """`experiment`: the value that was trained, where its classes cannot be imported (those of a notebook)."""
        self.folder = user_path(folder)
        self._experiment, self._step, self._best = experiment, step, best

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @functools.cached_property
    def experiment(self) -> Experiment:
        """The experiment, built again. Raises UserError where the folder is no run."""
        from lab.train.description import read_folder

        return self._experiment or read_folder(self.folder)

    @functools.cached_property
    def _opened(self) -> tuple[Program, State]:
        from lab.train.restore import open_run as restore

        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax thinks aloud
        _, program, state = restore(self.folder, self._step, self._best, self.experiment)
        return program, state

    @property
    def state(self) -> State:
        """Step, parameters, the model's other variables and the optimizer's state, as the checkpoint holds them.

        Raises:
          UserError: there is no such checkpoint, or only damaged ones.
        """
        return self._opened[1]

    @property
    def step(self) -> int:
        """Completed updates of the checkpoint."""
        return int(self.state.step)

    @functools.cached_property
    def params(self) -> Any:
        """The parameters to evaluate with, a tree of arrays by module name: averaged ones where the optimizer
        averages, in the compute type."""
        from lab.train.step import eval_params

        return eval_params(self.experiment, self.state)

    def apply(self, inputs: Any, *, params: Any = None, **named: Any) -> Any:
        """What the model returns for `inputs`, (B, ...) as it takes them in training, without dropout.

        Of a `batch()` that is `batch["inputs"]`, for language models `batch["tokens"][:, :-1]`. `params`: others than
        the run's own. `named`: further arguments of the model, such as `mask`.
        """
        model_state = self.experiment.optim.eval_model_state(self.state.opt_state, self.state.model_state)
        variables = {"params": self.params if params is None else params, **model_state}
        return self.experiment.model.apply(variables, inputs, train=False, **named)

    @functools.cached_property
    def data(self) -> Any:
        """The loaded data: `train`, `validation` and `test` (or None), each with a length and `[indices]`, and what
        was fitted. Raises UserError where it is not where it was, or changed since."""
        from lab.train.description import check_same

        data = self.experiment.data.load()
        check_same(self.folder, self.experiment, data.fingerprint)
        return data

    def batch(self, records: int | Sequence[int] = 32, split: Split = "validation") -> dict[str, Any]:
        """Records of a split as the model and the task see them: the first ones, or those of these numbers.

        Returns name -> (B, ...). Raises UserError where the split is not there, or too short.
        """
        import numpy as np

        from lab.train.step import prepare

        source = getattr(self.data, split)
        chosen = np.arange(records) if isinstance(records, int) else np.asarray(records, np.int64)
        if source is None or not len(chosen) or chosen.min() < 0 or chosen.max() >= len(source):
            size = "no" if source is None else f"{len(source):,}"
            raise UserError(f"The {split} split has {size} records: ask for at least one of them.")
        ones = np.ones(len(chosen), np.float32)
        numbered = {**source[chosen], "index": chosen.astype(np.int32), "weight": ones}
        return dict(prepare(self.experiment, numbered, False))

    def metrics(self, split: Split | None = None) -> Any:
        """The rows of metrics.jsonl, of one split or of all: a pandas.DataFrame where pandas is installed, else a list
        of dictionaries."""
        from lab.train.metrics import read_rows

        self.experiment  # noqa: B018 (says that this is not a run folder)
        rows = [row for row in read_rows(self.folder / "metrics.jsonl") if split in (None, row["split"])]
        with contextlib.suppress(ImportError):
            import pandas

            return pandas.DataFrame(rows)
        return rows

    @property
    def result(self) -> dict[str, Any] | None:
        """result.json: final and best metrics, and times; None where the run is not finished."""
        from lab.train.description import finished

        return finished(self.folder)


def open_run(folder: str | Path, *, step: int | None = None, best: bool = False,
             experiment: Experiment | None = None) -> Run:
    """A run folder, with its latest checkpoint, its best, or that after `step` updates.

    `experiment`: the value that was trained, where its classes cannot be imported (those of a notebook).

    Raises:
      UserError: there is no run there, or it was made by code that is gone.
    """
    run = Run(folder, experiment, step, best)
    run.experiment  # noqa: B018 (a mistake is said here, not at the first use)
    return run


def fit(experiment: Experiment, folder: str | Path | None = None, *, quiet: bool = False) -> Run:
    """Trains in this process, to the end or on from where it was; a finished run is only opened.

    Args:
      experiment: the value; `dataclasses.replace` changes it.
      folder: the run folder; by default runs/notebook-<fingerprint>.
      quiet: print nothing.

    Returns:
      The finished run. After an interrupt the same call goes on from the last checkpoint.

    Raises:
      UserError: the experiment, the data or the folder is not as it must be, or the run diverged.
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
            run.data  # noqa: B018 (says where the folder is of another experiment, or the data changed)
            screen.info(f"{place}: run already complete.")
            return run
        status = loop.train(experiment, place, screen)
    if status == 1:
        raise UserError(f"The run in {place} diverged: see diverged.json there.")
    if status:
        raise SystemExit(status)
    return run
