"""Sources: which documents, in which order, in which split, and what bad input gets."""

import gzip
import json
import os
import sys
import time
from pathlib import Path

import pytest

from lab.data import cache_folder
from lab.data.text.files import between, held_out, pieces
from lab.data.text.sources import PythonStdlib, TextFiles, TfdsText
from lab.errors import UserError

SHARED = Path(os.environ.get("LAB_SHARED") or Path(__file__).parents[3] / "shared")
SHAKESPEARE = SHARED / "data" / "tinyshakespeare" / "input.txt"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tfds_dir():
    if not (SHARED / "tfds").is_dir():
        pytest.skip(f"no prepared TFDS data in {SHARED}/tfds")
    return str(SHARED / "tfds")


def read(corpus, split):
    return ["".join(document) for document in corpus.documents(split, corpus.survey())]


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


# ------------------------------------------------------------------------------------------------- streaming


def test_pieces_are_the_text_and_ignore_chunks():
    text = "one two\n  three " * 5000 + "x" * 3000 + " " * 3000 + "\n" * 3000
    found = list(pieces([text], size=1000))
    assert "".join(found) == text and max(map(len, found)) <= 1000
    assert list(pieces([text[i : i + 37] for i in range(0, len(text), 37)], size=1000)) == found
    assert list(pieces([])) == [] and list(pieces(["", "a"])) == ["a"]


def test_cuts_leave_the_tokens_of_gpt2s_pattern_unchanged():
    pytest.importorskip("tokenizers")
    from tokenizers.pre_tokenizers import ByteLevel

    def words(text):
        return [word for word, _ in ByteLevel(add_prefix_space=False).pre_tokenize_str(text)]

    text = "def f(x):\n    return x  # it's 12 é's,   and\n\n\tmore don't\n" * 60
    found = list(pieces([text], size=50))
    assert len(found) > 50
    assert [w for piece in found for w in words(piece)] == words(text)
    blind = [text[i : i + 50] for i in range(0, len(text), 50)]  # negative control
    assert [w for piece in blind for w in words(piece)] != words(text)


def test_between_takes_characters_across_documents():
    def documents():
        return iter([iter(["ab", "c"]), iter(["de"]), iter(["fgh"])])

    for start in range(9):
        for stop in range(start, 9):
            assert "".join("".join(d) for d in between(documents(), start, stop)) == "abcdefgh"[start:stop]


# ----------------------------------------------------------------------------------------------------- files


def test_one_file_is_cut_at_nine_tenths_of_its_characters(tmp_path):
    text = "".join(chr(0x4E00 + i) for i in range(1000)) + "\r\n"
    corpus = TextFiles(str(write(tmp_path / "d", a=text) / "a.txt")).open()
    assert read(corpus, "train") == [text[:901]]
    assert "".join(read(corpus, "validation")) == text[901:]
    assert corpus.rule(corpus.survey()) == "validation is the last 10 % of the characters"


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason=f"no {SHAKESPEARE}")
def test_tiny_shakespeare_splits_as_nanogpt_does():
    corpus = TextFiles(str(SHAKESPEARE)).open()
    assert [len(read(corpus, split)[0]) for split in ("train", "validation")] == [1003854, 111540]


def test_few_files_are_cut_as_one_text(tmp_path):
    corpus = TextFiles(str(write(tmp_path / "d", a="a" * 50, b="b" * 45, c="c" * 5))).open()
    assert read(corpus, "train") == ["a" * 50, "b" * 40]
    assert [d for d in read(corpus, "validation") if d] == ["b" * 5, "c" * 5]


def test_many_files_are_split_whole_by_name(tmp_path):
    folder = write(tmp_path / "d", **{f"n{i:03}": f"text {i}\n" for i in range(200)})
    corpus = TextFiles(str(folder)).open()
    train, validation = read(corpus, "train"), read(corpus, "validation")
    assert sorted(train + validation) == sorted(f"text {i}\n" for i in range(200))
    assert 10 <= len(validation) <= 30
    write(folder, zzz="new\n")
    assert set(validation) <= set(read(TextFiles(str(folder)).open(), "validation"))  # none moves


def test_held_out_is_never_empty():
    for n in range(20, 40):
        assert 1 <= len(held_out([f"x{n}-{i}" for i in range(n)])) < n


def test_patterns(tmp_path, monkeypatch):
    write(tmp_path / "d", b="B", a="A")
    (tmp_path / "d" / "deep").mkdir()
    write(tmp_path / "d" / "deep", c="C")
    (tmp_path / "d" / "e.txt.gz").write_bytes(gzip.compress(b"E"))
    (tmp_path / "d" / "note.md").write_text("no")
    monkeypatch.setenv("HOME", str(tmp_path))

    def names(pattern):
        return list(TextFiles(pattern).open().paths)

    assert names(str(tmp_path / "d")) == ["a.txt", "b.txt", "e.txt.gz"]
    assert names("~/d/**/*.txt") == ["a.txt", "b.txt", "deep/c.txt"]
    assert names("~/d/note.md") == ["note.md"]
    corpus = TextFiles("~/d/e.txt.gz").open()
    assert corpus.survey().characters == 1


def test_fingerprint_is_of_names_and_content_only(tmp_path):
    def fingerprint(folder):
        return TextFiles(str(folder)).open().survey().fingerprint

    first = fingerprint(write(tmp_path / "one", a="A", b="B"))
    assert fingerprint(write(tmp_path / "two", a="A", b="B")) == first
    assert fingerprint(write(tmp_path / "three", a="B", b="A")) != first
    assert fingerprint(write(tmp_path / "four", a="A", c="B")) != first


def test_the_survey_is_remembered_until_a_file_changes(tmp_path, monkeypatch):
    folder = write(tmp_path / "d", a="A" * 10)
    old = time.time() - 100
    os.utime(folder / "a.txt", (old, old))
    corpus = TextFiles(str(folder)).open()
    first = corpus.survey()
    monkeypatch.setattr("lab.data.text.files.read_text", lambda path: pytest.fail("read again"))
    assert TextFiles(str(folder)).open().survey() == first
    monkeypatch.undo()
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    write(folder, a="B" * 10)
    assert TextFiles(str(folder)).open().survey().fingerprint != first.fingerprint
    for path in cache_folder("sources").iterdir():  # a damaged memory is no memory
        path.write_text("{")
    os.utime(folder / "a.txt", (old, old))
    assert TextFiles(str(folder)).open().survey().documents == 1


def test_bad_files(tmp_path):
    def message(pattern):
        with pytest.raises(UserError) as caught:
            corpus = TextFiles(str(pattern))
            corpus.validate()
            corpus.open().survey()
        return str(caught.value)

    assert "needs a file" in message(" ")
    assert "does not exist" in message(tmp_path / "no.txt")
    assert "no *.txt file" in message(tmp_path)
    folder = write(tmp_path / "d", bad=b"x" * (1 << 20) + b"ok \xe9 no", empty="")
    assert f"{folder / 'bad.txt'} is not UTF-8 text: byte {(1 << 20) + 3} " in message(folder / "bad.txt")
    assert "empty.txt is empty" in message(folder / "empty.txt")
    (folder / "cut.gz").write_bytes(gzip.compress(os.urandom(1000))[:-20])
    assert "not a whole gzip file" in message(folder / "cut.gz") or "not UTF-8" in message(folder / "cut.gz")
    (folder / "fake.gz").write_text("hello")
    assert "fake.gz is not a whole gzip file" in message(folder / "fake.gz")
    split = write(tmp_path / "s", a=b"\xc3\xa9" * (1 << 19) + b"x\xc3")  # a character cut by the end of the file
    assert f"byte {(1 << 20) + 1} " in message(split)


def test_a_character_across_two_blocks_is_whole(tmp_path):
    text = "x" + "é" * (1 << 20)
    corpus = TextFiles(str(write(tmp_path / "d", a=text))).open()
    assert "".join(read(corpus, "train") + read(corpus, "validation")) == text


def test_empty_files_among_others_are_counted(tmp_path):
    survey = TextFiles(str(write(tmp_path / "d", a="A", b="", c="C"))).open().survey()
    assert survey.skipped == ("b.txt",) and survey.documents == 2


# --------------------------------------------------------------------------------------------------- standard library


def test_python_stdlib():
    corpus = PythonStdlib().open()
    survey = corpus.survey()
    assert survey == PythonStdlib().open().survey()
    assert survey.documents > 300 and survey.bytes > 5_000_000
    assert list(corpus.paths) == sorted(corpus.paths)
    assert "dataclasses.py" in corpus.paths
    for name in corpus.paths:
        assert not {"site-packages", "test", "tests", "__pycache__", "encodings"} & set(Path(name).parts)
    sizes = {s: sum(len(d.encode()) for d in read(corpus, s)) for s in ("train", "validation")}
    assert sum(sizes.values()) == survey.bytes
    assert 0.04 < sizes["validation"] / survey.bytes < 0.2


def test_python_stdlib_skips_what_is_not_text_and_needs_some(tmp_path, monkeypatch):
    for i in range(25):
        (tmp_path / f"m{i}.py").write_text(f"x = {i}\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    survey = PythonStdlib().open().survey()
    assert survey.documents == 25 and survey.skipped == ("latin.py",)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="No source text"):
        PythonStdlib().open()


# --------------------------------------------------------------------------------------------------------------- TFDS


def test_tfds_named_splits(tfds_dir):
    corpus = TfdsText("tiny_shakespeare", tfds_dir).open()
    assert [[len(d) for d in read(corpus, s)] for s in ("train", "validation")] == [[1003854], [55770]]
    both = TfdsText("tiny_shakespeare", tfds_dir, validation="validation+test").open()
    assert [len(d) for d in read(both, "validation")] == [55770, 55770]
    assert both.survey().fingerprint != corpus.survey().fingerprint
    assert "tensorflow" not in sys.modules


def test_tfds_without_a_validation_split(tfds_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
    corpus = TfdsText("imdb_reviews", train="train[:300]").open()
    assert [len(read(corpus, s)) for s in ("train", "validation")] == [270, 30]
    assert "last 10 % of the records of train[:300]" in corpus.rule(corpus.survey())
    assert all(isinstance(d, str) and len(d) > 20 for d in read(corpus, "validation"))
    few = TfdsText("imdb_reviews/plain_text:1.0.0", train="train[:5]").open()
    whole = "".join(read(few, "train") + read(few, "validation"))
    assert len("".join(read(few, "train"))) == len(whole) * 9 // 10
    assert whole == "".join(read(corpus, "train")[:5])


def test_tfds_errors(tfds_dir, tmp_path):
    def message(**fields):
        begin = time.monotonic()
        with pytest.raises(UserError) as caught:
            TfdsText(**{"name": "imdb_reviews", "data_dir": tfds_dir} | fields).open().survey()
        assert time.monotonic() - begin < 10
        return str(caught.value)

    assert message(name="lm1b").endswith("run ./launch.sh prepare lm1b")
    assert str(tmp_path) in message(data_dir=str(tmp_path))
    assert "is not prepared" in message(name="imdb_reviews:9.0.0")
    assert "not a TFDS name" in message(name="../x")
    assert "no field 'txt'; it has label, text" in message(feature="txt")
    for bad in ("valid", "train[", "train[:0]"):
        assert f"'{bad}'" in message(validation=bad) and "train, test" in message(train=bad)
    for config in ("a", "b"):
        (tmp_path / "imdb_reviews" / config / "1.0.0").mkdir(parents=True)
        (tmp_path / "imdb_reviews" / config / "1.0.0" / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    assert "name one of imdb_reviews/a, imdb_reviews/b" in message(data_dir=str(tmp_path))
    assert "prepared as tfrecord" in message(name="imdb_reviews/a", data_dir=str(tmp_path))


# -------------------------------------------------------------------------------------------------------------- cache


def test_cache_folder_falls_back_with_one_line(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = cache_folder("tokens")
    assert folder.is_dir() and tmp_path in folder.parents and folder == cache_folder("tokens")
    assert len(caplog.records) == 2 and "cannot write the cache folder" in caplog.text
    monkeypatch.delenv("LAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("tokens") == tmp_path / "xdg" / "lab" / "tokens"


def forged_tfds(root, features):
    """A prepared data set whose description was written by somebody else."""
    folder = root / "forged" / "1.0.0"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_info.json").write_text(json.dumps({"name": "forged", "fileFormat": "array_record"}))
    (folder / "features.json").write_text(features)
    return TfdsText("forged", str(root))


@pytest.mark.parametrize("inner", [
    {"pythonClassName": "marker_module.Text"}, {"type": "marker_module.Text"},
    {"jsonFeature": {"json": json.dumps({"feature": {"type": "marker_module.Text"}})}},
    {"sequence": {"feature": [{"python_class_name": "marker_module.Text"}]}}])
def test_a_class_that_is_not_tfdss_is_not_imported(tmp_path, monkeypatch, inner):
    own = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    features = {"pythonClassName": own, "featuresDict": {"features": {"text": inner}}}
    (tmp_path / "marker_module.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    text = json.dumps(features)
    for written in (text, text.replace("marker", "\\u006darker")):
        with pytest.raises(UserError, match="'marker_module.Text'.* not TFDS's own"):
            forged_tfds(tmp_path, written).open()
    assert not (tmp_path / "marker").exists()


def test_damaged_descriptions_of_tfds_are_a_sentence(tmp_path):
    for text in ("{", "[1]", '{"featuresDict": 3}', "\0", '{"a": {"json": "{"}}'):
        with pytest.raises(UserError, match="are damaged .*: run ./launch.sh prepare forged"):
            forged_tfds(tmp_path, text).open()
