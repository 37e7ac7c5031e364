"""Token files and windows: exact content, the cache's life, and what bad input gets."""

import dataclasses
import errno
import logging
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lab.data.pipeline import epoch_offsets, eval_batches, train_batch, train_batches
from lab.data.text import token_files
from lab.data.text.sources import PythonStdlib, TextFiles, TfdsText
from lab.data.text.text import Text
from lab.data.tokenizers import BPE, GPT2, Bytes, Chars
from lab.errors import UserError

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("LAB_SHARED") or ROOT.parent / "shared")
SHAKESPEARE = SHARED / "data" / "tinyshakespeare" / "input.txt"
WORDS = "the quick brown fox jumps over the lazy dog's back, é 你 and so on.\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, "lab.data")
    return tmp_path / "cache"


@pytest.fixture
def corpus(tmp_path):
    """Forty files of different text, and the pattern that names them."""
    for i in range(40):
        (tmp_path / f"doc{i:02}.txt").write_text(f"{i}: " + WORDS * (5 + i), encoding="utf-8")
    return TextFiles(str(tmp_path / "doc*.txt"))


def token_folder(cache):
    return next(p for p in (cache / "tokens").iterdir() if p.is_dir())


@pytest.mark.parametrize("length", [1, 7, 64])
def test_windows_cover_each_target_once(corpus, length):
    data = Text(corpus, BPE(300), length).load()
    for records in (data.train, data.validation):
        n = len(records)
        assert n == (len(records.tokens) - 1) // length
        found = records[np.arange(n)]
        tokens, sizes = found["tokens"], found["bytes"]
        assert tokens.shape == (n, length + 1) and tokens.dtype == sizes.dtype == np.int32
        assert np.array_equal(tokens[:, 1:].ravel(), records.tokens[1 : n * length + 1])
        assert np.array_equal(tokens[:, :-1].ravel(), records.tokens[: n * length])
        assert sizes.tolist() == [data.fitted.byte_counts[row[1:]].sum() for row in tokens]
        pick = np.array([n - 1, 0, n // 2])
        assert np.array_equal(records[pick]["tokens"], tokens[pick])
        with pytest.raises(IndexError):
            records[np.array([n])]
    assert (data.unit, data.units_per_record) == ("tokens", length)
    assert data.metadata == {"vocab": 300, "length": length}


@pytest.mark.parametrize("length", [1, 7, 64])
def test_windows_move_along_the_text_in_every_epoch_but_the_first(corpus, length):
    """What is in an epoch is a function of (seed, epoch): all tokens still, once, but cut at other places."""
    data = Text(corpus, BPE(300), length).load()
    records, tokens = data.train, data.train.tokens
    n, whole = len(records), np.arange(len(records))
    plain = records[whole]
    first = records.in_epoch(whole, np.zeros(n, int), 3)
    assert all(np.array_equal(first[name], plain[name]) for name in plain)
    offsets = epoch_offsets(np.arange(40), 3, length)
    assert offsets[0] == 0 and ((offsets >= 0) & (offsets < length)).all()
    assert (len(set(offsets.tolist())) > min(length, 40) // 3) and (length == 1 or set(offsets[1:].tolist()) != {0})
    assert length == 1 or not np.array_equal(offsets, epoch_offsets(np.arange(40), 4, length))
    for epoch in (1, 2, 30):
        moved = records.in_epoch(whole, np.full(n, epoch), 3)["tokens"]
        begins = whole * length + offsets[epoch]
        inside = begins + length < len(tokens)
        assert (~inside).sum() <= 1
        assert np.array_equal(moved[inside], np.stack([tokens[b : b + length + 1] for b in begins[inside]]))
        assert all(np.array_equal(row, tokens[: length + 1]) for row in moved[~inside])
    mixed = records.in_epoch(np.array([0, 0]), np.array([0, 1]), 3)["tokens"]  # a batch across two epochs
    assert np.array_equal(mixed[1], tokens[offsets[1] : offsets[1] + length + 1])
    assert np.array_equal(mixed[0], plain["tokens"][0])


def test_batches_of_later_epochs_are_of_moved_windows_and_those_of_evaluation_are_not(tmp_path):
    letters = np.random.default_rng(0).integers(97, 123, 20_000).astype(np.uint8)  # no two windows are alike
    (tmp_path / "a.txt").write_bytes(letters.tobytes())
    records = Text(TextFiles(str(tmp_path / "a.txt")), Bytes(), 16).load().train
    n = len(records)
    cut = {row.tobytes() for row in records[np.arange(n)]["tokens"]}

    def known(batch):
        return np.mean([row.tobytes() in cut for row in batch["tokens"]])

    assert known(train_batch(records, 0, n, seed=1)) == 1
    later = train_batch(records, 1, n, seed=1)
    assert known(later) < 0.5 and sorted(later["index"].tolist()) == list(range(n))
    again = train_batch(records, 1, n, seed=1)
    assert all(np.array_equal(later[name], again[name]) for name in later)  # a function of (seed, step)
    both = train_batches(records, 0, 2, n, seed=1)
    assert np.array_equal(both["tokens"][1], later["tokens"])
    part = train_batch(records, 1, n, seed=1, rows=slice(1, None, 2))
    assert np.array_equal(part["tokens"], later["tokens"][1::2])
    assert all(known(batch) == 1 for batch in eval_batches(records, 16))


def test_text_and_bytes_are_exact_and_equal_across_tokenizers(corpus):
    opened = corpus.open()
    survey = opened.survey()
    want = {s: ["".join(d) for d in opened.documents(s, survey)] for s in ("train", "validation")}
    for tokenizer in (Bytes(), Chars(), BPE(300)):
        data = Text(corpus, tokenizer, 1).load()
        for split, records in (("train", data.train), ("validation", data.validation)):
            texts, ids = want[split], records.tokens
            parts = [ids] if data.eot is None else np.split(ids, np.flatnonzero(ids == data.eot))
            if data.eot is not None:
                parts = [parts[0], *(part[1:] for part in parts[1:])]
                assert [data.decode(part) for part in parts] == texts  # a separator between documents, none at the ends
            assert "".join(data.decode(part) for part in parts) == "".join(texts)
            assert data.fitted.byte_counts[ids].sum() == data.summary[f"{split} bytes"] == len("".join(texts).encode())
            assert data.summary[f"{split} documents"] == len(texts)
        assert data.validation_bytes() == "".join(want["validation"]).encode()
        assert data.validation_bytes(100) == data.validation_bytes()[:100]
        total = sum(int((b["bytes"] * b["weight"]).sum()) for b in eval_batches(data.validation, 7))
        assert total == data.summary["validation bytes"] - data.fitted.byte_counts[data.validation.tokens[0]]


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason=f"no {SHAKESPEARE}")
def test_tiny_shakespeare_characters():
    data = Text(TextFiles(str(SHAKESPEARE)), Chars(), 64).load()
    assert (len(data.train.tokens), len(data.validation.tokens)) == (1003854, 111540)
    assert data.metadata["vocab"] == 65 and data.eot is None and data.train.tokens.dtype == np.uint16
    assert data.decode(data.encode("ROMEO: What?")) == "ROMEO: What?"
    assert "".join(p.decode() for p in data.fitted.pieces[:4]) == "\n !$"


@pytest.mark.skipif(not (SHARED / "tfds").is_dir(), reason=f"no prepared TFDS data in {SHARED}/tfds")
def test_tfds_text():
    data = Text(TfdsText("tiny_shakespeare", str(SHARED / "tfds")), Bytes(), 64).load()
    assert (len(data.train.tokens), len(data.validation.tokens)) == (1003854, 55770)
    assert data.validation_bytes(14) == b"?\n\nGREMIO:\nGoo"


def test_wide_vocabulary_is_uint32(tmp_path):
    (tmp_path / "a.txt").write_text("".join(chr(0x10000 + i) for i in range(70_000)), encoding="utf-8")
    data = Text(TextFiles(str(tmp_path / "a.txt")), Chars(), 8).load()
    assert data.train.tokens.dtype == np.uint32 and data.metadata["vocab"] == 70_000
    assert data.decode(data.validation.tokens) == "".join(chr(0x10000 + i) for i in range(63_000, 70_000))


def test_second_load_reads_the_cache_only(corpus, monkeypatch, caplog):
    first = Text(corpus, BPE(300), 16).load()
    monkeypatch.setattr(BPE, "fit", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr("lab.data.text.token_files._encoded", lambda *_: pytest.fail("tokenised again"))
    caplog.clear()
    again = Text(corpus, BPE(300), 16).load()
    assert again.fingerprint == first.fingerprint and again.summary == first.summary
    assert np.array_equal(again.train.tokens, first.train.tokens) and caplog.text == ""


def test_fingerprint_depends_on_text_tokenizer_and_length(corpus, tmp_path):
    spec = Text(corpus, BPE(300), 16)
    change = [{"tokenizer": BPE(301)}, {"tokenizer": Bytes()}, {"length": 17}]
    found = [spec.load().fingerprint, *(dataclasses.replace(spec, **c).load().fingerprint for c in change)]
    (tmp_path / "doc00.txt").write_text("something else")
    found.append(spec.load().fingerprint)
    assert len(set(found)) == 5


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "tokenizer.json", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damaged_cache_is_made_again_and_said(corpus, cache, caplog, name, damage):
    spec = Text(corpus, BPE(300), 16)
    good = np.array(spec.load().train.tokens)
    path = token_folder(cache) / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    if damage == "flip":
        path.write_bytes(raw)
    elif damage == "cut":
        path.write_bytes(raw[:-1])
    else:
        path.unlink()
    caplog.clear()
    assert np.array_equal(spec.load().train.tokens, good)
    assert "is damaged" in caplog.text and name in caplog.text
    assert [p.name for p in (cache / "tokens").iterdir() if p.is_dir()] == [path.parent.name]
    caplog.clear()
    spec.load()
    assert caplog.text == ""


def test_large_files_are_checked_at_both_ends(corpus, cache, monkeypatch, caplog):
    monkeypatch.setattr(token_files, "FULL_CHECK", 1000)
    monkeypatch.setattr(token_files, "END", 500)
    spec = Text(corpus, Bytes(), 16)
    spec.load()
    path = token_folder(cache) / "train.bin"
    for at in (3, -3):
        raw = bytearray(path.read_bytes())
        raw[at] ^= 1
        path.write_bytes(raw)
        caplog.clear()
        spec.load()
        assert "train.bin" in caplog.text


def test_the_pages_of_a_batch_are_asked_for_together(corpus, monkeypatch):
    """Of a file too large to be read at each start: every page that the batch needs, and hardly any other."""
    data = Text(corpus, Bytes(), 100).load()
    records = data.train
    assert token_files._large_file(records.tokens) is None  # small: in memory since the check
    monkeypatch.setattr(token_files, "FULL_CHECK", 1000)
    asked = []

    class Spy:
        def madvise(self, what, start, length):
            assert what == mmap.MADV_WILLNEED and start % mmap.PAGESIZE == 0
            asked.append((start, start + length))

    assert isinstance(token_files._large_file(records.tokens), mmap.mmap)
    pick = np.array([len(records) - 1, 0, 7, 7])
    want = records[pick]
    monkeypatch.setattr(token_files, "_large_file", lambda tokens: Spy())
    assert np.array_equal(records[pick]["tokens"], want["tokens"])
    for i, (start, stop) in zip(pick.tolist(), asked, strict=True):
        assert 0 <= i * 200 - start < mmap.PAGESIZE and stop == i * 200 + 202 <= records.tokens.nbytes


def test_context_longer_than_the_data(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    source = TextFiles(str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match="30 tokens .* 90 train tokens and 10 validation .* is 9"):
        Text(source, Bytes(), 30).load()
    assert len(Text(source, Bytes(), 9).load().validation) == 1
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(UserError, match="give more text"):
        Text(TextFiles(str(tmp_path / "b.txt")), Bytes(), 1).load()


def test_validate_needs_no_files():
    Text(TextFiles("nowhere.txt"), GPT2()).validate()
    Text(PythonStdlib(), BPE()).validate()
    for bad in (Text(PythonStdlib(), Bytes(), 0), Text(TextFiles(""), Bytes()), Text(PythonStdlib(), BPE(10))):
        with pytest.raises(UserError):
            bad.validate()


def test_full_disk(corpus, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lab.data.text.token_files._write", full)
    with pytest.raises(UserError, match=r"disk of the cache folder .*tokens is full \(\d+ MB free\).*LAB_CACHE"):
        Text(corpus, Bytes(), 8).load()
    assert not [p for p in (cache / "tokens").iterdir() if p.is_dir()]


def test_text_that_changes_while_it_is_read(corpus, tmp_path, monkeypatch):
    real = token_files._encoded

    def touching(*arguments):
        (tmp_path / "doc00.txt").write_text("longer " * 1000)
        return real(*arguments)

    monkeypatch.setattr("lab.data.text.token_files._encoded", touching)
    with pytest.raises(UserError, match="changed while it was read"):
        Text(corpus, Bytes(), 8).load()


def test_without_locks_the_first_to_finish_wins(corpus, cache, monkeypatch):
    """On a file system without flock two processes may build at once: here the other one publishes in between."""
    spec = Text(corpus, Bytes(), 8)
    real = token_files._write
    other = cache / "other"

    def slow(*arguments):
        meta = real(*arguments)
        folder = cache / "tokens" / arguments[3].name.split("-")[1]
        shutil.copytree(arguments[3], folder)
        monkeypatch.setattr(Path, "exists", lambda self: self != folder and os.path.exists(self))
        return meta

    monkeypatch.setattr("lab.data.text.token_files._write", slow)
    assert len(spec.load().train) > 0
    assert not other.exists() and len([p for p in (cache / "tokens").iterdir() if p.is_dir()]) == 1


# ------------------------------------------------------------------------------------------------------ processes

LOAD = """
import sys
from lab.data.text.text import Text
from lab.data.text.sources import TextFiles
from lab.data.tokenizers import BPE, Bytes
print("ready", flush=True)
data = Text(TextFiles(sys.argv[1]), BPE(500) if sys.argv[2] == "bpe" else Bytes(), 16).load()
print(data.fingerprint, len(data.train.tokens), flush=True)
"""


def start(pattern, kind):
    run = [sys.executable, "-c", LOAD, pattern, kind]
    return subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def larger(tmp_path):
    (tmp_path / "large.txt").write_text("".join(f"{i * 7919 % 10007} {WORDS}" for i in range(60_000)), encoding="utf-8")
    return str(tmp_path / "large.txt")


def test_two_processes_at_once(larger, cache):
    both = [start(larger, "bpe") for _ in range(2)]
    out = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], out
    assert out[0][0] == out[1][0]
    assert len([p for p in (cache / "tokens").iterdir() if p.is_dir()]) == 1


def test_kill_leaves_no_damaged_cache(larger, cache, caplog):
    """Killed at several moments of the work; the next start always gives the right tokens and removes the rest."""
    for delay in (0.0, 0.3, 0.6):
        process = start(larger, "bpe")
        process.stdout.readline()
        deadline = time.monotonic() + 60
        while not list(cache.glob("tokens/.tmp-*")) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()
        if delay == 0.0:
            assert list(cache.glob("tokens/.tmp-*"))  # it was caught in the act
    data = Text(TextFiles(larger), BPE(500), 16).load()
    assert "is damaged" not in caplog.text
    assert not list(cache.glob("tokens/.tmp-*"))
    whole = data.fitted.decode(data.train.tokens) + data.fitted.decode(data.validation.tokens)
    assert whole == Path(larger).read_text(encoding="utf-8")


BEGIN = """
import sys
import lab.data.text.text as t, lab.data.text.sources as s, lab.data.tokenizers as k
k.SAMPLE = 2_000_000
base = int(open("/proc/self/statm").read().split()[1]) * 4096
"""
PEAK = """
print([int(l.split()[1]) * 1024 - base for l in open("/proc/self/status") if l.startswith("VmHWM")][0] / 2**20)
"""


def peak(script, *arguments):
    """Resident memory beyond that after the imports, MB: the most that a process of its own has."""
    run = [sys.executable, "-c", BEGIN + script + PEAK, *map(str, arguments)]
    return float(subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True, timeout=100).stdout)


def test_a_corpus_larger_than_the_memory_streams(tmp_path):
    """The first start on 60 MB of text takes no more memory than on 20 MB, also while merges are learned."""
    large, small = tmp_path / "large.txt", tmp_path / "small.txt"
    with large.open("w") as file:
        for i in range(60):
            file.write(f"{i} {WORDS.replace('é 你', f'e{i * 7919}')}" * (1_000_000 // 70))
    with large.open("rb") as file:
        small.write_bytes(file.read(large.stat().st_size // 3))
    assert large.stat().st_size > 55e6
    for tokenizer, limit in (("Bytes()", 60), ("BPE(500)", 160)):
        load = f"d = t.Text(s.TextFiles(sys.argv[1]), k.{tokenizer}, 64).load()"
        one, three = peak(load, small), peak(load, large)
        assert three < limit and three - one < 10, (tokenizer, one, three)
    whole = "d = open(sys.argv[1]).read(); d = [d, d.encode()]"  # negative control
    assert peak(whole, large) - peak(whole, small) > 60
