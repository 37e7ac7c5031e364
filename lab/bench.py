"""``bench``: how fast the compiled update is on this machine, and whether data keeps up."""

from __future__ import annotations

import functools
import json
import time
from dataclasses import dataclass

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from lab import metrics
from lab.console import human
from lab.data.pipeline import Prefetch, train_batch
from lab.experiment import Experiment
from lab.plan import make_plan
from lab.program import Program


@dataclass(frozen=True)
class BenchOptions:
    """Options of this command, beside the experiment's own."""

    updates: int = 50
    """Updates to time, after 3 to warm up."""
    full: bool = False
    """Measure the real experiment, also without an accelerator."""
    local: bool = False
    """Measure the small local twin, also with an accelerator."""


def measure(experiment: Experiment, options: BenchOptions) -> None:
    """Prints a table, and the same as one line of JSON."""
    data = experiment.data.load()
    experiment.model.check(data.facts)
    program = Program(experiment, data.train)
    state, update, n = program.init(), program.train, experiment.dispatch
    read = functools.partial(train_batch, program.train_records, batch=experiment.batch, seed=experiment.seed,
                             rows=program.rows)
    calls, warm, seconds = -(-options.updates // n), 3, []
    with Prefetch(lambda call: program.batch(read, call), 0, warm + calls) as batches:
        for batch in batches:
            if len(seconds) == warm:
                waited = batches.wait_seconds
            start = time.perf_counter()
            state, values = update(state, batch)
            jax.block_until_ready(values)
            seconds.append((time.perf_counter() - start) / n)
        waited = (batches.wait_seconds - waited) / (calls * n)
    timed = np.array(seconds[warm:]) * 1000
    median, flops = float(np.median(timed)), make_plan(experiment).flops
    units = experiment.batch * data.units_per_record
    memory = program.compiled.memory_analysis()
    found = {"device": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "jax": jax.__version__,
             "compile_seconds": round(program.compile_seconds, 2), "ms_per_update": round(median, 3),
             "ms_quartiles": [round(float(q), 3) for q in np.percentile(timed, [25, 75])],
             f"{data.unit}_per_second": round(units / median * 1000), "flops_per_second": flops / median * 1000,
             "mfu": metrics.mfu(flops / median * 1000, program.mesh.size), "data_wait_ms": round(waited * 1000, 3),
             "peak_temporary_bytes": getattr(memory, "temp_size_in_bytes", None)}
    table = Table("", "", show_header=False)
    for name, value in found.items():
        table.add_row(name.replace("_", " "), human(value) if isinstance(value, float) and value > 1e6 else str(value))
    Console(highlight=False).print(table)
    print(json.dumps(found))
