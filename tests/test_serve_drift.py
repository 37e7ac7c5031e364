"""Drift on /metrics: the population stability index of what is asked and answered against the training data."""

import json
import math

import numpy as np
import pytest

pytest.importorskip("starlette", reason="LAB_EXTRAS=serve")

from starlette.testclient import TestClient

from lab.commands.serve_models import service_of
from lab.data.statistics import bins_of, counts, stability
from lab.serve import app, drift
from lab.serve.requests import Limits
from lab.train.fitted import statistics_of
from tests.test_predict import place  # noqa: F401 (a fixture)
from tests.test_serve_metrics import counts as counted
from tests.test_serve_predict import OPTIONS
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)


def test_the_index_by_hand():
    bins = {"values": ["a", "b"], "shares": [0.5, 0.5, 0.0]}
    # 0.3 ln 1.6 - 0.3 ln 0.4, and a bin that is empty in both
    assert stability(bins, ["a"] * 8 + ["b"] * 2) == pytest.approx(0.3 * math.log(1.6) - 0.3 * math.log(0.4), abs=1e-12)
    assert stability(bins, ["a", "b"]) == 0
    # A new value: shares 0.4, 0.4, 0.2; a share of 0 counts as 1e-4.
    new = 2 * (-0.1) * math.log(0.8) + (0.2 - 1e-4) * math.log(0.2 / 1e-4)
    assert stability(bins, ["a", "b"] * 2 + ["c"]) == pytest.approx(new, abs=1e-12)
    numbers = {"edges": [1.0, 2.0], "shares": [0.25, 0.5, 0.25]}
    assert counts(numbers, [0, 1, 1.5, 2, 3, math.nan, None]).tolist() == [2, 2, 3]
    assert stability(numbers, [0, 1.5, 1.7, 9]) == pytest.approx(0, abs=1e-12)


def test_bins_have_equal_shares():
    rng = np.random.default_rng(0)
    bins = bins_of(rng.normal(size=10_000).tolist())
    assert len(bins["edges"]) == 9 and bins["shares"] == pytest.approx([0.1] * 10, abs=1e-3)
    assert stability(bins, rng.normal(size=1000).tolist()) < 0.03
    assert stability(bins, rng.normal(1, size=1000).tolist()) > 0.5
    many = bins_of([f"v{i}" for i in range(200)])
    assert len(many["values"]) == 50 and many["shares"][-1] == pytest.approx(0.75)
    assert bins_of([3.0] * 5) == {"edges": [3.0], "shares": [1.0, 0.0]} and json.dumps(many)


def test_a_shift_is_seen(place, monkeypatch):  # noqa: F811
    monkeypatch.setattr(drift, "FEWEST", 20)
    expected = statistics_of(place / "sales")
    assert set(expected) == {"size", "town", "prediction"}
    # Records with the shares of training; then others.
    rng = np.random.default_rng(0)
    edges, shares = expected["size"]["edges"], expected["size"]["shares"]
    inside = np.convolve([edges[0] - 1, *edges, edges[-1] + 1], [0.5, 0.5], "valid")
    towns = rng.choice(expected["town"]["values"], 400, p=expected["town"]["shares"][:-1])
    usual = [{"size": round(float(inside[i]), 2), "town": town} for i, town in zip(
        rng.choice(len(shares), 400, p=shares), towns, strict=True)]
    found = {}
    for name, records in (("usual", usual), ("shifted", [{"size": 10 * one["size"], "town": "Zug"} for one in usual])):
        service = service_of(str(place / "sales"), OPTIONS, None, False, None)
        service.start()
        assert service.worker.ready.wait(120)
        with TestClient(app.build(service, limits=Limits())) as client:
            assert math.isnan(counted(client)["lab_drift", ("feature", "size")])
            assert client.post("/v1/predict", json={"records": records}).status_code == 200
            found[name] = {key[1][1]: value for key, value in counted(client).items() if key[0] == "lab_drift"}
        assert service.close(5)
    assert found["usual"]["size"] < 0.1 and found["usual"]["town"] < 0.1
    assert found["shifted"]["size"] > 0.25 and found["shifted"]["town"] > 0.25
    assert found["shifted"]["prediction"] > found["usual"]["prediction"]
