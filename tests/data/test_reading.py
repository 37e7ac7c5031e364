"""Text files: encodings by their marks, the advice for all others, and what a line is."""

import codecs
import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from lab.data.messages.sources import TextFolder, load
from lab.data.reading import check_encoding, lines_of, read_text
from lab.data.tables.csv_files import Csv
from lab.data.text.sources import TextFiles
from lab.data.text.text import Text
from lab.data.tokenizers import Bytes
from lab.errors import UserError

TEXT = "temp;größe\n" + "".join(f"{i};é{i}\n" for i in range(50))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))


def read(path, **options):
    return "".join(read_text(path, **options))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("order", ["LE", "BE"])
@pytest.mark.parametrize("suffix", ["txt", "txt.gz"])
def test_a_byte_order_mark_says_what_a_file_is(tmp_path, encoding, order, suffix):
    mark = getattr(codecs, f"BOM_{encoding.upper().replace('-', '')}_{order}")
    raw = mark + TEXT.encode(f"{encoding}-{order}")
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
    assert read(path) == TEXT
    data = Text(TextFiles(str(path)), Bytes(), 8).load()
    assert data.summary["encodings"] == f"1 of the files is {encoding.upper()}"
    assert data.decode(np.concatenate([data.train.tokens, data.validation.tokens])) == TEXT
    again = Text(TextFiles(str(path)), Bytes(), 8).load()
    assert again.summary == data.summary  # also when nothing is read again


def test_the_same_text_in_another_encoding_is_the_same_data(tmp_path):
    prints = set()
    for name, encoding in (("utf-8", "UTF-8"), ("utf-16", "UTF-8"), ("cp1252", "cp1252"), ("utf-16-le", "utf-16-le")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "a.txt").write_bytes(TEXT.encode(name))
        prints.add(Text(TextFiles(str(tmp_path / name / "a.txt"), encoding), Bytes(), 8).load().fingerprint)
    assert len(prints) == 1
    wrong = Text(TextFiles(str(tmp_path / "utf-8" / "a.txt"), "cp1252"), Bytes(), 8).load()
    assert wrong.fingerprint not in prints


@pytest.mark.parametrize(("raw", "advice"), [
    (TEXT.encode("utf-16-le"), "encoding='utf-16-le' .*iconv -f UTF-16-LE"),
    (TEXT.encode("utf-16-be"), "encoding='utf-16-be' .*iconv -f UTF-16-BE"),
    ("plain ascii\n".encode("utf-16-le"), "encoding='utf-16-le'"),
    (TEXT.encode("latin-1"), "cp1252 .'größe'.*iconv -f CP1252"),
    (bytes(range(256)) * 4, "binary file"), (b"\0" * 100, "binary|utf-16"),
    (codecs.BOM_UTF16_LE + b"\x00\xd8\x00\xd8", "not UTF-16 text"), (codecs.BOM_UTF16_LE + b"abc", "not UTF-16 text")])
def test_other_encodings_get_advice_that_helps(tmp_path, raw, advice):
    (tmp_path / "a.txt").write_bytes(raw)
    with pytest.raises(UserError, match=advice) as caught:
        read(tmp_path / "a.txt")
    assert "\n" not in str(caught.value)
    if "utf-16-" in advice:  # and following it works
        name = "utf-16-le" if "le" in advice else "utf-16-be"
        assert read(tmp_path / "a.txt", encoding=name) == raw.decode(name)


def test_encodings_are_checked_before_anything_is_read():
    for source in (TextFiles("x", "utf-9"), TextFolder("x", "base64"), Csv("x", "y", encoding="rot13")):
        with pytest.raises(UserError, match="is unknown: write utf-8"):
            source.validate()
    check_encoding("shift_jis")


def test_lines_are_those_of_the_file():
    text = "one\x0cone\ntwo\u2028two\r\nthree\x85three\rfour\x0bfour\x1c\x1d\x1e\u2029\n\nsix"
    assert lines_of(text) == ["one\x0cone", "two\u2028two", "three\x85three", "four\x0bfour\x1c\x1d\x1e\u2029", "",
                              "six"]
    assert len(text.splitlines()) == 14  # negative control
    assert lines_of("") == [] and lines_of("a\n") == ["a"] and lines_of("a\n\n") == ["a", ""] and lines_of("\n") == [""]


def test_messages_in_utf16_are_read_and_said(tmp_path):
    for name in ("spam", "ham"):
        (tmp_path / "mail" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "mail" / name / f"{i}").write_bytes(f"é{name} {i}".encode("utf-16" if i else "utf-8"))
    found = TextFolder(str(tmp_path / "mail")).load()
    assert found.splits["train"][0][:2] == ["éham 0", "éham 1"] and found.rule == "4 files are UTF-16"
    (tmp_path / "m.csv").write_bytes("text,kind\né,a\nö,b\né,a\nö,b\n".encode("utf-16"))
    found = load(Csv(str(tmp_path / "m.csv"), "kind", text="text"))
    assert found.splits["train"][0] == ["é", "ö", "é", "ö"] and found.rule == "encoding: UTF-16"


JAPANESE = ("吾輩は猫である。名前はまだ無い", "データ,カテゴリ")
TEXTS = {
    "shift_jis": (*JAPANESE, "東京,大阪,京都"), "euc_jp": JAPANESE, "gbk": ("我们在北京学习中文",),
    "big5": ("臺北市政府今天宣布新的政策",), "euc_kr": ("서울특별시에서 오늘 발표한 내용",),
    "cp1251": ("Москва — столица России",), "koi8-r": ("Москва - столица",),
    "cp1252": ("Le café est situé à Genève", "Größe, Straße", "¿Dónde está?"), "cp1250": ("Łódź, Gdańsk, żółw",),
    "mac-roman": ("Le café est situé à Genève",), "utf-16-le": ("東京,大阪", "Москва"),
    "utf-16-be": ("東京,大阪", "Москва"), "utf-32-le": ("東京,大阪", "plain")}


@pytest.mark.parametrize(("encoding", "text"), [(name, text) for name, texts in TEXTS.items() for text in texts])
def test_the_encoding_is_named(tmp_path, encoding, text):
    """And what is advised reads the text."""
    whole = "id,name\n" + "".join(f"{i},{text}\n" for i in range(5))
    (tmp_path / "a.csv").write_bytes(whole.encode(encoding))
    with pytest.raises(UserError) as caught:
        read(tmp_path / "a.csv")
    assert f"looks like {encoding}" in str(caught.value)
    assert read(tmp_path / "a.csv", encoding=encoding) == whole


def test_what_two_encodings_may_be_is_shown(tmp_path):
    (tmp_path / "a.csv").write_bytes("北京,1".encode("gbk"))  # two characters, which are Korean and Japanese ones, too
    with pytest.raises(UserError, match=r"It may be .*gbk \('北京'\)"):
        read(tmp_path / "a.csv")


def test_a_broken_place_in_utf8_is_no_other_encoding(tmp_path):
    (tmp_path / "a.txt").write_bytes("café ".encode() * 50 + "café".encode("latin-1") + b" end")
    with pytest.raises(UserError, match="byte 303 is not valid. Nearly all of it is: correct that place"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(("raw", "what"), [
    (gzip.compress(TEXT.encode() * 9), "gzip: give it a name"), (b"PK\x03\x04\xff" + b"x" * 99, "spreadsheet"),
    (b"PAR1\x15\x04\xff", "Parquet"), (b"\xfd7zXZ\0\0\xff", "xz: unpack"), (b"\0" * 500, "binary file")])
def test_files_that_are_no_text_are_named(tmp_path, raw, what):
    (tmp_path / "a.csv").write_bytes(raw)
    with pytest.raises(UserError, match=what):
        read(tmp_path / "a.csv")


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.csv")
    for path in (tmp_path / "a.csv", Path("/dev/zero")):
        with pytest.raises(UserError, match="is a pipe or a device"):
            read(path)
