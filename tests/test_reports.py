"""What is said about a model when it has been trained: the test split, and the commands `evaluate` and `predict`."""

import csv
import functools
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
from PIL import Image

from lab.data.dataset import Dataset
from lab.data.pipeline import Arrays
from lab.data.tables.bundled import Sklearn
from lab.data.tables.table_data import TableData
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.tasks.base import EvalResult
from lab.train import ending, loop, restore
from lab.train.evaluation import predict
from lab.train.experiment_file import load
from lab.train.metrics import read_rows
from lab.train.program import Program
from lab.train.restore import open_run
from tests.test_loop import go, interrupt
from tests.test_pretrained import bits, program_of, state_of
from tests.test_step import Kinds, Points, Table, compiled_in_haste, toy  # noqa: F401 (a fixture)

# -------------------------------------------------------------------------------------------- the end of a run


class WithTest(Points):
    """Points with a test split of 21."""

    def load(self) -> SimpleNamespace:
        data, other = super().load(), Points(records=21, draw=3).load().train
        return SimpleNamespace(**vars(data) | {"test": other})


@dataclass(frozen=True)
class Aimed(Kinds):
    """Kinds of points; the best state is the one whose loss is nearest to `aim`. Remembers what it is to report."""

    aim: float = 0.0

    reported: ClassVar[list[EvalResult]] = []

    def summary(self, found: Mapping[str, float], counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        return {"distance": abs(found["loss"] - self.aim)}

    def artifacts(self, outcome: EvalResult) -> list[str]:
        self.reported.append(outcome)
        return []


@pytest.fixture
def quick(monkeypatch) -> Iterator[list[str]]:
    """Programs are shared, and no picture is drawn; the list gets each split evaluated at an end."""
    splits, evaluate = [], ending.evaluate

    def watched(program: Program, state: Any, data: Any, split: str, *args: Any) -> EvalResult:
        splits.append(split)
        return evaluate(program, state, data, split, *args)

    monkeypatch.setattr(loop, "Program", lambda experiment, train: program_of(replace(experiment, data=Points())))
    monkeypatch.setattr(restore, "Program", lambda experiment: program_of(replace(experiment, data=Points())))
    monkeypatch.setattr(ending, "evaluate", watched)
    monkeypatch.setattr(ending.plots, "curves", lambda rows, folder, metric: [])
    Aimed.reported.clear()
    return splits


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder / "metrics.jsonl") if row["split"] == split]


def loss_by_hand(folder: Path, step: int, records: Table) -> float:
    params = jax.device_get(open_run(folder, step)[2]).params
    hidden = np.tanh(records.columns["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = np.float64(hidden @ params["out"]["kernel"] + params["out"]["bias"])
    chosen = logits[np.arange(len(logits)), records.columns["y"]]
    return float((np.log(np.exp(logits).sum(1)) - chosen).mean())


def test_the_test_split_is_evaluated_once_at_the_end(tmp_path, quick):
    status, said = go(toy(data=WithTest()), tmp_path / "run")
    assert status == 0 and quick == ["test"]
    rows, result = read_rows(tmp_path / "run" / "metrics.jsonl"), result_of(tmp_path / "run")
    assert rows_of(tmp_path / "run", "test") == [rows[-1]] == [result["test"]]
    assert (result["test"]["step"], result["test"]["split"]) == (12, "test")
    data = WithTest().load()
    assert result["test"]["loss"] == pytest.approx(loss_by_hand(tmp_path / "run", 12, data.test), abs=1e-5)
    assert abs(result["test"]["loss"] - loss_by_hand(tmp_path / "run", 8, data.test)) > 1e-3
    assert abs(result["test"]["loss"] - result["final"]["loss"]) > 1e-2  # not the validation split
    assert f"Test split, with the state of step 12: accuracy {result['test']['accuracy']:.4f}  loss" in said
    assert result["final"]["split"] == "validation" and result["test"]["error"] == 1 - result["test"]["accuracy"]


def test_without_a_test_split_there_is_no_such_row(tmp_path, quick):
    assert go(toy(), tmp_path / "run")[0] == 0
    assert quick == [] and not rows_of(tmp_path / "run", "test") and "test" not in result_of(tmp_path / "run")


def test_stopped_between_the_row_of_the_test_split_and_the_result(tmp_path, quick, monkeypatch):
    experiment, write_result = toy(data=WithTest()), ending.write_result
    go(experiment, tmp_path / "whole")

    def crash(*_: Any) -> None:
        raise RuntimeError("fire")

    monkeypatch.setattr(ending, "write_result", crash)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="fire"):
            go(experiment, tmp_path / "run")
    assert len(rows_of(tmp_path / "run", "test")) == 1 and not (tmp_path / "run" / "result.json").exists()
    monkeypatch.setattr(ending, "write_result", write_result)
    assert go(experiment, tmp_path / "run")[0] == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert result_of(tmp_path / "run")["test"] == result_of(tmp_path / "whole")["test"]


@pytest.fixture
def aimed(tmp_path, quick) -> Experiment:
    """A run that is best at step 4 and out of patience at step 8."""
    go(toy(data=WithTest()), tmp_path / "plain")
    aim = rows_of(tmp_path / "plain", "validation")[1]
    assert aim["step"] == 4
    quick.clear()
    evaluate = Evaluate(every=4, metric="distance", patience=1)
    return toy(data=WithTest(), task=Aimed(round(aim["loss"], 3)), evaluate=evaluate)


def parameters(model, variables):
    return variables["params"]


def test_with_patience_the_best_state_is_reported(tmp_path, quick, aimed, monkeypatch):
    status, said = go(aimed, tmp_path / "run")
    result, data = result_of(tmp_path / "run"), WithTest().load()
    assert status == 0 and quick == ["test"] and "Reporting the best state, of step 4." in said
    assert (result["steps"], result["stopped_early"], result["best"]["step"], result["test"]["step"]) == (8, True, 4, 4)
    assert result["test"]["loss"] == pytest.approx(loss_by_hand(tmp_path / "run", 4, data.test), abs=1e-5)
    assert abs(result["test"]["loss"] - loss_by_hand(tmp_path / "run", 8, data.test)) > 1e-2
    (outcome,) = Aimed.reported
    assert (outcome.step, outcome.split, len(outcome.records)) == (4, "test", 21)
    assert bits(outcome.compute(parameters)) == bits(state_of(tmp_path / "run", 4).params)
    assert "Test split, with the state of step 4:" in said
    # The last checkpoint is lost after the end: the run goes on from the one before, and its end stands there once.
    whole = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    (tmp_path / "run" / "result.json").unlink()
    status, said = go(aimed, tmp_path / "run")
    assert status == 0 and "Resuming from step 4 of 12" in said
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == whole
    # Without patience it is the last state.
    patient = replace(aimed, evaluate=replace(aimed.evaluate, patience=None))
    go(patient, tmp_path / "last")
    assert (result_of(tmp_path / "last")["best"]["step"], result_of(tmp_path / "last")["test"]["step"]) == (4, 12)


def test_the_best_state_on_validation_or_not_kept(tmp_path, quick, aimed):
    experiment = replace(aimed, data=Points())
    assert go(experiment, tmp_path / "a")[0] == 0 and quick == ["validation"]
    (outcome,) = Aimed.reported
    assert (outcome.step, outcome.split, len(outcome.records)) == (4, "validation", 13)
    assert outcome.means["loss"] == pytest.approx(rows_of(tmp_path / "a", "validation")[1]["loss"], abs=1e-6)
    status, said = go(replace(experiment, checkpoint=Checkpoint(every=4, keep=1, best=False)), tmp_path / "b")
    assert status == 0 and "best step, 4, cannot be loaded: reporting the last state" in said
    assert Aimed.reported[-1].step == 8
    assert go(experiment, tmp_path / "c", 3, interrupt())[0] == 75 and len(Aimed.reported) == 2  # no end, no report
    assert go(experiment, tmp_path / "c")[0] == 0
    assert (tmp_path / "c" / "metrics.jsonl").read_bytes() == (tmp_path / "a" / "metrics.jsonl").read_bytes()


# ---------------------------------------------------------------------------------------------------- commands

opened = functools.cache(Program)  # of run folders

HEAD = '''"""For the tests of the commands."""

from lab.data.tables.bundled import Sklearn
from lab.data.images.images import Images
from lab.data.tables.tables import Table
from lab.experiment import Checkpoint, Evaluate, Experiment, Mesh
from lab.models.gan import GAN
from lab.models.linear import Linear
from lab.optim import SGD, Adam
from lab.tasks.adversarial import Adversarial
from lab.tasks.supervised import Classify

usual = dict(steps=20, batch=32, evaluate=Evaluate(every=10), checkpoint=Checkpoint(every=10), mesh=Mesh(1))
'''
DIGITS = 'Images(Sklearn("digits"), shape=(8, 8, 1))'
FILES = {
    "tumours": 'Experiment(Table(Sklearn("breast_cancer")), Linear(classes=2), Classify(), SGD(lr=0.1), **usual)',
    "digits": f"Experiment({DIGITS}, Linear(classes=10), Classify(), SGD(lr=0.1), **usual)",
    "gan": f"Experiment({DIGITS}, GAN(latent=4, width=4, shape=(8, 8, 1)), Adversarial(), Adam(lr=1e-3),"
           " **usual | dict(steps=2))",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with an experiment and a run of each kind."""
    folder = tmp_path_factory.mktemp("commands")
    with pytest.MonkeyPatch.context() as patch:
        for name, text in FILES.items():
            file = folder / f"{name}.py"
            file.write_text(f"{HEAD}\nexperiment = {text}\n")
            assert go(load(file).experiment, folder / name, file=file)[0] == 0
            patch.setattr(ending.plots, "curves", lambda rows, folder, metric: [])  # those of one run will do
    return folder


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """What two commands compute is compiled once."""
    monkeypatch.setattr(restore, "Program", opened)


def accumulation_dtype(place: Path, name: str) -> dict[str, Any]:
    return json.loads((place / name).read_text())


def test_a_run_reports_on_its_test_split(place):
    assert {"plots/confusion.png", "plots/loss.png", "report.txt", "worst.csv"} <= {
        str(p.relative_to(place / "tumours")) for p in (place / "tumours").rglob("*")}
    assert (place / "tumours" / "report.txt").read_text().startswith("Test split, 114 records: accuracy")
    assert result_of(place / "tumours")["test"]["accuracy"] > 0.85
    assert (place / "digits" / "report.txt").read_text().startswith("Validation split, 180 records: accuracy")


def test_eval_writes_the_whole_report(place, typed):
    status, out, _ = typed("evaluate", "tumours", "--split", "test")
    result, found = result_of(place / "tumours"), accumulation_dtype(place, "tumours/evaluation-test-20.json")
    assert status == 0 and (found["step"], found["split"]) == (20, "test")
    assert found == pytest.approx(result["test"], abs=1e-6)
    assert {"loss", "accuracy", "precision", "recall", "f1", "auc"} <= set(found)
    assert "114 of 114 test records" in out and f"{found['auc']:.6f}" in out and "evaluation-test-20.json and" in out
    assert "Test split, 114 records: accuracy" in out and "scikit-learn LogisticRegression" in out
    folder = place / "tumours" / "evaluation-test-20"
    assert {"plots", "report.txt", "worst.csv"} == {p.name for p in folder.iterdir()}
    assert (folder / "plots" / "confusion.png").stat().st_size > 1000
    assert (folder / "report.txt").read_text() == (place / "tumours" / "report.txt").read_text()


def test_eval_of_a_split_a_step_and_a_part(place, typed):
    status, out, _ = typed("evaluate", "tumours", "--split", "validation", "--step", "10")
    found = accumulation_dtype(place, "tumours/evaluation-validation-10.json")
    _, tenth, last = rows_of(place / "tumours", "validation")
    assert status == 0 and "46 of 46 validation records" in out
    assert found == pytest.approx(tenth, abs=1e-6) and abs(found["loss"] - last["loss"]) > 1e-4
    report = (place / "tumours/evaluation-validation-10/report.txt").read_text()
    assert report.startswith("Validation split, 46 records")
    status, out, _ = typed("evaluate", "tumours", "--split", "test", "--step", "10", "--records", "20")
    assert status == 0 and "20 of 114 test records" in out
    assert accumulation_dtype(place, "tumours/evaluation-test-10.json")["split"] == "test"
    best = min((tenth, last), key=lambda row: row["loss"])["step"]
    assert typed("evaluate", "tumours", "--best", "--split", "validation")[0] == 0
    assert accumulation_dtype(place, f"tumours/evaluation-validation-{best}.json")["split"] == "validation"
    assert typed("evaluate", "digits")[0] == 0  # without a test split
    final = result_of(place / "digits")["final"]
    assert accumulation_dtype(place, "digits/evaluation-validation-20.json") == pytest.approx(final, abs=1e-6)


def test_what_cannot_be_evaluated(place, mistake):
    assert "This data has no test split" in mistake("evaluate", "digits", "--split", "test", "--step", "10")
    assert "--judge is for a GAN" in mistake("evaluate", "digits", "--judge", "digits", "--step", "10")
    assert not list((place / "digits").glob("evaluation-*10*"))  # nothing is left behind
    assert "--best and --step exclude each other" in mistake("evaluate", "digits", "--best", "--step", "10")
    assert "has no checkpoint of step 3; it has [10, 20]" in mistake("evaluate", "tumours", "--step", "3")
    assert "nowhere is not a run folder" in mistake("evaluate", "nowhere")
    assert "no record to evaluate" in mistake("evaluate", "tumours", "--step", "20", "--records", "0")


def test_a_gan_and_its_judge(place, typed, mistake, monkeypatch):
    status, out, _ = typed("evaluate", "gan", "--judge", "digits")
    found = accumulation_dtype(place, "gan/evaluation-validation-2.json")
    assert status == 0 and found["judge_samples"] == 2000 and f"{found['judge_entropy']:.6f}" in out
    assert 0.1 <= found["judge_confidence"] <= 1 and 1 <= found["judge_classes"] <= 10
    assert (place / "gan" / "evaluation-validation-2" / "plots" / "samples.png").exists()
    assert "its own inputs are (30,)" in mistake("evaluate", "gan", "--judge", "tumours")
    assert "Adversarial makes no predictions" in mistake("evaluate", "gan", "--judge", "gan")
    assert "nowhere is not a run folder" in mistake("evaluate", "gan", "--judge", "nowhere")
    assert "Adversarial makes no predictions" in mistake("predict", "gan", "--input", images_in(place, 1))
    # A judge of larger images is refused; it would see the middle of them without a word.
    shutil.copytree(place / "digits", place / "larger", dirs_exist_ok=True)
    (place / "larger" / "fitted.json").unlink()
    real = restore.read_folder
    larger = real(place / "larger")
    larger = replace(larger, data=replace(larger.data, border=1))
    monkeypatch.setattr(restore, "read_folder", lambda run, *file: larger if run.name == "larger" else real(run))
    assert "cannot judge images of shape (8, 8, 1): its own inputs are (10, 10, 1)" in mistake(
        "evaluate", "gan", "--judge", "larger")


# -------------------------------------------------------------------------------------------------- predictions


def table_in(path: Path, rows: np.ndarray, names: list[str]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows.tolist()])
    return path


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    return head, rows


def images_in(place: Path, number: int) -> Path:
    """A folder with the first digits of scikit-learn as PNG files, one of them in a subfolder."""
    folder = place / f"images-{number}"
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    pixels = np.round(Sklearn("digits").load().inputs[:number].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / ("sub" if i == 1 else ".") / f"{i:03d}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_predict_a_table(place, typed):
    bunch = Sklearn("breast_cancer").load()
    order = np.random.default_rng(0).permutation(30)  # the columns are found by their names
    names = [bunch.feature_names[i] for i in order] + ["doctor"]
    rows = np.concatenate([bunch.inputs[:100, order], np.zeros((100, 1))], axis=1)
    path = table_in(place / "patients.csv", rows, names)
    status, out, err = typed("predict", "tumours", "--input", path, "--output", "answers.csv")
    assert (status, out, err) == (0, "100 predictions are in answers.csv\n", "")
    head, lines = read_csv(place / "answers.csv")
    assert head == ["record", "prediction", "p_malignant", "p_benign"]
    assert [line[0] for line in lines] == [str(i) for i in range(100)]
    found = np.array([line[2:] for line in lines], np.float64)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    assert [line[1] for line in lines] == [bunch.class_names[i] for i in found.argmax(1)]
    # NumPy says the same, from the parameters and the means of the training rows.
    experiment, program, state = open_run(place / "tumours")
    data = experiment.data.load()
    head = jax.device_get(state.params)["head"]
    used = data.read(path).records.arrays["inputs"]
    logits = used @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(found[:, 1], 1 / (1 + np.exp(logits[:, 0] - logits[:, 1])), atol=1e-5)
    assert np.array_equal(found, np.float64(predict(program, state, data.read(path).records)["probabilities"]))
    assert np.mean(found.argmax(1) == bunch.targets[:100]) > 0.85
    # Each record by itself: batches and their padding change nothing.
    single = predict(program, state, data.read(table_in(place / "one.csv", rows[41:42], names)).records)
    np.testing.assert_allclose(single["probabilities"][0], found[41], atol=1e-6)
    # Those of another checkpoint are others.
    assert typed("predict", "tumours", "--input", path, "--output", "early.csv", "--step", "10")[0] == 0
    early = np.array([line[2:] for line in read_csv(place / "early.csv")[1]], np.float64)
    assert np.abs(early - found).max() > 1e-3


def test_predict_images(place, typed):
    status, out, _ = typed("predict", "digits", "--input", images_in(place, 12))
    assert status == 0 and "12 predictions are in predictions.csv" in out
    head, lines = read_csv(place / "predictions.csv")
    assert head == ["record", "file", "prediction", *(f"p_{i}" for i in range(10))]
    assert [line[0] for line in lines] == [str(i) for i in range(12)]
    assert sorted(line[1] for line in lines) == sorted([f"{i:03d}.png" for i in range(12) if i != 1] + ["sub/001.png"])
    experiment, program, state = open_run(place / "digits")
    everything = predict(program, state, _digits(12))
    for line in lines:
        i = int(line[1][-7:-4])
        np.testing.assert_array_equal(np.array(line[3:], np.float64), everything["probabilities"][i])
        assert line[2] == str(everything["prediction"][i])
    assert len({line[2] for line in lines}) > 4
    alone = place / "images-12" / "sub" / "001.png"
    assert typed("predict", "digits", "--input", alone, "--output", "one.csv")[0] == 0
    assert [line[:3] for line in read_csv(place / "one.csv")[1]] == [["0", "001.png", str(everything["prediction"][1])]]


def _digits(number: int) -> Any:
    pixels = np.round(Sklearn("digits").load().inputs[:number].reshape(-1, 8, 8, 1) * (255 / 16))
    return Arrays({"inputs": pixels.astype(np.uint8)})


def test_tables_that_cannot_be_predicted(place, mistake):
    bunch = Sklearn("breast_cancer").load()
    names, rows = list(bunch.feature_names), bunch.inputs[:3].astype(object)
    bad = place / "bad.csv"
    assert "bad.csv has no column 'mean radius'" in mistake(
        "predict", "tumours", "--input", table_in(bad, rows[:, 1:], names[1:]))
    rows[1, 4] = "smooth"
    err = mistake("predict", "tumours", "--input", table_in(bad, rows, names))
    assert "line 3" in err and f"column {names[4]!r}" in err and "smooth" in err
    assert "missing.csv does not exist" in mistake("predict", "tumours", "--input", "missing.csv")
    table_in(bad, rows[:0], names)
    assert "bad.csv" in mistake("predict", "tumours", "--input", bad)
    for content in (b"", b"\x89PNG\r\n\x1a\n\xff\xfe"):
        bad.write_bytes(content)
        assert "bad.csv" in mistake("predict", "tumours", "--input", bad)
    assert "is a folder, where a CSV file is needed" in mistake("predict", "tumours", "--input", place)
    good = table_in(place / "good.csv", bunch.inputs[:3], names)
    for output in ("nowhere/out.csv", "tumours"):
        assert f"--output {output} cannot be written" in mistake("predict", "tumours", "--input", good, "--output",
                                                                 output)
    assert "nowhere is not a run folder" in mistake("predict", "nowhere", "--input", good)


def test_images_that_cannot_be_predicted(place, mistake):
    folder = place / "pictures"
    folder.mkdir()
    assert "pictures has no PNG or JPEG file in it" in mistake("predict", "digits", "--input", folder)
    for name, picture, words in (("large", Image.new("L", (9, 8)), "8x8 grey"),
                                 ("colour", Image.new("RGB", (8, 8)), "RGB")):
        picture.save(folder / f"{name}.png")
        err = mistake("predict", "digits", "--input", folder / f"{name}.png")
        assert f"{name}.png" in err and words in err
    (folder / "broken.png").write_bytes((folder / "large.png").read_bytes()[:40])
    assert "broken.png" in mistake("predict", "digits", "--input", folder / "broken.png")
    (folder / "table.csv").write_text("a,b\n1,2\n")
    assert "table.csv" in mistake("predict", "digits", "--input", folder / "table.csv")


def test_other_parameters_to_begin_with(mistake, typed, place):
    assert "nowhere is not a run folder" in mistake("tumours.py", "--init-from.run", "nowhere", "--run-dir", "a")
    err = mistake("tumours.py", "--init-from.run", "digits", "--run-dir", "b")
    assert "head/bias is (10,) in digits and (2,) here" in err
    assert "'(' is not a regular expression" in mistake("tumours.py", "--init-from.exclude", "(", "--run-dir", "c")
    assert "init_from.freeze: 'x' matches no parameter" in mistake("tumours.py", "--init-from.freeze", "x",
                                                                   "--run-dir", "d")


def test_data_without_a_reader(mistake, monkeypatch):
    monkeypatch.setattr(TableData, "read", Dataset.read)
    assert "This data has no reader for new records" in mistake("predict", "tumours", "--input", "tumours.py")


def test_eval_looks_at_the_test_split_only_when_asked():
    """It is evaluated once, when a run ends; a default would use it up, look by look."""
    import inspect

    from lab.commands.evaluate import evaluate

    assert inspect.signature(evaluate).parameters["split"].default == "validation"
