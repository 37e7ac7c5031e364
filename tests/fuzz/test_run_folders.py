"""Spoiled run folders: the same command ends with the same result or in a sentence; never in a traceback, and never
silently with another result.

    LAB_FUZZ=10 ./launch.sh tests tests/fuzz/test_run_folders.py    # ten times as many, others than in CI
"""

from __future__ import annotations

import json
import os
import random
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.errors import UserError, explain
from lab.train import restore
from lab.train.description import finished
from tests.test_loop import go, interrupt, program_of, quick, reference  # noqa: F401 (fixtures)
from tests.test_step import compiled_in_haste, toy  # noqa: F401 (a fixture)

FOLDERS = 40
TIMES = int(os.environ.get("LAB_FUZZ", "1"))
VALUES = [None, True, 0, -1, 7, 2**70, 1e400, float("nan"), "", "x", [], [1], {}, {"a": {"b": None}}]
TEXTS = [b"", b"{}", b"[]", b"[1]", b"5", b"null", b'"text"', b"\xff\xfe\x00", b"{" * 3000, b"[" * 100_000,
         b"\x00" * 64]
LINES = [b"12\n", b"{}\n", b'{"step": "1", "split": "train"}\n', b"\xff\n", b"\n"]
# What a run may say when it goes on from less than it had.
SAID = ("The run folder is new", "starting again from step 0", "is damaged")


# -------------------------------------------------------------------------------------------------- what is spoiled


def spoil(chance: random.Random, folder: Path) -> str:
    """Changes one thing in a run folder, and says what."""
    everything = sorted(p for p in folder.rglob("*"))
    top = [p for p in everything if p.parent == folder]
    path = chance.choice(top if chance.random() < 0.6 else everything)
    ways = [gone, other_kind, rubbish, truncated, flipped, stranger]
    if path.suffix == ".json" or path.name == "metadata":
        ways += [other_value] * 4
    if path.suffix == ".jsonl":
        ways += [other_rows] * 6
    way = chance.choice(ways)
    return f"{path.relative_to(folder)}: {way.__name__} {way(chance, path) or ''}"


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def gone(chance: random.Random, path: Path) -> None:
    remove(path)


def other_kind(chance: random.Random, path: Path) -> None:
    """A folder where a file was, and the other way round."""
    was_folder = path.is_dir()
    remove(path)
    path.write_bytes(b"a file") if was_folder else path.mkdir()


def rubbish(chance: random.Random, path: Path) -> str:
    text = chance.choice(TEXTS)
    if path.is_dir():
        path = path / "rubbish"
    path.write_bytes(text)
    return repr(text[:10])


def truncated(chance: random.Random, path: Path) -> None:
    if path.is_file():
        content = path.read_bytes()
        path.write_bytes(content[:chance.randrange(len(content) + 1)])


def flipped(chance: random.Random, path: Path) -> None:
    if path.is_file() and path.stat().st_size:
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)


def stranger(chance: random.Random, path: Path) -> str:
    """Something that is there already."""
    name = chance.choice(["damaged-checkpoint-10", "damaged-checkpoint-8", "plots", "samples", "logs", "tensorboard",
                          "diverged.json", "pretrained.json", "tokenizer.json", "environment-2.json", "evaluation-x",
                          "checkpoints/9", "checkpoints/11", "checkpoints/12", "checkpoints/x", "checkpoints/-1"])
    place = next(p for p in (path, *path.parents) if (p / "experiment.json").exists() or p.name == "run") / name
    if not place.exists() and place.parent.is_dir():
        place.mkdir() if chance.random() < 0.5 else place.write_text("a file")
    return name


def other_value(chance: random.Random, path: Path) -> str:
    """One value of a JSON file, at any depth, is another one, or is missing, or was not there."""
    if not path.is_file():
        return "(no file)"
    try:
        value = json.loads(path.read_text())
        assert isinstance(value, dict) and value
    except (ValueError, AssertionError):  # spoiled already
        return rubbish(chance, path)
    part, where = value, ""
    while True:
        name = chance.choice(sorted(part) if isinstance(part, dict) else range(len(part)))
        where += f".{name}"
        if not isinstance(part[name], dict | list) or not part[name] or chance.random() < 0.3:
            break
        part = part[name]
    if chance.random() < 0.25:
        del part[name]
    elif isinstance(part[name], int | float) and chance.random() < 0.5:
        part[name] = part[name] + chance.choice([1, -1, 0.5])
    else:
        part[name] = chance.choice(VALUES)
    path.write_text(json.dumps(value))
    return where


def other_rows(chance: random.Random, path: Path) -> str:
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    if not lines:
        return "(no rows)"
    i, how = chance.randrange(len(lines)), chance.randrange(6)
    if how == 0:
        del lines[i]
    elif how == 1:
        lines.insert(i, chance.choice([*LINES, lines[i]]))
    elif how == 2:
        lines = lines[:i]
    elif how == 3:
        j = chance.randrange(len(lines))
        lines[i], lines[j] = lines[j], lines[i]
    else:
        row = json.loads(lines[i]) if lines[i].startswith(b"{\"step") else {"step": 1}
        name = chance.choice(sorted(row))
        row[name] = row[name] + 1 if isinstance(row[name], int | float) and how == 4 else chance.choice(VALUES)
        lines[i] = json.dumps(row).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    return f"row {i}, way {how}"


# ------------------------------------------------------------------------------------------------------- what follows


def train(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """What the same command does: the result, and what was said."""
    if result := finished(folder):
        return result, ""
    status, said = go(toy(), folder)
    assert status == 0, said
    return finished(folder), said


def look(folder: Path) -> tuple[None, str]:
    """What eval, sample and predict begin with."""
    best = len(list(folder.glob("environment*"))) % 2 == 0
    restore.open_run(folder, best=best)
    return None, ""


def outcome(action: Callable[[Path], tuple[dict[str, Any] | None, str]], folder: Path) -> tuple[Any, str]:
    """(result or None, what was said); the sentence of a mistake counts as said."""
    try:
        return action(folder)
    except Exception as e:
        explained = explain(e)
        assert explained is not None, "".join(traceback.format_exception(e))
        status, sentence = explained
        assert status == 2 and sentence and "Traceback" not in sentence and len(sentence) < 700, sentence
        return None, sentence


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, quick: None) -> Path:  # noqa: F811
    """A run that was stopped after step 10. Not to be written to."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    assert go(toy(), folder, 9, interrupt())[0] == 75
    return folder


def check(folder: Path, whole: dict[str, Any], spoiled: str) -> None:
    result, said = outcome(train, folder)
    if result is None:
        assert said, spoiled
        return
    names = ("steps", "stopped_early", "final", "best")
    same = all(json.dumps(result[name]) == json.dumps(whole[name]) for name in names)
    assert same or any(words in said for words in SAID), (spoiled, result, said)
    again, said = outcome(train, folder)  # and the folder is in order now
    assert again is not None and again["final"] == result["final"], (spoiled, said)


@pytest.mark.parametrize("part", range(4))
def test_spoiled_run_folders(tmp_path, interrupted, reference, monkeypatch, part):  # noqa: F811
    monkeypatch.setattr(restore, "Program", program_of)
    whole = finished(reference)
    for number in range(part, FOLDERS * TIMES, 4):
        chance = random.Random(f"{TIMES} {number}")
        folder = Path(shutil.copytree(reference if number % 3 == 0 else interrupted, tmp_path / "run"))
        spoiled = f"{number} " + "; ".join(spoil(chance, folder) for _ in range(chance.choice([1, 1, 2])))
        try:
            if chance.random() < 0.3:
                outcome(look, folder)
            check(folder, whole, spoiled)
        except Exception as e:
            e.add_note(spoiled)
            raise
        shutil.rmtree(tmp_path / "run")


def test_the_fuzzer_sees_what_it_looks_for(tmp_path, reference, monkeypatch):  # noqa: F811
    """The negative control: a result that changes without a word, and a traceback."""
    from lab.train import description

    folder = Path(shutil.copytree(reference, tmp_path / "run"))
    path = folder / "result.json"
    value = json.loads(path.read_text())
    value["final"]["loss"] += 1
    path.write_text(json.dumps(value))
    assert outcome(train, folder)[0] is None  # it is a sentence
    real = description.digest
    monkeypatch.setattr(description, "digest", lambda found: value["digest"] if "final" in found else real(found))
    with pytest.raises(AssertionError, match="a loss was changed"):
        check(folder, finished(reference), "a loss was changed")
    whole = finished(reference)
    monkeypatch.setattr(description, "read_json", lambda path, shape=None: [][0])
    with pytest.raises(AssertionError, match="Traceback"):
        check(folder, whole, "a traceback")


def test_sentences_are_those_of_mistakes():
    assert explain(UserError("x")) == (2, "x") and explain(IndexError("x")) is None
