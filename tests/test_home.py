"""A leading ~ is the home folder in every path: of a flag, after its = too, and in an experiment's own fields."""

import gzip
import re
import struct
from pathlib import Path

import pytest

from lab.data.images.idx import Idx
from lab.data.images.sources import ImageFolder
from lab.data.messages.sources import TextFolder
from lab.data.saved import Saved
from lab.data.tables.bundled import Sklearn
from lab.data.tables.csv_files import Csv
from lab.data.tables.tables import Table
from lab.data.text.sources import TextFiles, TfdsText
from lab.data.tokenizers import GPT2
from lab.errors import UserError
from lab.files import expand_home, user_path
from lab.pretrained import Pretrained, WordVectors
from lab.train.restore import initial_arrays
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_words_of_a_command_line(home):
    words = ["x.py", "--run-dir", "~/a", "--run-dir=~/a", "--path=~", "~/file", "--x=b/~/c", "a~", "~no-body/x"]
    assert expand_home(words) == ["x.py", "--run-dir", f"{home}/a", f"--run-dir={home}/a", f"--path={home}",
                                  f"{home}/file", "--x=b/~/c", "a~", "~no-body/x"]
    text = ["sample", "~/run", "--prompt", "~/x", "~", "--prompt=~/y", "--x", "~/z"]
    assert expand_home(text) == ["sample", f"{home}/run", "--prompt", "~/x", "~", "--prompt=~/y", "--x", f"{home}/z"]
    assert user_path("~no-body/x") == Path("~no-body/x")  # no such person: the name as it is


@pytest.fixture
def place(tmp_path):
    return tmp_path / "elsewhere"


def test_a_run_and_its_predictions(home, place, monkeypatch, request):
    """The whole command line, as a shell leaves ~ after an = and within quotation marks."""
    place.mkdir()
    typed = request.getfixturevalue("typed")
    status, out, err = typed("experiments/linear_regression.py", "--local", "--run-dir=~/run")
    assert status == 0 and (home / "run" / "result.json").exists(), (out, err)
    (home / "new.csv").write_text((home / "run" / "worst.csv").read_text())
    status, out, err = typed("predict", "~/run", "--input=~/new.csv", "--output=~/p.csv")
    assert status == 0 and (home / "p.csv").exists(), (out, err)
    assert list(place.iterdir()) == []  # and no folder named ~


def test_the_fields_of_an_experiment(home):
    """Each reads its file from the home folder, or says where it looked."""
    (home / "t.csv").write_text("x,y\n" + "".join(f"{i}.5,{i / 7:.3f}\n" for i in range(40)))
    assert len(Table(Csv("~/t.csv", "y", test="~/t.csv")).load().test) == 40
    (home / "a.txt").write_text("text")
    assert TextFiles("~/*.txt").open().stored_bytes() == 4 and TextFiles("~/a.txt").open().stored_bytes() == 4
    for name in ("a", "b"):
        (home / "folder" / name).mkdir(parents=True)
        (home / "folder" / name / "1.png").write_text("x")
    assert len(ImageFolder("~/folder").open().splits["train"]) == 2
    assert len(TextFolder("~/folder").load().splits["train"][0]) == 2
    (home / "m").mkdir()
    for name, shape in (("train-images-idx3-ubyte.gz", (2, 2, 2)), ("train-labels-idx1-ubyte.gz", (2,))):
        size = 8 if len(shape) == 3 else 2
        raw = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(size)
        (home / "m" / name).write_bytes(gzip.compress(raw))
    assert len(Idx("~/m").open().splits["train"]) == 2
    for source in (Saved("~/no/run").fit, GPT2("~/no").identity, TfdsText("x", "~/no").open):
        with pytest.raises(UserError, match=re.escape(str(home))):
            source(*([None, 0] if source.__name__ == "fit" else []))
    with pytest.raises(UserError, match="is not a copy of"):
        Sklearn("california_housing", "~/folder").load()
    with pytest.raises(UserError, match=f"{home}/run is not a run folder"):
        initial_arrays(Pretrained("~/run"), None, None)


def test_no_path_is_opened_without_it():
    """One mechanism: whoever takes a path from a person calls `user_path`, and opens no field that is one otherwise."""
    for path in (ROOT / "lab").rglob("*.py"):
        source = path.read_text()
        assert (
            path.name
            in ("files.py", "prepare.py", "accelerator.py", "existing.py", "variables.py", "build.py", "bootstrap.py")
            or "expanduser" not in source
        ), path
        assert not re.search(r"(?<!user_)(\bPath|\bopen)\(self\.(path|folder|pattern|run|data_dir)\b", source), path
    assert WordVectors("x").path == "x"
