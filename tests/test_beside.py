"""Files beside an experiment's file: imported, part of what the run is, copied, and trusted as the file itself is."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from lab.errors import UserError
from lab.train.beside import FINDER, find
from lab.train.experiment_file import load
from lab.train.source_code import changed, code_of
from tests.test_foreign_folders import OWN
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

HEAD, CLASS, TAIL = OWN.partition("class Net")[0], "class Net" + OWN.partition("class Net")[2].partition(
    "\nexperiment =")[0], "experiment =" + OWN.partition("\nexperiment =")[2]
MODEL = "import flax.linen as nn\n\n\n" + CLASS
MINE = HEAD.replace("import flax.linen as nn\n", "from my_model import Net\n") + TAIL


@pytest.fixture(autouse=True)
def nothing_loaded():
    """Each test begins as a new process does."""
    yield
    for name in [*FINDER.known, "user_mine"]:
        sys.modules.pop(name, None)
    FINDER.known.clear()


@pytest.fixture
def place(tmp_path) -> Path:
    """mine.py, and my_model.py beside it."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "mine.py").write_text(MINE)
    (home / "my_model.py").write_text(MODEL)
    return home


def again() -> None:
    """As in another process."""
    for name in ("my_model", "user_mine"):
        sys.modules.pop(name, None)
    FINDER.known.clear()


def test_a_run_whose_model_is_in_a_file_beside(place, tmp_path, typed, mistake, monkeypatch, compiled_in_haste):  # noqa: F811
    """Trained from another folder, evaluated after the files are gone; never where the copies are not known."""
    run, marker = tmp_path / "run", tmp_path / "marker"
    monkeypatch.chdir(tmp_path)
    status, _, err = typed(place / "mine.py", "--run-dir", run)
    assert status == 0, err
    described = json.loads((run / "experiment.json").read_text())
    assert described["experiment"]["model"]["class"] == "my_model.Net" and "my_model.py" in described["code"]
    assert (run / "beside/my_model.py").read_text() == MODEL and "my_model" not in sys.path
    again()
    shutil.move(place, tmp_path / "gone")
    assert typed("evaluate", run)[0] == 0
    again()
    (run / "beside/my_model.py").write_text(f"open({str(marker)!r}, 'w')\n" + MODEL)
    assert "my_model.Net is not a class of lab" in mistake("evaluate", run)
    (run / "beside/my_model.py").write_text(MODEL)
    (run / "beside/more.py").write_text(f"open({str(marker)!r}, 'w')\n")
    assert "my_model.Net is not a class of lab" in mistake("evaluate", run)
    assert typed("evaluate", run, "--experiment", tmp_path / "gone/mine.py")[0] == 0
    again()
    (run / "beside/more.py").unlink()
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))  # another machine
    assert "my_model.Net is not a class of lab" in mistake("evaluate", run)
    assert not marker.exists()


def test_an_edited_file_beside_is_named_and_asked_for(place, tmp_path, typed, mistake, compiled_in_haste):  # noqa: F811
    words = ("mine.py", "--run-dir", tmp_path / "run")
    assert typed(*words)[0] == 0
    (place / "my_model.py").write_text(MODEL.replace("A classifier of our own.", "Ours.") + "\n# the end\n")
    assert "already complete" in typed(*words)[1]
    (place / "my_model.py").write_text(MODEL.replace("return nn", "return 2 * nn"))
    assert "error: my_model.py changed since the run" in mistake(*words)
    status, out, _ = typed(*words, "--rerun")
    assert status == 0 and "my_model.py changed: the run begins again." in out
    assert "return 2 * nn" in (tmp_path / "run/beside/my_model.py").read_text()
    (place / "mine.py").write_text(OWN)  # the model moves into the file: another experiment, by its class
    assert "is the run of another experiment: model.class is my_model.Net" in mistake(*words)


def test_packages_relative_imports_and_imports_inside_functions(place):
    """Whatever is imported from there belongs to the run; also what is imported only when a function is called."""
    for name, text in {"parts/__init__.py": "", "parts/model.py": "from .deep.layer import SIZE\nfrom . import other\n"
                       + MODEL.replace("= 2", "= SIZE"), "parts/other.py": "", "parts/deep/layer.py": "SIZE = 2\n",
                       "plain/late.py": "FACTOR = 1\n", "unused.py": "this is no Python"}.items():
        (place / name).parent.mkdir(exist_ok=True, parents=True)
        (place / name).write_text(text)
    mine = MINE.replace("from my_model import Net", "from parts import model\n\n\nclass Net(model.Net):\n"
                        "    def late(self):\n        import plain.late\n        return plain.late.FACTOR\n")
    (place / "mine.py").write_text(mine)
    module = load(place / "mine.py")
    before = code_of(module.experiment)
    names = {"parts/__init__.py", "parts/model.py", "parts/other.py", "parts/deep/layer.py", "plain/late.py", "mine.py"}
    assert {name for name in before if name.endswith(".py") and not name.startswith("lab/")} == names
    assert module.experiment.model.late() == 1 and code_of(module.experiment) == before
    for name, old, new in (("plain/late.py", "1", "2"), ("parts/deep/layer.py", "2", "2 + 0")):
        (place / name).write_text((place / name).read_text().replace(old, new))
        assert changed(before, code_of(load(place / "mine.py").experiment)) == [name]
        (place / name).write_text((place / name).read_text().replace(new, old))
    with pytest.raises(ModuleNotFoundError):  # negative control: beside it, but not imported by it
        __import__("unused")


def test_nothing_beside_shadows_what_is_installed(place, tmp_path):
    marker = tmp_path / "marker"
    for name in ("json", "random", "numpy", "flax", "lab", "optax", "sys"):
        (place / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (place / "lab").mkdir()
    (place / "lab/data.py").write_text(f"open({str(marker)!r}, 'w')\n")
    lines = "import json, random, sys\nimport flax, numpy, optax\n"
    (place / "mine.py").write_text(MINE.replace("from my_model", lines + "from my_model"))
    assert find(place / "mine.py", (place / "mine.py").read_bytes()).keys() == {"my_model"}
    load(place / "mine.py")
    assert not marker.exists() and sys.modules["json"].__file__ != str(place / "json.py")


def test_of_two_folders_each_has_its_own(place, tmp_path):
    other = Path(shutil.copytree(place, tmp_path / "other"))
    (other / "my_model.py").write_text(MODEL.replace("= 2", "= 2\n    width: int = 3"))
    assert not hasattr(load(place / "mine.py").experiment.model, "width")
    assert load(other / "mine.py").experiment.model.width == 3
    assert not hasattr(load(place / "mine.py").experiment.model, "width")


@pytest.mark.parametrize(("text", "said"), [
    ("import flax\n\n1 / 0\n", "my_model.py, line 3: ZeroDivisionError"), ("x = (\n", "my_model.py, line 1: '\\(' was"),
    ("def f():\n    raise KeyError('x')\nf()\n", "my_model.py, line 2: KeyError"),
    ("import nowhere_to_be_found\n", "my_model.py, line 1: ModuleNotFoundError"), ("", "mine.py, line .* ImportError")])
def test_a_mistake_in_a_file_beside_has_its_line(place, text, said):
    (place / "my_model.py").write_text(text)
    with pytest.raises(UserError, match=said):
        load(place / "mine.py")
