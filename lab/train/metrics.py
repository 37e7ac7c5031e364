"""Metrics: (sum, weight) pairs, the metrics.jsonl file, and model FLOPs utilisation."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lab.errors import UserError, naming
from lab.files import open_file, replace_file

# Peak dense bfloat16 FLOP/s per device, from vendor data sheets, by JAX's device_kind.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12, "TPU v2": 45e12, "TPU v3": 123e12, "TPU v4": 275e12, "TPU v5 lite": 197e12,
    "TPU v5": 459e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12,
}


def add(total: Any, more: Any) -> Any:
    """Adds two trees of (sum, weight) pairs; a `total` of None is empty."""
    return more if total is None else jax.tree.map(lambda a, b: a + b, total, more)


def means(metrics: Mapping[str, Any]) -> dict[str, float]:
    """sum / weight of every (sum, weight) metric; NaN if the weight is 0."""
    pairs = {name: pair for name, pair in metrics.items() if isinstance(pair, tuple)}
    return {name: float(np.float32(total) / np.float32(weight)) if weight else float("nan")
            for name, (total, weight) in jax.device_get(pairs).items()}


def counts(metrics: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The remaining metrics: arrays of counts, such as a confusion matrix."""
    return jax.device_get({name: array for name, array in metrics.items() if not isinstance(array, tuple)})


def best_row(rows: list[dict[str, Any]], metric: str, mode: str) -> dict[str, Any]:
    """The first row with the best value of the metric ("min" or "max"). NaN is never the best."""
    def badness(row: dict[str, Any]) -> float:
        value = row[metric] if mode == "min" else -row[metric]
        return math.inf if math.isnan(value) else value

    return min(rows, key=badness, default={"step": None})


def peak_flops() -> float | None:
    """Peak FLOP/s of one device of this machine; None if unknown."""
    return PEAK_FLOPS.get(jax.devices()[0].device_kind)


def mfu(flops_per_second: float, devices: int) -> float | None:
    """Model FLOPs utilisation of `devices` devices (PaLM, Chowdhery et al. 2022); None if the peak is unknown."""
    peak = peak_flops()
    return None if peak is None else flops_per_second / (peak * devices)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, without a last line that a crash left incomplete.

    Raises:
      UserError: any other line is damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}). Restore it, or start afresh with --run-dir.") from e
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # text after the last newline is an incomplete row
        try:
            row = json.loads(line.decode())
            if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("split"), str):
                raise ValueError("it is not a row of metrics with a step and a split")
            rows.append(row)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}, line {number} is damaged ({e}). Restore it, or start afresh with "
                            f"--run-dir.") from e
    return rows


def marked_rows(path: Path, saved: Mapping[str, Any] | None, *, finished: bool = False) -> list[dict[str, Any]]:
    """The rows covered by the mark `saved` (see `Rows.mark`); all rows if it is None; none if the file is missing.

    Raises:
      UserError: the rows are damaged or do not match the mark; or, `finished`, there are more.
    """
    rows = read_rows(path)
    if saved is None:
        return rows
    if finished and (more := len(rows) - saved["rows"]) > 0:
        raise UserError(f"{path} was changed: {more} row{'s' * (more > 1)} came after the run was finished. Delete "
                        f"{'them' if more > 1 else 'it'}, the last of {len(rows)}.")
    rows = rows[: saved["rows"]]
    found = hashlib.sha256("".join(json.dumps(row) + "\n" for row in rows).encode()).hexdigest()
    if found == saved["digest"] or not path.exists():
        return rows
    what = (f"{saved['rows'] - len(rows)} of the {saved['rows']} rows are gone" if len(rows) < saved["rows"] else
            f"its first {saved['rows']} rows are not those that were written")
    raise UserError(f"{path} was changed: {what}. The best state, early stopping and the result depend on them. "
                    f"Restore it; or delete it, and an unfinished run resumes and counts from there.")


class Rows:
    """A reproducible JSON-lines file: it contains no times, and is truncated to the checkpoint when a run resumes."""

    def __init__(self, path: Path, last_step: int, saved: Mapping[str, Any] | None = None):
        """Opens for appending, after removing rows later than `last_step`, left by a crashed process. `saved`: the
        `mark` of that step.

        Raises:
          UserError: the rows are damaged, or changed since the state of that step was saved.
        """
        if saved is None:
            # takewhile, not filter: the test row is written last, but its step may be earlier (the best state).
            rows = list(itertools.takewhile(lambda row: row["step"] <= last_step, read_rows(path)))
        else:
            rows = marked_rows(path, saved)
        self.beside: Callable[[int], dict[str, float]] = lambda step: {}
        """What every row gets besides its metrics, by its step."""
        self.path, self.rows, self._digest = path, rows, hashlib.sha256()
        lines = [self._line(row) for row in rows]
        replace_file(path, "".join(lines))
        self._file = open_file(path)

    def _line(self, row: dict[str, Any]) -> str:
        line = json.dumps(row) + "\n"
        self._digest.update(line.encode())
        return line

    def append(self, row: dict[str, Any]) -> None:
        """Appends a row, with what `beside` adds, and flushes it to the operating system."""
        row |= self.beside(row["step"])
        self.rows.append(row)
        with naming(self.path):
            self._file.write(self._line(row))
            self._file.flush()

    def mark(self) -> dict[str, Any]:
        """A digest of the rows so far, saved in a checkpoint to verify the rows on resume."""
        return {"rows": len(self.rows), "digest": self._digest.hexdigest()}

    def sync(self) -> None:
        """Syncs the rows to disk. Called before saving a checkpoint that refers to them."""
        with naming(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
