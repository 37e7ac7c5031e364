"""Trains a job (torch_job.py) in PyTorch and says how long it took. Imports PyTorch and NumPy, nothing of lab.

What is favourable to PyTorch: batches are tensors on the device before the clock starts (lab reads, normalises and
augments while it trains), only the loss is computed (lab also has accuracy and four norms), nothing is read back, and
of equal ways to the same result (`WAYS`, `OPTIMIZERS`) the fastest is used, which `tune` finds beforehand.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from tests.benchmarks.torch_models import WAYS, build, kind_of

OPTIMIZERS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "plain": {"foreach": False, "fused": False}}
WARM = 3  # calls before the clock; the first one compiles


class Job:
    """A job as tensors on a device."""

    def __init__(self, folder: Path, device: str):
        self.spec, self.device = json.loads((folder / "job.json").read_text()), device
        with np.load(folder / "arrays.npz") as file:
            arrays = dict(file)
        self.parameters = {name.removeprefix("parameters/"): x for name, x in arrays.items()
                           if name.startswith("parameters/")}
        self.batches, self.validation = ({name.removeprefix(f"{part}/"): self.tensor(x) for name, x in arrays.items()
                                          if name.startswith(f"{part}/")} for part in ("batches", "validation"))
        self.rates = arrays["rate"].tolist()

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """Images get PyTorch's order of axes: channels before height and width."""
        x = torch.from_numpy(array)
        if x.ndim >= 4:
            x = x.movedim(-1, -3).contiguous()
        return x.to(self.device)

    def batch(self, update: int) -> dict[str, torch.Tensor]:
        """The rows of an update; a job that is too short begins again."""
        return {name: x[update % len(x)] for name, x in self.batches.items()}


class LoadedJob(Job):
    """The same through a DataLoader, as a user writes it: shuffled rows, 4 processes, pinned memory. `validation` is
    left on the CPU."""

    def __init__(self, folder: Path, device: str):
        super().__init__(folder, "cpu")
        self.device = device
        rows = {name: x.flatten(0, 1) for name, x in self.batches.items()}
        self.names, self.iterator = list(rows), iter(())
        self.loader = DataLoader(TensorDataset(*rows.values()), self.spec["batch"], shuffle=True, drop_last=True,
                                 num_workers=min(4, os.cpu_count() or 1), pin_memory=device == "cuda",
                                 persistent_workers=True)

    def batch(self, update: int) -> dict[str, torch.Tensor]:
        """The next one of the loader, whatever the update."""
        values = next(self.iterator, None)
        if values is None:  # an epoch has ended
            self.iterator = iter(self.loader)
            values = next(self.iterator)
        return {name: x.to(self.device, non_blocking=True) for name, x in zip(self.names, values, strict=True)}


class Trainer:
    """Model, optimizer and one update."""

    def __init__(self, job: Job, ways: Mapping[str, str], compiled: bool = False):
        self.job, self.spec = job, job.spec
        torch.manual_seed(job.spec["seed"])
        ways = dict(ways)
        kind = ways.pop("optimizer", "fused")
        self.model = build(job.spec["model"], job.parameters, ways).to(job.device).train()
        self.objective = torch.compile(self.loss, dynamic=False) if compiled else self.loss
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self.make_optimizer(kind)
        self.average = [p.detach().clone() for p in self.trained] if job.spec["optim"]["ema"] else []

    def make_optimizer(self, kind: str) -> torch.optim.Optimizer:
        """lab's optimizer with its weight decay on the same parameters."""
        optim, name = self.spec["optim"], kind_of(self.spec["optim"])
        options: dict[str, Any] = dict(OPTIMIZERS[kind])
        if name == "SGD":
            options |= {"momentum": optim["momentum"], "nesterov": optim["nesterov"]}
        else:
            options |= {"betas": (optim["b1"], optim["b2"]), "eps": optim["eps"]}
            name = "AdamW" if optim["weight_decay"] else "Adam"
        decays = {True: [], False: []}
        for parameter, paths in self.model.places():
            (on,) = {self.spec["decays"][path] for path in paths}
            decays[on].append(parameter)
        groups = [{"params": params, "weight_decay": (optim["weight_decay"] or optim["l2"]) if on else 0.0}
                  for on, params in decays.items() if params]
        return getattr(torch.optim, name)(groups, lr=self.job.rates[0], **options)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean loss of some rows, in the compute type of the job."""
        low = self.spec["precision"] != "float32"
        with torch.autocast(self.job.device, torch.bfloat16) if low else contextlib.nullcontext():
            more = {"mask": batch["mask"]} if "mask" in batch else {}
            output = self.model(batch["inputs"], **more)
        targets = batch["targets"]
        if kind_of(self.spec["task"]) == "Regress":
            return F.mse_loss(output.float(), targets)
        return F.cross_entropy(output.float().flatten(0, -2), targets.flatten())

    def update(self, step: int) -> torch.Tensor:
        """Update number `step`, from 0; returns the loss before it, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.job.rates[step % len(self.job.rates)]
        self.optimizer.zero_grad(set_to_none=True)
        batch, n, total = self.job.batch(step), self.spec["grad_accum_steps"], 0.0
        for i in range(n):
            part = {name: x[i::n] for name, x in batch.items()} if n > 1 else batch
            loss = self.objective(part)
            (loss / n if n > 1 else loss).backward()
            total = total + loss.detach() / n
        if self.spec["optim"]["grad_clip_norm"] is not None:
            nn.utils.clip_grad_norm_(self.trained, self.spec["optim"]["grad_clip_norm"], foreach=True)
        self.optimizer.step()
        if self.average:
            decay = min(self.spec["optim"]["ema"], (1 + step) / (10 + step))
            get_ema_multi_avg_fn(decay)(self.average, self.trained, None)
        return total

    @torch.no_grad()
    def validate(self, rows: int = 128) -> float:
        """The mean loss of all validation records, `rows` at once: without the compiled form, which would be compiled
        once more for it."""
        self.model.eval()
        size, total = len(self.job.validation["inputs"]), 0.0
        for start in range(0, size, rows):
            part = {name: x[start:start + rows] for name, x in self.job.validation.items()}
            total += self.loss(part).item() * len(part["inputs"])
        self.model.train()
        return total / size


def finish(device: str) -> None:
    """Returns when the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(trainer: Trainer, first: int, count: int) -> float:
    """Seconds for `count` updates from update `first` on."""
    start = time.perf_counter()
    for step in range(first, first + count):
        trainer.update(step)
    finish(trainer.job.device)
    return time.perf_counter() - start


def tune(job: Job) -> dict[str, Any]:
    """The fastest ways, in alternation, eager: {"ways": ..., "ms": {ways: least of 5}}. The least, because noise must
    not choose a slow way."""
    names = {"optimizer": tuple(OPTIMIZERS), **WAYS[kind_of(job.spec["model"])]}
    combinations = [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*names.values())]
    trainers = [Trainer(job, ways) for ways in combinations]
    once = [timed(trainer, 0, 2) for trainer in trainers][-1] / 2
    count = int(min(200, max(2, 0.3 / once)))
    rounds = [[timed(trainer, 0, count) / count for trainer in trainers] for _ in range(5)]
    times = [min(r[i] for r in rounds) for i in range(len(trainers))]
    return {"ways": combinations[int(np.argmin(times))],
            "ms": {" ".join(ways.values()): round(1000 * t, 3) for ways, t in zip(combinations, times, strict=True)}}


def measure(job: Job, ways: Mapping[str, str], compiled: bool) -> dict[str, Any]:
    """Trains the whole job: median ms per step over its chunks but the first `WARM`, and seconds of compilation."""
    trainer, n, spec = Trainer(job, ways, compiled), job.spec["chunk"], job.spec
    seconds = [timed(trainer, first, n) / n for first in range(0, spec["steps"], n)]
    typical = median(seconds[WARM:])
    found = {"ms_per_step": 1000 * typical, "compile_seconds": seconds[0] * n - typical * n if compiled else 0.0,
             "ms_quartiles": [1000 * float(q) for q in np.percentile(seconds[WARM:], [25, 75])],
             f"{spec['unit']}_per_second": spec["units"] / typical, "loss": float(trainer.loss(job.batch(0)).detach())}
    if job.device == "cuda":
        peak = spec["peak_flops"].get(torch.cuda.get_device_name())
        found |= {"mfu": spec["flops"] / typical / peak if peak else None,
                  "peak_bytes": torch.cuda.max_memory_allocated(), "device": torch.cuda.get_device_name()}
    return found


def whole(job: Job, ways: Mapping[str, str], compiled: bool) -> dict[str, Any]:
    """The whole run: evaluations before the first update, every so many, and at the end."""
    trainer, spec = Trainer(job, ways, compiled), job.spec
    every, losses = spec["evaluate_every"], []
    for step in range(spec["steps"] + 1):
        if step in (0, spec["steps"]) or every and step % every == 0:
            losses.append(trainer.validate())
        if step < spec["steps"]:
            trainer.update(step)
    return {"loss": losses[-1], "losses": losses}


def main(folder: str, form: str, ways: str, device: str) -> None:
    """`form`: tune, eager, compiled, loader (eager with a DataLoader), whole-eager or whole-compiled. The last
    line of stdout is JSON."""
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, JAX's default there
    job = (LoadedJob if form == "loader" else Job)(Path(folder), device)
    run = whole if form.startswith("whole") else measure
    found = tune(job) if form == "tune" else run(job, json.loads(ways), form.endswith("compiled"))
    print(json.dumps(found | {"torch": torch.__version__, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
