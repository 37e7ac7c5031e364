"""Digests of the code that a run imports. Experiment, data and this code determine a run's results.

Digests ignore comments, docstrings and formatting. Runs and cells of studies are compared by the same digests.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.configuration.rebuild import class_paths, module_of, of_a_library
from lab.configuration.values import to_json
from lab.experiment import Experiment
from lab.files import ROOT
from lab.train.beside import imported, source_of

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# Modules that every run uses, in addition to the classes in its experiment.
CORE = ("lab.train.loop", "lab.train.program", "lab.train.evaluation")
# Imported modules that do not affect results: a change in them does not change a run's digests.
WITHOUT_NUMBERS = {
    "lab.parallel.backend",
    "lab.parallel.channel",
    "lab.train.checkpoint",
    "lab.train.console",
    "lab.parallel.processes",
    "lab.errors",
    "lab.configuration.field_types",
    "lab.files",
    "lab.train.fitted",
    "lab.configuration.limits",
    "lab.train.own_file",
    "lab.train.cost",
    "lab.train.plots",
    "lab.configuration.rebuild",
    "lab.train.beside",
    "lab.train.run_copy",
    "lab.train.run_folder",
    "lab.parallel.shared_secret",
    "lab.signals",
    "lab.train.source_code",
    "lab.train.teacher",  # teacher.json has the teacher's sha256
    "lab.compress.folder",
    "lab.compress.model",
    "lab.study.run.cells",
    "lab.study.design.arms",
    "lab.study.run.preflight",
}
VALUES = {"experiment", "local", "study"}  # variables of user files whose values are in the experiment's JSON


def code_of(experiment: Experiment, more: Sequence[str] = ()) -> dict[str, str]:
    """The code that determines a run's results: file or package -> digest or version.

    Includes the files of the experiment's classes, of `CORE` and of the modules `more`, and their imports from lab or
    user files. So a change of one model does not affect runs of another model.
    """
    modules = {module_of(path) or path for path in class_paths(to_json(experiment))}
    found = digests(modules | {*CORE, *more})
    found |= {package: importlib.metadata.version(package) for package in PACKAGES}
    return found | {"Python": ".".join(platform.python_version_tuple()[:2])}


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The files and packages that differ between two results of `code_of`."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def digests(modules: Iterable[str]) -> dict[str, str]:
    """File -> digest, for these modules and everything they import from lab or user files."""
    found, seen, open_ = {}, set(), set(modules)
    while open_:
        seen.add(module := open_.pop())
        if (source := _source(module)) is not None:
            name, digest, names = _read(*source)
            found[name] = digest
            open_ |= {name for name in names if source_of(name) or _file_of(name)} - seen - WITHOUT_NUMBERS
    return dict(sorted(found.items()))


def _source(module: str) -> tuple[str, bytes, str] | None:
    """Name, content and package of the source file of a lab or user module; None for a library."""
    if beside := source_of(module):
        inside = beside.path.is_relative_to(ROOT)
        name = str(beside.path.relative_to(ROOT)) if inside else beside.name
        return name, beside.content, module if beside.is_package else module.rpartition(".")[0]
    content = getattr(sys.modules.get(module), "__experiment_source__", None)
    path = _file_of(module)
    if path is None:
        return None
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return (name, path.read_bytes() if content is None else content, "") if content or path.exists() else None


def _file_of(module: str) -> Path | None:
    inside = ROOT.joinpath(*module.split("."))
    for path in (inside.with_suffix(".py"), inside / "__init__.py"):
        if path.exists():
            return path
    loaded = sys.modules.get(module)
    if module.startswith("lab.") or loaded is None or of_a_library(loaded):
        return None
    return Path(loaded.__file__) if getattr(loaded, "__file__", None) else None


@functools.cache
def _read(name: str, content: bytes, package: str = "") -> tuple[str, str, tuple[str, ...]]:
    """Name, digest, and all names of modules that a source file of `package` may import."""
    tree = ast.parse(content)
    mine = name.startswith("lab/")
    meaning = repr(_meaning(tree if mine else _without_values(tree)))
    return name, hashlib.sha256(meaning.encode()).hexdigest()[:12], tuple(imported(tree, package))


def _without_values(tree: ast.Module) -> ast.Module:
    kept = [node for node in tree.body if not (isinstance(node, ast.Assign) and all(
        isinstance(target, ast.Name) and target.id in VALUES for target in node.targets))]
    return ast.Module(kept, [])


def _meaning(node: Any) -> Any:
    """The syntax tree without docstrings, in a form that does not depend on the Python version."""
    if isinstance(node, ast.AST):
        fields = ((name, _meaning(value)) for name, value in ast.iter_fields(node) if name not in ("ctx", "kind"))
        return (type(node).__name__, *((name, value) for name, value in fields if value not in (None, ())))
    if isinstance(node, list):
        return tuple(_meaning(item) for item in node
                     if not (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant)))
    return node
