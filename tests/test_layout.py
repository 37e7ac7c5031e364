"""The architecture, tested: who may import whom, how long things may get, and that every knob is read."""

import ast
import dataclasses
import functools
import gc
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

FILES = sorted((ROOT / "lab").rglob("*.py"))
INGREDIENTS = {"data", "models", "tasks", "optim", "schedules", "generate"}
KITCHEN = {"step", "sharding", "checkpoint", "metrics", "plan", "program", "run_folder", "restore", "fitted",
           "pretrained", "channel", "distributed", "local", "topologies", "hlo", "roofline", "compiled_plan", "files",
           "field_types", "rebuild", "own_file", "shared_secret", "source_code", "continued",
           "matrices", "members", "frozen", "averages", "check"}


@functools.cache
def parsed(path: Path) -> ast.Module:
    """A file's syntax tree. Without garbage collection, which can break ast.parse on Python 3.11 (gh-106905)."""
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        gc.enable()


def lab_imports(source: str) -> set[str]:
    """`data.text`, `step`, ...: the modules of lab that a source imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lab":
            inner = node.module.removeprefix("lab").removeprefix(".")
            found |= {inner} if inner else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("lab.") for a in node.names if a.name.startswith("lab.")}
    return found


def forbidden(path: Path, source: str) -> set[str]:
    """The imports of lab that the design does not allow in this file."""
    part = path.relative_to(ROOT / "lab").with_suffix("").parts[0]
    tops = {name.split(".")[0] for name in lab_imports(source)} - {"errors", "files", "members"}  # import nothing
    if part in ("data", "models"):
        return tops - {part}
    if part in INGREDIENTS:
        more = {"optim": {"schedules", "matrices", "averages", "optax_source"}, "tasks": {"generate", "plots"}}
        return tops - {part} - more.get(part, set())
    if part in KITCHEN:
        return tops & (INGREDIENTS | {"loop", "commands", "__main__", "study"})
    if path == ROOT / "lab/study/design.py":  # experiments import it: a value, without JAX
        return tops - {"experiment"}
    if part == "study":
        return tops & (INGREDIENTS - {"data"} | {"commands", "__main__"})
    return set()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path):
    assert not forbidden(path, path.read_text())


def test_the_import_rule_sees_a_violation():
    assert forbidden(ROOT / "lab/models/gpt.py", "def f():\n    from lab.step import State") == {"step"}
    assert forbidden(ROOT / "lab/step.py", "from lab.models.gpt import GPT") == {"models"}
    assert forbidden(ROOT / "lab/tasks/language.py", "import lab.data.text") == {"data"}


def test_experiments_import_ingredients_only():
    for path in (ROOT / "experiments").glob("*.py"):
        tops = {name if name == "study.design" else name.split(".")[0] for name in lab_imports(path.read_text())}
        assert tops <= INGREDIENTS | {"experiment", "pretrained", "study.design"}, path


def test_sizes_and_names():
    """Limits that stop growth; the design wants most files under 200 lines and most functions under 50."""
    for path in FILES:
        assert path.stem not in ("utils", "common", "helpers", "core"), path
        tree, lines = parsed(path), path.read_text().count("\n")
        assert lines <= 450, f"{path} has {lines} lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{path}: {node.name} has {length} lines"
    for path in (ROOT / "experiments").glob("*.py"):
        assert path.read_text().count("\n") <= 60, path


def test_public_functions_have_docstrings_and_types():
    for path in FILES:
        for node in parsed(path).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public:
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"
            if public and isinstance(node, ast.FunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                assert all(a.annotation for a in arguments) and node.returns, f"{path}: {node.name} lacks type hints"


def configuration_classes() -> list[type]:
    """Every dataclass of lab that an experiment may hold."""
    import importlib

    import flax.linen as nn

    parts = [p for p in FILES if p.parent.name in ("data", "models", "tasks") and p.stem not in ("__init__", "prepare")]
    names = [f"lab.{p.parent.name}.{p.stem}" for p in parts]
    names += ["lab.experiment", "lab.optim", "lab.schedules", "lab.pretrained"]
    modules = [importlib.import_module(name) for name in names]
    found = [c for m in modules for c in vars(m).values() if isinstance(c, type) and c.__module__ == m.__name__]
    return [c for c in found if dataclasses.is_dataclass(c)
            and (issubclass(c, nn.Module) or c.__dataclass_params__.frozen)]


def test_no_dead_knobs():
    """A field that no code reads is a lie in --help."""
    source = "\n".join(path.read_text() for path in FILES)
    for cls in configuration_classes():
        for f in dataclasses.fields(cls):
            if f.name not in ("parent", "name"):
                assert re.search(rf"\.{f.name}\b", source) or re.search(rf"getattr\(.*[\"']{f.name}[\"']", source), \
                    f"{cls.__name__}.{f.name} is read nowhere"


def test_no_global_random_state_and_no_host_sync_in_the_step():
    compiled = [ROOT / "lab" / name for name in ("step.py", "optim.py", "data/augment.py")]
    for path in [*compiled, *(ROOT / "lab/models").glob("*.py"), *(ROOT / "lab/tasks").glob("*.py")]:
        assert not re.search(r"np\.random|random\.seed|block_until_ready|\.item\(\)", path.read_text()), path


def test_nothing_private_is_committed():
    """No registry address, no path of one machine."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        content = (ROOT / name).read_bytes().decode(errors="ignore")
        assert name == "tests/test_layout.py" or not re.search(r"index-url\s*=?\s*http|/root/|/work/", content), name
