"""Folders that somebody else made: no code of theirs runs, and nothing is written through their links."""

import contextlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from lab.configuration.rebuild import find_class
from lab.files import ROOT, make_folder, open_file, replace_file
from lab.train.description import sealed
from lab.train.own_file import load_own
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)
from tests.test_study import FILE


def train_in(folder: Path, file: str, run: str) -> None:
    """Trains an experiment of a folder, from that folder."""
    from lab.__main__ import main

    with contextlib.chdir(folder):
        assert main([file, "--run-dir", run]) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with small.py, and run/, where it was trained."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "small.py").write_text(FILE)
    train_in(folder, "small.py", "run")
    return folder


@pytest.fixture
def run(place, tmp_path) -> Path:
    """A copy of the run, as it was just before its result was written."""
    copied = Path(shutil.copytree(place / "run", tmp_path / "run"))
    (copied / "result.json").unlink()
    return copied


# ------------------------------------------------------------------------------------------------------------ links


LINKED = ("lock", "metrics.jsonl", "metrics.tmp", "result.json", "experiment.json", "environment-2.json",
          "pretrained.json", "diverged.json", "plots/loss.png", "report.txt", "checkpoints/6", "logs/process-0.txt",
          "evaluation-test-4.json", "launch/slurm.sh")


@pytest.mark.parametrize("name", LINKED)
def test_no_file_is_written_through_a_link(run, tmp_path, mistake, name):
    """Neither by training nor by eval, whose sentence names the link."""
    precious, link = tmp_path / "precious", run / name
    precious.write_text("precious")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(precious)
    for command in (("small.py", "--run-dir", run), ("evaluate", run)):
        assert str(link) in mistake(*command)
        assert precious.read_text() == "precious"


@pytest.mark.parametrize("name", ["plots", "checkpoints", "logs", "evaluation-test-4", "samples"])
def test_no_folder_is_written_through_a_link(run, tmp_path, mistake, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).symlink_to(outside)
    assert f"{run / name} is a symbolic link" in mistake("small.py", "--run-dir", run)
    mistake("evaluate", run)
    assert not list(outside.iterdir())


def test_the_writers_follow_no_link(tmp_path):
    """Also one that appears after the folder was looked through."""
    from lab.errors import UserError

    precious, link = tmp_path / "precious", tmp_path / "link"
    precious.write_text("precious")
    link.symlink_to(precious)
    for mode in ("a", "w"):
        with pytest.raises(UserError, match="link is a symbolic link"):
            open_file(link, mode)
    replace_file(link, "new")
    assert link.read_text() == "new" and not link.is_symlink() and precious.read_text() == "precious"
    (tmp_path / "folder").symlink_to(tmp_path)
    with pytest.raises(UserError, match="folder is a symbolic link"):
        make_folder(tmp_path / "folder")
    with open_file(tmp_path / "new", "w") as file:  # negative control: what is no link is written
        file.write("é")
    with open_file(tmp_path / "new") as file:
        file.write("è")
    assert (tmp_path / "new").read_bytes() == "éè".encode()


@pytest.mark.parametrize("name", ["experiment.json", "result.json", "metrics.jsonl", "fitted.json", "experiment.py",
                                  "checkpoints/4/manifest/metadata"])
def test_no_command_waits_at_a_pipe(run, mistake, name):
    """Whoever opens a named pipe waits for a writer, forever."""
    import os

    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    for command in (("small.py", "--run-dir", run), ("evaluate", run), ("predict", run, "--split", "test")):
        assert f"{run / name} is neither a file nor a folder" in mistake(*command)


def test_checkpoints_go_where_the_user_says(run, tmp_path, mistake, typed):
    """A run folder that names another place gets nothing written there, unless that place is the run's."""
    precious = tmp_path / "precious"
    (precious / "100").mkdir(parents=True)
    forge(run, checkpoints=str(precious))
    assert f"the checkpoints are in {precious}, where there is no run" in mistake("small.py", "--run-dir", run)
    assert [p.name for p in precious.rglob("*")] == ["100"]
    status, _, err = typed("small.py", "--run-dir", tmp_path / "new", "--checkpoint-dir", tmp_path / "mine")
    assert status == 0, err
    (tmp_path / "new/result.json").unlink()
    assert typed("small.py", "--run-dir", tmp_path / "new")[0] == 0  # negative control: its own


# ------------------------------------------------------------------------------------------------------------- code


OWN = FILE.replace("from lab.models.linear import Linear\n", "import flax.linen as nn\n").replace(
    "Linear(classes=2)", "Net(classes=2)").replace("\nexperiment =", '''

class Net(nn.Module):
    """A classifier of our own."""

    classes: int = 2

    @nn.compact
    def __call__(self, inputs, *, train, mask=None):
        return nn.Dense(self.classes, name="head")(inputs)

    def validate(self):
        pass

    def check(self, facts):
        pass


experiment =''')


@pytest.fixture(scope="module")
def own(place) -> Path:
    """own.py, which has a model of its own, and run-own/, where it was trained."""
    (place / "own.py").write_text(OWN)
    train_in(place, "own.py", "run-own")
    return place / "run-own"


def forge(run: Path, fits: bool = True, **changes) -> None:
    """Other values in experiment.json, with a digest that `fits` them or that is kept; `a__b` is b of a."""
    value = json.loads((run / "experiment.json").read_text())
    for path, new in changes.items():
        part, names = value, path.split("__")
        for name in names[:-1]:
            part = part[name]
        part[names[-1]] = new
    kept = value.pop("digest")
    (run / "experiment.json").write_text(json.dumps(sealed(value) if fits else value | {"digest": kept}))


FORGED = {
    "Popen": {"experiment__init_from": {"class": "subprocess.Popen", "args": ["touch", "MARKER"]}},
    "system": {"experiment__mesh__rules": [{"class": "os.system", "command": "touch MARKER"}]},
    "deep": {"experiment__mesh__rules": [["a", {"class": "os.system", "command": "touch MARKER"}]]},
    "exec": {"experiment__optim__lr": {"class": "builtins.exec", "source": "open('MARKER', 'w')"}},
    "plain field": {"experiment__steps": {"class": "os.system", "command": "touch MARKER"}},
    "the whole": {"experiment": {"class": "subprocess.Popen", "args": ["touch", "MARKER"]}},
    "main": {"experiment__model": {"class": "lab.commands.train.TrainOptions"}},
    "workers": {"experiment__model": {"class": "lab.study.run.workers.pin"}},
    "not a part": {"experiment__model": {"class": "lab.launch.tpu.Pod", "name": "x"}},
    "another part": {"experiment__init_from": {"class": "lab.optim.sgd.SGD", "lr": 0.1}},
    "of its own file": {"experiment__model": {"class": "user_small.Net", "classes": 2}},
    "a path": {"experiment__model": {"class": "../samples/x.Net"}},
    "no class": {"experiment__model": {"classes": 2}},
    "class of another type": {"experiment__model": {"class": 5}},
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_experiment_runs_nothing(run, tmp_path, mistake, monkeypatch, kind):
    """Whatever it says, with the attacker's file in every place where a file of the run could be."""
    import importlib

    real, marker, imported = importlib.import_module, tmp_path / "marker", []
    monkeypatch.setattr(importlib, "import_module", lambda name: real(name) if name.startswith("lab.commands.") else
                        imported.append(name) or sys.modules[name])
    forge(run, **json.loads(json.dumps(FORGED[kind]).replace("MARKER", str(marker))))
    (run / "samples").mkdir(exist_ok=True)
    for path in (run / "samples" / "x.py", run / "experiment.py"):
        path.write_text(f"open({str(marker)!r}, 'w')\n" + OWN)
    forge(run, file=str(run / "samples" / "x.py"))
    for command in (("evaluate", run), ("sample", run), ("predict", run, "--input", run / "experiment.json"),
                    ("small.py", "--run-dir", tmp_path / "new", "--init-from.run", run)):
        mistake(*command)
        assert not marker.exists(), command
    assert all(name.split(".")[1] in ("data", "models", "tasks", "optim", "schedules", "experiment", "pretrained")
               for name in imported)


def test_the_file_that_a_run_names_is_not_run(run, tmp_path, typed):
    """All its classes are lab's: there is nothing to run."""
    marker = tmp_path / "marker"
    (run / "x.py").write_text(f"open({str(marker)!r}, 'w')\n" + FILE)
    shutil.copy(run / "x.py", run / "experiment.py")
    forge(run, file=str(run / "x.py"))
    status, out, err = typed("evaluate", run)
    assert status == 0 and "accuracy" in out, err
    assert not marker.exists()
    assert typed("evaluate", run, "--experiment", run / "x.py")[0] == 0 and marker.exists()  # negative control


def test_a_run_of_a_file_of_ones_own(place, own, tmp_path, typed, mistake, monkeypatch):
    """Its copy is run where it was made; elsewhere, and where it was edited, the user must name a file."""
    run, marker = Path(shutil.copytree(own, tmp_path / "run")), tmp_path / "marker"
    sys.modules.pop("user_own", None)
    (place / "own.py").rename(place / "hidden.py")
    try:
        assert typed("evaluate", run)[0] == 0
        sys.modules.pop("user_own", None)
        edited = f"open({str(marker)!r}, 'w')\n" + (run / "experiment.py").read_text()
        (run / "experiment.py").write_text(edited)
        for command in (("evaluate", run), ("predict", run, "--input", "small.py"),
                        ("small.py", "--run-dir", tmp_path / "new", "--init-from.run", run)):
            assert "user_own.Net is not a class of lab" in (said := mistake(*command)) and "--experiment FILE" in said
        assert not marker.exists()
        assert "there is no such file" in mistake("evaluate", run, "--experiment", "gone.py")
        assert typed("evaluate", run, "--experiment", "hidden.py")[0] == 0  # under another name
        sys.modules.pop("user_own", None)
        shutil.copy(place / "hidden.py", run / "experiment.py")
        assert typed("evaluate", run)[0] == 0
        sys.modules.pop("user_own", None)
        monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))  # another machine
        assert "user_own.Net is not a class of lab" in mistake("evaluate", run)
        words = ("small.py", "--run-dir", tmp_path / "new", "--init-from.run", run)
        assert "user_own.Net is not a class of lab" in mistake(*words)
        assert typed(*words, "--init-from.experiment", "hidden.py")[0] == 0
    finally:
        (place / "hidden.py").rename(place / "own.py")


def test_a_study_of_an_experiment_that_defines_a_class(tmp_path):
    path = "experiments.census_groups.Diabetes"
    load_own(tmp_path, {"experiment": {"class": path}}, ROOT / "experiments" / "ablate_census_groups.py")
    assert find_class(path) and sys.modules["experiments.census_groups"].experiment.steps


def test_a_known_copy_does_not_import_the_folders_other_files(place, tmp_path, typed, monkeypatch):
    """An experiment that imports a file beside it imports the one that was there, not one in a foreign run folder."""
    home, marker = tmp_path / "home", tmp_path / "marker"
    home.mkdir()
    (home / "beside_it.py").write_text("CLASSES = 2\n")
    (home / "with_import.py").write_text(OWN.replace('"""A linear', '"""A', 1).replace(
        "import flax", "import sys\nfrom pathlib import Path\nsys.path.insert(0, str(Path(__file__).parent))\n"
        "from beside_it import CLASSES\nimport flax", 1))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert typed(home / "with_import.py", "--run-dir", tmp_path / "run")[0] == 0
    sys.modules.pop("user_with_import")
    sys.modules.pop("beside_it")
    (tmp_path / "run" / "beside_it.py").write_text(f"open({str(marker)!r}, 'w')\nCLASSES = 2\n")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(home)])
    status, _, err = typed("evaluate", tmp_path / "run")
    assert status == 0, err
    assert not marker.exists() and sys.modules.pop("beside_it").__file__ == str(home / "beside_it.py")


def test_a_forged_study_runs_nothing(run, tmp_path, typed):
    """The report of a study reads numbers only."""
    from tests.studies import make_study

    marker = tmp_path / "marker"
    forged = {"class": "os.system", "command": f"touch {marker}"}
    study = make_study(tmp_path / "study", {"rms": {"model.norm": forged}}, seeds=range(2))
    for cell in study.glob("cells/*/*"):
        shutil.copy(run / "experiment.json", cell)
        (cell / "experiment.py").write_text(f"open({str(marker)!r}, 'w')\n")
        forge(cell, experiment__init_from={"class": "subprocess.Popen", "args": ["touch", str(marker)]},
              file=str(cell / "experiment.py"))
    assert typed("report", study)[0] == 0
    assert not marker.exists()
