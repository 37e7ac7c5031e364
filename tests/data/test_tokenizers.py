"""Every tokenizer gives back its text, and says how many bytes each id stands for."""

import builtins
import hashlib
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lab.data import tokenizers as tk
from lab.data.tokenizers import BPE, EOT, GPT2, Bytes, Chars
from lab.data.word_memory import WordMemory
from lab.errors import UserError

ROOT = Path(__file__).parents[2]
TEXT = "The quick brown fox\n    jumps over\tthe lazy dog's 123 bones.\r\n" * 20 + "é ß 你好 😀 \x00\x1c\u00a0\u2028 "
HARD = [TEXT, "", " ", "\n\n \n", EOT, f"a{EOT}b", "\x00\x01\x7f", "🏳️‍🌈 e\u0301", "'ll", "\ufeffx\uffff\U0010ffff"]


def fit(tokenizer, train=TEXT, validation="The end. 你"):
    texts = {"train": [train[:300], train[300:]], "validation": [validation]}
    return tokenizer.fit(lambda split: iter(texts[split]), len(train.encode()))


@pytest.fixture
def gpt2_folder(tmp_path):
    """A stand-in of GPT-2's shape: 50,000 merges, all of two bytes."""
    pytest.importorskip("tiktoken")
    alphabet = list(tk._alphabet())
    pairs = [f"{a} {b}" for a in alphabet for b in alphabet][:50000]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("kind", [Bytes(), BPE(300), Chars(), "gpt2"], ids=lambda k: type(k).__name__)
def test_round_trip(kind, request):
    kind = GPT2(str(request.getfixturevalue("gpt2_folder"))) if kind == "gpt2" else kind
    fitted = fit(kind, TEXT + "".join(HARD))
    samples = list(HARD)
    if not isinstance(kind, Chars):  # any text at all, also what was never seen
        draw = random.Random(0)
        samples += ["".join(chr(c) for c in draw.sample(range(0x110000), 50) if not 0xD800 <= c < 0xE000)]
    batch = fitted.encode_batch(samples)
    again = kind.restore(fitted.state)
    for text, ids in zip(samples, batch, strict=True):
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert fitted.decode(ids) == text
        assert fitted.byte_counts[ids].sum() == len(text.encode())
        assert np.array_equal(again.encode(text), ids)
    assert fitted.byte_counts.shape == (fitted.size,)


def test_end_of_text_is_never_made_from_text(gpt2_folder):
    for fitted in (fit(BPE(300)), fit(GPT2(str(gpt2_folder)))):
        assert fitted.eot not in fitted.encode(f"a{EOT}b")
        assert fitted.decode([fitted.eot]) == EOT
        assert fitted.byte_counts[fitted.eot] == 0
    assert fit(Bytes()).eot is None and fit(Chars()).eot is None


def test_gpt2_remembers_words_too(gpt2_folder, monkeypatch):
    plain = fit(GPT2(str(gpt2_folder))).encode_batch(HARD)  # too short to be remembered
    monkeypatch.setattr("lab.data.word_memory.SHORT", 0)
    fitted = fit(GPT2(str(gpt2_folder)))
    for _ in range(2):
        assert [ids.tolist() for ids in fitted.encode_batch(HARD)] == [ids.tolist() for ids in plain]
    assert fitted._encode_batch._count > 10
    alike = " 12345678 123456789"
    right = fitted.encode(alike)
    keys = WordMemory._keys  # negative control: words that begin alike taken for the same
    monkeypatch.setattr(WordMemory, "_keys", lambda *a: (keys(*a)[0], keys(*a)[0]))
    assert not np.array_equal(fit(GPT2(str(gpt2_folder))).encode(alike), right)


def test_sizes_and_hints(gpt2_folder):
    assert (fit(Bytes()).size, Bytes().vocab_size_hint) == (256, 256)
    assert (fit(BPE(300)).size, BPE(300).vocab_size_hint) == (300, 300)
    assert (fit(GPT2(str(gpt2_folder))).size, GPT2().vocab_size_hint) == (50257, 50257)
    chars = fit(Chars(), "banana", "nab!")
    assert Chars().vocab_size_hint is None
    assert [p.decode() for p in chars.pieces] == ["!", "a", "b", "n"]


def test_ids_beyond_the_vocabulary_and_broken_characters_decode():
    fitted = fit(Bytes())
    assert fitted.decode([72, 300, 105]) == "H\ufffdi"
    assert fitted.decode(fitted.encode("é")[:1]) == "\ufffd"


def test_unknown_character_and_lone_surrogate():
    with pytest.raises(UserError, match="'q' is not among the 3"):
        fit(Chars(), "aab", "c").encode("abq")
    for kind in (Bytes(), Chars(), BPE(300)):
        with pytest.raises(UserError, match="lone surrogate"):
            fit(kind).encode("x\ud800")


def test_bpe_learns_and_is_the_same_in_another_process():
    fitted = fit(BPE(400))
    assert len(fitted.encode(TEXT)) < 0.6 * len(fit(Bytes()).encode(TEXT))
    code = (
        "import sys, hashlib; from lab.data.tokenizers import BPE; t = sys.stdin.buffer.read().decode();"
        "f = BPE(400).fit(lambda s: iter([t[:300], t[300:]]), len(t));"
        "print(hashlib.sha256(f.state.encode()).hexdigest())"
    )
    run = [sys.executable, "-c", code]
    found = subprocess.run(run, cwd=ROOT, input=TEXT.encode(), capture_output=True, check=True, timeout=60)
    assert found.stdout.decode().strip() == hashlib.sha256(fitted.state.encode()).hexdigest()
    assert fit(BPE(400), TEXT.replace("quick", "slow")).state != fitted.state  # negative control


def test_bpe_learns_from_the_training_split_only():
    assert fit(BPE(400)).state == fit(BPE(400), validation="zzzz " * 500).state
    assert fit(BPE(400)).state != fit(BPE(400), train=TEXT + "zzzz " * 500).state


def test_bpe_sample_is_bounded(monkeypatch):
    monkeypatch.setattr(tk, "SAMPLE", 1000)
    seen = []

    def texts(split):
        for i in range(100):
            seen.append(i)
            yield "a b " * 25 if i % 10 == 0 else "only here zzz"

    state = BPE(260).fit(texts, 10_000).state
    assert len(seen) == 100 and '"zz"' not in state


def test_bpe_learns_from_a_bounded_number_of_distinct_words(monkeypatch):
    """Memory grows with them: text without spaces is learned from its beginning, other text is not cut short."""
    monkeypatch.setattr(tk, "DISTINCT", 1000)

    def taken(texts):
        return len(list(tk._bounded(iter(texts))))

    assert taken(["the same words " * 10] * 100) == 100
    assert taken([f"{i:050}" for i in range(100)]) == 21 and taken([chr(0x4E00 + i) * 50 for i in range(100)]) == 7


def test_bpe_too_small():
    with pytest.raises(UserError, match="vocab=256.*257"):
        BPE(256).validate()
    BPE(257).validate()


def test_gpt2_folder_errors(tmp_path, gpt2_folder):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="neither vocab.bpe nor merges.txt"):
        GPT2(str(tmp_path / "none")).restore("")
    merges = gpt2_folder / "merges.txt"
    lines = merges.read_text(encoding="utf-8").splitlines()
    before = GPT2(str(gpt2_folder)).identity()
    merges.write_text("\n".join(lines[:40000]), encoding="utf-8")
    assert GPT2(str(gpt2_folder)).identity() != before
    with pytest.raises(UserError, match="40255 tokens where GPT-2 has 50256"):
        GPT2(str(gpt2_folder)).restore("")
    merges.write_bytes(b"\xff\xfe nonsense\n")
    with pytest.raises(UserError, match="not a list of byte-level BPE merges"):
        GPT2(str(gpt2_folder)).restore("")


def test_gpt2_without_tiktoken(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "tiktoken":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="LAB_EXTRAS=tiktoken"):
        GPT2().restore("")


@pytest.mark.parametrize("hang", [False, True])
def test_gpt2_offline_is_one_sentence_at_once(monkeypatch, tmp_path, hang):
    tiktoken = pytest.importorskip("tiktoken")

    def get(name):
        if hang:
            time.sleep(5)
        raise ConnectionError("no route")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken, "get_encoding", get)
    monkeypatch.setattr(tk, "DOWNLOAD_SECONDS", 0.3)
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"GPT2\(folder\)") as caught:
        GPT2().restore("")
    assert time.monotonic() - begin < 2
    assert ("no answer" in str(caught.value)) == hang
