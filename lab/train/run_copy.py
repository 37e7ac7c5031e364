"""Copies the run folder next to its checkpoints, if these are in a bucket or another folder.

A cloud machine loses its disk when it is preempted or the run ends. The bucket must then also hold the metrics,
pictures and result, not only the checkpoints.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab.errors import forgiving
from lab.experiment import Experiment
from lab.train.description import check_same

SECONDS = 60.0  # between two copies
NAME = "run"  # folder of the copy, next to the checkpoints
LEFT_OUT = ("checkpoints", "lock", "launch")


class _Copy:
    """Copies the files that changed since the last copy."""

    def __init__(self, folder: Path, place: Any):
        self.folder, self.place, self.seen = folder, place / NAME, {}

    def update(self) -> None:
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            if name.parts[0] in LEFT_OUT or path.suffix == ".tmp" or path.is_symlink() or not path.is_file():
                continue
            stat = path.stat()
            if self.seen.get(name) != (stat.st_mtime_ns, stat.st_size):
                target = self.place.joinpath(*name.parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
                self.seen[name] = stat.st_mtime_ns, stat.st_size


@contextlib.contextmanager
def copied(folder: Path, place: Any) -> Iterator[None]:
    """Context in which a thread copies the run folder to run/ in `place`, every 60 s and once at the end.

    `place`: a pathlib.Path or an etils.epath.Path. Failures are logged and do not stop the run.
    """
    copy, done = _Copy(folder, place), threading.Event()

    def work() -> None:
        while not done.wait(SECONDS):
            with forgiving(f"The copy of the run folder in {place}"):
                copy.update()

    thread = threading.Thread(target=work, name="run-copy", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with forgiving(f"The copy of the run folder in {place}"):
            copy.update()


def bring_back(folder: Path, place: Any, experiment: Experiment, data_fingerprint: str) -> None:
    """Restores a new run folder from the copy that an earlier machine left in `place`, except for the result.

    Raises:
      UserError: the copy has another experiment or other data.
    """
    if (folder / "experiment.json").exists() or not (place / NAME / "experiment.json").exists():
        return
    check_same(place, experiment, data_fingerprint)
    _fetch(place / NAME, folder)


def _fetch(source: Any, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_dir():
            _fetch(path, target / path.name)
        elif path.name != "result.json":  # written anew when the run ends
            (target / path.name).write_bytes(path.read_bytes())
