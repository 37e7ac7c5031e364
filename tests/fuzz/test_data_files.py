"""Spoiled CSV, text and image files: each is read, or named in one sentence; never a traceback, never a NaN.

    LAB_FUZZ=20 ./launch.sh tests tests/fuzz/test_data_files.py    # twenty times as many, others than in CI
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import random
import shutil
import struct
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lab.data.images.idx import Idx
from lab.data.images.images import Images
from lab.data.images.sources import ImageFolder
from lab.data.messages.messages import Messages
from lab.data.messages.sources import TextFolder
from lab.data.tables.csv_files import Csv
from lab.data.tables.tables import Table
from lab.data.text.sources import TextFiles
from lab.data.text.text import Text
from lab.data.tokenizers import BPE, Bytes, Chars
from lab.data.word_tokenizer import Words
from lab.errors import UserError

TIMES = int(os.environ.get("LAB_FUZZ", "1"))
MUTATIONS = 50  # of each kind of file
ODD = [b"\0", b"\r", b"\n\n", b'"', b'""', b"'", b",", b";", b"\t", b"|", b",,,", b"\xff\xfe", b"\xfe\xff",
       b"\xef\xbb\xbf", b"\x85", "\u2028".encode(), "\u0085".encode(), "é".encode(), "😀".encode(), b"\xed\xa0\x80",
       b"\x1a", b"\x0c", b"sep=;\n",
       b"9223372036854775808", b"-18446744073709551616", b"1e999", b"-1e300", b"nan", b"inf", b"1,200", b"$10", b"45%",
       b"(5)", b"-", b"#N/A", b"None", b"1_000", "−5".encode(), "１２".encode(), b"0x1F", b"1e", b"+", b".",
       b"=1+1", b"A" * 70_000]


class Spoiler:
    """What happens to a file, decided by a seed."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def content(self, raw: bytes) -> bytes:
        """The bytes after one to three changes."""
        for _ in range(self.random.randint(1, 3)):
            raw = self.random.choice([self.flip, self.cut, self.drop, self.twice, self.insert, self.insert, self.insert,
                                      self.other_encoding, self.lines, self.empty])(raw)
        return raw

    def place(self, raw: bytes) -> int:
        return self.random.randrange(len(raw) + 1)

    def flip(self, raw: bytes) -> bytes:
        found = bytearray(raw)
        for _ in range(self.random.randint(1, 8)):
            if found:
                found[self.random.randrange(len(found))] = self.random.randrange(256)
        return bytes(found)

    def cut(self, raw: bytes) -> bytes:
        return raw[: self.place(raw)]

    def drop(self, raw: bytes) -> bytes:
        a = self.place(raw)
        return raw[:a] + raw[a + self.random.randint(1, 40):]

    def twice(self, raw: bytes) -> bytes:
        a, b = sorted((self.place(raw), self.place(raw)))
        return raw[:b] + raw[a:b] + raw[b:]

    def insert(self, raw: bytes) -> bytes:
        a = self.place(raw)
        return raw[:a] + self.random.choice(ODD) + raw[a:]

    def other_encoding(self, raw: bytes) -> bytes:
        names = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "utf-7", "utf-8-sig"]
        name = self.random.choice(names)
        return raw.decode(errors="ignore").encode(name, errors="ignore")

    def lines(self, raw: bytes) -> bytes:
        found = raw.split(b"\n")
        self.random.shuffle(found)
        return self.random.choice([b"\n", b"\r\n", b"\r", b"\n\n"]).join(found)

    def empty(self, raw: bytes) -> bytes:
        return b"" if self.random.random() < 0.3 else raw[:1]

    def folder(self, root: Path) -> None:
        """One change to the files and folders below `root`, if the file system allows it."""
        inside = [path for path in sorted(root.rglob("*")) if path.exists()]
        if inside:
            with contextlib.suppress(OSError):
                self.change(self.random.choice(inside), self.random.choice(inside))

    def change(self, path: Path, other: Path) -> None:
        """Link, rename, remove, empty, replace or spoil a file or folder."""
        kind = self.random.randrange(6)
        if kind == 0:
            target = self.random.choice([other, "..", "nowhere", path.name])
            os.symlink(target, path.with_name(f"l{self.random.random()}.png"))
        elif kind == 1:
            name = self.random.choice(["train", "Test", "VAL", ".hidden", "a b", "x\n", "é", "..."])
            path.rename(path.with_name(name))
        elif kind == 2:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif kind == 3:
            (path if path.is_dir() else path.parent).joinpath("empty").mkdir(exist_ok=True)
        elif kind == 4 and path.is_file():
            path.unlink()
            path.mkdir()
        elif path.is_file():
            path.write_bytes(self.content(path.read_bytes()))


def outcome(read: Callable[[], object], what: str) -> str:
    """"read" or "refused". A failure of the test for anything else than a UserError of one line."""
    try:
        read()
        return "read"
    except UserError as error:
        text = str(error)
        assert text and "Traceback" not in text and len(text) < 2_000, (what, text)
        assert "\n" not in text or "\n" in what, (what, text)
        return "refused"
    except Exception:
        pytest.fail(f"{what}\n{traceback.format_exc()}")


def finite(records: object) -> None:
    """Nothing that reaches a model may be NaN or infinite."""
    if records is not None and len(records):
        for name, array in records[np.arange(min(len(records), 200))].items():
            assert np.isfinite(array).all(), name


def loaded(spec: Table | Messages | Text | Images) -> object:
    data = spec.load()
    for records in (data.train, data.validation, data.test):
        finite(records)
    spec.restored(data.saved(), getattr(data, "tokenizer_state", ""))
    return data


def both(seen: Counter) -> None:
    """The mutations are worth something only where some files survive them and some do not."""
    assert seen["read"] > 0.05 * seen.total() and seen["refused"] > 0.05 * seen.total(), seen


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))


def table() -> bytes:
    rows = [f"{i},{i * 1.5:.2f},{['Uri', 'Zug'][i % 2]},{'abb'[i % 3]},some words {i % 5}" for i in range(40)]
    return "\n".join(["id,size,town,kind,text", *rows, ""]).encode()


def test_csv_files(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    good = Table(Csv(str(tmp_path / "good.csv"), "kind", drop=("id",)), unseen="zeros", categories=50)
    (tmp_path / "good.csv").write_bytes(table())
    fitted = good.load()
    texts = Messages(Csv(str(tmp_path / "good.csv"), "kind", text="text"), Words(20), length=5).load()
    for seed in range(MUTATIONS * TIMES):
        spoil = Spoiler(seed)
        raw, name = spoil.content(table()), spoil.random.choice(["t.csv", "t.csv.gz"])
        path = tmp_path / name
        path.write_bytes(gzip.compress(raw) if name.endswith("gz") and seed % 3 else raw)
        options = spoil.random.choice([
            {}, {"thousands": ","}, {"decimal": ","}, {"units": ("$", "%"), "brackets": True},
            {"missing": ("-", "#N/A")}, {"encoding": "cp1252"}, {"categorical": ("size",)}])
        target = spoil.random.choice(["size", "kind"])
        source = Csv(str(path), target, **options | ({"categorical": ()} if target == "size" else {}))
        what = f"seed {seed}, {source}"
        seen[outcome(lambda s=source: loaded(Table(s)), what)] += 1
        seen[outcome(lambda p=path: finite(fitted.read(p, None, False).records), what)] += 1
        texts_of = path.rename(tmp_path / "new.csv") if name == "t.csv" else path
        seen[outcome(lambda p=texts_of: finite(texts.read(p, "id").records), what)] += 1
    both(seen)


def test_text_files(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    good = "".join(f"line {i} of a text, with é and 你\n" for i in range(200)).encode()
    folder = tmp_path / "mail"
    for i in range(12):
        (folder / ("spam" if i % 2 else "ham")).mkdir(parents=True, exist_ok=True)
        (folder / ("spam" if i % 2 else "ham") / f"{i}.txt").write_text(f"message {i} é")
    texts = Messages(TextFolder(str(folder)), Words(20), length=5).load()
    for seed in range(MUTATIONS * TIMES):
        spoil = Spoiler(seed)
        path = tmp_path / spoil.random.choice(["t.txt", "t.txt.gz"])
        raw = spoil.content(good)
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" and seed % 3 else raw)
        encoding = spoil.random.choice(["UTF-8", "UTF-8", "latin-1", "utf-16"])
        tokenizer = spoil.random.choice([Bytes(), Chars(), BPE(300)])
        what = f"seed {seed}, {path.name} {encoding} {tokenizer}"
        seen[outcome(lambda p=path, t=tokenizer, e=encoding: loaded(Text(TextFiles(str(p), e), t, 8)), what)] += 1
        new = path.rename(tmp_path / "new.txt")
        seen[outcome(lambda p=new: finite(texts.read(p).records), what)] += 1
        if seed % 2:
            shutil.copytree(folder, tmp_path / "spoiled", symlinks=True)
            for _ in range(2):
                spoil.folder(tmp_path / "spoiled")
            spec = Messages(TextFolder(str(tmp_path / "spoiled")), Words(20), length=5)
            seen[outcome(lambda s=spec: loaded(s), f"{what}\n")] += 1
            shutil.rmtree(tmp_path / "spoiled")
    both(seen)


def picture(mode: str, form: str, **options: object) -> bytes:
    file, pixels = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, form, **options)
    return file.getvalue()


def test_image_files(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("L", "PNG"), ("I;16", "PNG"), ("RGB", "JPEG"),
             ("CMYK", "JPEG"), ("L", "JPEG")]
    root = tmp_path / "good"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(6):
            (root / name / f"{i}.png").write_bytes(picture("RGB", "PNG"))
    fitted = Images(ImageFolder(str(root)), (6, 5, 3), resize=True).load()
    for seed in range(MUTATIONS * TIMES):
        spoil = Spoiler(seed)
        mode, form = spoil.random.choice(kinds)
        if mode == "I;16":
            file = io.BytesIO()
            Image.fromarray(np.full((6, 5), 999, np.uint16)).save(file, "PNG")
            raw = file.getvalue()
        else:
            raw = picture(mode, form, **({"exif": exif} if spoil.random.random() < 0.5 else {}))
        what = f"seed {seed}, {mode} {form}"
        path = tmp_path / "new.png"
        path.write_bytes(spoil.flip(raw) if seed % 2 else spoil.content(raw))
        seen[outcome(lambda p=path: finite(fitted.read(p).records), what)] += 1
        copy = tmp_path / f"spoiled{seed}"
        shutil.copytree(root, copy, symlinks=True)
        (copy / "cat" / "0.png").write_bytes(raw)
        for _ in range(spoil.random.randint(0, 3)):
            spoil.folder(copy)
        resize, skip = spoil.random.random() < 0.8, spoil.random.random() < 0.5
        spec = Images(ImageFolder(str(copy)), (6, 5, 3), resize=resize, skip_corrupt=skip, validation=2)
        seen[outcome(lambda s=spec: loaded(s), f"{what}\n")] += 1
        shutil.rmtree(copy)
    both(seen)


def test_idx_files(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    images = bytes([0, 0, 8, 3]) + struct.pack(">3I", 20, 6, 5) + bytes(range(200)) * 3
    labels = bytes([0, 0, 8, 1]) + struct.pack(">I", 20) + bytes([0, 1] * 10)
    for seed in range(MUTATIONS * TIMES):
        spoil = Spoiler(seed)
        pack = spoil.random.random() < 0.5
        first, second = (spoil.flip(images), labels) if seed % 2 else (images, spoil.content(labels))
        for name, raw in (("train-images-idx3-ubyte", first), ("train-labels-idx1-ubyte", second)):
            for old in tmp_path.glob(f"{name}*"):
                old.unlink()
            (tmp_path / (name + ".gz" * pack)).write_bytes(gzip.compress(raw) if pack else raw)
        spec = Images(Idx(str(tmp_path)), (6, 5, 1), validation=2)
        seen[outcome(lambda s=spec: loaded(s), f"seed {seed}")] += 1
    both(seen)


def test_the_fuzzer_sees_a_traceback_and_a_nan() -> None:
    """Negative controls."""
    with pytest.raises(pytest.fail.Exception, match="ZeroDivisionError"):
        outcome(lambda: 1 / 0, "x")
    with pytest.raises(AssertionError):
        finite(_Bad())
    assert Spoiler(1).content(table()) == Spoiler(1).content(table()) != Spoiler(2).content(table())


class _Bad:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"inputs": np.array([np.nan])}
