"""Folders that somebody else made: no code of theirs runs, and nothing is written through their links."""

import os
import shutil
from pathlib import Path

import pytest

from lab.files import make_folder, open_file, replace_file
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)
from tests.test_study import FILE


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with small.py, and run/, where it was trained."""
    from lab.__main__ import main

    folder, before = tmp_path_factory.mktemp("foreign"), os.getcwd()
    (folder / "small.py").write_text(FILE)
    os.chdir(folder)
    try:
        assert main(["small.py", "--run-dir", "run"]) == 0
    finally:
        os.chdir(before)
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
    for command in (("small.py", "--run-dir", run), ("eval", run)):
        assert str(link) in mistake(*command)
        assert precious.read_text() == "precious"


@pytest.mark.parametrize("name", ["plots", "checkpoints", "logs", "evaluation-test-4", "samples"])
def test_no_folder_is_written_through_a_link(run, tmp_path, mistake, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).symlink_to(outside)
    assert f"{run / name} is a symbolic link" in mistake("small.py", "--run-dir", run)
    mistake("eval", run)
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
