"""``bench``: time per compiled step on this machine, its breakdown, and the throughput of the data pipeline."""

from __future__ import annotations

import functools
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from lab.commands.arguments import find_experiment, parse, with_example
from lab.configuration.values import override
from lab.data.pipeline import reader
from lab.data.prefetch import Prefetch
from lab.errors import UserError
from lab.experiment import Experiment
from lab.parallel.backend import start_jax
from lab.parallel.sharding import constrained
from lab.train import metrics
from lab.train.check import load_data
from lab.train.console import Screen, human
from lab.train.cost import cost_of
from lab.train.program import Program
from lab.train.step import State, make_loss, microbatched, prepare
from lab.train.teacher import with_teacher

WARM = 3  # untimed calls
TRACED = 5  # calls in a profile


@dataclass(frozen=True)
class BenchOptions:
    """Options of this command, in addition to the experiment's fields."""

    timed_steps: int = 50
    """Steps to time, after 3 to warm up (also --steps)."""
    breakdown: bool = True
    """Also compile and time the forward pass and the gradient separately: forward, backward, optimizer."""
    profile: bool = False
    """Write a trace of 5 calls of the step to profiles/, for xprof or https://ui.perfetto.dev."""
    xla: tuple[str, ...] = ()
    """XLA options for the compiled step, NAME=VALUE, such as xla_gpu_enable_latency_hiding_scheduler=true."""
    full: bool = False
    """Measure the real experiment, even without an accelerator."""
    local: bool = False
    """Measure the small local config, even with an accelerator."""


def main(args: Sequence[str]) -> int:
    """EXPERIMENT.py"""
    args = with_example(args)
    if not args:
        raise UserError("Say which experiment to measure: ./launch.sh bench experiments/gpt_small.py")
    flags = ["--timed-steps" + a.removeprefix("--steps") if a.partition("=")[0] == "--steps" else a for a in args[1:]]
    experiment, options, _ = parse(find_experiment(args[0]), flags, BenchOptions, verb="bench")
    start_jax()
    if options.timed_steps < 1:
        raise UserError(f"--timed-steps must be at least 1, not {options.timed_steps}.")
    with Screen():
        measure(experiment, options)
    return 0


def measure(experiment: Experiment, options: BenchOptions) -> dict[str, Any]:
    """Prints a table and a line of JSON with the same values, and returns them as a dictionary.

    Steps are timed as in the training loop: the metrics of a step are fetched after the next one is dispatched.
    """
    data, experiment = load_data(experiment), with_teacher(experiment)
    program = Program(experiment, data.train)
    program.options = program.options | xla_options(options.xla)
    state, update, read, n = program.init(), program.train, reader(program), experiment.steps_per_call
    calls = -(-options.timed_steps // n)
    with Prefetch(lambda call: program.batch(read, call), 0, 1 + WARM + calls) as batches:
        state, values = jax.block_until_ready(update(state, next(batches)))
        first, ends, host, waits = _seconds_since_start(), [], [], []
        for batch in batches:
            start = time.perf_counter()
            state, last = update(state, batch)
            called = time.perf_counter()
            jax.device_get(values)
            values = last
            ends.append(time.perf_counter())
            # Host overhead is the shorter interval: an accelerator computes in the second, a CPU in the first.
            host.append(min(called - start, ends[-1] - called))
            waits.append(batches.wait_seconds)
        jax.block_until_ready(state)
        ends[-1] = time.perf_counter()
    ms = 1000 / n * np.diff(ends[WARM - 1 :])
    median, units = float(np.median(ms)), experiment.batch * data.units_per_record
    flops = cost_of(experiment).flops / median * 1000
    profile, state = _profile(program, state, program.batch(read, 0)) if options.profile else (None, state)
    parts = _breakdown(program, state, data, options.timed_steps) if options.breakdown else {}  # donates the state
    found = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "jax": jax.__version__,
        "precision": experiment.precision, "time_to_first_step_seconds": round(first, 2),
        "compile_seconds": round(program.compile_seconds, 2), "ms_per_step": round(median, 3),
        "ms_quartiles": [round(float(q), 3) for q in np.percentile(ms, [25, 75])],
        **parts,
        "host_ms": round(1000 / n * float(np.median(host[WARM:])), 3),
        "data_wait_ms": round(1000 / n * (waits[-1] - waits[WARM - 1]) / calls, 3),
        f"{data.unit}_per_second": round(units / median * 1000), "flops_per_second": flops,
        "mfu": metrics.mfu(flops, program.mesh.size), **_memory(program), **({"profile": profile} if profile else {})}
    table = Table("", "", show_header=False)
    for name, value in found.items():
        table.add_row(name.replace("_", " "), human(value) if isinstance(value, int | float) and value > 1e5
                      else str(value))
    Console(highlight=False).print(table)
    print(json.dumps(found))
    return found


def xla_options(words: Sequence[str]) -> dict[str, Any]:
    """Parses NAME=VALUE words into compiler options, with bools and ints converted.

    Raises:
      UserError: a word without name or value.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise UserError(f"--xla {word}: write NAME=VALUE, such as xla_gpu_autotune_level=4.")
        found[name] = {"true": True, "false": False}.get(value.lower(), int(value) if value.isdecimal() else value)
    return found


def _seconds_since_start() -> float:
    """Seconds since the command was typed: launch.sh execs this process, so its start time counts."""
    import psutil

    return time.time() - psutil.Process().create_time()


def _memory(program: Program) -> dict[str, int | None]:
    """Peak bytes: compiled temporaries, first device (if it reports them), this process."""
    compiled, device = program.compiled.memory_analysis(), jax.devices()[0].memory_stats() or {}
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    return {"temporary_bytes": getattr(compiled, "temp_size_in_bytes", None),
            "peak_device_bytes": device.get("peak_bytes_in_use"), "peak_host_bytes": kilobytes * 1024}


def _breakdown(program: Program, state: State, data: Any, steps: int) -> dict[str, float]:
    """Milliseconds of the parts of one step, as time differences between separately compiled programs.

    Forward: the loss. Backward: gradient minus loss. Optimizer: step minus gradient. Donates the state.
    """
    if program.stacked or program.resident is not None:
        program = Program(replace(program.experiment, steps_per_call=1, data_on_device="never"), data.train)
        state = program.init()
    kept, batch = [state], program.batch(reader(program), 0)

    def alone(differentiate: Callable) -> Callable[[], Any]:
        def part(state: State, batch: Any, given: Any) -> Any:
            seeded = override(program.experiment, given)
            with constrained(program.mesh):
                rows = prepare(seeded, batch, True, state.step)
                loss = make_loss(seeded, getattr(state, "base", None))
                return microbatched(seeded.grad_accum_steps)(differentiate(loss), state, rows)

        compiled = jax.jit(part).lower(kept[0], batch, program.given).compile(program.options)
        return lambda: compiled(kept[0], batch, program.given)

    forward, gradient = alone(lambda loss: loss), alone(functools.partial(jax.grad, has_aux=True))

    def update() -> Any:
        kept[0], values = program.train(kept[0], batch)  # the old state is donated
        return values

    times: dict[Callable, list[float]] = {forward: [], gradient: [], update: []}
    for i in range(WARM + max(steps // 2, 5)):  # interleaved, because the machine's speed may drift
        for run, seconds in times.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds += [time.perf_counter() - start] * (i >= WARM)
    f, g, u = (1000 * float(np.median(seconds)) for seconds in times.values())
    return {"forward_ms": round(f, 3), "backward_ms": round(g - f, 3), "optimizer_ms": round(u - g, 3)}


def _profile(program: Program, state: State, batch: Any) -> tuple[str, State]:
    """Writes a trace of `TRACED` calls; returns its folder and the state after them."""
    folder = Path("profiles") / f"{program.experiment.fingerprint()}-{time.strftime('%Y%m%d-%H%M%S')}"
    with jax.profiler.trace(str(folder), create_perfetto_trace=True):
        for _ in range(TRACED):
            state, values = program.train(state, batch)
            jax.block_until_ready(values)
    return str(folder), state
