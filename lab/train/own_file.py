"""The copy of a user's experiment file in the run folder, and whether this machine may execute it.

A run folder, and the copy in it, may come from somebody else. The copy is executed only if a file with the same content
was started on this machine before, or if the user names it. The files beside it that it imports belong to it: all of
them together must be the same.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.configuration.rebuild import class_paths, find_class
from lab.errors import UserError
from lab.files import cache_folder, make_folder, no_links, replace_file, user_path
from lab.train.beside import find
from lab.train.experiment_file import load

COPY, BESIDE = "experiment.py", "beside"  # in the run folder
KNOWN = "experiments"  # in the cache folder: sha256 of a file -> its original path


def keep_copy(folder: Path, file: Path) -> None:
    """Copies the experiment's file, and the files beside it that it imports, into the run folder, and records their
    hash as trusted."""
    content = file.read_bytes()
    beside = {b.name: b.content for b in find(file, content).values() if b.name.endswith(".py")}
    replace_file(folder / COPY, content)
    if (folder / BESIDE).exists():
        no_links(folder)
        shutil.rmtree(folder / BESIDE)
    for name, text in beside.items():
        make_folder((folder / BESIDE / name).parent)
        replace_file(folder / BESIDE / name, text)
    known = cache_folder(KNOWN) / _hash(content, beside)
    if not known.exists() or known.read_text("utf-8") != f"{file.resolve()}\n":
        replace_file(known, f"{file.resolve()}\n")


def _hash(content: bytes, beside: Mapping[str, bytes]) -> str:
    """The hash of an experiment's file together with the files beside it: name -> content."""
    whole = hashlib.sha256(content)
    for name in sorted(beside):
        whole.update(f"\n{name} {hashlib.sha256(beside[name]).hexdigest()}".encode())
    return whole.hexdigest()


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
        load(file, name=_module(wanted, file.read_bytes()))
    elif not all(map(find_class, wanted)) and (copy := _own_copy(folder)):
        path, content, beside = copy
        load(path, content, _module(wanted, content), beside.get)


def _own_copy(folder: Path) -> tuple[Path, bytes, Mapping[str, bytes]] | None:
    """Original path and content of the run's experiment file, and name -> content of the files beside it; None if this
    machine does not trust them."""
    if not (folder / COPY).is_file():
        return None
    try:
        content = (folder / COPY).read_bytes()
        beside = {path.relative_to(folder / BESIDE).as_posix(): path.read_bytes()
                  for path in (folder / BESIDE).rglob("*.py") if path.is_file()}
        known = cache_folder(KNOWN) / _hash(content, beside)
        return Path(known.read_text("utf-8").rstrip("\n")), content, beside
    except (OSError, UnicodeDecodeError):
        return None


def _module(wanted: set[str], content: bytes) -> str | None:
    """The module name of the file in the paths of the classes that it defines, if any."""
    own = [path for path in wanted if re.search(rf"^class {path.rpartition('.')[2]}\b".encode(), content, re.MULTILINE)]
    found = {path.partition(".")[0] if path.startswith("user_") else path.rpartition(".")[0] for path in own}
    named = [name for name in found if name.startswith(("user_", "experiments."))]
    return named[0] if len(named) == 1 else None
