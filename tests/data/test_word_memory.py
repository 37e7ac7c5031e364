"""Words that are remembered give the ids that the library gives for the whole text, whatever is in the text."""

import random

import numpy as np
import pytest
from tokenizers import Tokenizer

from lab.data import word_memory
from lab.data.text import files, token_files
from lab.data.text.sources import TextFiles
from lab.data.text.text import Text
from lab.data.tokenizers import BPE, EOT
from lab.data.word_memory import SPACES, WordMemory

WORDS = "The quick brown fox\n    jumps over\tthe lazy dog's 123 bones -- d’une façon “très” simple; 你好。\n\n"
LETTERS = [*"ab 'tslvRE\n\t\r\x0b\x0c\x1c\x1d\x1e\x1f\x00\x7f_.1  \n", "é", "你", "😀", "e\u0301", "\u200b", *SPACES]
NASTY = [
    "caf\xe9 na\xefve\x85\xa0\x93quoted\x94 \xad", "Ã© â€œ mojibake â€\x9d",  # Latin-1 and what came of it
    "one\r\ntwo\r\n\r\n  three\r", "\r", "\n" * 5000, " " * 7000 + "x" + " " * 7000, "a  b   c\t\td \n e\n \n  f \t",
    "🏳️‍🌈👩‍👩‍👧 😀😀 e\u0301\u0301", "no newline at the end", " ", EOT, f"a {EOT}b", "\x00" * 40, "", "a",
    "x" * 20_000, "long line " * 5000, "é" * 9000, "\u3000" * 3 + "。\u3000 你" * 100, "\ufeffx\uffff\U0010ffff",
    "12345678 123456789 1234567 1234567890123456 12345678901234567\x00 12345678\x00 12345678\x00\x00",
]


@pytest.fixture(scope="module")
def state():
    learn = WORDS * 20 + "".join(NASTY)
    return BPE(700).fit(lambda split: iter([learn]), len(learn)).state


@pytest.fixture(scope="module")
def library(state):
    """text -> ids by the tokenizers library alone."""
    tokenizer = Tokenizer.from_str(state)
    tokenizer.encode_special_tokens = True
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def drawn():
    draw = random.Random(0)
    return ["".join(draw.choices(LETTERS, k=draw.randrange(40))) for _ in range(3000)]


def same(fitted, texts, library) -> bool:
    return all(ids.dtype == np.int32 and ids.tolist() == library(text)
               for text, ids in zip(texts, fitted.encode_batch(texts), strict=True))


@pytest.mark.parametrize("limits", [{}, {"WORDS": 3000, "SLOT_BITS": 12, "AT_ONCE": 5000}, {"BYTES": 60_000}],
                         ids=["plain", "forgets and collides", "forgets bytes"])
def test_ids_are_the_librarys(state, library, drawn, monkeypatch, limits):
    for name, value in ({"SHORT": 0} | limits).items():
        monkeypatch.setattr(word_memory, name, value)
    fitted = BPE(700).restore(state)
    every = [*NASTY, *drawn, "".join(NASTY), "".join(drawn), ""]
    assert same(fitted, every, library) and same(fitted, every[::-1], library)  # the second time from memory
    assert all(same(fitted, [one], library) for one in [*NASTY, *drawn[:300]])
    assert [ids.tolist() for ids in fitted.encode_batch(["", ""])] == [[], []] and fitted.encode_batch([]) == []


@pytest.mark.parametrize("wrong", ["spaces", "keys"])
def test_the_comparison_sees_a_wrong_word(state, library, drawn, monkeypatch, wrong):
    monkeypatch.setattr(word_memory, "SHORT", 0)
    texts = [*NASTY, *drawn]
    if wrong == "spaces":  # a wide space taken for a letter
        monkeypatch.setattr(word_memory, "_WIDE", word_memory._WIDE[1:])
    else:  # words that begin alike taken for the same
        real_keys = WordMemory._keys
        monkeypatch.setattr(WordMemory, "_keys", lambda *a: (real_keys(*a)[0], real_keys(*a)[0]))
    assert not same(BPE(700).restore(state), texts, library)


def test_the_spaces_are_the_librarys():
    """Behind a letter and two spaces, only a space is a token without the space in front of it."""
    from tokenizers.pre_tokenizers import ByteLevel

    points = [chr(c) for c in [*range(0x3100), *range(0xFE00, 0xFFFF)] if chr(c) not in " '"]
    split = ByteLevel(add_prefix_space=False).pre_tokenize_str("".join(f"a  {c}" for c in points))
    begins = {place[0] for _, place in split}
    assert {c for i, c in enumerate(points) if 4 * i + 3 in begins} | {" "} == set(SPACES)


def test_a_token_file_is_the_library_on_the_whole_text(library, state, drawn, tmp_path, monkeypatch):
    """Through pieces and groups of them: no cut shows."""
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "PIECE", 4096)
    monkeypatch.setattr(token_files, "AT_ONCE", 30_000)
    monkeypatch.setattr(BPE, "fit", lambda self, *_: self.restore(state))
    whole = "".join(part for part in ["".join(drawn), WORDS * 300, *NASTY[:4], *NASTY[6:10], WORDS * 10])
    (tmp_path / "nasty.txt").write_bytes(whole.encode())
    data = Text(TextFiles(str(tmp_path / "nasty.txt")), BPE(700), 64).load()
    cut = len(whole) * 9 // 10
    for records, want in ((data.train, whole[:cut]), (data.validation, whole[cut:])):
        assert records.tokens.tolist() == library(want)
