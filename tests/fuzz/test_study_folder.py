"""A hundred damaged study folders: the report says what is damaged, or is right; never a traceback.

    LAB_FUZZ=20 ./launch.sh tests tests/fuzz/test_study_folder.py    # twenty times as many
"""

from __future__ import annotations

import json
import os
import random
import shutil
import traceback
from pathlib import Path
from typing import Any

import pytest

from lab.errors import UserError
from lab.study.report import pictures
from lab.study.report.report import report
from tests.studies import make_study, write

FOLDERS = 100 * int(os.environ.get("LAB_FUZZ", "1"))
VALUES = (None, True, 0, -1, 2**70, 1.5, float("nan"), "", "x", [], [1], {}, {"a": 1}, [[]], "\u2028")


def damage(dice: random.Random, folder: Path) -> str:
    """Damages one file of a study folder; says how."""
    path = dice.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    how = dice.choice(("value", "value", "value", "lack", "lack", "cut", "byte", "whole", "gone", "folder", "double"))
    text = path.read_text()
    if how in ("value", "lack"):
        lines = text.splitlines()
        at = dice.randrange(len(lines)) if path.suffix == ".jsonl" else 0
        whole = json.loads(lines[at] if path.suffix == ".jsonl" else text)
        key = _inside(dice, whole, None if how == "lack" else dice.choice(VALUES))
        lines[at:] = [json.dumps(whole), *lines[at + 1:]] if path.suffix == ".jsonl" else [json.dumps(whole)]
        path.write_text("\n".join(lines) + "\n")
        how = f"{how} of {key}"
    elif how == "cut":
        path.write_text(text[:dice.randrange(len(text) + 1)])
    elif how == "byte":
        raw = bytearray(text.encode())
        raw[dice.randrange(len(raw))] = dice.randrange(256)
        path.write_bytes(bytes(raw))
    elif how == "whole":
        path.write_text(json.dumps(dice.choice(VALUES)))
    elif how == "double":
        path.write_text(text + text)
    else:
        path.unlink()
        if how == "folder":
            path.mkdir()
    return f"{path.relative_to(folder)}: {how}"


def _inside(dice: random.Random, whole: Any, value: Any) -> str:
    """Replaces something at any depth, or takes it out where `value` is None."""
    part, name = whole, ""
    while isinstance(part, dict | list) and part:
        key = dice.choice(sorted(part)) if isinstance(part, dict) else dice.randrange(len(part))
        inner, name = part[key], f"{name}.{key}"
        if not (isinstance(inner, dict | list) and inner and dice.random() < 0.6):
            if value is None:
                del part[key]
            else:
                part[key] = value
            return name
        part = inner
    return name


def test_no_damaged_study_ends_in_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pictures, "png", lambda figure: b"")
    cross = {"rms": {"model.norm": "rmsnorm"}, "lr": {"optim.lr.peak": 1e-4},
             "both": {"model.norm": "rmsnorm", "optim.lr.peak": 1e-4}}
    factors = {"model.norm": ["layernorm", "rmsnorm"], "optim.lr.peak": [1e-3, 1e-4]}
    good = make_study(tmp_path / "good", cross, seeds=range(3), design={"kind": "grid", "factors": factors})
    names = [f"{arm}-{seed}" for arm in cross for seed in (0, 1)]
    units = [{"name": name, "cells": [name], "numbers": [], "group": 0} for name in names]
    write(good / "plan.json", {"how": "loop", "steps_per_call": 1, "seconds": {}, "workers": 1, "units": units})
    report([good], quiet=True)
    for made in ("pictures", "report.md", "report.html", "results.csv"):
        shutil.rmtree(good / made) if (good / made).is_dir() else (good / made).unlink()
    faults, refused = {}, 0
    for number in range(FOLDERS):
        dice, folder = random.Random(number), tmp_path / "study"
        shutil.copytree(good, folder)
        said = damage(dice, folder)
        try:
            report([folder], quiet=True)
        except UserError as e:
            refused += 1
            assert len(str(e)) < 1_000, (number, said, e)
        except Exception as e:
            last = [f for f in traceback.extract_tb(e.__traceback__) if "/lab/" in f.filename][-1]
            faults.setdefault((type(e).__name__, last.filename, last.lineno), (number, said, str(e)[:200]))
        shutil.rmtree(folder)
    assert not faults, "\n".join(f"{kind}: {what}" for kind, what in faults.items())
    assert FOLDERS / 20 < refused < FOLDERS, refused  # not everything is noticed, since much is only shown
