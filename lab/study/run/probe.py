"""Times a step of one cell in a separate process bound to one core: `python -m lab.study.run.probe`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lab.study.run.workers import pin


def probe() -> None:
    """Prints seconds per step of the cell described on stdin."""
    from lab.configuration.rebuild import from_json
    from lab.parallel.backend import start_jax
    from lab.study.run.shared import Bench
    from lab.study.run.units import time_alone
    from lab.train.experiment_file import load
    from lab.train.teacher import with_teacher

    start_jax()
    told = json.load(sys.stdin)
    if told["file"]:
        load(Path(told["file"]))
    bench = Bench(told["stops"])
    print(time_alone(with_teacher(from_json(told["experiment"])), told["numbers"], told["steps_per_call"], bench))
    bench.close()


if __name__ == "__main__":
    pin()
    probe()
