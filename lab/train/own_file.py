"""The copy of a user's experiment file in the run folder, and whether this machine may execute it.

A run folder, and the copy in it, may come from somebody else. The copy is executed only if a file with the same content
was started on this machine before, or if the user names it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.configuration.rebuild import class_paths, find_class
from lab.errors import UserError
from lab.files import cache_folder, replace_file, user_path
from lab.train.experiment_file import load

COPY = "experiment.py"  # in the run folder
KNOWN = "experiments"  # in the cache folder: sha256 of a file -> its original path


def keep_copy(folder: Path, file: Path) -> None:
    """Copies the experiment's file into the run folder, and records its hash as trusted."""
    content = file.read_bytes()
    replace_file(folder / COPY, content)
    known = cache_folder(KNOWN) / hashlib.sha256(content).hexdigest()
    if not known.exists() or known.read_text("utf-8") != f"{file.resolve()}\n":
        replace_file(known, f"{file.resolve()}\n")


def load_own(folder: Path, described: Mapping[str, Any], file: Path | None) -> None:
    """Loads the experiment file that defines the run's user classes. `described`: the content of experiment.json.

    `file`: the experiment's file, if the user named it. Otherwise loads the copy in the run folder, if it is trusted
    and the classes are not loaded yet.

    Raises:
      UserError: the file cannot be read or run.
    """
    wanted = {path for path in class_paths(described.get("experiment")) if not path.startswith("lab.")}
    if file is not None:
        file = user_path(str(file))
        if not file.is_file():
            raise UserError(f"--experiment {file}: there is no such file.")
        load(file, name=_module(wanted))
    elif not all(map(find_class, wanted)) and (copy := _own_copy(folder)):
        load(*copy, name=_module(wanted))


def _own_copy(folder: Path) -> tuple[Path, bytes] | None:
    """Original path and content of the run's experiment file; None if this machine does not trust it."""
    try:
        content = (folder / COPY).read_bytes()
        known = cache_folder(KNOWN) / hashlib.sha256(content).hexdigest()
        return Path(known.read_text("utf-8").rstrip("\n")), content
    except (OSError, UnicodeDecodeError):
        return None


def _module(wanted: set[str]) -> str | None:
    """The module name of the file in the run's class paths, if any."""
    found = {path.partition(".")[0] if path.startswith("user_") else path.rpartition(".")[0] for path in wanted}
    named = [name for name in found if name.startswith(("user_", "experiments."))]
    return named[0] if len(named) == 1 else None
