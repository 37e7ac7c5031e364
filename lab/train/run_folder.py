"""The run folder: what was run, with what, on what; and whether it is done."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lab.errors import UserError
from lab.experiment import ROOT, Experiment, differences, digest, from_json, to_json
from lab.files import make_folder, no_links, open_file, replace_file
from lab.train.metrics import marked_rows
from lab.train.own_file import keep_copy, load_own
from lab.train.source_code import changed, code_of

log = logging.getLogger(__name__)
OURS = ("lock", "launch", "logs", "begun.json")  # what is in a run folder before its description
OnChange = Literal["refuse", "accept", "rerun"]


def write_json(path: Path, value: Any) -> None:
    """Writes all or nothing, also when the power fails."""
    replace_file(path, json.dumps(value, indent=2) + "\n")


NUMBER = (int, float)
# What must be in a file: name -> the types that it may have there.
RESULT = {"steps": int, "stopped_early": bool, "final": dict, "best": dict}
TIMES = {"timed_updates": int} | dict.fromkeys(
    ("seconds_per_update", "data_wait_seconds", "training_seconds", "evaluation_seconds"), NUMBER)
DESCRIPTION = {"experiment": dict, "fingerprint": str, "data": str}


def read_json(path: Path, shape: Mapping[str, Any] | None = None) -> Any:
    """The value in a JSON file; with `shape` an object that has these fields.

    Raises:
      UserError: the file is damaged.
    """
    try:
        value = json.loads(path.read_bytes().decode())
        if shape is not None:
            check_shape(value, shape)
        return value
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}). Restore it, or start afresh with --run-dir.") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e}). Restore it, or start afresh with --run-dir.") from e


def check_shape(value: Any, shape: Mapping[str, Any]) -> None:
    """Raises ValueError where a JSON value is no object with these fields of these types."""
    if not isinstance(value, dict):
        raise ValueError(f"it holds {str(value)[:40]!r} instead of named fields")
    for name, types in shape.items():
        types = types if isinstance(types, tuple) else (types,)
        if name not in value:
            raise ValueError(f"it has no {name!r}")
        if type(value[name]) not in types:
            raise ValueError(f"{name} is {str(value[name])[:40]!r}")


def finished(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, or None. Raises UserError where it is damaged, or no row of metrics.jsonl."""
    path = folder / "result.json"
    if not path.exists():
        return None
    result = read_json(path, RESULT)
    try:
        for row in [result[name] for name in ("final", "best", "test") if name in result]:
            check_shape(row, {"step": int, "split": str})
            check_shape(row, dict.fromkeys(row.keys() - {"step", "split"}, NUMBER))
        if "seconds_per_update" in result:
            check_shape(result, TIMES)
        if "digest" in result and result.pop("digest") != digest(result):
            raise ValueError("it was edited")
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}). Restore it, or delete it: the same command writes it anew.") from e
    marked_rows(folder / "metrics.jsonl", result.get("metrics"))
    return result


def write_result(folder: Path, result: Mapping[str, Any], mark: Mapping[str, Any]) -> None:
    """Writes result.json, which means that the run is done. `mark`: of its rows (`lab.train.metrics.Rows`)."""
    result = {**result, "metrics": mark}
    write_json(folder / "result.json", {**result, "digest": digest(result)})


@contextlib.contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Creates the run folder and holds it; the operating system lets go of it when the process dies.

    Raises:
      UserError: another process is training there, it holds something else, or it cannot be written.
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
            pass  # a file system without locks
        yield


def shared(folder: Path) -> None:
    """Returns when this process sees the folder that process 0 has made.

    Raises:
      UserError: this process does not see it.
    """
    limit = time.monotonic() + 10  # a network file system may show new files late
    while not (folder / "experiment.json").exists():
        if time.monotonic() > limit:
            raise UserError(f"It does not see {folder.absolute()}, which process 0 has made. The run folder must be on "
                            f"a disk that all machines share: --run-dir.")
        time.sleep(0.2)


def checkpoint_folder(folder: Path, wish: str | None = None) -> Any:
    """Where the checkpoints of a run are: where `wish` says, else where they were put before, else in its folder.

    A pathlib.Path, or for a bucket an etils.epath.Path, which has the same methods.

    Raises:
      UserError: the bucket cannot be used.
    """
    described = folder / "experiment.json"
    if wish is None and described.exists():
        wish = read_description(folder).get("checkpoints")
    if wish is None or "://" not in wish:
        return folder / "checkpoints" if wish is None else Path(wish)
    from etils import epath

    try:
        place = epath.Path(wish)
        place.mkdir(parents=True, exist_ok=True)
        place.exists()
    except ImportError as e:
        raise UserError(f"Checkpoints in {wish} need more packages ({e}): LAB_EXTRAS=bucket ./launch.sh ...") from None
    except Exception as e:  # of whatever library speaks to this kind of bucket
        raise UserError(f"The bucket {wish} cannot be used ({type(e).__name__}: {str(e)[:160]}). Does it exist, and "
                        f"are there credentials (gcloud auth application-default login)?") from e
    return place


def open_folder(folder: Path, experiment: Experiment, file: Path | None, data_fingerprint: str,
                checkpoints: str | None = None, on_change: OnChange = "refuse") -> list[str]:
    """Describes the run in its folder, or checks that the folder belongs to this experiment, data and code.

    Every start adds an environment file, environment.json, environment-2.json, ...: a run may change machines. What an
    earlier start left is deleted where code or data changed and `on_change` is "rerun". Returns lines for a person.

    Raises:
      UserError: it belongs to another run (says in what they differ), or see `changes`.
    """
    described, lines, names = folder / "experiment.json", [], []
    if described.exists():
        names = changes(folder, experiment, data_fingerprint, on_change)
        lines += carried_out_otherwise(read_description(folder)["experiment"], experiment)
        if names and on_change == "rerun":
            clear(folder)
            lines = [f"{', '.join(names)} changed: the run begins again."]
        elif names:
            lines.append(f"Going on though {', '.join(names)} changed since the run began (--accept).")
    description = sealed({"experiment": to_json(experiment), "fingerprint": experiment.fingerprint(),
                          "data": data_fingerprint, "code": code_of(experiment), "file": str(file) if file else None,
                          "checkpoints": checkpoints})
    if checkpoints is not None:  # what is there may be older than this run folder, and of another run
        place = checkpoint_folder(folder, checkpoints)
        older = (place / "experiment.json").exists() and changes(place, experiment, data_fingerprint, on_change)
        if older and on_change == "rerun":
            _clear_checkpoints(place)
        text = json.dumps(description, indent=2) + "\n"
        if isinstance(place, Path):
            make_folder(place)
            no_links(place)
            replace_file(place / "experiment.json", text)
        else:  # a bucket, which knows no links
            place.mkdir(parents=True, exist_ok=True)
            (place / "experiment.json").write_text(text, "utf-8")
    write_json(described, description)
    if file is not None:
        keep_copy(folder, file)
    start = 1 + sum(1 for _ in folder.glob("environment*.json"))
    found = environment() | {"how": how(to_json(experiment)), "accepted": names if on_change == "accept" else []}
    write_json(folder / f"environment{f'-{start}' if start > 1 else ''}.json", found)
    return lines


def sealed(description: Mapping[str, Any]) -> dict[str, Any]:
    """A description with the digest that tells whether it was edited."""
    return {**description, "digest": digest(description)}


def run_again(folder: Path, experiment: Experiment, on_change: OnChange) -> bool:
    """Whether a finished run is to be run again. What is accepted is noted, and not asked for a second time.

    Raises:
      UserError: see `changes`.
    """
    data = experiment.data.load().fingerprint
    names = changes(folder, experiment, data, on_change)
    if names and on_change == "accept":
        now = {"data": data, "code": code_of(experiment), "accepted": names}
        write_json(folder / "experiment.json", sealed(read_description(folder) | now))
    return bool(names) and on_change == "rerun"


def clear(folder: Path) -> None:
    """Deletes what a run wrote, its description last: a start that is killed here is asked again."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "experiment.json"):
        if path.name not in OURS:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _clear_checkpoints(place: Any) -> None:
    """Deletes the checkpoints in another place than the run folder, where there may be other things, too."""
    for path in [p for p in place.iterdir() if p.name.isdigit()]:
        shutil.rmtree(path) if isinstance(path, Path) else path.rmtree()
    (place / "experiment.json").unlink()


def how(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an experiment, as JSON, that say how it is carried out and may change from start to start."""
    return {
        name: experiment.get(name)
        for name in ("grad_accum_steps", "steps_per_call", "mesh", "parallel", "deterministic", "data_on_device")
    }


def carried_out_otherwise(before: Mapping[str, Any], experiment: Experiment) -> list[str]:
    """A line where the number of microbatches is another one than at the last start."""
    then, now = before.get("grad_accum_steps"), experiment.grad_accum_steps
    return [f"Going on with --grad-accum-steps {now} instead of {then}: the same sums in another order."] * (
        then != now
    )


def changes(folder: Path, experiment: Experiment, data_fingerprint: str, on_change: OnChange) -> list[str]:
    """What changed since the run in a folder began: files, packages, "the data".

    Raises:
      UserError: it is the run of another experiment; or something changed, and it was not said what to do.
    """
    check_experiment(folder, experiment)
    there = read_description(folder)
    names = changed(there["code"], code_of(experiment)) if there.get("code") else ["code of an unknown version"]
    names += ["the data"] * (there["data"] != data_fingerprint)
    if names and on_change == "refuse":
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        data = f" (fingerprint {there['data']} then, {data_fingerprint} now)" if "the data" in names else ""
        raise UserError(f"{shown} changed since the run in {folder} began{data}. --accept goes on with it as it is, "
                        f"--rerun deletes it and runs it again, --run-dir chooses another folder.")
    return names


def check_experiment(folder: Path, experiment: Experiment) -> None:
    """Raises UserError where a run folder is of another experiment (says in what they differ), or was edited."""
    there = read_description(folder)
    try:
        then = from_json(there["experiment"], Experiment)
    except UserError:  # made by code that is gone: its fingerprint is all that is known
        then = None
    if then is not None and not then.may_be(there["fingerprint"]):
        raise UserError(f"{folder / 'experiment.json'} is of another experiment: its fingerprint is "
                        f"{there['fingerprint']}, not {then.fingerprint()}. It was edited, or another version of lab "
                        f"wrote it: bring it back, or choose another folder with --run-dir.")
    same = then is not None and to_json(then) == to_json(experiment)
    if same or there["fingerprint"] == experiment.fingerprint():
        return
    before = then.identity() if then is not None else there["experiment"]
    found = list(differences(before, experiment.identity()))
    shown = ", ".join(f"{path} is {a if path in before else there['experiment'].get(path, a)} there and "
                      f"{b if b is not None else getattr(experiment, path, b)} here" for path, a, b in found[:4])
    raise UserError(f"{folder} is the run of another experiment: {shown}. Choose another with --run-dir or "
                    f"--checkpoint-dir.")


def read_description(folder: Path) -> dict[str, Any]:
    """What experiment.json says. Raises UserError where it is damaged or was edited."""
    path = folder / "experiment.json"
    found = read_json(path, DESCRIPTION)
    for name, kind in (("file", str | None), ("checkpoints", str | None), ("code", dict | None)):
        if not isinstance(found.get(name), kind):
            raise UserError(f"{path} is damaged ({name} is {found[name]!r}). Restore it, or start afresh with "
                            f"--run-dir.")
    if "digest" in found and found.pop("digest") != digest(found):
        raise UserError(f"{path} was edited since the run began. Restore it, or start afresh with --run-dir.")
    return found


def check_same(folder: Path, experiment: Experiment, data_fingerprint: str) -> None:
    """Raises UserError where a run folder is of another experiment (says in what they differ) or other data."""
    check_experiment(folder, experiment)
    there = read_description(folder)
    if there["data"] != data_fingerprint:
        raise UserError(f"The data changed since the run in {folder} began (fingerprint {there['data']} then, "
                        f"{data_fingerprint} now). Bring it back, or start afresh with --run-dir.")


def read_folder(folder: Path, file: Path | None = None) -> Experiment:
    """The experiment of a run folder, built again. `file`: see `load_own`.

    Raises:
      UserError: there is no run there, it was made by code that is gone, or by a file that is not known here.
    """
    described = folder / "experiment.json"
    if not described.exists():
        near = sorted(str(p.parent) for p in Path("runs").glob("*/experiment.json"))
        raise UserError(f"{folder} is not a run folder" + (f"; there are {', '.join(near)}." if near else "."))
    value = read_description(folder)
    load_own(folder, value, file)
    experiment = from_json(value["experiment"], Experiment)
    check_experiment(folder, experiment)
    if names := changed(value.get("code") or {}, code_of(experiment)):
        log.warning("note: %s changed since this run was made; numbers may differ.", ", ".join(names))
    return experiment


def write_diverged(folder: Path, step: int, indices: np.ndarray, means: Mapping[str, float],
                   rows: Sequence[Any]) -> Path:
    """Writes what is needed to look into an update that gave no number, and returns the file.

    `indices`: its training records; `means`: its metrics; `rows`: those of metrics.jsonl before it.
    """
    write_json(folder / "diverged.json", {"step": step, "metrics": {k: repr(v) for k, v in means.items()},
                                          "batch_indices": indices.tolist(), "last_rows": list(rows[-20:])})
    return folder / "diverged.json"


def environment() -> dict[str, Any]:
    """Commit and local changes, versions, devices: what is needed to run this again in a year."""
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
