"""Predictions that join their input, and runs that outlive their data: what was learnt from it is in the run folder."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lab.data.images.images import Images
from lab.data.images.sources import ImageFolder
from lab.data.messages.messages import Messages
from lab.data.tables.csv_files import Csv
from lab.data.tables.tables import Table, split
from lab.data.text.sources import TextFiles
from lab.data.text.text import Text
from lab.data.tokenizers import BPE, Bytes, Chars
from lab.data.word_tokenizer import Words
from lab.errors import UserError
from lab.tasks.reports import column_names

N = 60
HEAD = """import os
from lab.data.tables.csv_files import Csv
from lab.data.text.sources import TextFiles
from lab.data.tables.tables import Table
from lab.data.text.text import Text
from lab.data.tokenizers import Bytes
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.gpt import GPT
from lab.models.linear import Linear
from lab.optim import SGD, AdamW, Constant
from lab.tasks.language import LanguageModel
from lab.tasks.supervised import Classify
from lab.tasks.regress import Regress
usual = dict(steps=2, batch=8, evaluate=Evaluate(every=0), checkpoint=Checkpoint(every=0))
"""
SALES = """experiment = Experiment(Table(Csv("sales.csv", "price", drop=("id",), thousands=",", units=("$",),
    missing=("-",))), Linear(), Regress(), SGD(lr=Constant(0.1)), **usual)"""
LETTERS = """experiment = Experiment(Text(TextFiles("corpus.txt"), Bytes(), 8), GPT(depth=1, width=8, heads=1,
    vocab=256, context=8), LanguageModel(samples=0), AdamW(lr=Constant(1e-3)), **usual)"""


def sales(path: Path, rows=range(N), blank=()) -> Path:
    """A table with an id, numbers as people write them, a gap, a category and the target."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "size", "town", "price"])
        for i in rows:
            cells = [f"house {i}", f"{1000 + 37 * i:,}" if i % 7 else "-", ["Uri", "Zug"][i % 2], f"${2000 + 41 * i:,}"]
            writer.writerow(["", " ", "-", ""] if i in blank else cells)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with two runs whose data has gone."""
    from lab.__main__ import main

    folder = tmp_path_factory.mktemp("predict")
    before = os.getcwd()
    os.chdir(folder)
    try:
        sales(folder / "sales.csv")
        (folder / "corpus.txt").write_text("a text of a few words " * 40)
        for name, text in (("sales", SALES), ("letters", LETTERS)):
            (folder / f"{name}.py").write_text(HEAD + text)
            assert main([f"{name}.py", "--run-dir", name]) == 0
        assert main(["predict", "sales", "--split", "test", "--id", "id", "--output", "test.csv"]) == 0
        sales(folder / "new.csv", blank=(3, 30))
        assert main(["predict", "sales", "--input", "new.csv", "--id", "id", "--output", "before.csv"]) == 0
        (folder / "gone").mkdir()
        for name in ("sales.csv", "corpus.txt"):
            (folder / name).rename(folder / "gone" / name)
    finally:
        os.chdir(before)
    return folder


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_predictions_join_the_rows_that_they_are_of(place):
    rows = table(place / "before.csv")
    assert list(rows[0]) == ["record", "id", "prediction", "truth"]
    kept = [i for i in range(N) if i not in (3, 30)]
    assert [int(row["record"]) for row in rows] == kept  # what was skipped counts, as in pandas' row numbers
    assert [row["id"] for row in rows] == [f"house {i}" for i in kept]
    assert [float(row["truth"]) for row in rows] == [2000 + 41 * i for i in kept]


def test_a_split_of_the_runs_own(place):
    rows = table(place / "test.csv")
    wanted = split(N, 0.2, 0.1)["test"].tolist()
    assert [int(row["record"]) for row in rows] == wanted
    assert [row["id"] for row in rows] == [f"house {i}" for i in wanted]
    assert [float(row["truth"]) for row in rows] == [2000 + 41 * i for i in wanted]  # not the float32 of the records
    same = {row["id"]: row["prediction"] for row in table(place / "before.csv")}
    assert all(float(same[row["id"]]) == pytest.approx(float(row["prediction"]), rel=1e-5) for row in rows
               if row["id"] in same)


def test_a_run_predicts_and_samples_without_its_data(place, typed):
    status, out, err = typed("predict", "sales", "--input", "new.csv", "--id", "id", "--output", "after.csv")
    assert status == 0 and "58 predictions are in after.csv" in out, err
    assert (place / "after.csv").read_bytes() == (place / "before.csv").read_bytes()
    assert "new.csv: 2 of 60 records have no text or value and are skipped: line 5, line 32" in err
    status, out, err = typed("sample", "letters", "--prompt", "a text", "--new-tokens", "4")
    assert status == 0 and out.startswith("a text"), err


def test_standard_output_gets_the_csv_alone(place, typed):
    status, out, err = typed("predict", "sales", "--input", "new.csv", "--id", "id", "--output", "-")
    assert status == 0 and out.encode() == (place / "before.csv").read_bytes() and "\r" not in out
    assert "2 of 60 records" in err and not (place / "-").exists()


def test_an_id_column_is_kept_whatever_its_name(place, typed):
    lines = (place / "new.csv").read_text().splitlines()
    for name in ("record", "prediction", "truth"):
        (place / "named.csv").write_text("\n".join([lines[0].replace("id", name), *lines[1:]]))
        status, out, err = typed("predict", "sales", "--input", "named.csv", "--id", name, "--output", "-")
        rows = list(csv.DictReader(out.splitlines()))
        assert list(rows[0]) == ["record", f"input_{name}", "prediction", "truth"], err
        assert rows[0][f"input_{name}"] == "house 0" and rows[0]["record"] == "0"


def test_only_the_runs_own_splits_need_the_data(place, mistake):
    for words in (("evaluate", "sales"), ("predict", "sales", "--split", "test"), ("evaluate", "letters")):
        assert "sales.csv" in mistake(*words) or "corpus.txt" in mistake(*words)


def test_mistakes_at_prediction(place, mistake):
    strict = mistake("predict", "sales", "--input", "new.csv", "--strict")
    assert "new.csv, line 5, line 32 have no text or value" in strict
    assert "no column 'name'" in mistake("predict", "sales", "--input", "new.csv", "--id", "name")
    for words in ((), ("--input", "new.csv", "--split", "test")):
        assert "--input FILE, or --split test" in mistake("predict", "sales", *words)


def test_what_a_run_remembers_cannot_be_changed_silently(place, mistake, tmp_path):
    """One digit of one mean, and a tokenizer with another content."""
    for name, file in (("sales", "fitted.json"), ("letters", "tokenizer.json")):
        shutil.copytree(place / name, place / "copy", dirs_exist_ok=True)
        text = (place / "copy" / file).read_text()
        kept = json.loads(text)
        changed = text.replace("Uri", "Uro") if name == "sales" else json.dumps(kept | {"size": 3})
        assert changed != text
        (place / "copy" / file).write_text(changed)
        command = ("predict", "copy", "--input", "new.csv") if name == "sales" else ("sample", "copy")
        assert f"{file} is not as the run wrote it" in mistake(*command)
        shutil.rmtree(place / "copy")


def test_worst_is_in_the_units_of_the_file(place):
    rows = table(place / "sales" / "worst.csv")
    assert list(rows[0]) == ["record", "true", "predicted", "error", "size", "town"]
    own = split(N, 0.2, 0.1)["test"]
    for row in rows:
        i = own[int(row["record"])]
        assert row["town"] == ["Uri", "Zug"][i % 2] and float(row["true"]) == pytest.approx(2000 + 41 * i, rel=1e-4)
        if i % 7:
            assert float(row["size"]) == pytest.approx(1000 + 37 * i, rel=1e-4)


def test_names_of_columns_are_names_for_pandas():
    names = ["a b", "a-b", "x(1)", "größe", "3", "c"]
    found = column_names("p", names)
    assert found == ["p_a_b", "p_a_b_1", "p_x_1_", "p_größe", "p_3", "p_c"]
    assert all(name.isidentifier() for name in found) and len(set(found)) == len(found)


# ------------------------------------------------------------------------------------------- all kinds of data


def pictures(root: Path) -> Path:
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.random.default_rng(i).integers(0, 256, (6, 5, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def messages(path: Path) -> Path:
    path.write_text("n,text,kind\n" + "".join(f"{i},{'xyz'[i % 3]}{'xyz'[i // 3 % 3]}{'xyz'[i // 9]} é,{'ab'[i % 2]}\n"
                                                  for i in range(27)))
    return path


def test_every_kind_of_data_comes_back_from_json(tmp_path, monkeypatch):
    """Restored from its JSON it reads new records as it did, to the bit, without looking at the old ones."""
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    source = Csv(str(messages(tmp_path / "m.csv")), "kind", text="text")
    (tmp_path / "t.txt").write_text("some text, and é, for a model " * 30)
    kinds = [(Table(Csv(str(sales(tmp_path / "s.csv")), "price", drop=("id",), thousands=",", units=("$",),
                        missing=("-",))), tmp_path / "s.csv"),
             (Table(Csv(str(tmp_path / "m.csv"), "kind", drop=("n",)), unseen="zeros"), tmp_path / "m.csv"),
             (Images(ImageFolder(str(pictures(tmp_path / "p"))), (6, 5, 3)), tmp_path / "p"),
             *[(Messages(source, tokenizer, length=6), tmp_path / "m.csv")
               for tokenizer in (Words(12), Bytes(), Chars(), BPE(260))],
             (Text(TextFiles(str(tmp_path / "t.txt")), BPE(260), 4), None)]
    for spec, new in kinds:
        data = spec.load()
        again = spec.restored(json.loads(json.dumps(data.saved())), getattr(data, "tokenizer_state", ""))
        assert (again.fingerprint, again.metadata, again.classes) == (data.fingerprint, data.metadata, data.classes)
        assert again.train is None and again.unit == data.unit
        if new is None:
            assert np.array_equal(again.encode("some é"), data.encode("some é"))
            assert again.decode(data.encode("some é")) == "some é" and again.eot == data.eot
            continue
        before, after = data.read(new), again.read(new)
        assert before.numbers == after.numbers and before.truth == after.truth and before.beside == after.beside
        assert before.truth is not None
        indices = np.arange(len(before.numbers))
        for name, array in before.records[indices].items():
            assert np.array_equal(array, after.records[indices][name]), name


def test_splits_of_every_kind_join_their_source(tmp_path, monkeypatch):
    """Numbers count in the source, not in the split; --id takes a column of it, and images have the name of a file."""
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    source = Csv(str(messages(tmp_path / "m.csv")), target="kind", text="text")
    data = Messages(source, Bytes(), 16).load()
    cells = table(tmp_path / "m.csv")
    for name in ("train", "validation"):
        own = data.own(name, "kind")
        assert own.beside["kind"] == own.truth == [cells[i]["kind"] for i in own.numbers]
        assert data.texts[name] == [cells[i]["text"] for i in own.numbers]
    with pytest.raises(UserError, match="--id name .*those are .*kind"):
        data.own("train", "name")
    root = pictures(tmp_path / "p")
    data = Images(ImageFolder(str(root)), (6, 5, 3)).load()
    files = {}
    for name in ("train", "validation"):
        own = data.own(name)
        assert [file.split("/")[0] for file in own.beside["file"]] == own.truth
        files |= dict(zip(own.numbers, own.beside["file"], strict=True))
    assert [files[i] for i in range(12)] == sorted(p.relative_to(root).as_posix() for p in root.rglob("*.png"))
    with pytest.raises(UserError, match="there are no columns here"):
        data.own("train", "name")


def test_blank_messages_are_skipped_by_their_lines(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    data = Messages(Csv(str(messages(tmp_path / "m.csv")), "kind", text="text"), Words(12), length=6).load()
    (tmp_path / "new.txt").write_text("one\x0cword\n\ntwo\u2028words\n   \nthree\n")
    found = data.read(tmp_path / "new.txt")
    assert found.numbers == [0, 2, 4] and found.names == ["line 1", "line 3", "line 5"]
    assert "2 of 5 records have no text or value and are skipped: line 2, line 4" in caplog.text
    with pytest.raises(UserError, match="new.txt, line 2, line 4 have no text or value"):
        data.read(tmp_path / "new.txt", strict=True)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="line 1, line 2 have no text or value"):  # nothing is left
        data.read(tmp_path / "empty.txt")
    (tmp_path / "new.csv").write_text("n,text,kind\n7,xyz,a\n8, ,b\n9,zyx,\n")
    found = data.read(tmp_path / "new.csv", "n")
    assert found.numbers == [0, 2] and found.beside == {"n": ["7", "9"]} and found.truth == ["a", ""]
    with pytest.raises(UserError, match="--id n is for tables and messages in CSV files"):
        data.read(tmp_path / "new.txt", "n")


PICTURES = """
from lab.data.images.images import Images
from lab.data.images.sources import ImageFolder
experiment = Experiment(Images(ImageFolder("pictures"), (6, 5, 3)), Linear(classes=2), Classify(),
                        SGD(lr=Constant(0.1)), **usual)
"""


def test_a_dry_run_refuses_data_that_is_there_and_wrong_and_goes_on_without_data(place, typed, mistake):
    (place / "pictures.py").write_text(HEAD + PICTURES)
    status, out, err = typed("pictures.py", "--dry-run")  # meant for another machine
    assert status == 0 and "pictures is not a folder" in " ".join(out.split()), err
    for name in ("Training/cat", "Training/dog", "Train/cat"):
        pictures(place / "pictures" / name)
    status, out, err = typed("pictures.py", "--dry-run")
    assert status == 2 and err.count("\n") == 1 and "--data.source.splits" in err
