"""The architecture, tested: who may import whom, how long things may get, and that every knob is read."""

import ast
import dataclasses
import functools
import gc
import graphlib
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

FILES = sorted((ROOT / "lab").rglob("*.py"))
PARTS = {"data", "models", "tasks", "optim"}  # what an experiment is made of
# Room -> the rooms that it may import. `errors`, `files` and `signals` import nothing and serve all.
ROOMS = {
    "configuration": set(), "environment": set(), "pretrained": set(),
    "adapt": {"models.dropout", "optim.matrices", "pretrained"}, "experiment": {"configuration", "pretrained"},
    "data": {"configuration.protocols", "weights.location", "weights.gguf_files", "weights.chat"},
    "models": set(), "optim": {"models"}, "tasks": {"models", "train.plots"},
    "compress": {"models", "optim.matrices", "train.json_files"},
    "weights": {"compress", "configuration.field_types", "models", "pretrained", "data.hugging_face"},
    "harness": set(), "parallel": {"environment"},
    "train": {"adapt", "compress", "configuration", "experiment", "pretrained", "parallel", "data.order",
              "data.pipeline", "data.prefetch", "data.statistics", "models.members", "optim.matrices", "tasks.base",
              "weights.location", "weights.read"},
    "private": {"configuration.protocols", "data", "pretrained", "tasks"},
    "planning": {"experiment", "parallel", "train"},
    "serve": {"data.statistics", "models"}, "exported": {"data", "models", "tasks"},
    "explain": {"models.layers", "study.report.pictures", "study.report.render", "train.plots"},
    "launch": {"environment", "commands.arguments", "experiment", "parallel.shared_secret"},
    "api": {"experiment", "parallel", "train"},
}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
EVERY = {"", "__main__", "bootstrap", "commands", "study"}  # may import all rooms
PROGRAMS = {"serve.examples.ray_serve"}  # so may these, which nothing imports


@functools.cache
def parsed(path: Path) -> ast.Module:
    """A file's syntax tree. Without garbage collection, which can break ast.parse on Python 3.11 (gh-106905)."""
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        gc.enable()


@functools.cache
def modules() -> dict[str, Path]:
    """`train.loop`, ...: every module of lab, and its file; a package is its `__init__`."""
    names = {path: ".".join(path.relative_to(ROOT / "lab").with_suffix("").parts) for path in FILES}
    return {name.removesuffix("__init__").removesuffix("."): path for path, name in names.items()}


def imports(source: str) -> set[str]:
    """The modules of lab that a source imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lab":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "lab"}
    return {module_of(name.removeprefix("lab").removeprefix(".")) for name in found} - {""}


def module_of(name: str) -> str:
    """`train.loop` of `train.loop.train`."""
    while name not in modules():
        name = name.rpartition(".")[0]
    return name


def forbidden(module: str, source: str) -> set[str]:
    """The imports of lab that the design does not allow in this module."""
    room = module.split(".")[0]
    if module == "study.design.arms":  # experiments import it: a value, without JAX
        return imports(source) - {"errors", "experiment", "configuration.field_types", "configuration.values"}
    if room in EVERY or module in PROGRAMS:
        return set()
    allowed = ROOMS.get(room, set()) | {room, "errors", "files", "signals"}
    return {name for name in imports(source)
            if not any(name == a or name.startswith(f"{a}.") for a in allowed)}


@pytest.mark.parametrize("module", modules())
def test_imports_go_one_way(module: str):
    assert not forbidden(module, modules()[module].read_text())


def test_the_import_rule_sees_a_violation():
    assert forbidden("models.gpt", "def f():\n    from lab.train.step import State") == {"train.step"}
    assert forbidden("train.step", "from lab.models.gpt import GPT") == {"models.gpt"}
    assert forbidden("tasks.language", "import lab.data.text") == {"data.text"}


@functools.cache
def defined(path: Path) -> set[str]:
    """The names that a file defines itself, not by an import."""
    return {getattr(node, "name", getattr(node, "id", "")) for node in ast.walk(parsed(path))
            if isinstance(node, FUNCTION | ast.ClassDef)
            or isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def borrowed(source: str) -> set[str]:
    """The names that a source imports from a file of lab that itself imports them."""
    found = [(node.module, alias.name) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)
             for alias in node.names if (ROOT / f"{(node.module or '').replace('.', '/')}.py").is_file()]
    return {f"{module}.{name}" for module, name in found
            if module.startswith("lab.") and name not in defined(ROOT / f"{module.replace('.', '/')}.py")}


def test_a_name_is_imported_from_the_file_that_defines_it():
    """Only packages (`lab.optim`) pass names on."""
    paths = [path for room in ("lab", "tests", "experiments") for path in (ROOT / room).rglob("*.py")]
    assert not {path.name: found for path in paths if (found := borrowed(path.read_text()))}
    assert borrowed("from lab.experiment import Experiment, to_json") == {"lab.experiment.to_json"}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import one another, over any number of others."""
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as e:
        return [e.args[1]]
    return []


def test_no_file_imports_itself_over_others():
    graph = {name: imports(path.read_text()) - {name} for name, path in modules().items()}
    assert not circles(graph)
    assert circles(graph | {"errors": {"train.loop"}})  # negative control


def test_experiments_import_parts_only():
    allowed = PARTS | {"adapt", "experiment", "harness", "pretrained", "private", "weights"}
    for path in (ROOT / "experiments").glob("*.py"):
        found = imports(path.read_text())
        assert {name.split(".")[0] for name in found if not name.startswith("study.design")} <= allowed, path


def test_sizes_and_names():
    """Limits that stop growth; the design wants most files under 200 lines and most functions under 50."""
    for path in FILES:
        assert path.stem not in ("utils", "common", "helpers", "core"), path
        tree, lines = parsed(path), path.read_text().count("\n")
        assert lines <= 350, f"{path} has {lines} lines"
        for node in ast.walk(tree):
            if isinstance(node, FUNCTION):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{path}: {node.name} has {length} lines"
    for path in (ROOT / "experiments").glob("*.py"):
        assert path.read_text().count("\n") <= 60, path


READING_PATH = ("experiments/gpt_small.py", "lab/commands/train.py", "lab/experiment.py", "lab/train/loop.py",
                "lab/train/step.py", "lab/train/program.py", "lab/models/gpt.py", "lab/models/layers.py",
                "lab/tasks/language.py", "lab/optim/optimizers.py", "lab/data/text/text.py", "lab/data/pipeline.py")


def test_the_reading_path_does_not_grow():
    """From the command to a trained GPT on one device."""
    lines = {name: (ROOT / name).read_text().count("\n") for name in READING_PATH}
    assert sum(lines.values()) <= 2000, lines


def test_public_functions_have_docstrings_and_types():
    for path in FILES:
        for node in parsed(path).body:
            public = isinstance(node, FUNCTION | ast.ClassDef) and not node.name.startswith("_")
            if public:
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"
            if public and isinstance(node, FUNCTION):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                assert all(a.annotation for a in arguments) and node.returns, f"{path}: {node.name} lacks type hints"


def configuration_classes() -> list[type]:
    """Every dataclass of lab that an experiment may hold."""
    import importlib

    import flax.linen as nn

    names = [name for name in modules() if name.split(".")[0] in PARTS | {"adapt", "experiment", "pretrained"}]
    imported = [importlib.import_module(f"lab.{name}") for name in names if name != "data.prepare"]
    found = [c for m in imported for c in vars(m).values() if isinstance(c, type) and c.__module__ == m.__name__]
    return [c for c in found if dataclasses.is_dataclass(c)
            and (issubclass(c, nn.Module) or c.__dataclass_params__.frozen)]


# What values of these rooms are called where a field of theirs is read from outside.
CALLED = {
    "experiment": {"experiment", "settings", "evaluate", "checkpoint", "mesh", "log"},
    "pretrained": {"start", "init_from"},
    "adapt": {"adapt"},
    "models": {"model", "member", "module"},
    "tasks": {"task", "part", "p"},
    "optim": {"optim", "optimizer", "lr", "schedule"},
    "data": {"data", "source", "form", "options", "corpus", "tokenizer", "split", "table", "column", "feature",
             "augment", "fitted", "state", "found", "text", "settings"},
}


def constants(node: ast.AST) -> set[str]:
    """The strings in an expression."""
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


@functools.cache
def reads() -> tuple[dict[str, set[str]], set[tuple[str, str]], set[str]]:
    """(class -> fields read of `self` in it, (name of a variable or attribute, field read of it), names given to
    getattr or looped over)."""
    own, outside, strings = {}, set(), set()
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                own.setdefault(node.name, set()).update(
                    n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
                    and n.value.id in ("self", "cls"))
            elif isinstance(node, ast.Attribute):
                last = getattr(node.value, "id", None) or getattr(node.value, "attr", "")
                outside.add((last, node.attr))
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                strings |= constants(node)
            elif isinstance(node, ast.For | ast.comprehension):
                strings |= constants(node.iter)
    return own, outside, strings


def descendants(cls: type) -> set[type]:
    """All classes derived from one."""
    return {cls}.union(*(descendants(c) for c in cls.__subclasses__()))


def is_read(cls: type, name: str) -> bool:
    """Whether code reads this field of a configuration: of `self` in the class or its family, of a variable that is
    called as such values are, or by its name in a string (`getattr`, a loop over names)."""
    own, outside, strings = reads()
    family = {c.__name__ for c in cls.__mro__} | {d.__name__ for c in cls.__mro__ if name in vars(c).get(
        "__annotations__", ()) for d in descendants(c)}
    room = cls.__module__.split(".")[1]
    if not (hasattr(cls, "validate") or room in ("experiment", "pretrained", "models")):  # not chosen by a user
        return any(name == field for _, field in outside)
    return (any(name in own.get(c, ()) for c in family) or any((called, name) in outside for called in CALLED[room])
            or name in strings)


def test_no_dead_knobs():
    """A field that no code reads is a lie in --help."""
    for cls in configuration_classes():
        for f in dataclasses.fields(cls):
            if f.name not in ("parent", "name"):
                assert is_read(cls, f.name), f"{cls.__name__}.{f.name} is read nowhere"


def test_a_dead_knob_is_seen_though_its_name_is_common():
    from lab.models.gpt import GPT

    class Knob(GPT):
        path: str = ""

    Knob.__module__ = GPT.__module__
    assert is_read(GPT, "softcap") and not is_read(Knob, "folder") and any(f == "folder" for _, f in reads()[1])


def texts(tree: ast.Module) -> set[str]:
    """The string constants of a source that are no docstrings: names in files, screens, messages."""
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return {node.value for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented}


def updates(found: set[str]) -> set[str]:
    """Texts that call a step an update. Optax's update is what is added to the parameters, XLA's a slice."""
    return {text for text in found if re.search(r"(\b|_)updates?(\b|_)", text)
            and text not in ("update", "update_norm", "dynamic-update-slice")}


def test_a_step_has_one_name():
    assert not {path.name: found for path in FILES if (found := updates(texts(parsed(path))))}
    assert updates(texts(ast.parse('"""An update."""\nfor i in f"{n} updates", "ms_per_update": pass'))) == {
        " updates", "ms_per_update"}


def test_no_global_random_state_and_no_host_sync_in_the_step():
    compiled = [ROOT / "lab" / name for name in ("train/step.py", "optim/optimizers.py", "data/images/augment.py")]
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
