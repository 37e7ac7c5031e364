"""The Python files beside an experiment's file that it imports: `from my_model import Net` reads my_model.py there.

Only names in import statements, followed from file to file, become importable, and only if Python, an installed package
or lab has no such name.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from lab.files import ROOT


@dataclass(frozen=True)
class Beside:
    """A module beside an experiment's file."""

    name: str
    """Its file, relative to the experiment's folder; for a package without __init__.py the folder."""
    path: Path
    content: bytes = b""
    copied: bool = False
    """Whether the content is that of a copy, not of the file at `path`."""

    @property
    def is_package(self) -> bool:
        """Whether modules may be inside it."""
        return not self.name.endswith(".py") or self.name.endswith("__init__.py")


def imported(tree: ast.Module, package: str = "") -> Iterator[str]:
    """Modules that a source in `package` may import, also inside functions; a and a.b for ``from a import b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".") if node.level else []
            above = above[: len(above) - node.level + 1]
            if base := ".".join(filter(None, [*above, node.module])):
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)


def find(file: Path, content: bytes, read: Callable[[str], bytes | None] | None = None) -> dict[str, Beside]:
    """Module name -> module, for all that an experiment's file with this content imports from its folder.

    `read`: the content of a file by its name relative to that folder, None if there is none; by default from disk.

    Raises:
      SyntaxError: in the experiment's file or in one of these modules.
    """
    folder, found, copied = file.resolve().parent, {}, read is not None
    read = read or (lambda name: (folder / name).read_bytes() if (folder / name).is_file() else None)
    open_ = set(imported(ast.parse(content, str(file))))
    while open_:
        module = open_.pop()
        if module in found or _elsewhere(module.partition(".")[0], folder):
            continue
        inner = module.replace(".", "/")
        for name in (f"{inner}/__init__.py", f"{inner}.py"):
            if folder / name != file.resolve() and (text := read(name)) is not None:
                found[module] = beside = Beside(name, folder / name, text, copied)
                package = module if beside.is_package else module.rpartition(".")[0]
                open_ |= set(imported(ast.parse(text, str(beside.path)), package))
                open_ |= {above for above in _above(module) if above not in found}
                break
    for module in list(found):
        for above in _above(module):
            inner = above.replace(".", "/")
            found.setdefault(above, Beside(inner, folder / inner))
    return found


def _above(module: str) -> list[str]:
    """The packages around a module."""
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _elsewhere(name: str, folder: Path) -> bool:
    """Whether Python, a package or lab has a module of this name."""
    if name in sys.stdlib_module_names or name == "lab":
        return True
    for finder in sys.meta_path:
        spec = finder.find_spec(name, None) if finder is not FINDER and hasattr(finder, "find_spec") else None
        if spec is not None:
            places = [spec.origin] if spec.has_location else list(spec.submodule_search_locations or [])
            here = {folder / f"{name}.py", folder / name / "__init__.py", folder / name}
            return folder == ROOT or not places or any(Path(place).resolve() not in here for place in places)
    return False


class _Finder:
    """Python's way to the modules in `known`; see `importlib`."""

    def __init__(self) -> None:
        self.known: dict[str, Beside] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if (beside := self.known.get(name)) is None:
            return None
        spec = ModuleSpec(name, self, origin=str(beside.path), is_package=beside.is_package)
        spec.has_location = True
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        beside = self.known[module.__name__]
        module.__experiment_source__ = beside.content
        exec(compile(beside.content, str(beside.path), "exec"), vars(module))


FINDER = _Finder()


def make_importable(modules: Mapping[str, Beside]) -> None:
    """From here on, these modules can be imported, before any other of the same names."""
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)
    if any(FINDER.known.get(name, beside) != beside for name, beside in modules.items()):  # another folder, or edited
        for name in modules.keys() & FINDER.known.keys():
            sys.modules.pop(name, None)
    FINDER.known.update(modules)


def source_of(module: str) -> Beside | None:
    """The module beside the experiment that has this name, if it is (or would be) imported from there, as its file is
    now."""
    beside, loaded = FINDER.known.get(module), sys.modules.get(module)
    mine = loaded is None or getattr(loaded, "__experiment_source__", None) is not None
    if not mine or beside is None or not beside.name.endswith(".py"):
        return None
    return beside if beside.copied or not beside.path.is_file() else replace(beside, content=beside.path.read_bytes())


def versions(file: Path) -> dict[str, str]:
    """Digests of the files beside an experiment's file that it imports, to compare processes."""
    modules = find(file, file.read_bytes()).values()
    return {f"the file {m.name}": hashlib.sha256(m.content).hexdigest()[:12] for m in modules if m.content}
