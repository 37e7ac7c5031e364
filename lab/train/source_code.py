"""The code that a run reaches: with its experiment and its data, what its numbers are a function of.

Of each file counts what it means: not its comments, its docstrings, or where its lines break. Runs and the cells of
studies are compared by the same digests.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.configuration.rebuild import class_paths, module_of, of_a_library
from lab.experiment import ROOT, Experiment, to_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# Every run goes through these, besides the classes that its experiment names.
CORE = ("lab.train.loop", "lab.train.program", "lab.train.evaluation")
# Imported along the way, and without influence on any number: a change of theirs makes no run another one.
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
    "lab.train.run_copy",
    "lab.train.run_folder",
    "lab.parallel.shared_secret",
    "lab.signals",
    "lab.train.source_code",
    "lab.study.run.cells",
    "lab.study.design.arms",
    "lab.study.run.preflight",
}
VALUES = {"experiment", "local", "study"}  # in the user's files: what they hold is in the experiment's JSON


def code_of(experiment: Experiment, more: Sequence[str] = ()) -> dict[str, str]:
    """What a run is a function of besides its experiment and data: file or package -> digest or version.

    The files are those of the classes in the experiment, of the core and of `more` modules, and what they import from
    lab or from files of the user: a change of one model does not make the runs of another one others.
    """
    modules = {module_of(path) or path for path in class_paths(to_json(experiment))}
    found = digests(modules | {*CORE, *more})
    found |= {package: importlib.metadata.version(package) for package in PACKAGES}
    return found | {"Python": ".".join(platform.python_version_tuple()[:2])}


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The files and packages that two results of `code_of` do not share."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def digests(modules: Iterable[str]) -> dict[str, str]:
    """File -> digest of what it means, of these modules and all that they import from lab or from the user's files."""
    found, seen, open_ = {}, set(), set(modules)
    while open_:
        seen.add(module := open_.pop())
        if (source := _source(module)) is not None:
            name, digest, imported = _read(*source)
            found[name] = digest
            open_ |= set(imported) - seen - WITHOUT_NUMBERS
    return dict(sorted(found.items()))


def _source(module: str) -> tuple[str, bytes] | None:
    """Name and content of the file of a module of the project or of the user; None for a library's."""
    content = getattr(sys.modules.get(module), "__experiment_source__", None)
    path = _file_of(module)
    if path is None:
        return None
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return (name, path.read_bytes() if content is None else content) if content or path.exists() else None


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
def _read(name: str, content: bytes) -> tuple[str, str, tuple[str, ...]]:
    """Name, digest of the meaning, and modules that a source imports anywhere."""
    tree = ast.parse(content)
    mine = name.startswith("lab/")
    meaning = repr(_meaning(tree if mine else _without_values(tree)))
    return name, hashlib.sha256(meaning.encode()).hexdigest()[:12], tuple(_imports(tree))


def _imports(tree: ast.Module) -> Iterator[str]:
    """The modules that may be lab's or the user's; of ``from a import b`` both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (name for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
                        if _file_of(name))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _file_of(alias.name))


def _without_values(tree: ast.Module) -> ast.Module:
    kept = [node for node in tree.body if not (isinstance(node, ast.Assign) and all(
        isinstance(target, ast.Name) and target.id in VALUES for target in node.targets))]
    return ast.Module(kept, [])


def _meaning(node: Any) -> Any:
    """A syntax tree without strings that stand alone; the same on every version of Python that reads it."""
    if isinstance(node, ast.AST):
        fields = ((name, _meaning(value)) for name, value in ast.iter_fields(node) if name not in ("ctx", "kind"))
        return (type(node).__name__, *((name, value) for name, value in fields if value not in (None, ())))
    if isinstance(node, list):
        return tuple(_meaning(item) for item in node
                     if not (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant)))
    return node
