"""Messages: vocabularies against collections.Counter, rows of ids, splits, every source, and every mistake in one."""

import dataclasses
import io
import json
import re
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lab.data.messages import sources as message_sources
from lab.data.messages.messages import Messages, encode_rows, put_aside
from lab.data.messages.sources import PACKAGES, PythonPackages, TextFolder, TfdsMessages, cut_code, load
from lab.data.saved import Saved, saved_form
from lab.data.tables.bundled import Sklearn
from lab.data.tables.csv_files import Csv
from lab.data.text.sources import PythonStdlib, TextFiles
from lab.data.text.text import Text
from lab.data.tokenizers import BPE, Bytes, Chars, with_padding
from lab.data.word_tokenizer import Words, words
from lab.errors import UserError

SPAM = ["Buy cheap watches now", "cheap cheap pills", "WIN money, win it now", "buy money"]
HAM = ["See you at lunch", "The meeting is at noon", "don't forget the milk", "lunch at noon?"]


def write_folder(root: Path, classes: dict[str, list[str]]) -> Path:
    for name, texts in classes.items():
        (root / name).mkdir(parents=True)
        for i, text in enumerate(texts):
            (root / name / f"{i}").write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def mail(tmp_path: Path) -> TextFolder:
    """Forty messages of two classes: 20 in each, all different."""
    return TextFolder(str(write_folder(tmp_path / "mail", {
        "ham": [f"{text} {i}" for i in range(5) for text in HAM],
        "spam": [f"{text} {i}" for i in range(5) for text in SPAM]})))


def fit(tokenizer, texts):
    return tokenizer.fit(lambda split: iter(texts if split == "train" else []), 100)


def fails(match: str, call, *arguments):
    with pytest.raises(UserError, match=match) as caught:
        call(*arguments)
    assert str(caught.value).count("\n") == 0


# ------------------------------------------------------------------------------------------------------- words


def test_words_are_the_most_frequent_ones():
    texts = ["b a c a", "A b d_1, don't! DON\u2019T d_1", "e \u00c9t\u00e9 \u00e9t\u00e9"]
    counts = Counter(re.findall(r"[\w']+", " ".join(texts).lower().replace("\u2019", "'")))
    expected = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    assert expected[:3] == ["a", "b", "d_1"] and expected.index("don't") < expected.index("été")  # ties by alphabet
    for size in (3, 5, 100):
        fitted = fit(Words(size), texts)
        assert [piece.decode() for piece in fitted.pieces] == ["", "<unk>", *expected[: size - 2]]
        assert fitted.size == min(size, len(expected) + 2)
    assert Words(100).vocab_size_hint == 100
    ids = fitted.encode("C zzz, a-b\n")
    assert ids.dtype == np.int32 and fitted.decode(ids) == "c <unk> a b" and ids[1] == 1
    assert fitted.decode([0, 2, 0, 3, 10**6]) == "a b \ufffd"
    again = Words(100).restore(fitted.state)
    assert again.pieces == fitted.pieces and np.array_equal(again.encode(texts[1]), fitted.encode(texts[1]))
    assert words("It's 'quoted' rock'n'roll") == ["it's", "quoted", "rock'n'roll"]


def test_capitals_and_stop_words():
    text = "The cat of THE Queen, the cat"
    pieces = {fields: [piece.decode() for piece in fit(Words(9, *fields), [text]).pieces[2:]]
              for fields in ((True, False), (False, False), (True, True), (False, True))}
    assert pieces == {(True, False): ["the", "cat", "of", "queen"], (True, True): ["cat", "queen"],
                      (False, False): ["cat", "Queen", "THE", "The", "of", "the"], (False, True): ["cat", "Queen"]}
    fitted = fit(Words(9, remove_stop_words=True), [text])
    assert fitted.encode("of the Queen").tolist() == Words(9, remove_stop_words=True).restore(fitted.state).encode(
        "queen").tolist() == [3]
    assert len({Words(9, *fields).identity() for fields in pieces}) == 4 and Words(9).identity() == "words 9"
    fails("no word in it", fit, Words(9, remove_stop_words=True), ["the of"])


def test_words_learn_from_the_training_split_only(mail):
    data = Messages(mail, length=8, test=0.2).load()
    train = {word for text in data.texts["train"] for word in words(text)}
    assert set(data.vocabulary[2:]) == train and data.vocabulary[:2] == ["", "<unk>"]
    only = Messages(mail, Words(4), length=8).load()
    assert only.metadata["vocab"] == 4 and only.encode("zebra")[0] == 1
    two = write_folder(Path(mail.path).parent / "two", {
        "train/a": ["x y"], "train/b": ["y z"], "test/a": ["x secret secret secret"], "validation/b": ["z secret"]})
    assert Messages(TextFolder(str(two)), length=8).load().vocabulary[2:] == ["y", "x", "z"]
    (two / "train" / "a" / "0").write_text("x y secret")  # negative control: the same word in a training message
    assert Messages(TextFolder(str(two)), length=8).load().vocabulary[2:] == ["y", "secret", "x", "z"]


def test_words_errors():
    fails("vocab=2.*need 3", Words(2).validate)
    Words(3).validate()
    fails("no word in it: use Bytes", fit, Words(10), ["?!", "--"])


# -------------------------------------------------------------------------------------------------------- rows


def test_rows_padding_mask_and_both_truncations():
    fitted = fit(Words(20), ["a b c d e"])
    texts = ["a b c d e", "c b", "e d c", "?", "q a"]
    for side, first in (("end", "a b c"), ("start", "c d e")):
        rows, lines = encode_rows(fitted, texts, 3, side)
        assert rows["inputs"].dtype == np.int32 and rows["mask"].dtype == np.uint8
        assert [fitted.decode(ids) for ids in rows["inputs"]] == [first, "c b", "e d c", "<unk>", "<unk> a"]
        assert rows["mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]
        assert not rows["inputs"][rows["mask"] == 0].any()
    assert lines == {"messages": 5, "tokens per message": 2.4, "cut off": "20.0% of the messages",
                     "unknown words": "8.3%", "messages without a token": 1}
    assert encode_rows(fitted, [], 3, "end")[0]["inputs"].shape == (0, 3)


def test_many_rows_are_encoded_in_parts(monkeypatch):
    fitted, texts = fit(BPE(300), HAM), [text * (i % 4) for i, text in enumerate(HAM * 9)]
    whole = encode_rows(fitted, texts, 12, "end")
    monkeypatch.setattr("lab.data.messages.messages.AT_ONCE", 50)
    parts = encode_rows(fitted, texts, 12, "end")
    assert np.array_equal(whole[0]["inputs"], parts[0]["inputs"]) and whole[1] == parts[1]


def test_ids_move_up_where_text_makes_id_0():
    texts = ["\x00 ab", "ba"]
    for tokenizer, moved in ((Bytes(), 1), (Chars(), 1), (BPE(260), 0), (Words(9), 0)):
        plain = fit(tokenizer, texts)
        padded = with_padding(plain)
        assert (padded.size, padded.pads) == (plain.size + moved, True) and with_padding(padded) is padded
        for a, b in zip(plain.encode_batch(texts), padded.encode_batch(texts), strict=True):
            assert np.array_equal(a + moved, b) and b.min() > 0
            assert plain.decode(a) == padded.decode(b)
        assert padded.byte_counts[padded.encode("ab")].sum() == plain.byte_counts[plain.encode("ab")].sum()
        assert Messages(PythonPackages(), tokenizer).metadata().get("vocab", padded.size) >= padded.size
    assert (fit(Bytes(), texts).encode("\x00") == 0).all()  # why they must move


def test_loaded_records_keep_what_was_promised(mail):
    for tokenizer in (Words(50), Bytes(), BPE(300), Chars()):
        data = Messages(mail, tokenizer, length=12, truncate="start").load()
        spec = Messages(mail, tokenizer, length=12).record_spec()
        batch = data.train[np.arange(len(data.train))]
        assert {name: (a.shape[1:], a.dtype.type) for name, a in batch.items()} == spec
        assert batch["inputs"].max() < data.metadata["vocab"]
        for ids, mask, label, text in zip(*batch.values(), data.texts["train"], strict=True):
            assert np.array_equal(ids[mask > 0], data.encode(text)[-12:])
            assert data.classes[label] == ("ham" if text.rpartition(" ")[0] in HAM else "spam")
        assert data.decode(np.concatenate([data.encode("buy now"), [0, 0]])) == "buy now"
        assert bool(data.vocabulary) == isinstance(tokenizer, Words)
        assert (data.unit, data.units_per_record, data.metadata["classes"], data.metadata["length"]) == (
            "messages",
            1,
            2,
            12,
        )
        assert data.test is None and data.summary["train messages"] == len(data.train) == 36
    same = {"inputs": 1}
    assert Messages(mail).transform(same, True) is same


def test_an_unseen_character_is_named(mail):
    data = Messages(mail, Chars(), length=4).load()
    fails("'~' is not among", data.encode, "~")


# ------------------------------------------------------------------------------------------------------- split


def test_put_aside_is_stratified_deterministic_and_keeps_copies_together():
    labels = np.repeat([0, 1, 2], [100, 10, 1])
    texts = [f"m{i}" for i in range(len(labels))]
    where = put_aside(texts, labels, (0.1, 0.2))
    assert [np.bincount(where[labels == c], minlength=3).tolist() for c in range(3)] == [[70, 10, 20], [7, 1, 2],
                                                                                         [1, 0, 0]]
    assert np.array_equal(where, put_aside(texts, labels, (0.1, 0.2)))
    assert np.flatnonzero(where == 1).tolist() != list(range(10))  # shuffled
    copies = ["same" if i % 2 else text for i, text in enumerate(texts)]
    assert len(set(put_aside(copies, labels, (0.5,))[1::2])) == 1
    assert len(set(put_aside(texts, labels, (0.5,))[1::2])) == 2  # negative control
    many = ["a"] * 50 + ["b"] * 50 + [f"m{i}" for i in range(11)]  # a class of few different texts keeps one
    assert sorted(np.bincount(put_aside(many, labels, (0.5,))[:100])) == [50, 50]


def test_no_message_is_in_two_splits(mail):
    data = Messages(mail, length=8, validation=0.25, test=0.25).load()
    sets = [set(data.texts[split]) for split in ("train", "validation", "test")]
    assert [len(s) for s in sets] == [20, 10, 10] and len(set.union(*sets)) == 40
    assert all(np.bincount(r.arrays["targets"]).tolist() == [n, n] for r, n in
               ((data.train, 10), (data.validation, 5), (data.test, 5)))
    assert "25% of the training messages of each class" in data.summary["split"]
    assert data.summary["test also in training"] == 0


def test_a_source_keeps_its_own_splits_and_says_what_is_in_two(tmp_path):
    root = write_folder(tmp_path, {"20-train/a": ["one", "two"], "20-train/b": ["three"], "20-test/a": ["one"],
                                   "20-test/b": ["four"], "20-dev/b": ["five"]})
    (root / ".git").mkdir()
    data = Messages(TextFolder(str(root)), length=3, test=0.3, validation=0.3).load()
    assert data.texts == {"train": ["one", "two", "three"], "validation": ["five"], "test": ["one", "four"]}
    assert data.summary["split"] == "train is 20-train, validation is 20-dev, test is 20-test"
    assert (data.summary["test also in training"], data.summary["validation also in training"]) == (1, 0)


def test_the_fingerprint_changes_with_what_is_computed_and_only_with_that(mail, tmp_path):
    first = Messages(mail, length=8)
    found = {first.load().fingerprint}
    for change in ({"length": 9}, {"truncate": "start"}, {"tokenizer": Words(12)}, {"validation": 0.2}, {"test": 0.1}):
        found.add(dataclasses.replace(first, **change).load().fingerprint)
    other = Path(mail.path).rename(tmp_path / "elsewhere")
    assert Messages(TextFolder(str(other)), length=8).load().fingerprint in found and len(found) == 6
    (other / "ham" / "3").write_text("changed")
    assert Messages(TextFolder(str(other)), length=8).load().fingerprint not in found


def test_too_few_messages(tmp_path):
    root = write_folder(tmp_path, {"a": ["x"], "b": ["y"]})
    fails("2 different training messages are too few", Messages(TextFolder(str(root))).load)
    write_folder(tmp_path / "c", {"a": ["x", "y"], "b": ["x", "z", "x"]})
    data = Messages(TextFolder(str(tmp_path / "c")), length=2, validation=0.5)
    assert not set(data.load().texts["train"]) & set(data.load().texts["validation"])


@pytest.mark.parametrize("fields, match", [
    ({"length": 0}, "length=0"), ({"validation": 0.0}, "validation=0.0"), ({"test": 1.0}, "test=1.0"),
    ({"validation": 0.6, "test": 0.4}, "leave something to train on"), ({"tokenizer": Words(1)}, r"Words\(vocab=1\)"),
    ({"source": Csv("a.csv", "label")}, "text="), ({"source": Sklearn("digits")}, "holds no messages"),
    ({"source": Csv("a.csv", "label", text="t", task="regression")}, "classes as its target"),
    ({"source": TextFolder(" ")}, "path="), ({"source": TextFolder("x", encoding="utf-9")}, "utf-9"),
    ({"source": TfdsMessages("../x")}, "not a TFDS name"), ({"tokenizer": Saved("")}, "Saved needs")])
def test_fields_out_of_range(fields, match):
    fails(match, Messages(**{"source": PythonPackages()} | fields).validate)
    Messages(PythonPackages()).validate()


# ------------------------------------------------------------------------------------------------------- saved


@pytest.mark.parametrize("tokenizer", [Words(20), BPE(280), Bytes(), Chars()], ids=lambda t: type(t).__name__)
def test_another_run_gets_the_same_ids(mail, tmp_path, tokenizer):
    first = Messages(mail, tokenizer, length=10).load()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.json").write_text(first.tokenizer_state)
    other = TextFolder(str(write_folder(tmp_path / "other", {"x": ["milk money now", "cow"], "y": ["a lunch", "no"]})))
    for path in ("run", "run/tokenizer.json"):
        saved = Saved(str(tmp_path / path))
        data = Messages(other, saved, length=10).load()
        assert data.tokenizer_state == first.tokenizer_state and saved.vocab_size_hint == first.metadata["vocab"]
        assert Messages(other, saved).metadata()["vocab"] == data.metadata["vocab"] == first.metadata["vocab"]
        assert np.array_equal(data.encode("milk at lunch"), first.encode("milk at lunch"))
        assert data.vocabulary == first.vocabulary
    if not isinstance(tokenizer, Bytes | Chars):  # negative control: a tokenizer of its own has other ids
        own = Messages(other, tokenizer, length=10).load()
        assert own.tokenizer_state != first.tokenizer_state
    old = data.fingerprint
    (tmp_path / "run" / "tokenizer.json").write_text(saved_form(Words(9), fit(Words(9), HAM)))
    assert Messages(other, saved, length=10).load().fingerprint != old


def test_text_gives_its_tokenizer_to_messages(mail, text_file, tmp_path):
    bpe = Text(TextFiles(str(text_file)), BPE(270), 16).load()
    (tmp_path / "tokenizer.json").write_text(bpe.tokenizer_state)
    data = Messages(mail, Saved(str(tmp_path)), length=10).load()
    assert data.metadata["vocab"] == 270 and np.array_equal(data.encode("pure seed"), bpe.encode("pure seed"))
    assert (bpe.test, bpe.classes, bpe.reference(), bpe.unit) == (None, (), [], "tokens")
    fails("no reader", bpe.read, text_file)
    (tmp_path / "tokenizer.json").write_text(Text(TextFiles(str(text_file)), Bytes(), 16).load().tokenizer_state)
    fails("no id that is free for padding", Messages(mail, Saved(str(tmp_path))).load)


def test_saved_errors(tmp_path, mail):
    fails("no readable .*tokenizer.json", Messages(mail, Saved(str(tmp_path))).load)
    assert Messages(mail, Saved(str(tmp_path))).metadata() == {"length": 100}
    good = saved_form(Bytes(), with_padding(Bytes().restore("")))
    for bad in ("", "[]", '{"version": "1.0"}', good[:-3], good.replace("Bytes", "Other"),
                json.dumps(json.loads(good) | {"fields": {"size": 3}})):
        (tmp_path / "tokenizer.json").write_text(bad)
        fails("no tokenizer that a run", Saved(str(tmp_path)).fit, lambda split: iter(()), 0)


# ----------------------------------------------------------------------------------------------------- folders


def test_text_folder_reads_files_in_order_of_names(tmp_path):
    write_folder(tmp_path, {"b": ["b0", "b1"], "a": ["a0 \u00e9"]})
    (tmp_path / "a" / "deep").mkdir()
    (tmp_path / "a" / "deep" / "x.txt").write_bytes("a1 \u00e9".encode())
    (tmp_path / "a" / ".hidden").write_text("no")
    (tmp_path / "notes.txt").write_text("no message")
    found = TextFolder(str(tmp_path)).load()
    assert found.classes == ("a", "b") and list(found.splits) == ["train"]
    texts, labels = found.splits["train"]
    assert texts == ["a0 é", "a1 é", "b0", "b1"] and labels.tolist() == [0, 0, 1, 1]
    latin = TextFolder(str(tmp_path), encoding="latin-1").load()
    assert latin.splits["train"][0][0] == "a0 Ã©" and latin.fingerprint() != found.fingerprint()


def test_text_folder_errors(tmp_path):
    fails("Cannot read the folder .*/nowhere", TextFolder(str(tmp_path / "nowhere")).load)
    (tmp_path / "empty").mkdir()
    fails("no folder of messages in .*/empty", TextFolder(str(tmp_path / "empty")).load)
    (tmp_path / "empty" / "train").mkdir()
    fails("empty/train has no folder", TextFolder(str(tmp_path / "empty")).load)
    root = write_folder(tmp_path / "x", {"train/a": ["1"], "train/b": ["2"], "test/a": ["3"]})
    found = load(TextFolder(str(root)))
    assert [label.tolist() for _, label in found.splits.values()] == [[0, 1], [0]]  # a class may be missing in test
    (root / "train" / "b" / "0").rename(root / "spare")
    fails("class folder .*/train/b has no message", TextFolder(str(root)).load)
    (root / "train" / "b" / "9").write_bytes(b"caf\xe9!")
    fails(r'train/b/9 is not UTF-8 text: byte 3 .*cp1252', TextFolder(str(root)).load)
    TextFolder(str(root), encoding="latin-1").load()
    write_folder(root, {"test/c": ["4"]})
    fails("test/c is a class that the training folder lacks", TextFolder(str(root), encoding="latin-1").load)
    shutil.rmtree(root / "test")
    write_folder(root, {"other/c": ["4"]})
    fails("not clear what other is", TextFolder(str(root)).load)
    one = write_folder(tmp_path / "one", {"a": ["1", "2"]})
    fails("has 1 class", load, TextFolder(str(one)))


# ----------------------------------------------------------------------------------------------------- csv, TFDS


def write_csv(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("text,category\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
    return str(path)


def test_csv(tmp_path):
    rows = [(f"{text} {i}", label) for i in range(4) for label, texts in (("h", HAM), ("s", SPAM)) for text in texts]
    train, test = write_csv(tmp_path / "train.csv", rows), write_csv(tmp_path / "test.csv", [("my lunch", "h")])
    data = Messages(Csv(train, "category", text="text", test=test), length=5).load()
    assert data.classes == ("h", "s") and len(data.test) == 1 and data.test.arrays["targets"].tolist() == [0]
    assert data.decode(data.test.arrays["inputs"][0]) == "<unk> lunch"
    assert Messages(Csv(train, "category", text="text"), length=5).load().test is None
    fails("no column 'txt'.*text", load, Csv(train, "category", text="txt"))
    fails("needs text=", load, Csv(train, "category"))
    fails("no column 'label'", load, Csv(train, "label", text="text"))
    strange = write_csv(tmp_path / "strange.csv", [("my lunch", "h"), ("x", "new")])
    fails("strange.csv, line 3, column 'category': the class 'new' does not occur", load,
          Csv(train, "category", text="text", test=strange))
    fails("no messages", load, Sklearn("digits"))


def prepare(root: Path, **splits: list[tuple[str, int]]) -> str:
    """A data set as TFDS prepares it, made without TensorFlow."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = root / "toy" / "1.0.0"
    folder.mkdir(parents=True)
    label = tfds.features.ClassLabel(names=["neg", "pos"])
    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": label, "id": tfds.features.Text()})
    features.save_config(folder)
    info = {"name": "toy", "version": "1.0.0", "fileFormat": "array_record", "splits": []}
    for split, records in splits.items():
        writer = ArrayRecordWriter(str(folder / f"toy-{split}.array_record-00000-of-00001"), "group_size:1")
        for text, number in records:
            writer.write(features.serialize_example({"text": text, "label": number, "id": "id of it"}))
        writer.close()
        info["splits"].append({"name": split, "shardLengths": [str(len(records))], "numBytes": "100",
                               "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"})
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return str(root)


def test_tfds(tmp_path, monkeypatch):
    monkeypatch.setattr(message_sources, "AT_ONCE", 3)
    train = [(text, int(text in SPAM)) for pair in zip(HAM, SPAM, strict=True) for text in pair]
    where = prepare(tmp_path, train=train, test=[("milk", 0)], extra=[("odd", -1)])
    found = load(TfdsMessages("toy", where))
    assert found.classes == ("neg", "pos") and found.splits["train"][0] == [text for text, _ in train]
    assert found.splits["train"][1].tolist() == [0, 1] * 4 and found.splits["test"][0] == ["milk"]
    assert found.rule == "train is train, test is test"
    cut = load(TfdsMessages("toy", where, train="train[2:]", validation="train[:2]", test="test[:1]"))
    assert [len(texts) for texts, _ in cut.splits.values()] == [6, 2, 1]
    assert Messages(TfdsMessages("toy", where), length=4).load().summary["test messages"] == 1
    fails("no field 'class'; it has id, label, text", load, TfdsMessages("toy", where, label="class"))
    fails("no field 'txt'", load, TfdsMessages("toy", where, feature="txt"))
    fails("field 'id' of toy holds .*no class", load, TfdsMessages("toy", where, label="id"))
    fails("toy extra has the label -1", load, TfdsMessages("toy", where, test="extra"))
    fails("split 'tset' .*unknown", load, TfdsMessages("toy", where, test="tset"))
    fails("class 'pos' has no training message", load, TfdsMessages("toy", where, train="train[:1]"))
    fails("not prepared", load, TfdsMessages("other", where))


def test_imdb(shared):
    data = Messages(
        TfdsMessages("imdb_reviews/plain_text", str(shared / "tfds"), train="train[:300]", test="test[:100]"),
        Words(500),
        length=50,
    ).load()
    assert data.classes == ("neg", "pos") and (len(data.train) + len(data.validation), len(data.test)) == (300, 100)
    accuracy = float(re.search(r"accuracy ([\d.]+)", data.reference()[0])[1])
    assert 0.6 < accuracy < 1  # far from chance on 100 reviews: text and label belong together


def test_banking77(shared):
    folder = shared / "data" / "banking77"
    data = Messages(Csv(str(folder / "train.csv"), "category", text="text", test=str(folder / "test.csv")),
                    length=32).load()
    assert (len(data.train) + len(data.validation), len(data.test), len(data.classes)) == (10_003, 3_080, 77)
    assert set(np.bincount(data.test.arrays["targets"])) == {40} and min(np.bincount(
        data.validation.arrays["targets"], minlength=77)) >= 1
    assert data.classes == tuple(sorted(json.loads((folder / "categories.json").read_text())))


# ------------------------------------------------------------------------------------------------- 20 newsgroups


def test_newsgroups_archive(tmp_path):
    """A small archive of the same layout, read by Sklearn and, unpacked, by TextFolder: the same messages."""
    path = tmp_path / "20news-bydate.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for split, count in (("train", 6), ("test", 2)):
            for group in ("alt.atheism", "sci.space"):
                for i in range(count):
                    raw = f"From: x\xe9\n\n{group[:3]} {split} {i}".encode("latin-1")
                    member = tarfile.TarInfo(f"20news-bydate-{split}/{group}/{i}")
                    member.size = len(raw)
                    archive.addfile(member, io.BytesIO(raw))
    data = Messages(Sklearn("20newsgroups", str(path)), length=6).load()
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "out", filter="data")
    folder = Messages(TextFolder(str(tmp_path / "out"), encoding="latin-1"), length=6).load()
    assert data.texts == folder.texts and data.classes == folder.classes == ("alt.atheism", "sci.space")
    assert data.fingerprint == folder.fingerprint and [len(data.train), len(data.test)] == [10, 4]


# ---------------------------------------------------------------------------------------------- standard library


def test_python_packages_share_no_file_and_no_import(tmp_path):
    found = load(PythonPackages())
    assert found.classes == PACKAGES and set(found.splits) == {"train", "validation", "test"}
    files = {name: set(cut_code(path)) for name, path in PythonStdlib().open().paths.items()
             if name.split("/")[0] in PACKAGES}
    texts = {split: set(texts) for split, (texts, _) in found.splits.items()}
    for name, pieces in files.items():
        assert not pieces or sum(pieces <= own for own in texts.values()) == 1, name
    sizes = {split: len(own) for split, (own, _) in found.splits.items()}
    assert sizes["train"] > 1000 and min(sizes.values()) > 200 and sum(sizes.values()) == sum(map(len, files.values()))
    for own, labels in found.splits.values():
        assert len(own) == len(labels) and np.bincount(labels, minlength=8).min() >= 10
        assert not any(re.search(r"^\s*import |^\s*from \S+ import ", text, re.M) for text in own)
    path = tmp_path / "x.py"
    path.write_text("import os\nfrom a import b\n\n" + "\n".join(f"x{i} = 1  " for i in range(31)) + "\n  import re\n")
    first, second = cut_code(path)
    assert first.splitlines() == [f"x{i} = 1" for i in range(20)] and second.count("\n") == 10
    path.write_bytes(b"\xff" * 100)
    assert cut_code(path) == []


def test_python_without_the_source_text(monkeypatch):
    real = PythonStdlib.open
    monkeypatch.setattr(PythonStdlib, "open", lambda self: dataclasses.replace(real(self), paths={
        name: path for name, path in real(self).paths.items() if not name.startswith("xml/")}))
    fails("without most of the source text of xml", load, PythonPackages())


# ------------------------------------------------------------------------------------------------ read, reference


def test_new_messages_are_encoded_as_in_training(mail, tmp_path):
    data = Messages(mail, length=3).load()
    (tmp_path / "new.txt").write_bytes("\ufeffcheap pills now at noon\nlunch\r\n".encode())
    found = data.read(tmp_path / "new.txt")
    names, records = found.names, found.records
    assert names == ["line 1", "line 2"] and set(records.arrays) == {"inputs", "mask"}
    assert [data.decode(ids) for ids in records.arrays["inputs"]] == ["cheap pills now", "lunch"]
    (tmp_path / "new.csv").write_text('id,text\n7,"cheap, cheap"\n\n8,"noon\nlunch"\n')
    found = data.read(tmp_path / "new.csv")
    names, records = found.names, found.records
    assert names == ["line 2", "line 4"]
    assert [data.decode(ids) for ids in records.arrays["inputs"]] == ["cheap cheap", "noon lunch"]


@pytest.mark.parametrize("name, content, match", [
    ("a.txt", "one\n\nthree\n", "a.txt, line 2 has no text"), ("a.txt", "", "a.txt is empty"),
    ("a.csv", "txt\nx\n", "no column 'text'"), ("a.csv", 'text,n\n" ",1\n', "a.csv, line 2 has no text"),
    ("a.pdf", "x", "give a .txt file with one message a line"), ("a.txt", None, "Cannot read"),
    ("a.txt", b"\xff", "not UTF-8")])
def test_new_messages_errors(mail, tmp_path, name, content, match):
    data = Messages(mail, length=3).load()
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    fails(match, data.read, tmp_path / name, None, True)


def test_reference_is_scikit_learn_on_the_same_split(mail):
    data = Messages(mail, length=3, test=0.25).load()
    assert data.reference() == ["TF-IDF + logistic regression (whole messages): test accuracy 1.0000, macro F1 1.0000"]
    data.texts["test"] = data.texts["test"][::-1]  # negative control: messages that are not the targets'
    assert "accuracy 0.0000" in data.reference()[0]
    data.test = None
    assert "validation accuracy" in data.reference()[0]
