"""A benchmark as a study's metric: evaluated when a run ends, compared item by item."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lab.configuration.rebuild import from_json
from lab.configuration.values import to_json
from lab.errors import UserError
from lab.experiment import Evaluate
from lab.harness.value import Harness
from lab.study.report.items import item_interval, mcnemar, read_items
from lab.study.report.report import report
from lab.train.experiment_file import load
from tests.studies import make_study
from tests.test_cli import furnished
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

STUDY = '''"""A study by a benchmark."""
from dataclasses import replace
import small
from lab.harness.value import Harness
from lab.study.design.arms import Study

base = replace(small.experiment, steps=4, evaluate=replace(
    small.experiment.evaluate, every=0, harness=Harness(("blimp_causative",), data="data", limit=5)))
study = Study(base, {"slow": {"optim.lr.peak": 1e-5}}, seeds=2, metric="blimp_causative.acc", mode="max")
'''
SENTENCES = ["the pure function of a seed", "a step decides everything", "that the run computes", "of a step"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = furnished(tmp_path_factory.mktemp("benchmark"))
    (folder / "benchmark.py").write_text(STUDY)
    (folder / "data" / "blimp").mkdir(parents=True)
    rows = [{"sentence_good": text, "sentence_bad": text[::-1]} for text in SENTENCES * 2]
    (folder / "data" / "blimp" / "causative.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (5, 0), (7, 3), (40, 61), (12, 12)])
def test_mcnemar_is_scipys_sign_test(only_a, only_b):
    n = only_a + only_b
    assert mcnemar(only_a, only_b) == pytest.approx(stats.binomtest(only_a, n).pvalue if n else 1.0)


def test_the_interval_over_items_covers_the_truth():
    """Of 500 simulated benchmarks of 200 items; an interval of a tenth of the items would be far off."""
    draw, truth = np.random.default_rng(0), 0.04
    covers = []
    for _ in range(500):
        d = draw.choice([-1, -0.5, 0, 0.5, 1], 200, p=[0.06, 0.1, 0.62, 0.12, 0.1])
        low, high = item_interval(d, resamples=999)
        covers.append(low <= 0.05 <= high)
        assert low < d.mean() < high
    assert 0.92 <= np.mean(covers) <= 0.98, truth
    low, high = item_interval(d)
    half = 1.96 * d.std() / np.sqrt(200)
    assert (low, high) == pytest.approx((d.mean() - half, d.mean() + half), abs=0.01)
    assert item_interval(d) == (low, high)


def answer(run: Path, task: str, right: list[int], of: str = "none") -> None:
    folder = run / "evaluations"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"doc_id": i, "doc_hash": f"h{i}", "filter": of, "acc": float(x)}) for i, x in enumerate(right)]
    (folder / f"samples_{task}.jsonl").write_text("\n".join(lines))
    (folder / "results-x.json").write_text(json.dumps({"group_subtasks": {"group": ["one", "two"], "one": []}}))


def test_items_of_tasks_groups_and_filters(tmp_path):
    answer(tmp_path, "one", [1, 0])
    answer(tmp_path, "two", [1, 1, 0])
    answer(tmp_path, "gsm8k", [1], of="strict-match")
    assert read_items(tmp_path, "one.acc") == {"one 0 h0": 1.0, "one 1 h1": 0.0}
    assert sorted(read_items(tmp_path, "group.acc").values()) == [0, 0, 1, 1, 1]
    assert read_items(tmp_path, "gsm8k.acc,strict-match") == {"gsm8k 0 h0": 1.0}
    assert not read_items(tmp_path, "gsm8k.acc") and not read_items(tmp_path, "loss")
    answer(tmp_path, "maths_0.5k_(hard)", [1, 0])
    odd = tmp_path / "evaluations" / "samples_maths_0.5k_(hard).jsonl"
    odd.rename(odd.with_name("samples_maths_0.5k__hard_.jsonl"))  # as `lab.harness.run.write` names it
    assert len(read_items(tmp_path, "maths_0.5k_(hard).acc")) == 2
    text = json.dumps({"doc": "a\u2028b\x85c", "doc_id": 0, "doc_hash": "h", "filter": "none", "acc": 1},
                      ensure_ascii=False)  # separators of str.splitlines
    (tmp_path / "evaluations" / "samples_two.jsonl").write_text(f"{text}\n", "utf-8")
    assert read_items(tmp_path, "two.acc") == {"two 0 h": 1.0}
    (tmp_path / "evaluations" / "samples_one.jsonl").write_text("{")
    with pytest.raises(UserError, match="samples_one.jsonl is damaged"):
        read_items(tmp_path, "one.acc")


def test_a_report_pairs_the_items(tmp_path):
    folder = make_study(tmp_path / "s", {"a": {"model.norm": "rmsnorm"}}, seeds=range(2), metric="one.acc", mode="max")
    truth = {("base", 0): [1, 0, 0, 0, 1, 0], ("base", 1): [1, 0, 0, 1, 1, 0], ("a", 0): [1, 1, 1, 1, 0, 0],
             ("a", 1): [1, 1, 1, 1, 1, 1]}
    for (arm, seed), right in truth.items():
        run = folder / "cells" / arm / str(seed)
        answer(run, "one", right)
        result = json.loads((run / "result.json").read_text())
        (run / "result.json").write_text(json.dumps(result | {"harness": {"one.acc": np.mean(right)}}))
    text = (report([folder], quiet=True) / "report.md").read_text()
    row = next(line for line in text.splitlines() if "3:1" in line)
    # Seed 0: items 1, 2, 3 by a alone, 4 by the base alone; seed 1: 1, 2 and 5 by a alone.
    assert [part.strip() for part in row.strip("|").split("|")] == [
        "a", "2", "6", "0.4167", row.split("|")[5].strip(), "3:1, 3:0", "0.62, 0.25"]
    assert "McNemar" in text and "harness.one.acc" in (folder / "results.csv").read_text().splitlines()[0]
    plain = make_study(tmp_path / "p", {"a": {"model.norm": "rmsnorm"}}, seeds=range(2))
    assert "McNemar" not in (report([plain], quiet=True) / "report.md").read_text()


def test_a_run_without_a_harness_keeps_its_fingerprint(place):
    experiment = load(place / "small.py").experiment
    other = load(place / "benchmark.py").base
    assert "harness" not in json.dumps(experiment.identity()) and "blimp_causative" in json.dumps(other.identity())
    assert Evaluate().harness is None
    assert from_json(json.loads(json.dumps(to_json(other.evaluate)))) == other.evaluate  # as a run folder has it
    with pytest.raises(UserError, match="evaluates nothing"):
        Harness(()).validate()
    with pytest.raises(UserError, match="--limit must be at least 1"):
        Harness(("blimp",), limit=0).validate()


@pytest.mark.usefixtures("compiled_in_haste")
@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_a_study_by_a_benchmark(typed, mistake, place, monkeypatch, mode):
    pytest.importorskip("lm_eval", reason="LAB_EXTRAS=lm-eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, out, err = typed("benchmark.py", "--studies", mode, "--execution", mode)
    assert status == 0, err
    run = next((place / mode).glob("*/cells/slow/1"))
    result = json.loads((run / "result.json").read_text())
    items = [json.loads(line) for line in (run / "evaluations" / "samples_blimp_causative.jsonl").open()]
    assert len(items) == 5 and result["harness"]["blimp_causative.acc"] == np.mean([item["acc"] for item in items])
    text = next((place / mode).glob("*/report.md")).read_text()
    assert "paired by item" in text and "blimp_causative.acc of the validation split (higher is better)" in text
    if mode == "loop":
        wrong = STUDY.replace('metric="blimp_causative.acc"', 'metric="blimp_causative.ac"')
        (place / "wrong.py").write_text(wrong)
        assert "Perhaps you meant blimp_causative.acc." in mistake("wrong.py", "--studies", "none")
        (place / "unknown.py").write_text(STUDY.replace("blimp_causative", "blimp_cau"))
        assert "lm-eval has no task 'blimp_cau'" in mistake("unknown.py", "--studies", "none")
        (place / "early.py").write_text(STUDY.partition("study =")[0].replace("blimp_causative", "hellaswag").replace(
            "base =", "experiment ="))
        status, out, err = typed("early.py", "--run-dir", "early")
        assert status == 2 and "download the data set Rowan/hellaswag" in err, err
        assert not (place / "early" / "metrics.jsonl").exists()  # before the first step
