"""Study folders made by hand, as the engine would leave them, and a signal at a moment of one's choice."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lab.study.run.cell_files import CellScreen

BASE = {"class": "lab.experiment.Experiment", "seed": 0,
        "model": {"class": "lab.models.gpt.GPT", "norm": "layernorm", "position": "learned", "width": 64},
        "optim": {"class": "lab.optim.optimizers.AdamW", "lr": {"class": "lab.optim.schedules.Cosine", "peak": 1e-3}}}
UPDATES = (0, 10, 20, 30, 40)


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_study(folder: Path, arms: Mapping[str, Mapping[str, Any]], effects: Mapping[str, float] | None = None,
               seeds: Sequence[int] = range(5), noise: float = 0.02, **study: Any) -> Path:
    """A finished study: loss = 1.5 + what the seed adds + the arm's effect + noise (fixed by folder name and arm)."""
    arms = {"base": {}, **arms}
    listed = [{"name": name, "changes": dict(changes), "fingerprint": f"{abs(hash_of(changes)):012d}"[:12],
               "parameters": 10_000 + 100 * i, "flops_per_step": 2e9 + 1e8 * i, "memory_bytes": 5e6}
              for i, (name, changes) in enumerate(arms.items())]
    write(folder / "study.json", {
        "name": folder.name, "metric": "loss", "mode": "min", "split": "validation",
        "design": {"kind": "list", "factors": {}}, "base": BASE, "seeds": list(seeds), "tuning_seeds": [],
        "arms": listed, "code": "c0de", **study})
    for arm in arms:
        for seed in seeds:
            rng = np.random.default_rng([hash_of(arm), seed])
            shared = np.random.default_rng(seed).normal() * 0.05
            make_cell(folder, arm, seed, 1.5 + shared + (effects or {}).get(arm, 0.0) + noise * rng.normal())
    return folder


def hash_of(value: Any) -> int:
    """The same in every process."""
    import zlib

    return zlib.crc32(json.dumps(value, sort_keys=True, default=dict).encode())


def make_cell(study: Path, arm: str, seed: int, loss: float, status: str = "done", mode: str = "separate",
              device: str = "cpu", jax: str = "0.10.2", seconds: float | None = None) -> Path:
    """A cell's run folder, whose validation loss ends at `loss`."""
    folder = study / "cells" / arm / str(seed)
    rows = [{"step": step, "split": "validation", "loss": loss + 3 * np.exp(-step / 8)} for step in UPDATES[:-1]]
    rows.append({"step": UPDATES[-1], "split": "validation", "loss": loss})
    train = [{"step": step, "split": "train", "loss": loss + 1 / step} for step in range(1, UPDATES[-1] + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *train]))
    write(folder / "environment.json", {"devices": [device] * 2, "platform": device,
                                        "versions": {"jax": jax, "flax": "0.12.8", "optax": "0.2.8"}, "settings": {}})
    write(folder / "experiment.json", {"experiment": BASE, "fingerprint": f"{arm}{seed}"})
    write(folder / "cell.json", {"arm": arm, "seed": seed, "fingerprint": f"{arm}{seed}", "status": status,
                                 "mode": mode, "seconds": seconds or 12.0 + len(arm), "error": None})
    if status == "done":
        write(folder / "result.json", {"steps": 40, "final": rows[-1], "best": rows[-1], "seconds_per_step": 0.25,
                                       "tokens_per_second": 8192.0, "test": {"step": 40, "split": "test", "loss": 9.0}})
    return folder


def told_to_stop(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """SIGTERM comes, once, when a cell's progress shows this."""
    progress, seen = CellScreen.progress, []

    def told(self: CellScreen, shown: str) -> None:
        progress(self, shown)
        if line in shown and not seen:
            seen.append(shown)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(CellScreen, "progress", told)
