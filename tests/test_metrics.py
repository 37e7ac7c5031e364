"""Metrics: sums and weights, rows in a file that goes back with the run, and utilisation."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from lab.train import metrics
from lab.train.metrics import Rows, add, means, read_rows


def test_sums_are_added_and_divided_once():
    a, b = {"loss": (6.0, 2.0), "hit": (1.0, 2.0)}, {"loss": (1.0, 1.0), "hit": (1.0, 1.0)}
    total = add(add(None, a), b)
    assert means(total) == pytest.approx({"loss": 7 / 3, "hit": 2 / 3})
    mean_of_means = (means(a)["loss"] + means(b)["loss"]) / 2
    assert abs(mean_of_means - means(total)["loss"]) > 0.3  # negative control: another number


def test_means_of_device_arrays_and_of_nothing():
    found = means({"loss": (jnp.float32(3), jnp.float32(2)), "none": (jnp.float32(0), jnp.float32(0))})
    assert found["loss"] == 1.5 and math.isnan(found["none"])
    assert all(type(x) is float for x in found.values())


def test_utilisation(monkeypatch):
    assert metrics.mfu(1e12, 8) is None  # the peak of a CPU is not known
    monkeypatch.setitem(metrics.PEAK_FLOPS, jax.devices()[0].device_kind, 1e12)
    assert metrics.mfu(2e12, 4) == pytest.approx(2 / 4)


def rows_of(path, *steps):
    rows = Rows(path, last_step=0)
    for step in steps:
        rows.append({"step": step, "split": "train", "loss": 1 / step})
    rows.close()
    return path.read_bytes()


def test_rows_are_in_the_file_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = Rows(path, 0)
    rows.append({"step": 1, "loss": 0.1})
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows.rows == [{"step": 1, "loss": 0.1}]
    rows.sync()
    rows.close()
    assert read_rows(tmp_path / "none.jsonl") == []


def test_rows_go_back_with_the_run(tmp_path):
    whole = rows_of(tmp_path / "a.jsonl", 1, 2, 3, 4)
    path = tmp_path / "b.jsonl"
    rows_of(path, 1, 2, 3)
    with path.open("a") as file:
        file.write('{"step": 4, "spl')  # a crash in the middle of a line
    assert path.read_bytes() != whole
    rows = Rows(path, last_step=2)
    assert [row["step"] for row in rows.rows] == [1, 2]
    for step in (3, 4):
        rows.append({"step": step, "split": "train", "loss": 1 / step})
    rows.close()
    assert path.read_bytes() == whole


def test_rows_keep_every_bit(tmp_path):
    values = [0.1 + 0.2, 1e-45, 3.4028234663852886e38, float(jnp.float32(1) / 3)]
    rows = Rows(tmp_path / "m.jsonl", 0)
    for value in values:
        rows.append({"step": 1, "split": "train", "loss": value})
    rows.close()
    assert [row["loss"] for row in Rows(tmp_path / "m.jsonl", 1).rows] == values
