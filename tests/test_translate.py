"""Translation: the loss by NumPy, pairs and their splits, scores, baselines; the commands; one device and eight."""

import csv
import json
import re
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest

from lab.data.pipeline import train_batch
from lab.data.tokenizers import BPE, Bytes
from lab.data.translations import PairsFile, PythonSignatures, TfdsPairs, Translations
from lab.data.translations import sources as pair_sources
from lab.errors import UserError
from lab.experiment import Checkpoint, Evaluate, Experiment, Mesh
from lab.models.seq2seq import Seq2Seq
from lab.optim import AdamW, Constant
from lab.tasks.translate import Translate, baselines
from lab.tasks.translation_scores import margins, translation_scores
from lab.train.metrics import means
from lab.train.program import Program
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
HEAD = """from lab.data.tokenizers import Bytes
from lab.data.translations import PairsFile, Translations
from lab.experiment import Checkpoint, Evaluate, Experiment, Mesh
from lab.models.seq2seq import Seq2Seq
from lab.optim import AdamW, Constant
from lab.tasks.translate import Translate
experiment = Experiment(Translations(PairsFile("pairs.jsonl", "sum", "words"), Bytes(), 12, 16),
    Seq2Seq(depth=1, width=16, heads=2, vocab=257, context=16), Translate(beams=2), AdamW(lr=Constant(1e-2)), steps=2,
    batch=8, evaluate=Evaluate(every=0), checkpoint=Checkpoint(every=0), mesh=Mesh(data=1))
"""


def write_pairs(path: Path) -> Path:
    """100 sums and what they say; the text of ten of them is that of ten others."""
    rows = [{"sum": f"{i}+{j}", "words": f"{WORDS[i]} and {WORDS[j % 9]}"} for i in range(10) for j in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("translate")
    write_pairs(folder / "pairs.jsonl")
    (folder / "sums.py").write_text(f'"""Sums.\n\n    ./launch.sh sums.py\n"""\n\n{HEAD}')
    return folder


@pytest.fixture(scope="module")
def small(place) -> Experiment:
    """What every axis of 8 devices can divide."""
    return Experiment(Translations(PairsFile(str(place / "pairs.jsonl"), "sum", "words"), BPE(272), 16, 16),
                      Seq2Seq(depth=1, width=16, heads=2, vocab=272, context=16, dropout=0.0), Translate(0.1, beams=2),
                      AdamW(lr=Constant(1e-2)), steps=3, batch=8, evaluate=Evaluate(every=0),
                      checkpoint=Checkpoint(every=0))


# --------------------------------------------------------------------------------------------------------------- data

def test_a_record_is_a_padded_pair(small):
    data = small.data.load()
    assert {split: len(pairs) for split, pairs in data.pairs.items()} == {
        split: len(getattr(data, split)) for split in ("train", "validation", "test")}
    row = {name: x[0] for name, x in data.train[np.arange(1)].items()}
    assert {name: (x.shape, x.dtype.type) for name, x in row.items()} == small.data.record_spec()
    pair = data.pairs["train"][0]
    ids, source = data.fitted.encode(pair.target), data.fitted.encode(pair.source)
    assert row["tokens"].tolist() == [0, *ids, *[0] * (16 - len(ids))] and data.text(row["tokens"]) == pair.target
    assert row["learn"].sum() == len(ids) + 1 and row["mask"].sum() == len(source)
    assert row["inputs"][: len(source)].tolist() == source.tolist() and 0 not in ids
    short = replace(small.data, target_length=3).load()
    assert short.train.arrays["learn"].all() and short.summary["train targets cut at the end"] == len(short.train)


def test_no_target_is_in_two_splits(small):
    data = small.data.load()
    targets = {split: {pair.target for pair in pairs} for split, pairs in data.pairs.items()}
    assert sum(map(len, targets.values())) == 90 == len(set().union(*targets.values()))  # of 100 pairs
    assert data.summary["test targets also in training"] == 0
    own = data.own("test")
    assert [WORDS[i // 10] + " and " + WORDS[i % 10 % 9] for i in own.numbers] == own.truth


def test_splits_of_their_own(tmp_path):
    for name, rows in (("train", "a,b\nx,one\ny,two\n"), ("dev", "a,b\nz,one\n"), ("test", "a,b\nw,three\n")):
        (tmp_path / f"{name}.csv").write_text(rows)
    source = PairsFile(str(tmp_path / "train.csv"), "a", "b", str(tmp_path / "dev.csv"), str(tmp_path / "test.csv"))
    data = Translations(source, Bytes(), 4, 8).load()
    assert [len(data.train), len(data.validation), len(data.test)] == [2, 1, 1]
    assert data.summary["validation targets also in training"] == 1 and data.most_frequent() == "one"


def test_signatures_of_the_standard_library(monkeypatch, tmp_path):
    (tmp_path / "m.py").write_text('class A:\n    def f(self, x: int = 1) -> str:\n        """Return the text.\n\n'
                                   '        More."""\n        def inner():\n            """Not of the module."""\n'
                                   'async def g(*, k):\n    "Wait for it all."\ndef h():\n    """Short."""\n')
    (tmp_path / "bad.py").write_text("def (:\n")
    files = type("Files", (), {"paths": {"p/m.py": tmp_path / "m.py", "bad.py": tmp_path / "bad.py"}})
    monkeypatch.setattr(pair_sources.PythonStdlib, "open", lambda self: files)
    pair_sources._documented.cache_clear()
    found = PythonSignatures().read()["train"]
    pair_sources._documented.cache_clear()
    assert PythonSignatures().prepare("a.copyFile(self, src_dir: int=1)") == "a copy file ( self , src dir : int = 1 )"
    assert [(pair.source, pair.target) for pair in found] == [
        ("p.m.A.f(self, x: int=1)", "Return the text."), ("p.m.g(*, k)", "Wait for it all.")]


def tfds(root: Path) -> TfdsPairs:
    """A translation data set in TFDS's format."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    folder = root / "talks" / "pt_to_en" / "1.0.0"
    folder.mkdir(parents=True)
    own = "tensorflow_datasets.core.features.translation_feature.Translation"
    (folder / "features.json").write_text(json.dumps({"pythonClassName": own,
                                                      "translation": {"languages": ["en", "pt"]}}))
    splits = {"train": [("um", "one"), ("dois", "two"), (" ", "three")], "validation": [("tres", "three")]}
    for split, rows in splits.items():
        writer = ArrayRecordWriter(str(folder / f"talks-{split}.array_record-00000-of-00001"), "group_size:1")
        for pt, en in rows:
            example = tf_example_pb2.Example()
            for language, text in (("pt", pt), ("en", en)):
                example.features.feature[language].bytes_list.value.append(text.encode())
            writer.write(example.SerializeToString())
        writer.close()
    (folder / "dataset_info.json").write_text(json.dumps({
        "name": "talks", "configName": "pt_to_en", "version": "1.0.0", "fileFormat": "array_record", "splits": [
            {"name": split, "shardLengths": [str(len(rows))], "numBytes": "100",
             "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"} for split, rows in splits.items()]}))
    return TfdsPairs("talks/pt_to_en", data_dir=str(root))


def test_pairs_of_tfds(tmp_path):
    source = tfds(tmp_path)
    found = source.read()
    assert {split: [pair[1:] for pair in pairs] for split, pairs in found.items()} == {
        "train": [("one", "um", 0), ("two", "dois", 1)], "validation": [("three", "tres", 0)]}
    back = replace(source, source="en", target="pt").read()["train"][0]
    assert (back.source, back.target) == ("one", "um")
    for fields, said in (({"source": "fr"}, "has no field 'fr'; it has en, pt"),
                         ({"name": "talks"}, "name them, --data.source.source"),
                         ({"name": "talks/pt_to_de"},
                          "is not prepared .*, but talks/pt_to_en: run ./launch.sh prepare talks/pt_to_de"),
                         ({"source": "en"}, "does not say two languages")):
        with pytest.raises(UserError, match=said):
            replace(source, **fields).validate() or replace(source, **fields).read()


# ------------------------------------------------------------------------------------------------------ loss, devices

def test_the_loss_is_smoothed_cross_entropy(small):
    batch = {**small.data.load().train[np.arange(4)], "weight": np.array([1, 1, 0, 1], np.float32)}
    shapes = jax.eval_shape(lambda: small.task.init(small.model, jax.random.key(0), batch))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.5, shapes)

    @jax.jit
    def both(params):
        logits = small.model.apply(params, batch["inputs"], batch["tokens"][:, :-1], train=False, mask=batch["mask"])
        return small.task.loss(small.model, params, batch, {}, False)[:3], logits

    (total, weight, metrics), logits = both(params)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    counted = batch["learn"] * batch["weight"][:, None]
    nll = -np.take_along_axis(log_p, batch["tokens"][:, 1:, None], -1)[..., 0]
    assert float(weight) == counted.sum()
    assert float(metrics["loss"][0]) == pytest.approx((nll * counted).sum(), rel=1e-5)
    smoothed = 0.9 * nll + 0.1 * -log_p.mean(-1)
    assert float(total) == pytest.approx((smoothed * counted).sum(), rel=1e-5)
    assert float(total) != pytest.approx(float(metrics["loss"][0]), rel=1e-4)  # negative control
    right = (log_p.argmax(-1) == batch["tokens"][:, 1:]) * counted
    assert float(metrics["accuracy"][0]) == right.sum()


def test_eight_devices_learn_what_one_does(small):
    train, alone = small.data.load().train, Program(replace(small, mesh=Mesh(data=1)))
    together, begin = Program(replace(small, mesh=Mesh(2, 2, 2))), jax.device_get(alone.init())

    def losses(program: Program) -> tuple[list[float], dict]:
        state, found = jax.device_put(begin, program.shardings), []
        for step in range(3):
            rows = train_batch(train, step, 8, 0, program.rows)
            state, values = program.train(state, program.batch(lambda _, rows=rows: rows, step))
            found.append(means(jax.device_get(values))["loss"])
        return found, state.params

    (one, _), (eight, params) = losses(alone), losses(together)
    np.testing.assert_allclose(eight, one, atol=2e-5)
    assert one[-1] < one[0] - 0.2  # it learns
    cross = params["decoder"]["block_0"]["cross_attn"]["query"]["kernel"].sharding.spec
    assert tuple(cross) == ("fsdp", "tensor")
    assert tuple(params["wte"]["embedding"].sharding.spec) == ("tensor", "fsdp")


# ------------------------------------------------------------------------------------------------------------- scores

def test_scores_and_baselines(small):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    truth = ["the cat sat on the mat", "a dog ran away from us"]
    found = translation_scores(truth, {"same": truth, "part": ["the cat sat", "a dog ran"], "none": ["x", "y"]})
    assert found["same"]["bleu"] == pytest.approx(100) and found["same"]["chrf"] == pytest.approx(100)
    assert found["same"]["rouge_l"] == 100 and found["same"]["exact"] == 1 and found["none"]["exact"] == 0
    assert found["part"]["rouge_l"] == pytest.approx(100 * 2 / 3)  # precision 1, recall 1/2
    assert found["none"]["rouge_1"] == 0 and 0 < found["part"]["chrf"] < 100
    assert margins(found, "part")[2] == "rouge_l 66.67: -33.33 over same, +66.67 over none"
    data = small.data.load()
    known = data.pairs["train"][7]
    each = baselines(replace(data, prepare=str.upper), [known.source])
    assert each["copy"] == [known.source.upper()] and each["nearest source"] == [known.target]
    counts = [pair.target for pair in data.pairs["train"]].count
    assert counts(each["most frequent"][0]) == max(map(counts, {pair.target for pair in data.pairs["train"]}))


def test_without_the_packages_a_line_says_so(monkeypatch, caplog):
    for name in ("sacrebleu.metrics", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    with caplog.at_level("INFO"):
        found = translation_scores(["a"], {"x": ["a"], "y": ["b"]})
    assert found == {"x": {"exact": 1.0, "words": 1.0}, "y": {"exact": 0.0, "words": 1.0}}
    assert caplog.text.count("LAB_EXTRAS=sacrebleu,rouge") == 2 and margins(found, "x") == []


# ----------------------------------------------------------------------------------------------------------- commands

def test_from_training_to_predictions(typed, mistake, place):
    status, out, err = typed("sums.py", "--run-dir", "run")
    assert status == 0, err
    outputs = json.loads((place / "run/outputs/outputs.json").read_text())
    assert set(outputs["statistics"]) == {"model", "copy", "most frequent", "nearest source"}
    assert ("over copy" in out) == any(map(find_spec, ("sacrebleu", "rouge_score")))
    assert (place / "run/outputs/outputs.md").read_text().count("| target |") == 9
    assert len(outputs["outputs"]) == 9  # the test split
    assert (place / "run/plots/cross_attention.png").stat().st_size > 5000
    (place / "new.csv").write_text("sum,words\n1+2,two and three\n,x\n9+9,no\n")
    (place / "pairs.jsonl").rename(place / "gone.jsonl")  # what was learned is in the run folder
    status, out, _ = typed("predict", "run", "--input", "new.csv", "--output", "-")
    rows = list(csv.DictReader(out.splitlines()))
    assert status == 0 and [row["record"] for row in rows] == ["0", "2"]
    assert [row["truth"] for row in rows] == ["two and three", "no"] and float(rows[0]["score"]) < 0
    (place / "long.txt").write_text("1+2\n" + "1+2" * 5 + "\n")
    assert "long.txt, line 2 has 15 tokens, and this run's sources at most 12" in mistake("predict", "run", "--input",
                                                                                          "long.txt")
    assert "./launch.sh predict run --input sources.txt" in mistake("sample", "run", "--prompt", "1+2")
    assert "An encoder-decoder is not exported" in mistake("export", "run", "--to", "stablehlo", "run.stablehlo")
    (place / "gone.jsonl").rename(place / "pairs.jsonl")


@pytest.mark.parametrize("flags, said", [
    (("--task.beams", "300"), r"--task.beams 300 is wider than the vocabulary of 257 tokens"),
    (("--task.beams", "0"), "--task.beams must be at least 1"),
    (("--data.source-length", "17"), "--data.source-length 17 is longer than --model.context 16"),
    (("--data.source.target", "word"), r"pairs.jsonl:1 has no 'word', but 'sum', 'words': --data.source.target"),
    (("--data.source.path", "empty.csv"), "empty.csv:3: the target is empty; write it, or leave the pair out"),
    (("--data.source.path", "few.csv"), "few.csv has 1 pairs, and none falls into"),
])
def test_mistakes_are_a_sentence(mistake, place, flags, said):
    (place / "empty.csv").write_text('sum,words\n1,one\n2,""\n')
    (place / "few.csv").write_text("sum,words\n1,one\n")
    assert re.search(said, mistake("sums.py", *flags, "--run-dir", "other"))
    assert not (place / "other/result.json").exists()
