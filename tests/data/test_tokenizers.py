"""Every tokenizer gives back its text, and says how many bytes each id stands for."""

import hashlib
import http.server
import json
import os
import random
import re
import subprocess
import sys
import threading
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from lab.data import gpt2
from lab.data import tokenizers as tk
from lab.data.tokenizers import BPE, EOT, GPT2, Bytes, Chars
from lab.data.word_memory import SPACES, WordMemory
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
    alphabet = list(gpt2.alphabet())
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


# -------------------------------------------------------------------------------------------------------------- GPT-2

CONTRACTION = re.compile(r"'(?:s|t|re|ve|m|ll|d)")
SHAPES = re.compile(r" ?L+| ?N+| ?O+|[ S]+(?![LNO])|[ S]+")  # GPT-2's pattern over the kinds of characters


def split(text):
    """GPT-2's words, by the standard library alone."""
    kinds = {" ": " "} | dict.fromkeys(SPACES.replace(" ", ""), "S")
    shape = "".join(kinds.get(c) or {"L": "L", "N": "N"}.get(unicodedata.category(c)[0], "O") for c in text)
    i = 0
    while i < len(text):
        end = (CONTRACTION.match(text, i) or SHAPES.match(shape, i)).end()
        yield text[i:end]
        i = end


def reference(merges, text):
    """The ids by GPT-2's definition: the earliest merge first, everywhere in the word; slow."""
    character = {b: c for c, b in gpt2.alphabet().items()}
    ranks = {pair: i for i, pair in enumerate(merges)}
    names = {name: i for i, name in enumerate([*gpt2.alphabet(), *map("".join, merges)])}
    ids = []
    for word in split(text):
        parts = [character[b] for b in word.encode()]
        while pairs := [pair for pair in zip(parts, parts[1:], strict=False) if pair in ranks]:
            best, joined = min(pairs, key=ranks.get), []
            while parts:
                n = 1 + (tuple(parts[:2]) == best)
                joined.append("".join(parts[:n]))
                parts = parts[n:]
            parts = joined
        ids += [names[part] for part in parts]
    return ids


WORDS = ("It's we'll I'd they're you've I'm don't DON'T 'tis ''ss 's's 12345 1a2b x\u00b2 \u2167 \u0661\u0662   two   "
         "spaces\n\n \n  \t\tend  \r\n.\x1c\x1d\x85\u00a0\u2028\u3000x\u200by e\u0301\u0301 \u0345 _a_ #!? ... ")
HARDER = [*HARD, WORDS, WORDS.strip(), "👩\u200d👩\u200d👧😀😀 🇩🇪", "你好。" * 99, "x" * 3000, "ab" * 1500, " " * 3000,
          "\n" * 99 + "a"]


@pytest.fixture(scope="module")
def small():
    """The merges of a small vocabulary, learned from hard text."""
    learn = TEXT + WORDS * 20
    state = json.loads(BPE(500).fit(lambda split: iter([learn]), len(learn)).state)
    return [tuple(pair) for pair in state["model"]["merges"]]


@pytest.fixture(scope="module")
def texts():
    draw = random.Random(0)
    known = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cs", "Cn")]
    short = ["".join(draw.choices([*WORDS, "'", " "], k=draw.randrange(40))) for _ in range(500)]
    return HARDER + short + ["".join(draw.choices(known, k=30)) for _ in range(200)]


def different(merges, texts):
    """How many texts get other ids than the reference."""
    found = tk._from_merges(merges).encode_batch(texts)
    return sum(ids.tolist() != reference(merges, text) for text, ids in zip(texts, found, strict=True))


def test_gpt2_ids_are_those_of_the_definition(small, texts, monkeypatch):
    assert different(small, texts) == 0
    assert different(small, [text[:5000] for text in ["".join(texts)]]) == 0
    real = pre_tokenizers.ByteLevel  # negative controls: no pattern, and a space in front
    for options in ({"use_regex": False}, {"add_prefix_space": True}):
        monkeypatch.setattr(pre_tokenizers, "ByteLevel", lambda _o=options, **given: real(**given | _o))
        assert different(small, texts) > 20


def test_gpt2_ids_are_those_of_tiktoken(small, texts):
    tiktoken = pytest.importorskip("tiktoken")
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    fitted = tk._from_merges(small)
    ranks = {piece: i for i, piece in enumerate(fitted.pieces[:-1])}
    encoding = tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text, ids in zip(texts, fitted.encode_batch(texts), strict=True):
        assert ids.tolist() == encoding.encode_ordinary(text)


def test_gpt2_reads_the_list_under_each_name(tmp_path, gpt2_folder):
    right = fit(GPT2(str(gpt2_folder))).encode(TEXT).tolist()
    text = (gpt2_folder / "merges.txt").read_text(encoding="utf-8")
    pairs = text.splitlines()[1:]
    files = {"a/vocab.bpe": text, "b/merges.txt": text.replace("\n", "\r\n"),
             "c/tokenizer.json": json.dumps({"model": {"merges": pairs}}),
             "d/tokenizer.json": json.dumps({"model": {"merges": [pair.split() for pair in pairs]}})}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content.encode())
        fitted = fit(GPT2(str((tmp_path / name).parent)))
        assert (fitted.encode(TEXT).tolist(), fitted.eot) == (right, 50256)
    (tmp_path / "d/tokenizer.json").write_text(json.dumps({"model": {"merges": pairs[::-1]}}))  # negative control
    assert fit(GPT2(str(tmp_path / "d"))).encode(TEXT).tolist() != right


def test_gpt2_folder_errors(tmp_path, gpt2_folder):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="finds no merges.txt, vocab.bpe or tokenizer.json"):
        GPT2(str(tmp_path / "none")).restore("")
    merges = gpt2_folder / "merges.txt"
    lines = merges.read_text(encoding="utf-8").splitlines()
    before = GPT2(str(gpt2_folder)).identity()
    merges.write_text("\n".join(lines[:40000]), encoding="utf-8")
    assert GPT2(str(gpt2_folder)).identity() != before
    with pytest.raises(UserError, match="40255 tokens where GPT-2 has 50256"):
        GPT2(str(gpt2_folder)).restore("")
    for content in (b"\xff\xfe nonsense\n", b"ab c\n", "a \u4f60\n".encode(), b"one two three\n"):
        merges.write_bytes(content)
        with pytest.raises(UserError, match="not a list of byte-level BPE merges"):
            GPT2(str(gpt2_folder)).restore("")
    merges.unlink()
    for content in ("{}", "[]", '{"model": {"merges": [1]}}', '{"model": {"merges": null}}', "merges"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match="tokenizer.json is not a list of byte-level BPE merges"):
            GPT2(str(tmp_path)).restore("")


@pytest.fixture
def hub(tmp_path, gpt2_folder):
    """Calls GPT2() in a process whose Hugging Face is a server here, with the stand-in's list; returns its error."""
    content, asked = (gpt2_folder / "merges.txt").read_bytes(), []
    release = threading.Event()

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            if hub.hang:
                release.wait(30)
            self.send_response(200)
            for name, value in (("Content-Length", len(content)), ("ETag", '"1"'), ("X-Repo-Commit", "0" * 40)):
                self.send_header(name, str(value))
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def hub(checksum="", seconds=20.0, hang=False, **variables):
        hub.hang, checksum = hang, checksum or hashlib.sha256(content).hexdigest()
        code = ("import time; from lab.data import gpt2; from lab.data.tokenizers import GPT2; import huggingface_hub\n"
                f"gpt2.SHA256, gpt2.SECONDS, begin = {checksum!r}, {seconds}, time.monotonic()\n"
                "try: print(GPT2().restore('').size, GPT2().identity())\n"
                "except gpt2.UserError as error: print(type(error).__name__, error)\n"
                "print(time.monotonic() - begin)\n")
        env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"),
                            "HF_HUB_DISABLE_TELEMETRY": "1"} | variables
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True,
                             timeout=120)
        assert run.returncode == 0 and not re.search("Retry|Error", run.stderr), run.stderr
        said, took = run.stdout.splitlines()
        return said, float(took)

    hub.asked = asked
    yield hub
    release.set()
    server.shutdown()


def test_gpt2_is_downloaded_once(hub):
    said, _ = hub(HF_HUB_OFFLINE="1")
    assert said.startswith("Absent GPT-2's vocabulary") and "OfflineModeIsEnabled" in said and not hub.asked
    assert hub()[0] == "50257 gpt2"
    assert any(path.endswith("/openai-community/gpt2/resolve/main/merges.txt") for path in hub.asked)
    hub.asked.clear()
    assert hub()[0] == "50257 gpt2" and hub(HF_HUB_OFFLINE="1")[0] == "50257 gpt2" and not hub.asked
    said, _ = hub(checksum=gpt2.SHA256)  # a list that is not GPT-2's
    assert said.startswith("UserError") and "wrong checksum" in said and "delete it" in said


def test_gpt2_without_a_network_is_one_sentence_at_once(hub):
    said, took = hub(HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be downloaded (ConnectError)" in said and took < 15
    assert f"curl -LO {gpt2.URL}" in said and "--data.tokenizer.folder" in said
    said, took = hub(hang=True, seconds=0.3)
    assert "cannot be downloaded (no answer in 0 s)" in said and took < 15
