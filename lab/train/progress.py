"""Progress line and final summary of a run: time, throughput, the first few metrics."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

from lab.experiment import Experiment
from lab.train import metrics
from lab.train.console import clock, human
from lab.train.cost import cost_of
from lab.train.program import Program


class Clock:
    """Wall-clock time, throughput and ETA. Not written to metrics.jsonl, which must be reproducible."""

    def __init__(self, experiment: Experiment, data: Any, step: int, devices: int):
        self.experiment, self.data, self.first = experiment, data, step
        self.units = experiment.batch * data.units_per_record
        self.devices = devices
        self.flops = cost_of(experiment).flops if metrics.peak_flops() else math.nan  # 0.4 s, needed for MFU only
        self.begun = self.last = time.monotonic()
        self.other = {"evaluation": 0.0, "checkpoint": 0.0}
        self.rate: float | None = None  # seconds per step, smoothed
        self.last_step = step

    def start(self) -> None:
        """Starts the clock, just before the first step."""
        self.begun = self.last = time.monotonic()

    @contextlib.contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Excludes the time inside from step times, and adds it to the total of `what`."""
        start = time.monotonic()
        yield
        spent = time.monotonic() - start
        self.other[what] += spent
        self.last += spent

    def line(self, step: int, means: dict[str, float]) -> str:
        """The progress line after step `step`."""
        now = time.monotonic()
        if step > self.last_step:
            seconds = (now - self.last) / (step - self.last_step)
            self.rate = seconds if self.rate is None else self.rate + 0.1 * (seconds - self.rate)
            self.last, self.last_step = now, step
        parts = [f"step {step:>6}/{self.experiment.steps}", f"loss {means['loss']:.4f}"]
        if self.rate:
            parts.append(f"{human(self.units / self.rate)} {self.data.unit}/s")
            parts.append(f"{1000 * self.rate:.0f} ms/step")
            if utilisation := metrics.mfu(self.flops / self.rate, self.devices):
                parts.append(f"MFU {utilisation:.1%}")
            parts.append(f"ETA {clock(self.rate * (self.experiment.steps - step))}")
        return "  ".join(parts)

    def totals(self, step: int, program: Program, batches: Any) -> dict[str, Any]:
        """The timing fields of result.json, over the steps made by this process."""
        steps, training = step - self.first, time.monotonic() - self.begun - sum(self.other.values())
        if not steps:
            return {}
        rate = training / steps
        return {"timed_steps": steps, "seconds_per_step": rate, f"{self.data.unit}_per_second": self.units / rate,
                "mfu": metrics.mfu(self.flops / rate, self.devices), "training_seconds": training,
                "evaluation_seconds": self.other["evaluation"], "checkpoint_seconds": self.other["checkpoint"],
                "compile_seconds": program.compile_seconds, "data_wait_seconds": batches.wait_seconds}


def shown(row: dict[str, Any], most: int = 6) -> str:
    """The first few metrics of a row, without those of groups (METRIC/GROUP); metrics.jsonl has all of them."""
    values = [(name, value) for name, value in row.items() if name not in ("step", "split") and "/" not in name]
    return "  ".join([f"{name} {_short(value)}" for name, value in values[:most]] + ["..."] * (len(values) > most))


def _short(value: float) -> str:
    return f"{value:.3g}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def describe_result(result: dict[str, Any]) -> str:
    """A summary of a finished run for the console."""
    final = shown(result["final"])
    early = " (stopped early)" if result["stopped_early"] else ""
    lines = [f"Finished after {result['steps']} steps{early}: {final}; best at step {result['best']['step']}"]
    if "test" in result:
        lines.append(f"Test split, with the state of step {result['test']['step']}: {shown(result['test'])}")
    if "out_of_bag" in result:
        means = {name: value for name, value in result["out_of_bag"].items() if name != "records"}
        lines.append(f"Out of bag, {result['out_of_bag']['records']:,} training records by the members that did not "
                     f"learn them: {shown(means)}")
    if "seconds_per_step" in result:
        share = result["data_wait_seconds"] / max(result["training_seconds"], 1e-9)
        rate, seconds = 1000 * result["seconds_per_step"], result["training_seconds"]
        lines.append(f"{rate:.1f} ms/step over {result['timed_steps']} steps ({seconds:.0f} s), {share:.2%} "
                     f"of it waiting for data; "
                     f"evaluation {result['evaluation_seconds']:.0f} s")
    return "\n".join(lines)
