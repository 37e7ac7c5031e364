"""Runs several cells as one program and writes the same files for each as if it had run alone."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lab.data.pipeline import eval_batches, train_indices
from lab.data.prefetch import Prefetch
from lab.experiment import Checkpoint
from lab.signals import EXIT, Stop
from lab.study.run.cells import Cell
from lab.study.run.stacked import FINITE, Stacked, apart
from lab.train import metrics
from lab.train.check import check_metric
from lab.train.checkpoint import Checkpoints
from lab.train.console import Screen, clock
from lab.train.fitted import write_fitted
from lab.train.restore import initial_arrays
from lab.train.run_folder import open_folder, write_diverged, write_result
from lab.train.step import eval_variables


def run_together(stacked: Stacked, cells: Sequence[Cell], folders: Sequence[Path], home: Path, data: Any,
                 screen: Screen, file: Path | None, stop: Stop) -> tuple[int, list[bool]]:
    """Runs or resumes the cells to their end. Returns (exit status, for each cell whether it has not diverged).

    `home`: a folder for their shared files while they run. 0: finished; 75 / 130: stopped by a signal, saved.

    Raises:
      UserError: a problem with data, checkpoint, devices or disk.
    """
    run = _Together(stacked, cells, folders, home, data, screen, file, stop)
    try:
        return run.go()
    finally:
        run.close()


class _Together:
    def __init__(self, stacked: Stacked, cells: Sequence[Cell], folders: Sequence[Path], home: Path, data: Any,
                 screen: Screen, file: Path | None, stop: Stop):
        self.stacked, self.cells, self.folders, self.data, self.stop = stacked, cells, folders, data, stop
        self.screen, self.experiment = screen, stacked.experiment
        for cell, folder in zip(cells, folders, strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            open_folder(folder, cell.experiment, file, data.fingerprint)
            write_fitted(folder, cell.experiment, data)
        self.checkpoints = Checkpoints(home / "checkpoints", Checkpoint(keep=1, best=False))
        self._restore_or_init()
        marks = self.checkpoints.beside(self.step) if self.step in self.checkpoints.steps() else None
        self.rows = [metrics.Rows(folder / "metrics.jsonl", self.step, marks and marks[c])
                     for c, folder in enumerate(folders)]
        self.pending: tuple[int, Any] | None = None
        self.begun, self.first, self.evaluating = time.monotonic(), self.step, 0.0

    def _restore_or_init(self) -> None:
        settings, stacked = self.experiment.checkpoint, self.stacked
        self.keeps_best = settings.best and bool(self.experiment.evaluate.every)
        alive = jax.ShapeDtypeStruct((len(stacked),), bool, sharding=stacked.cells)
        steps = self.checkpoints.steps()
        saved = self.checkpoints.restore({"states": stacked.abstract, "alive": alive}
                                         | ({"best": stacked.abstract} if self.keeps_best else {})) if steps else None
        if saved is None:
            arrays, _ = initial_arrays(self.experiment.init_from, jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked.abstract), self.data)
            self.step, self.states, self.alive = 0, stacked.init(arrays), stacked.everyone()
            self.best = jax.tree.map(jnp.copy, self.states) if self.keeps_best else None
        else:
            self.step = int(jax.device_get(saved["states"].step).max())
            self.states, self.alive, self.best = saved["states"], saved["alive"], saved.get("best")
            self.screen.info(f"Resuming from step {self.step} of {self.experiment.steps}.")
        self.lives = [bool(x) for x in jax.device_get(self.alive)]

    def go(self) -> tuple[int, list[bool]]:
        experiment, n = self.experiment, self.experiment.steps_per_call
        first, last = self.step // n, experiment.steps // n
        with Prefetch(self.stacked.batch, first, last) as batches:
            if first < last:
                self.screen.progress("Compiling ...")
                _ = self.stacked.compiled
            self.begun = time.monotonic()
            with self.stop.listening():  # before this there is nothing to save
                return self._steps(batches)

    def _steps(self, batches: Prefetch) -> tuple[int, list[bool]]:
        experiment, n = self.experiment, self.experiment.steps_per_call
        while not self.stop():
            self._evaluate_if_due()
            done = self.step == experiment.steps or not any(self.lives)
            if done and not self.stop():
                return self._finish()
            if experiment.checkpoint.every and self.step % experiment.checkpoint.every == 0:
                self._save()
            if self.stop():
                break
            with jax.transfer_guard_host_to_device("disallow"):
                self.states, self.alive, values = self.stacked.train(self.states, self.alive, next(batches))
            self.step += n
            self._flush()
            self.pending = (self.step, values)
        self._save()
        self.checkpoints.wait()
        return EXIT[self.stop.signal], self.lives

    def _flush(self) -> None:
        """Writes the metrics of the last completed call, for cells that have not diverged."""
        if self.pending is None:
            return
        (last, values), self.pending = self.pending, None
        n, shown = self.experiment.steps_per_call, []
        for i, at_once in enumerate(apart(jax.device_get(values), n)):
            step = last - n + 1 + i
            for c, own in enumerate(apart(at_once, len(self.cells))):
                if not self.lives[c]:
                    continue
                means = metrics.means(own)
                shown.append(means["loss"])
                if not all(math.isfinite(means[name]) for name in FINITE):
                    self.lives[c] = False
                    indices = train_indices(step - 1, self.experiment.batch, len(self.data.train), self.cells[c].seed)
                    write_diverged(self.folders[c], step, indices, means, self.rows[c].rows)
                elif step % self.experiment.log.every == 0:
                    self.rows[c].append({"step": step, "split": "train", **means})
        left = (time.monotonic() - self.begun) / (last - self.first) * (self.experiment.steps - last)
        self.screen.progress(f"step {last:>6}/{self.experiment.steps}  {sum(self.lives)} cells  "
                             f"losses {min(shown, default=0):.4f} to {max(shown, default=0):.4f}  left {clock(left)}")

    def _evaluations(self, c: int) -> list[dict[str, Any]]:
        return [row for row in self.rows[c].rows if row["split"] == "validation"]

    def _evaluate(self, states: Any, split: str, records: int | None) -> list[dict[str, float]] | None:
        batches, start = eval_batches(getattr(self.data, split), self.stacked.eval_batch, records), time.monotonic()
        found = self.stacked.evaluate(states, batches, self.stop)
        self.evaluating += time.monotonic() - start
        return found

    def _evaluate_if_due(self) -> None:
        settings = self.experiment.evaluate
        due = self.step in (0, self.experiment.steps) or (settings.every and self.step % settings.every == 0)
        missing = [lives and all(row["step"] != self.step for row in self._evaluations(c))
                   for c, lives in enumerate(self.lives)]  # a killed process may have written some rows
        if not due or not any(missing):
            return
        self._flush()
        found = self._evaluate(self.states, "validation", settings.records)
        if found is None:
            return
        improved = []
        for c, means in enumerate(found):
            check_metric(settings.metric, means)
            if self.lives[c] and missing[c]:
                self.rows[c].append({"step": self.step, "split": "validation",
                                     settings.metric: means[settings.metric], **means})
            best = metrics.best_row(self._evaluations(c), settings.metric, settings.mode)
            improved.append(self.lives[c] and best["step"] == self.step)
        if self.best is not None:
            mask = jax.device_put(np.array(improved), self.stacked.cells)
            self.best = _select(mask, self.states, self.best)

    def _save(self) -> None:
        if self.step == 0 or self.step in self.checkpoints.steps():
            return
        self._flush()
        for rows in self.rows:
            rows.sync()
        self.checkpoints.save(self.step, {"states": self.states, "alive": self.alive}
                              | ({} if self.best is None else {"best": self.best}), [rows.mark() for rows in self.rows])

    def _finish(self) -> tuple[int, list[bool]]:
        self._save()  # if killed after this, only this last part is repeated
        tested = None
        if self.data.test is not None and (tested := self._evaluate(self.states, "test", None)) is None:
            return EXIT[self.stop.signal], self.lives
        seconds, steps = time.monotonic() - self.begun - self.evaluating, self.step - self.first
        share = seconds / max(steps, 1) / len(self.cells)
        times = {"timed_steps": steps, "seconds_per_step": share,
                 f"{self.data.unit}_per_second": self.experiment.batch * self.data.units_per_record / share,
                 "cells_together": len(self.cells), "evaluation_seconds": self.evaluating / len(self.cells),
                 "compile_seconds": self.stacked.compile_seconds} if steps else {}
        states = apart(jax.device_get(self.states), len(self.cells))
        bests = apart(jax.device_get(self.best), len(self.cells)) if self.best is not None else states
        for c, folder in enumerate(self.folders):
            settings, rows = self.experiment.evaluate, self._evaluations(c)
            best = metrics.best_row(rows, settings.metric, settings.mode)
            self._save_alone(folder, [bests[c], states[c]] if self.lives[c] else [states[c]], best["step"])
            if not self.lives[c]:
                continue
            result = {"steps": self.step, "stopped_early": False, "final": rows[-1], "best": best,
                      **times}
            if tested:
                result["test"] = {"step": self.step, "split": "test", **tested[c]}
                if self.rows[c].rows[-1]["split"] != "test":
                    self.rows[c].append(result["test"])
            if settings.harness is not None:
                own = self.cells[c].experiment  # numbers of the model may differ between cells
                result["harness"] = settings.harness.evaluate(own.model, eval_variables(own, states[c]), self.data,
                                                              folder)
            write_result(folder, result, self.rows[c].mark())
        return 0, self.lives

    def _save_alone(self, folder: Path, states: Sequence[Any], best: int | None) -> None:
        """Saves checkpoints as if the cell had run alone, so that it can be resumed, sampled or evaluated."""
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        checkpoints = Checkpoints(folder / "checkpoints", self.experiment.checkpoint, lambda: best)
        by_step: Mapping[int, Any] = {int(state.step): state for state in states}
        for step, state in sorted(by_step.items()):
            if step:
                checkpoints.save(step, jax.tree.map(jnp.asarray, state))
        checkpoints.close()

    def close(self) -> None:
        for rows in self.rows:
            rows.close()
        self.checkpoints.close()


@jax.jit
def _select(mask: jax.Array, new: Any, old: Any) -> Any:
    """`jnp.where` per cell, on trees."""
    return jax.tree.map(lambda a, b: jnp.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)
