"""`./launch.sh promote`: two runs on the same records, the link, its log, and a server that follows the link."""

import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

import lab
from experiments import logistic_regression
from lab.commands.promote import compare, move
from lab.errors import UserError
from lab.experiment import Checkpoint, Evaluate
from lab.optim import SGD, Constant
from lab.train.evaluation import by_record
from lab.train.restore import open_run
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

BASE = replace(logistic_regression.local, optim=SGD(lr=Constant(0.1)), evaluate=Evaluate(every=0),
               checkpoint=Checkpoint(every=0), batch=64, steps_per_call=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run that has learned nothing, a good one, one like it, and one on other records."""
    folder = tmp_path_factory.mktemp("promote")
    for name, experiment in (("bad", replace(BASE, steps=1, optim=SGD(lr=Constant(1e-6)))),
                             ("good", replace(BASE, steps=60)), ("near", replace(BASE, steps=50)),
                             ("other", replace(BASE, steps=1, data=replace(BASE.data, validation=0.2)))):
        lab.fit(experiment, folder / name, quiet=True)
    return folder


@pytest.fixture
def promoted(tmp_path, typed):
    """Types the command in the folder of the runs; (status, what it printed)."""
    return lambda *words: typed("promote", *words, "--link", tmp_path / "served")[:2]


def rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "served.jsonl").read_text().splitlines()]


def test_sums_by_record_are_those_of_an_evaluation(place):
    experiment, program, state = open_run(place / "good")
    data = experiment.data.load()
    found = by_record(program, state, data, "validation")
    whole = json.loads((place / "good" / "result.json").read_text())["final"]
    for name, (sums, weights) in found.items():
        assert sums.shape == weights.shape == (len(data.validation),)
        assert sums.sum() / weights.sum() == pytest.approx(whole[name], rel=1e-6)
    assert set(np.unique(found["accuracy"][0])) == {0, 1}
    assert len(by_record(program, state, data, "validation", 10)["loss"][0]) == 10


def test_a_better_run_is_promoted_and_a_worse_one_not(promoted, place, tmp_path):
    link = tmp_path / "served"
    status, out = promoted("good", "--over", "bad", "--metric", "loss")
    assert status == 0 and "Promoted" in out and link.resolve() == place / "good"
    status, out = promoted("bad", "--over", str(link), "--metric", "loss")
    assert status == 1 and "Not promoted" in out and link.resolve() == place / "good"
    first, second = rows(tmp_path)
    assert (first["promoted"], second["promoted"]) == (True, False)
    assert first["served"] == second["served"] == str(place / "good")
    assert first["difference"] == -second["difference"] > 0 and first["low"] > 0 > second["high"]
    status, _ = promoted("bad", "--over", "good", "--metric", "loss", "--margin", "1")
    assert status == 0 and link.resolve() == place / "bad"
    status, out = promoted("near", "--over", "bad", "--metric", "accuracy", "--margin", "0")
    assert status == 1 and "interval 0.000000 to 0.000000" in out  # the same answers are not better
    assert not [p for p in tmp_path.iterdir() if p.name not in ("served", "served.jsonl")]


def test_the_interval_is_that_of_the_mean_of_differences(place):
    found = compare(place / "good", place / "near", "loss", None, "validation", None, False)
    losses = []
    for name in ("good", "near"):
        experiment, program, state = open_run(place / name)
        losses.append(by_record(program, state, experiment.data.load(), "validation")["loss"][0])
    each = losses[1] - losses[0]
    assert found.mode == "min" and found.difference == pytest.approx(each.mean())
    draw = np.random.default_rng(1).integers(0, len(each), (4000, len(each)))
    assert found.interval == pytest.approx(np.quantile(each[draw].mean(1), [0.025, 0.975]), rel=0.1)
    apart = np.quantile(losses[1][draw].mean(1) - losses[0][draw[::-1]].mean(1), [0.025, 0.975])
    assert np.ptp(apart) > 3 * np.ptp(found.interval)  # negative control: not paired


@pytest.mark.parametrize(("words", "said"), [
    (("other", "--over", "bad"), "different data"),
    (("good", "--over", "bad", "--metric", "accurcy"), "Perhaps you meant accuracy"),
    (("good", "--over", "good"), "the same run"),
    (("good", "--over", "nowhere"), "nowhere"),
    (("good", "--over", "bad", "--margin", "-1"), "--margin"),
    (("good", "--over", "bad", "--records", "1"), "--records"),
])
def test_mistakes(place, mistake, words, said):
    assert said in mistake("promote", *words)
    assert not (place / "served").exists()


def test_only_what_is_served_is_compared_with(place, tmp_path, mistake):
    link = tmp_path / "served"
    link.symlink_to(place / "other")
    words = ("promote", "good", "--over", "bad", "--link", link)
    assert f"compare with what is served, --over {link}" in mistake(*words)
    with pytest.raises(UserError, match="meanwhile"):
        move(link, place / "good", place / "bad")
    link.unlink()
    link.mkdir()
    assert "is not a link" in mistake(*words)


def test_a_server_follows_the_link_without_losing_a_request(place, tmp_path, monkeypatch):
    pytest.importorskip("starlette", reason="LAB_EXTRAS=serve")
    pytest.importorskip("uvicorn", reason="LAB_EXTRAS=serve")
    import httpx

    from lab.commands.serve_models import Options, service_of
    from lab.serve import app, switch
    from lab.serve.requests import Limits
    from tests.launching import wait_for
    from tests.serving import live

    monkeypatch.setattr(switch, "EVERY", 0.05)
    link = tmp_path / "served"
    move(link, place / "bad", None)
    options = Options("served", 2, 64, 64, 60.0)
    service = switch.Switch(link, lambda place: service_of(str(place), options, None, False, None),
                            lambda service: app.build(service, limits=Limits()))
    experiment, _, _ = open_run(place / "good")
    record = {feature.name: 1.0 for feature in experiment.data.load().features}
    seen, stop = [], threading.Event()

    def ask(port):
        with httpx.Client() as client:
            while not stop.is_set():
                found = client.post(f"http://127.0.0.1:{port}/v1/predict", json={"records": [record]}, timeout=60)
                seen.append((found.status_code, json.dumps(found.json())))

    service.start()
    wait_for(lambda: service.ready, 60, "compilation")
    with live(service, service) as port:
        threads = [threading.Thread(target=ask, args=(port,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for target, before in (("good", "bad"), ("nowhere", "good"), ("bad", "nowhere")):
                move(link, place / target, (place / before).resolve())
                if target == "good":
                    wait_for(lambda: len({text for _, text in seen}) == 2, 60, "the other model's answer")
                time.sleep(0.3)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert service.close(5)
    assert {status for status, _ in seen} == {200} and len(seen) > 20
    assert len({text for _, text in seen}) == 2  # the answers of both runs
