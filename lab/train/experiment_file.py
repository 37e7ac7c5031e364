"""Imports and checks an experiment file."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from lab.configuration.field_types import check_types
from lab.configuration.parts import check_parts
from lab.errors import UserError
from lab.experiment import Experiment
from lab.files import ROOT
from lab.train.beside import find, make_importable


def load(path: Path, content: bytes | None = None, name: str | None = None,
         read: Callable[[str], bytes | None] | None = None) -> ModuleType:
    """Imports an experiment file, which may import files beside it. `content` replaces the content of the file, and
    `read` that of the files beside it: see `lab.train.beside.find`.

    The module name defaults to the file's path in the repository; outside the repository, to one that shadows nothing.

    Raises:
      UserError: the file cannot be read or run (names the line), or defines no experiment.
    """
    path = path.resolve()
    inside = path.is_relative_to(ROOT)
    sys.path += [p for p in os.environ.get("LAB_PYTHONPATH", "").split(os.pathsep) if p and p not in sys.path]
    name = name or (".".join(path.relative_to(ROOT).with_suffix("").parts) if inside else f"user_{path.stem}")
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
    sys.modules[name], beside = module, {}
    try:
        module.__experiment_source__ = path.read_bytes() if content is None else content
        make_importable(beside := find(path, module.__experiment_source__, read))
        exec(compile(module.__experiment_source__, str(path), "exec"), vars(module))
    except UserError:
        raise
    except SyntaxError as e:
        place = f"{e.filename}, line {e.lineno}" if e.filename else path  # no line for a NUL byte
        raise UserError(f"{place}: {e.msg}.") from e
    except (Exception, SystemExit) as e:  # any error in the user's file; reported with its line
        theirs = {str(path), *(str(b.path) for b in beside.values())}
        frames = [f for f in reversed(traceback.extract_tb(e.__traceback__)) if f.filename in theirs]
        place = f"{frames[0].filename}, line {frames[0].lineno}" if frames else f"{path}, line ?"
        raise UserError(f"{place}: {type(e).__name__}: {e}.") from e
    for name in ("experiment", "local", "study"):
        value = getattr(module, name, None)
        if isinstance(value := getattr(value, "base", value), Experiment):
            try:
                check_parts(value)
                check_types(value)
            except UserError as e:
                place = "" if str(e).startswith("/") else f"{path}, line {_line_of(name, path)}: "
                raise UserError(f"{place}{e}") from None
    base = getattr(getattr(module, "study", None), "base", None)
    if not isinstance(getattr(module, "experiment", base), Experiment):
        raise UserError(f"{path} defines no `experiment = Experiment(...)`, and no `study = Study(...)`.")
    return module


def _line_of(name: str, path: Path) -> int:
    """The line of the last assignment to `name` in a file."""
    nodes = [node for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.Assign | ast.AnnAssign)]
    return max((n.lineno for n in nodes if f"'{name}'" in ast.dump(n, annotate_fields=False).partition(", Call")[0]),
               default=1)
