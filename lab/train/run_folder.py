"""The run folder: experiment, code, environment and result of a run, and the lock on it."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab.configuration.values import digest, to_json
from lab.errors import UserError
from lab.experiment import Experiment
from lab.files import ROOT, make_folder, no_links, open_file, replace_file
from lab.train.description import (
    OURS,
    OnChange,
    _clear_checkpoints,
    carried_out_otherwise,
    changes,
    clear,
    how,
    read_description,
    sealed,
)
from lab.train.json_files import write_json
from lab.train.own_file import keep_copy
from lab.train.source_code import code_of


def write_result(folder: Path, result: Mapping[str, Any], mark: Mapping[str, Any]) -> None:
    """Writes result.json, which marks the run as finished. `mark`: see `lab.train.metrics.Rows.mark`."""
    result = {**result, "metrics": mark}
    write_json(folder / "result.json", {**result, "digest": digest(result)})


@contextlib.contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Creates and locks the run folder. The operating system releases the lock when the process dies.

    Raises:
      UserError: another process is training there, or the folder is not a run folder or not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        no_links(folder)
        strange = [p.name for p in folder.iterdir() if p.name not in OURS and p.suffix != ".tmp"]
        if strange and "experiment.json" not in strange:
            raise UserError(f"{folder} is not empty and is not a run folder. Choose another with --run-dir.")
        lock = open_file(folder / "lock")
    except OSError as e:
        raise UserError(f"The run folder {folder} cannot be written ({e.strerror}). Choose another with "
                        f"--run-dir.") from e
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another process is training in {folder}. Wait for it, or choose another with "
                            f"--run-dir.") from None
        except OSError:
            pass  # the file system has no locks
        yield


def check_shared_disk(folder: Path) -> None:
    """Waits until this process sees the run folder that process 0 created.

    Raises:
      UserError: this process does not see it within 10 s.
    """
    limit = time.monotonic() + 10  # a network file system may show new files late
    while not (folder / "experiment.json").exists():
        if time.monotonic() > limit:
            raise UserError(f"This process cannot see {folder.absolute()}, the run folder that process 0 created. It "
                            f"must be on a disk that all machines share: --run-dir.")
        time.sleep(0.2)


def checkpoint_folder(folder: Path, wish: str | None = None, *, to_write: bool = False) -> Any:
    """The checkpoint folder of a run: `wish`, else the one used before, else a folder in the run folder.

    A pathlib.Path, or for a bucket an etils.epath.Path, which has the same methods.

    Raises:
      UserError: the bucket cannot be used; or, `to_write`, the one used before holds no run. (A run folder of somebody
        else may name any folder.)
    """
    described = folder / "experiment.json"
    before = wish is None and described.exists()
    if before:
        wish = read_description(folder).get("checkpoints")
    if wish is None:
        return folder / "checkpoints"
    place = _place(wish)
    if before and to_write and not (place / "experiment.json").exists():
        raise UserError(f"{described} says that the checkpoints are in {wish}, where there is no run. Restore them, "
                        f"or pass --checkpoint-dir {wish} to start new ones there.")
    return place


def _place(wish: str) -> Any:
    if "://" not in wish:
        return Path(wish)
    from etils import epath

    try:
        place = epath.Path(wish)
        place.mkdir(parents=True, exist_ok=True)
        place.exists()
    except ImportError as e:
        raise UserError(f"Checkpoints in {wish} need more packages ({e}): LAB_EXTRAS=bucket ./launch.sh ...") from None
    except Exception as e:  # each bucket library has its own exceptions
        raise UserError(f"The bucket {wish} cannot be used ({type(e).__name__}: {str(e)[:160]}). Does it exist, and "
                        f"are there credentials (gcloud auth application-default login)?") from e
    return place


def open_folder(folder: Path, experiment: Experiment, file: Path | None, data_fingerprint: str,
                checkpoints: str | None = None, on_change: OnChange = "refuse") -> list[str]:
    """Writes the run's description to a new folder, or checks that the folder has this experiment, data and code.

    Every start adds an environment file (environment.json, environment-2.json, ...), since a run may change machines.
    If code or data changed and `on_change` is "rerun", deletes the earlier output. Returns lines for the console.

    Raises:
      UserError: the folder has another run (lists the differences), or see `changes`.
    """
    described, lines, names = folder / "experiment.json", [], []
    if described.exists():
        names = changes(folder, experiment, data_fingerprint, on_change)
        lines += carried_out_otherwise(read_description(folder)["experiment"], experiment)
        if names and on_change == "rerun":
            clear(folder)
            lines = [f"{', '.join(names)} changed: the run begins again."]
        elif names:
            lines.append(f"Continuing although {', '.join(names)} changed since the run began (--accept).")
    description = sealed({"experiment": to_json(experiment), "fingerprint": experiment.fingerprint(),
                          "data": data_fingerprint, "code": code_of(experiment), "file": str(file) if file else None,
                          "checkpoints": checkpoints})
    if checkpoints is not None:  # the checkpoint folder may be of another run
        place = checkpoint_folder(folder, checkpoints)
        older = (place / "experiment.json").exists() and changes(place, experiment, data_fingerprint, on_change)
        if older and on_change == "rerun":
            _clear_checkpoints(place)
        text = json.dumps(description, indent=2) + "\n"
        if isinstance(place, Path):
            make_folder(place)
            no_links(place)
            replace_file(place / "experiment.json", text)
        else:  # buckets have no symbolic links
            place.mkdir(parents=True, exist_ok=True)
            (place / "experiment.json").write_text(text, "utf-8")
    write_json(described, description)
    if file is not None:
        keep_copy(folder, file)
    start = 1 + sum(1 for _ in folder.glob("environment*.json"))
    found = environment() | {"how": how(to_json(experiment)), "accepted": names if on_change == "accept" else []}
    write_json(folder / f"environment{f'-{start}' if start > 1 else ''}.json", found)
    return lines


def write_diverged(folder: Path, step: int, indices: np.ndarray, means: Mapping[str, float],
                   rows: Sequence[Any]) -> Path:
    """Writes a report on a step with non-finite metrics, and returns the file.

    `indices`: training records of the step; `means`: its metrics; `rows`: the earlier rows of metrics.jsonl.
    """
    write_json(folder / "diverged.json", {"step": step, "metrics": {k: repr(v) for k, v in means.items()},
                                          "batch_indices": indices.tolist(), "last_rows": list(rows[-20:])})
    return folder / "diverged.json"


def environment() -> dict[str, Any]:
    """Commit, local changes, versions and devices, to reproduce the run later."""
    import jax

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "tensorflow-datasets")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    settings = ("JAX_", "XLA_", "LAB_", "MALLOC_", "OMP_")
    return {"command": sys.argv, "commit": git("rev-parse", "HEAD"), "diff": git("diff", "HEAD"),
            "python": platform.python_version(), "machine": platform.platform(), "cpus": os.cpu_count(),
            "versions": versions, "devices": [d.device_kind for d in jax.devices()], "platform": jax.default_backend(),
            "processes": jax.process_count(),
            "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith(settings) and k != "LAB_SECRET"}}
