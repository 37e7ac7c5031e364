"""The training loop: handles time, files and signals. Independent of the model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from lab.data.pipeline import eval_batches, reader
from lab.data.prefetch import Prefetch
from lab.errors import UserError, forgiving
from lab.experiment import Experiment
from lab.parallel.processes import ALONE, Processes
from lab.signals import Stop
from lab.tasks.base import EvalResult
from lab.train import metrics
from lab.train.beginning import add_reference, first_state, last_step, open_rows, open_tensorboard
from lab.train.check import check_metric, load_data
from lab.train.checkpoint import Checkpoints
from lab.train.console import Screen, facts
from lab.train.ending import Diverged, diverged, finish, interrupted
from lab.train.evaluation import make_eval_result
from lab.train.fitted import write_fitted
from lab.train.program import Program
from lab.train.progress import Clock, shown
from lab.train.run_copy import bring_back, copied
from lab.train.run_folder import check_shared_disk, checkpoint_folder, lock_run_folder, open_folder
from lab.train.step import State
from lab.train.teacher import with_teacher


@dataclass(frozen=True)
class Shared:
    """Data and compiled program, shared by the cells of a study to save time. Such cells draw no pictures."""

    data: Any
    """The result of `experiment.data.load()`."""
    program: Program
    """The program of the same experiment and seed; its `steps_per_call` may differ."""
    keep: tuple[int, ...] = ()
    """Steps whose checkpoints are always kept."""
    begin: Callable[[Program, Path], State | None] = lambda program, folder: None
    """Returns the shared state that this arm starts from, with its rows in `folder`; None: initialise the state."""


def train(experiment: Experiment, folder: Path, screen: Screen, file: Path | None = None, *,
          tensorboard: bool = False, processes: Processes = ALONE, checkpoints: str | None = None,
          shared: Shared | None = None, on_change: str = "refuse") -> int:
    """Runs `experiment` in `folder` to its end, resuming if possible; returns the exit status in every process.

    `checkpoints`: a location outside the run folder, see `checkpoint_folder`. `on_change`: see `open_folder`.

    0: finished. 75 / 130 / 141: stopped by a signal, state saved, same command resumes (`lab.signals`). 1: diverged.

    Raises:
      UserError: a problem with the data, folder, checkpoint, devices or disk.
    """
    data = shared.data if shared else load_data(experiment)
    processes.check_same({"the data's fingerprint": data.fingerprint}, "Give every machine the same data files.")
    with lock_run_folder(folder) if processes.first else contextlib.nullcontext():
        place = checkpoint_folder(folder, checkpoints, to_write=True)
        remote = None if place == folder / "checkpoints" else str(place)
        if processes.first:
            if remote:
                bring_back(folder, place, experiment, data.fingerprint)
            for line in open_folder(folder, experiment, file, data.fingerprint, remote, on_change):
                screen.info(line)
            write_fitted(folder, experiment, data)
        processes.gather(None)  # barrier: the folder exists from here on
        if checkpoints is None:
            check_shared_disk(folder)
        screen.record(processes.log(folder))
        with copied(folder, place) if remote and processes.first else contextlib.nullcontext():
            return _train(experiment, folder, place, screen, data, tensorboard, processes, shared)


def _train(experiment: Experiment, folder: Path, checkpoints: Any, screen: Screen, data: Any, tensorboard: bool,
           processes: Processes, shared: Shared | None) -> int:
    for line in facts(data.summary):
        screen.info(line)
    among = f" in {processes.count} processes" if processes.count > 1 else ""
    screen.info(f"Devices: {jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()}){among}, "
               f"compute in {experiment.precision}")
    run = TrainingRun(experiment, folder, checkpoints, screen, data, Stop(processes), tensorboard, shared)
    try:
        return run.go()
    except Diverged as e:
        screen.info(str(e))
        return 1
    finally:
        run.close()


class TrainingRun:
    """One run: the pure program with its metric rows, checkpoints and clock."""

    def __init__(self, experiment: Experiment, folder: Path, checkpoints: Any, screen: Screen, data: Any, stop: Stop,
                 tensorboard: bool, shared: Shared | None):
        self.experiment, self.screen, self.data, self.stop = experiment, screen, data, stop
        self.folder = stop.processes.own_folder(folder)
        self.pictures = shared is None
        self.shared = shared or Shared(data, Program(with_teacher(experiment), data.train))
        self.program, keep = self.shared.program, self.shared.keep
        self.checkpoints = Checkpoints(checkpoints, experiment.checkpoint, lambda: self.best_step, stop.processes, keep)
        self.state, self.begun_at = first_state(self)
        self.step = int(self.state.step)
        add_reference(self)
        if self.step % self.program.experiment.steps_per_call:
            raise UserError(f"The run is at step {self.step}, which is not a multiple of --steps-per-call "
                            f"{self.program.experiment.steps_per_call}: resume with --steps-per-call 1.")
        self.rows, self.end = open_rows(self), last_step(experiment, self.program.experiment.steps_per_call)
        self.evaluations = [row for row in self.rows.rows if row["split"] == "validation"]
        self.board = open_tensorboard(folder) if tensorboard else None
        self.pending: tuple[int, Any] | None = None
        self.evaluated: EvalResult | None = None  # the last evaluation of this process
        self.batches: Prefetch | None = None
        self.clock = Clock(experiment, data, self.step, self.program.mesh.size)

    def go(self) -> int:
        """Compiles, then trains until the last step, early stopping or a signal; returns the exit status."""
        n = self.program.experiment.steps_per_call
        read, first, last = reader(self.program), self.step // n, self.end // n
        with Prefetch(lambda call: self.program.batch(read, call), first, last) as self.batches:
            if first < last:
                self.screen.progress("Compiling ...")
                _ = self.program.train  # compiled here, while the first batches are read
                self.screen.info(f"Compiled in {self.program.compile_seconds:.1f} s.")
            self.clock.start()
            with self.stop.listening():  # before this point there is nothing to save
                return self._steps()

    def _steps(self) -> int:
        """The loop: evaluates and saves if due, then makes the next step, until the run ends or is stopped."""
        n = self.program.experiment.steps_per_call
        while not self.stop():
            self._evaluate_if_due()
            done = self.step == self.end or self._out_of_patience()
            self._save_if_due(done)
            if done and not self.stop():
                return finish(self)
            if self.stop():
                break
            self.evaluated = None  # frees its copy of the parameters
            with jax.transfer_guard_host_to_device("disallow"):  # an implicit transfer would slow every step
                self.state, values = self.program.train(self.state, next(self.batches))
            self.step += n
            self.flush()
            self.pending = (self.step, values)
        return interrupted(self)

    def flush(self) -> None:
        """Fetches the metrics of the step before the one in flight, so that the device never waits for the host."""
        if self.pending is None:
            return
        (last, values), self.pending = self.pending, None
        values, n = jax.device_get(values), self.program.experiment.steps_per_call
        for i in range(n):
            step = last - n + 1 + i
            means = metrics.means({k: (s[i], w[i]) for k, (s, w) in values.items()} if n > 1 else values)
            if not all(math.isfinite(means[k]) for k in ("loss", "gradient_norm", "update_norm", "parameter_norm")):
                raise diverged(self, step, means)
            if step % self.experiment.log.every == 0:
                self.write({"step": step, "split": "train", **means})
        self.screen.progress(self.clock.line(last, means))

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.board:
            for name in row.keys() - {"step", "split"}:
                self.board.add_scalar(f"{row['split']}/{name}", row[name], row["step"])

    def _evaluate_if_due(self) -> None:
        settings = self.experiment.evaluate
        due = self.step in (self.begun_at, self.end) or (settings.every and self.step % settings.every == 0)
        if not due or (self.evaluations and self.evaluations[-1]["step"] == self.step):
            return
        self.flush()
        batches = eval_batches(self.data.validation, self.program.eval_batch, settings.records, self.program.eval_rows)
        with self.clock.paused("evaluation"):
            evaluated = self.program.evaluate(self.state, batches, self.stop)
        if evaluated is None:
            return
        means, counts = evaluated
        check_metric(settings.metric, means)
        means = {settings.metric: means[settings.metric], **means}
        self.evaluations.append({"step": self.step, "split": "validation", **means})
        self.write(self.evaluations[-1])
        best = "  (best)" if self.step and self.best_step == self.step else ""
        self.screen.info(f"step {self.step:>6}  validation  {shown(means)}{best}")
        with self.clock.paused("evaluation"):
            self.evaluated = make_eval_result(self.program, self.state, self.data, "validation", means, counts,
                                              self.folder)
            if self.pictures:
                with forgiving("The snapshot"):
                    self.experiment.task.snapshot(self.evaluated)

    @property
    def best_step(self) -> int | None:
        """The step with the best validation metric so far. Computed from the rows, so resuming cannot change it."""
        return self.best["step"]

    @property
    def best(self) -> dict[str, Any]:
        return metrics.best_row(self.evaluations, self.experiment.evaluate.metric, self.experiment.evaluate.mode)

    def _out_of_patience(self) -> bool:
        patience = self.experiment.evaluate.patience
        since_best = [row for row in self.evaluations if row["step"] > (self.best_step or 0)]
        return patience is not None and len(since_best) >= patience

    def _save_if_due(self, done: bool) -> None:
        settings = self.experiment.checkpoint
        periods = [p for p in (settings.every, settings.permanent) if p]
        best = settings.best and self.best_step == self.step and self.experiment.evaluate.every
        if self.step and (done or best or self.step in self.shared.keep or any(self.step % p == 0 for p in periods)):
            self.save()

    def save(self) -> None:
        """Saves the state and a mark of the metric rows, unless this step is saved."""
        if self.step in self.checkpoints.steps():
            return
        self.flush()  # raises Diverged before a non-finite state is saved
        self.rows.sync()
        with self.clock.paused("checkpoint"):
            self.checkpoints.save(self.step, self.state, self.rows.mark())

    def close(self) -> None:
        """Releases files and threads, after waiting for a save in progress."""
        self.rows.close()
        if self.board:
            self.board.close()
        self.checkpoints.close()
