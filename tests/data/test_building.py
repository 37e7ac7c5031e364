"""Folders of the cache that several processes build at once, also where the file system has no locks."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lab.data.building import built
from lab.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_locks(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def check(folder: Path) -> str | None:
    try:
        text = (folder / "content").read_text()
    except OSError:
        return None
    return text if text.startswith("good") else None


def make(folder: Path) -> None:
    (folder / "content").write_text("good")


def test_a_folder_is_made_once_and_made_again_when_damaged(tmp_path):
    folder, calls = tmp_path / "x", []

    def counted(where):
        calls.append(where)
        make(where)

    assert [built(folder, check, counted, "working") for _ in range(2)] == ["good", "good"] and len(calls) == 1
    (folder / "content").write_text("bad")
    assert built(folder, check, counted, "working") == "good" and len(calls) == 2
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["x"]  # nothing is left over
    with pytest.raises(UserError, match="cannot be read: look at that disk"):
        built(tmp_path / "y", lambda where: None, make, "working")


def test_the_temporary_folder_of_a_living_process_stays_and_that_of_a_dead_one_goes(tmp_path, no_locks):
    """Also that of another machine, whose processes have numbers of their own, stays."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = socket.gethostname()
    owners = {f"{here}-{os.getpid()}-ab12": True, f"{here}-{os.getppid()}-ab12": True, f"{here}-{dead.pid}-ab12": False,
              f"{here}-{dead.pid}": False, f"other-{dead.pid}-ab12": True, f"{here}-2-{dead.pid}-ab12": True,
              f"{here}-b-{dead.pid}-ab12": True}
    for owner in owners:
        (tmp_path / f".tmp-x-{owner}").mkdir()
    built(tmp_path / "x", check, make, "working")
    assert {owner: (tmp_path / f".tmp-x-{owner}").exists() for owner in owners} == owners


def test_without_locks_two_that_build_at_once_both_end_well(tmp_path, no_locks):
    """Each finishes in a folder of its own; the second one's rename finds the first one's folder, and leaves it."""
    folder, both = tmp_path / "x", threading.Barrier(2, timeout=20)
    seen = []

    def slow(where):
        make(where)
        both.wait()  # both are in the act: with one name for both, or with cleaning up, one of them would now fail
        seen.append((where / "content").read_text())

    threads = [threading.Thread(target=lambda: seen.append(built(folder, check, slow, "working"))) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert seen == ["good"] * 4
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["x"]


def test_a_good_folder_that_another_process_just_finished_is_never_removed(tmp_path, no_locks):
    folder = tmp_path / "x"

    def beaten(where):
        make(where)
        folder.mkdir()
        (folder / "content").write_text("good, of the other one")

    assert built(folder, check, beaten, "working") == "good, of the other one"


def test_only_one_works_where_there_are_locks(tmp_path):
    calls = []

    def slow(where):
        calls.append(where)
        threading.Event().wait(0.2)
        make(where)

    threads = [threading.Thread(target=built, args=(tmp_path / "x", check, slow, "working")) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(calls) == 1


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path):
    def full(where):
        make(where)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="is full .*set LAB_CACHE .*another disk"):
        built(tmp_path / "x", check, full, "working", ", or less")
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []
