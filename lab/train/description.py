"""The description of a run in its folder (experiment.json), and the checks before the run is resumed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lab.configuration.rebuild import from_json
from lab.configuration.values import differences, digest, to_json
from lab.errors import UserError
from lab.experiment import Experiment
from lab.files import no_pipes
from lab.train.json_files import check_shape, read_json, write_json
from lab.train.metrics import marked_rows
from lab.train.own_file import load_own
from lab.train.source_code import changed, code_of

NUMBER = (int, float)
# Required fields of the JSON files: name -> allowed types.
RESULT = {"steps": int, "stopped_early": bool, "final": dict, "best": dict}
TIMES = {"timed_steps": int} | dict.fromkeys(
    ("seconds_per_step", "data_wait_seconds", "training_seconds", "evaluation_seconds"), NUMBER)


log = logging.getLogger(__name__)
OURS = ("lock", "launch", "logs", "begun.json")  # files that exist before experiment.json; `clear` keeps them
OnChange = Literal["refuse", "accept", "rerun"]
DESCRIPTION = {"experiment": dict, "fingerprint": str, "data": str}


def finished(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, or None. Raises UserError if it is damaged or does not match metrics.jsonl."""
    no_pipes(folder)
    path = folder / "result.json"
    if not path.exists():
        return None
    result = read_json(path, RESULT)
    try:
        for row in [result[name] for name in ("final", "best", "test") if name in result]:
            check_shape(row, {"step": int, "split": str})
            check_shape(row, dict.fromkeys(row.keys() - {"step", "split"}, NUMBER))
        if "seconds_per_step" in result:
            check_shape(result, TIMES)
        if "digest" in result and result.pop("digest") != digest(result):
            raise ValueError("it was edited")
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}). Restore it, or delete it: the same command writes it again.") from e
    marked_rows(folder / "metrics.jsonl", result.get("metrics"), finished=True)
    return result


def sealed(description: Mapping[str, Any]) -> dict[str, Any]:
    """The description with a digest, to detect edits."""
    return {**description, "digest": digest(description)}


def run_again(folder: Path, experiment: Experiment, on_change: OnChange) -> bool:
    """Whether to rerun a finished run. Records accepted changes, so that later starts accept them too.

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
    """Deletes a run's output, experiment.json last: a process killed here leaves a folder that is checked again."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "experiment.json"):
        if path.name not in OURS:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _clear_checkpoints(place: Any) -> None:
    """Deletes the checkpoints in a location outside the run folder, and no other files there."""
    for path in [p for p in place.iterdir() if p.name.isdigit()]:
        shutil.rmtree(path) if isinstance(path, Path) else path.rmtree()
    (place / "experiment.json").unlink()


def how(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """JSON of the fields that describe how an experiment executes, which may change between starts."""
    return {
        name: experiment.get(name)
        for name in ("grad_accum_steps", "steps_per_call", "mesh", "parallel", "deterministic", "data_on_device")
    }


def carried_out_otherwise(before: Mapping[str, Any], experiment: Experiment) -> list[str]:
    """A message if the number of microbatches changed since the last start."""
    then, now = before.get("grad_accum_steps"), experiment.grad_accum_steps
    return [f"Continuing with --grad-accum-steps {now} instead of {then}: the same sums in another order."] * (
        then != now
    )


def changes(folder: Path, experiment: Experiment, data_fingerprint: str, on_change: OnChange) -> list[str]:
    """Changes since the run in a folder began: names of files and packages, and "the data".

    Raises:
      UserError: the folder has another experiment; or there are changes and `on_change` is "refuse".
    """
    check_experiment(folder, experiment)
    there = read_description(folder)
    names = changed(there["code"], code_of(experiment)) if there.get("code") else ["code of an unknown version"]
    names += ["the data"] * (there["data"] != data_fingerprint)
    if names and on_change == "refuse":
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        data = f" (fingerprint {there['data']} then, {data_fingerprint} now)" if "the data" in names else ""
        raise UserError(f"{shown} changed since the run in {folder} began{data}. --accept continues it as it is, "
                        f"--rerun deletes it and runs it again, --run-dir chooses another folder.")
    return names


def check_experiment(folder: Path, experiment: Experiment) -> None:
    """Raises UserError if a run folder has another experiment (lists the differences) or was edited."""
    there = read_description(folder)
    try:
        then = from_json(there["experiment"], Experiment)
    except UserError:  # the code that wrote it is gone: compare fingerprints only
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
    """The content of experiment.json. Raises UserError if it is damaged or was edited."""
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
    """Raises UserError if a run folder has another experiment (lists the differences) or other data."""
    check_experiment(folder, experiment)
    there = read_description(folder)
    if there["data"] != data_fingerprint:
        raise UserError(f"The data changed since the run in {folder} began (fingerprint {there['data']} then, "
                        f"{data_fingerprint} now). Bring it back, or start afresh with --run-dir.")


def read_folder(folder: Path, file: Path | None = None) -> Experiment:
    """Rebuilds the experiment of a run folder. `file`: see `load_own`.

    Raises:
      UserError: no run in the folder, or its code or experiment file is not available here.
    """
    described = folder / "experiment.json"
    if not described.exists():
        near = sorted(str(p.parent) for p in Path("runs").glob("*/experiment.json"))
        raise UserError(f"{folder} is not a run folder" + (f"; there are {', '.join(near)}." if near else "."))
    no_pipes(folder)
    value = read_description(folder)
    load_own(folder, value, file)
    experiment = from_json(value["experiment"], Experiment)
    check_experiment(folder, experiment)
    if names := changed(value.get("code") or {}, code_of(experiment)):
        log.warning("note: %s changed since this run was made; numbers may differ.", ", ".join(names))
    return experiment
