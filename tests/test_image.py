"""Images: sources, splits, decoding, the cache, and what bad input gets."""

import dataclasses
import gzip
import io
import json
import logging
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from lab.data.images.augment import Augment
from lab.data.images.idx import Idx, read_idx
from lab.data.images.images import Images
from lab.data.images.records import Lazy
from lab.data.images.sources import ImageFolder, Shards, TfdsImages
from lab.data.pipeline import Arrays
from lab.data.tables.bundled import Sklearn
from lab.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LAB_CACHE", str(folder))
    return folder / "images"


def pixels(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, split="train", n=20, pack=False, images=None, labels=None):
    folder.mkdir(exist_ok=True)
    images = pixels(n, 6, 5) if images is None else images
    labels = np.arange(len(images), dtype=np.uint8) % 4 if labels is None else labels
    for what, array in ((f"{split}-images-idx{images.ndim}-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
        raw = idx_bytes(array)
        (folder / (what + ".gz" * pack)).write_bytes(gzip.compress(raw) if pack else raw)
    return folder


def encoded(array, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def write_images(root, per_class=4, classes=("cat", "dog"), shape=(6, 5, 3), seed=0):
    """root/<class>/<i>.png; returns {relative name: array}."""
    written = {}
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i, array in enumerate(pixels(per_class, *shape, seed=seed + number)):
            (root / name / f"{i}.png").write_bytes(encoded(array))
            written[f"{name}/{i}.png"] = array
    return written


def everything(records):
    return records[np.arange(len(records))]


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def rows(data):
    """Pixels and label of each image of each split, to compare sets."""
    found = {}
    for split in ("train", "validation", "test"):
        records = getattr(data, split)
        if records is not None:
            arrays = everything(records)
            pairs = zip(arrays["inputs"], arrays["targets"], strict=True)
            found[split] = sorted((x.tobytes(), int(t)) for x, t in pairs)
    return found


# --------------------------------------------------------------------------------------------------------- IDX


@pytest.mark.parametrize("pack", [False, True])
def test_idx(tmp_path, pack):
    folder = write_idx(tmp_path / "idx", pack=pack)
    write_idx(folder, "t10k", 7, pack, images=pixels(7, 6, 5, seed=1))
    data = Images(Idx(str(folder)), (6, 5, 1), validation=5).load()
    assert (len(data.train), len(data.validation), len(data.test)) == (15, 5, 7)
    test = everything(data.test)
    assert np.array_equal(test["inputs"], pixels(7, 6, 5, seed=1)[..., None]) and test["inputs"].dtype == np.uint8
    assert np.array_equal(test["targets"], np.arange(7) % 4) and test["targets"].dtype == np.int32
    found = rows(data)
    assert sorted(found["train"] + found["validation"]) == sorted(
        (x.tobytes(), i % 4) for i, x in enumerate(pixels(20, 6, 5)))
    assert data.metadata == {"height": 6, "width": 5, "channels": 1, "classes": 4}
    assert isinstance(data.train, Arrays) and data.summary["train images"] == 15
    assert "5 of the 20 training images" in data.summary["split"] and "fixed shuffle" in data.summary["split"]


def test_idx_with_names_and_one_file(tmp_path):
    folder = write_idx(tmp_path)
    data = Images(Idx(str(folder), names=("a", "b", "c", "d", "e")), (6, 5, 1)).load()
    assert data.classes == ("a", "b", "c", "d", "e") and data.metadata["classes"] == 5 and data.test is None
    path = folder / "train-images-idx3-ubyte"
    one = Images(Idx(str(path)), (6, 5, 1)).load()
    assert rows(one) == rows(data) and one.fingerprint == Images(Idx(str(folder)), (6, 5, 1)).load().fingerprint
    write_idx(folder, "t10k", 3)
    assert len(Images(Idx(str(path)), (6, 5, 1)).load().test) == 3
    colour = write_idx(tmp_path / "colour", images=pixels(9, 6, 5, 3))
    assert everything(Images(Idx(str(colour)), (6, 5, 3)).load().train)["inputs"].shape == (8, 6, 5, 3)


@pytest.mark.parametrize("change, message", [
    (lambda raw: b"\x89PNG" + raw[4:], "not an IDX file of bytes: it begins with 89 50 4e 47"),
    (lambda raw: raw[:2] + b"\x0d" + raw[3:], "not an IDX file of bytes"),  # IDX of floats
    (lambda raw: raw[:-1], "announces 600 bytes, shape .20, 6, 5., but has 599"),
    (lambda raw: raw + b"x", "but has 601"), (lambda raw: b"", "not an IDX file"), (lambda raw: raw[:6], "not an IDX"),
])
def test_damaged_idx(tmp_path, change, message):
    path = write_idx(tmp_path) / "train-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=f"train-images-idx3-ubyte.*{message}"):
        Images(Idx(str(tmp_path)), (6, 5, 1)).load()


def test_idx_files_that_are_missing_or_do_not_belong_together(tmp_path):
    def error(path=tmp_path / "idx", shape=(6, 5, 1), **fields):
        with pytest.raises(UserError) as caught:
            Images(Idx(str(path), **fields), shape).load()
        return str(caught.value)

    assert "does not exist" in error(tmp_path / "nowhere")
    folder = write_idx(tmp_path / "idx")
    assert "has no train-images-idx3-ubyte" in error(tmp_path)
    assert "label 3, which is outside 0 to 2" in error(names=("a", "b", "c"))
    assert "image 3 of train-images-idx3-ubyte" in error(names=("a", "b", "c"))
    write_idx(folder, "t10k", labels=np.full(20, 4, np.uint8))
    assert "image 0 of t10k-images-idx3-ubyte has label 4" in error()
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(19, np.uint8)))
    assert "(20, 6, 5, 1)" in error() and "(19,)" in error()
    (folder / "train-labels-idx1-ubyte").unlink()
    assert "train-labels-idx1-ubyte.gz" in error()
    packed = folder / "train-labels-idx1-ubyte.gz"
    packed.write_bytes(gzip.compress(idx_bytes(np.zeros(20, np.uint8)))[:-9])
    assert "not a whole gzip file" in error()
    packed.write_bytes(gzip.compress(idx_bytes(np.zeros(20, np.uint8))))
    assert "image 0 of train-images-idx3-ubyte is 6x5 grey" in error(shape=(5, 6, 1))
    assert "but 5x6 grey is wanted" in error(shape=(5, 6, 1))


def test_shared_mnist(shared):
    data = Images(Idx(str(shared / "data" / "mnist")), (28, 28, 1), validation=5000).load()
    assert (len(data.train), len(data.validation), len(data.test)) == (55_000, 5_000, 10_000)
    assert list(np.bincount(data.test.arrays["targets"])) == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    test = data.test.arrays["inputs"] / np.float32(255)
    assert abs(test.mean() - 0.1325) < 1e-4 and abs(test.std() - 0.3105) < 1e-4


# ----------------------------------------------------------------------------------------------------- folders


def folder_data(root, shape=(6, 5, 3), **fields):
    return Images(ImageFolder(str(root)), shape, **fields)


def test_image_folder(tmp_path):
    written = write_images(tmp_path, 10, ("dog", "cat", "bird"))
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / ".DS_Store").write_text("hidden")
    (tmp_path / "dog" / "more").mkdir()
    (tmp_path / "dog" / "more" / "last.JPEG").write_bytes(encoded(np.full((6, 5, 3), 77, np.uint8), "JPEG"))
    data = folder_data(tmp_path, validation=0.2, test=5).load()
    assert data.classes == ("bird", "cat", "dog") and data.metadata["classes"] == 3
    assert (len(data.test), len(data.validation), len(data.train)) == (5, 5, 21)  # 0.2 of the other 26
    found = sum(rows(data).values(), [])
    jpeg = (np.full((6, 5, 3), 77, np.uint8).tobytes(), 2)
    assert sorted(found) == sorted(
        [(x.tobytes(), ("bird", "cat", "dog").index(name.split("/")[0])) for name, x in written.items()] + [jpeg])
    assert data.summary["other files, left out"] == "1 .txt"


def test_folders_of_splits(tmp_path):
    for split, n in (("train", 10), ("test", 2), ("val", 3)):
        write_images(tmp_path / split, n, seed=len(split) * 100)
    data = folder_data(tmp_path).load()
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 6, 4)
    assert "validation is the source's own" in data.summary["split"]
    own = folder_data(tmp_path, validation=0.25).load()  # asked for: out of train, whatever there is
    assert (len(own.train), len(own.validation), len(own.test)) == (15, 5, 4)
    assert "not the source's own" in own.summary["split"]
    assert len(folder_data(tmp_path, validation=0).load().validation) == 4
    (tmp_path / "test").rename(tmp_path / "elsewhere")
    only = folder_data(tmp_path).load()  # what is held out is the test split
    assert (len(only.train), len(only.validation), len(only.test)) == (18, 2, 6)
    assert "validation" in only.summary["test split"]
    with pytest.raises(UserError, match="leave out --data.test"):
        folder_data(tmp_path, test=0.1).load()


def test_wrong_folders(tmp_path):
    def error(root=tmp_path / "data"):
        with pytest.raises(UserError) as caught:
            folder_data(root).load()
        return str(caught.value)

    assert "is not a folder" in error()
    write_images(tmp_path / "data", classes=("cat",))
    assert "at least two classes; it has cat" in error()
    (tmp_path / "data" / "dog").mkdir()
    assert f"class folder {tmp_path / 'data' / 'dog'} has no PNG or JPEG" in error()
    write_images(tmp_path / "split" / "train")
    write_images(tmp_path / "split" / "test", classes=("cat", "cow"))
    assert "test/cow is a class that" in error(tmp_path / "split")


def test_images_of_another_form_are_named_with_both_forms(tmp_path):
    write_images(tmp_path)

    def error(name, raw, shape=(6, 5, 3)):
        path = tmp_path / "dog" / name
        path.write_bytes(raw)
        with pytest.raises(UserError) as caught:
            folder_data(tmp_path, shape).load()
        path.unlink()
        return str(caught.value)

    big = pixels(1, 7, 9, 3)[0]
    assert "dog/big.png is 7x9 RGB" in error("big.png", encoded(big))
    assert "6x5 RGB is wanted" in error("big.png", encoded(big))
    assert "is 6x5 grey (height x width)" in error("grey.png", encoded(big[:6, :5, 0]))
    assert "cat/0.png is 6x5 RGB" in error("x.png", encoded(big[:6, :5]), (6, 5, 1))
    assert "(8 more)" in error("x.png", encoded(big[:6, :5]), (6, 5, 1))


def encoded_as(mode, image):
    """An image as a PNG, or as a JPEG in CMYK."""
    file = io.BytesIO()
    image.convert(mode).save(file, "JPEG" if mode == "CMYK" else "PNG", **({"quality": 100} if mode == "CMYK" else {}))
    return file.getvalue()


@pytest.mark.parametrize("memory", [1.0, 0.0])
def test_other_kinds_of_images_are_converted_and_counted(tmp_path, memory, caplog):
    """Transparency, palettes, CMYK and 16 bits: the pixels that people see, and a line that says how many."""
    write_images(tmp_path, 4)
    flat = Image.fromarray(np.full((6, 5, 3), [200, 100, 50], np.uint8))
    for i, mode in enumerate(("RGBA", "P", "CMYK")):
        (tmp_path / "dog" / f"{i}.png").write_bytes(encoded_as(mode, flat))

    def loaded(path, shape):
        data = folder_data(path, shape, validation=1, memory=memory).load()
        return data, np.concatenate([everything(r)["inputs"] for r in (data.train, data.validation)])

    with caplog.at_level(logging.WARNING, "lab.data"):
        data, found = loaded(tmp_path, (6, 5, 3))
    assert (np.abs(found.astype(int) - [200, 100, 50]).max((1, 2, 3)) < 10).sum() == 3
    said = data.summary if memory else caplog.text
    for change in ("transparency left out", "palette made RGB", "CMYK made RGB"):
        assert change in (" ".join(said) if memory else said)
    if memory:
        assert data.summary["train images, transparency left out"] == 1
    grey = tmp_path / "grey"
    write_images(grey, 4, shape=(6, 5))
    for i, value in enumerate((40_000, 255, 65_535)):
        (grey / "dog" / f"{i}.png").write_bytes(encoded(np.full((6, 5), value, np.uint16)))
    (grey / "dog" / "3.png").write_bytes(encoded_as("LA", flat.convert("L")))
    _, found = loaded(grey, (6, 5, 1))
    flat_ones = sorted(int(x[0, 0, 0]) for x in found if x.min() == x.max())
    assert flat_ones == sorted([40_000 // 256, 0, 255, np.asarray(flat.convert("L"))[0, 0]])  # not clipped at 255
    with pytest.raises(UserError, match="is 6x5 grey"):  # grey and RGB do not become each other without a flag
        folder_data(grey, (6, 5, 3)).load()


def test_16_bits_of_colour_are_said(tmp_path):
    """Pillow gives the high bytes; what it was is in the file's header only."""
    write_images(tmp_path, 4)
    rows16 = b"".join(b"\0" + struct.pack(">15H", *[51_200, 25_600, 12_800] * 5) for _ in range(6))
    header = struct.pack(">IIBBBBB", 5, 6, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows16)), (b"IEND", b"")]
    raw = b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(body)) + kind + body
                                           + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks)
    (tmp_path / "dog" / "0.png").write_bytes(raw)
    data = folder_data(tmp_path, validation=1).load()
    found = np.concatenate([everything(r)["inputs"] for r in (data.train, data.validation)])
    assert (found == [200, 100, 50]).all((1, 2, 3)).sum() == 1
    assert data.summary["train images, 16 bits a channel made 8"] == 1


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_images_are_turned_as_exif_says(tmp_path, form):
    """All eight orientations of one picture are the same record, as Pillow's own function has it; the count is said."""
    picture = np.zeros((8, 16, 3), np.uint8)
    picture[:4, :8] = 250  # bright at the top left
    stored = {1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
              5: lambda x: x.transpose(1, 0, 2), 6: lambda x: x.transpose(1, 0, 2)[::-1],
              7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1], 8: lambda x: x.transpose(1, 0, 2)[:, ::-1]}
    write_images(tmp_path / "data", 9, ("dog", "cat"), shape=(8, 16, 3))
    for turn, store in stored.items():
        exif = Image.Exif()
        exif[0x0112] = turn
        path = tmp_path / "data" / "dog" / f"{turn}.{form.lower()}"
        Image.fromarray(np.ascontiguousarray(store(picture))).save(path, form, exif=exif, **(
            {"quality": 95, "subsampling": 0} if form == "JPEG" else {}))
        with Image.open(path) as image:
            seen = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)
        assert np.abs(seen - picture).max() < 60, turn  # the test itself is right
        assert turn == 1 or seen.shape != np.asarray(Image.open(path)).shape or \
            np.abs(np.asarray(Image.open(path)).astype(int) - picture).max() > 100  # negative control
    data = folder_data(tmp_path / "data", (8, 16, 3), validation=1).load()
    found = np.concatenate([everything(r)["inputs"] for r in (data.train, data.validation)]).astype(int)
    assert (np.abs(found - picture).max((1, 2, 3)) < 60).sum() == 8
    assert data.summary["train images, turned upright by their EXIF orientation"] == 7
    read = everything(data.read(tmp_path / "data" / "dog").records)["inputs"].astype(int)
    assert (np.abs(read - picture).max((1, 2, 3)) < 60).sum() == 8


def test_damaged_exif_is_no_reason_to_lose_an_image(tmp_path):
    write_images(tmp_path, 4)
    Image.fromarray(np.full((6, 5, 3), 9, np.uint8)).save(tmp_path / "dog" / "0.jpg", exif=b"Exif\0\0garbage")
    odd = Image.Exif()
    odd[0x0112] = 99
    Image.fromarray(np.full((6, 5, 3), 9, np.uint8)).save(tmp_path / "dog" / "1.jpg", exif=odd)
    loaded = folder_data(tmp_path, validation=1).load()
    assert len(loaded.train) + len(loaded.validation) == 10


def test_forms_that_lose_nothing_are_taken(tmp_path):
    write_images(tmp_path, 1)
    palette = Image.fromarray(np.tile(np.uint8([[[250, 10, 20]]]), (6, 5, 1))).quantize(4)
    palette.save(tmp_path / "dog" / "0.png")
    data = folder_data(tmp_path, validation=1).load()
    found = np.concatenate([everything(r)["inputs"] for r in (data.train, data.validation)])
    assert (found == [250, 10, 20]).all((1, 2, 3)).any()
    grey = tmp_path / "grey"
    write_images(grey, 2, shape=(6, 5))
    Image.fromarray(np.eye(6, 5) > 0).save(grey / "dog" / "0.png")
    data = folder_data(grey, (6, 5, 1), validation=1).load()
    found = np.concatenate([everything(r)["inputs"] for r in (data.train, data.validation)])
    assert (found[..., 0] == np.eye(6, 5) * 255).all((1, 2)).any()


def test_resize_takes_the_middle(tmp_path):
    write_images(tmp_path, 3, shape=(8, 8, 3))
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 30:70] = 200  # the middle square
    wide[:, 70:, 0] = 90
    (tmp_path / "cat" / "0.png").write_bytes(encoded(wide))
    (tmp_path / "cat" / "1.png").write_bytes(encoded(np.full((16, 12), 33, np.uint8)))
    (tmp_path / "cat" / "2.png").write_bytes(encoded(np.full((3, 3, 3), 44, np.uint8)))
    data = folder_data(tmp_path, (8, 8, 3), resize=True, validation=1).load()
    found = np.concatenate([everything(r)["inputs"] for r in (data.train, data.validation)])
    for value in (200, 33, 44):
        inside = found[:, :, 1:-1]  # antialiasing reaches beyond the part that is taken, as resizing first would
        assert (inside == value).all((1, 2, 3)).sum() == 1, value
    one = Images(Idx(str(write_idx(tmp_path / "idx"))), (12, 10, 1), resize=True).load()
    want = [np.asarray(Image.fromarray(x).resize((10, 12), Image.Resampling.BILINEAR)) for x in pixels(20, 6, 5)]
    assert {x.tobytes() for x in one.train.arrays["inputs"]} < {x.tobytes() for x in want}


@pytest.mark.parametrize("memory", [4.0, 0.0])
def test_corrupt_images_are_named_and_counted(tmp_path, memory, caplog):
    root = tmp_path / "data"
    write_images(root, 8)
    good = encoded(pixels(1, 6, 5, 3)[0])
    data = folder_data(root, memory=memory, validation=2)
    assert "images skipped, corrupt" not in " ".join(data.load().summary)
    broken = [good[: len(good) // 2], b"", b"no image at all", good[:40] + b"\0\0\0\0" + good[44:]]
    for i, raw in enumerate(broken):
        (root / "cat" / f"{i}.png").write_bytes(raw)

    def load(**fields):
        found = dataclasses.replace(data, **fields).load()
        everything(found.train), everything(found.validation)
        return found

    with pytest.raises(UserError) as caught:
        load()
    text = str(caught.value)
    assert "0.png" in text and "--data.skip-corrupt" in text
    if memory:
        assert "4 images are corrupt" in text and "2.png" in text and "3.png" not in text and "(empty file)" in text
    with caplog.at_level(logging.WARNING, "lab.data"):
        found = load(skip_corrupt=True)
    if memory:
        assert len(found.train) == 10 and found.summary["train images skipped, corrupt"].startswith("4: ")
        assert load(skip_corrupt=True).summary == found.summary  # from the cache
    else:
        assert isinstance(found.train.records, Lazy) and len(found.train) == 14
        assert sum("is corrupt" in r.message for r in caplog.records) == 4
    for path in (root / "cat").iterdir():
        path.write_bytes(b"")
    for path in (root / "dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="None of the 16 images can be decoded"):
        load(skip_corrupt=True)


# -------------------------------------------------------------------------------------------------------- TFDS


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A small data set as TFDS prepares it, with two splits: 20 images of 3 classes in train, 6 in validation."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer
    from tensorflow_datasets.core.features.feature import TensorInfo

    folder = tmp_path_factory.mktemp("tfds") / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    types = {"picture": TensorInfo((), np.object_), "kind": TensorInfo((), np.int64)}
    counts = {"train": 20, "validation": 6}
    for split, n in counts.items():
        writer = ArrayRecordWriter(str(folder / f"tiny-{split}.array_record-00000-of-00001"), "group_size:1")
        for i, image in enumerate(pixels(n, 6, 5, 3, seed=n)):
            example = {"picture": encoded(image), "kind": i % 3 if i != 19 else 0}
            writer.write(ExampleSerializer(types).serialize_example(example))
        writer.close()
    module = "tensorflow_datasets.core.features"
    features = {"picture": {"pythonClassName": f"{module}.image_feature.Image",
                            "image": {"dtype": "uint8", "shape": {"dimensions": ["6", "5", "3"]}}},
                "kind": {"pythonClassName": f"{module}.class_label_feature.ClassLabel",
                         "classLabel": {"numClasses": "3"}}}
    (folder / "features.json").write_text(json.dumps(
        {"pythonClassName": f"{module}.features_dict.FeaturesDict", "featuresDict": {"features": features}}))
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (folder / "dataset_info.json").write_text(json.dumps({
        "name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "moduleName": "nowhere.tiny",
        "splits": [{"name": split, "numBytes": "1", "shardLengths": [str(n)], "filepathTemplate": template}
                   for split, n in counts.items()]}))
    (folder / "kind.labels.txt").write_text("a\nb\nc\n")
    return TfdsImages("tiny", str(folder.parents[1]), image_key="picture", label_key="kind")


def test_tfds(prepared, monkeypatch):
    data = Images(prepared, (6, 5, 3), validation=4).load()
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 4, 6) and data.classes == ("a", "b", "c")
    assert np.array_equal(everything(data.test)["inputs"], pixels(6, 6, 5, 3, seed=6))
    assert np.array_equal(everything(data.test)["targets"], np.arange(6) % 3)
    assert "validation" in data.summary["test split"]
    monkeypatch.setattr(Shards, "read", None)  # the second time nothing is read, and TFDS is not asked anything
    monkeypatch.setattr(Shards, "__len__", None)
    again = Images(prepared, (6, 5, 3), validation=4).load()
    assert rows(again) == rows(data) and again.fingerprint == data.fingerprint


def test_tfds_batch_by_batch_is_the_same(prepared):
    data = Images(prepared, (6, 5, 3)).load()
    lazy = Images(prepared, (6, 5, 3), memory=0).load()
    assert isinstance(lazy.test, Lazy) and isinstance(data.test, Arrays)
    for split in ("train", "validation", "test"):
        assert same(everything(getattr(lazy, split)), everything(getattr(data, split)))
    indices = np.array([3, 0, 3, 5])
    assert same(lazy.test[indices], data.test[indices])
    assert lazy.summary["decoding"].startswith("batch by batch")


def test_tfds_split_expressions_and_errors(prepared):
    by_name = Images(dataclasses.replace(prepared, train="train[:50%]", validation="train[50%:]", test="validation"),
                     (6, 5, 3)).load()
    assert (len(by_name.train), len(by_name.validation), len(by_name.test)) == (10, 10, 6)
    kept = Images(dataclasses.replace(prepared, validation="validation"), (6, 5, 3)).load()
    assert len(kept.validation) == 6 and kept.test is None

    def error(**fields):
        with pytest.raises(UserError) as caught:
            Images(dataclasses.replace(prepared, **fields), (6, 5, 3)).load()
        return str(caught.value)

    assert "its splits are train, validation" in error(train="tra")
    missing = error(image_key="image")
    assert "no field 'image' that is image; its fields are kind (classLabel), picture (image)" in missing
    assert "./launch.sh prepare other" in error(name="other")
    assert "not a TFDS name" in error(name="a b")
    features = os.path.join(prepared.data_dir, "tiny", "1.0.0", "features.json")
    with open(features) as file:
        before = file.read()
    try:
        with open(features, "w") as file:
            file.write(before.replace('"numClasses": "3"', '"numClasses": "2"'))
        assert "image 2 of tiny train has label 2, which is outside 0 to 1" in error()
        lazy = Images(prepared, (6, 5, 3), memory=0).load()
        with pytest.raises(UserError, match="has label 2"):
            everything(lazy.test)
    finally:
        with open(features, "w") as file:
            file.write(before)


def test_a_file_that_vanishes_while_training_is_named(tmp_path):
    write_images(tmp_path)
    data = folder_data(tmp_path, memory=0).load()
    (tmp_path / "dog" / "1.png").unlink()
    with pytest.raises(UserError, match="Cannot read .*dog/1.png: No such file"):
        everything(data.train), everything(data.validation)


def test_imagenet_needs_no_data_for_a_dry_run(tmp_path):
    data = Images(TfdsImages("imagenet2012", str(tmp_path)), (224, 224, 3), border=16, classes=1000,
                  augment=Augment(resized_crop=0.08, flip=True, mixup=0.2))
    data.validate()
    assert data.record_spec() == {"inputs": ((256, 256, 3), np.uint8), "targets": ((), np.int32)}
    assert data.metadata() == {"height": 224, "width": 224, "channels": 3, "classes": 1000}
    with pytest.raises(UserError, match="./launch.sh prepare imagenet2012"):
        data.describe()


def test_shared_tfds_is_what_the_original_files_are(shared):
    folder = str(shared / "tfds")
    assert {name: len(split) for name, split in TfdsImages("mnist", folder).open().splits.items()} == {
        "train": 60_000, "test": 10_000}
    part = Images(TfdsImages("mnist", folder, train="train[:600]", test="test[:300]"), (28, 28, 1)).load()
    original = Images(Idx(str(shared / "data" / "mnist")), (28, 28, 1)).load()
    found, whole = rows(part), rows(original)
    assert set(found["train"] + found["validation"]) <= set(whole["train"] + whole["validation"])
    assert set(found["test"]) <= set(whole["test"]) and not set(found["test"]) & set(whole["train"])


def test_shared_cifar10(shared):
    from tensorflow_datasets import builder_from_directory

    data = Images(TfdsImages("cifar10", str(shared / "tfds")), (32, 32, 3)).load()
    assert (len(data.train), len(data.validation), len(data.test)) == (3600, 400, 1000)
    assert data.classes[:2] == ("airplane", "automobile") and data.metadata["classes"] == 10
    theirs = builder_from_directory(str(shared / "tfds" / "cifar10" / "3.0.2")).as_data_source(split="test[:50]")
    ours = data.test[np.arange(50)]
    assert all(np.array_equal(record["image"], image) and record["label"] == label for record, image, label
               in zip(theirs, ours["inputs"], ours["targets"], strict=True))


# ------------------------------------------------------------------------------------------- digits and splits


def test_digits():
    from sklearn.datasets import load_digits

    data = Images(Sklearn("digits"), (8, 8, 1), validation=0.1, test=297).load()
    assert (len(data.train), len(data.validation), len(data.test)) == (1350, 150, 297)
    raw = load_digits()
    grey = np.round(raw.images * (255 / 16)).astype(np.uint8)
    pairs = zip(grey, raw.target, strict=True)
    assert sorted(sum(rows(data).values(), [])) == sorted((x.tobytes(), int(t)) for x, t in pairs)
    assert data.train.arrays["inputs"].max() == 255 and data.classes == tuple("0123456789")
    with pytest.raises(UserError, match="no images"):
        Images(Sklearn("iris"), (8, 8, 1)).load()


def test_the_split_is_fixed_and_honest():
    data = Images(Sklearn("digits"), (8, 8, 1), validation=100, test=100).load()
    first = data.test.arrays["inputs"][0]
    again = Images(Sklearn("digits"), (8, 8, 1), validation=100, test=100).load()
    assert rows(again) == rows(data) and again.fingerprint == data.fingerprint
    # Written down once: another library version or machine must not move anything between splits.
    assert (int(first.sum()), int(data.test.arrays["targets"].sum())) == (4098, 489)
    other = Images(Sklearn("digits"), (8, 8, 1), validation=101, test=100).load()
    assert rows(other)["test"] == rows(data)["test"] and other.fingerprint != data.fingerprint
    with pytest.raises(UserError, match="1,000 for test and 797 for validation leave none"):
        Images(Sklearn("digits"), (8, 8, 1), validation=797, test=1000).load()
    with pytest.raises(UserError, match="no test split to validate on"):
        Images(Sklearn("digits"), (8, 8, 1), validation=0).load()
    both = Images(Sklearn("digits"), (8, 8, 1), validation=0, test=0.2).load()
    assert both.validation is both.test and "validation is the test split itself" in both.summary["split"]


@pytest.mark.parametrize("fields, message", [
    ({"shape": (8, 8, 2)}, "channels .1 or 3."), ({"shape": (1, 8, 1)}, "at least 2"), ({"test": 1.5}, "whole number"),
    ({"mean": (0.1, 0.2)}, "--data.mean"), ({"std": (0.0,)}, "positive"), ({"mean": (33.0,)}, "units of white"),
    ({"validation": -0.1}, "--data.validation"), ({"border": -1}, "border"), ({"classes": 1}, "--data.classes"),
    ({"memory": -1.0}, "memory"), ({"augment": Augment(mixup=1.0)}, "--data.classes"),
    ({"augment": Augment(crop=9)}, "crop"),
])
def test_values_out_of_range(fields, message):
    Images(Sklearn("digits"), (8, 8, 1)).validate()
    with pytest.raises(UserError, match=message):
        Images(**{"source": Sklearn("digits"), "shape": (8, 8, 1)} | fields).validate()


def test_the_number_of_classes_is_compared():
    with pytest.raises(UserError, match="has 10 classes, but --data.classes is 12"):
        Images(Sklearn("digits"), (8, 8, 1), classes=12).load()


def test_importing_it_does_not_import_jax_or_grain():
    slow = {"jax", "grain", "sklearn", "tensorflow_datasets"}
    code = f"import sys, lab.data.images.images; sys.exit(bool({slow} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ------------------------------------------------------------------------------------------------------- cache


def test_the_cache_notices_changes_and_damage(tmp_path, cache, caplog):
    root = tmp_path / "data"
    write_images(root, 6)
    data = folder_data(root)
    first = data.load()
    (folder,) = cache.iterdir()
    for name, damage in (("images.bin", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])), ("meta.json", lambda raw: b"{"),
                         ("images.bin", lambda raw: raw[:-7]), ("labels.bin", lambda raw: b"")):
        path = folder / name
        path.write_bytes(damage(path.read_bytes()))
        with caplog.at_level(logging.WARNING, "lab.data"):
            caplog.clear()
            assert rows(data.load()) == rows(first) and "are damaged" in caplog.text
    assert list(cache.iterdir()) == [folder]  # nothing left over
    (root / "cat" / "0.png").write_bytes(encoded(np.zeros((6, 5, 3), np.uint8)))
    changed = data.load()
    assert rows(changed) != rows(first) and changed.fingerprint != first.fingerprint
    other = tmp_path / "moved"
    root.rename(other)
    assert folder_data(other).load().fingerprint == changed.fingerprint  # what is in it counts, not where it is


def test_a_killed_process_leaves_nothing_for_ever(tmp_path, cache):
    write_images(tmp_path / "data")
    data = folder_data(tmp_path / "data")
    data.load()
    (folder,) = cache.iterdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    junk = cache / f".tmp-{folder.name}-{os.uname().nodename}-{dead.pid}"
    junk.mkdir()
    (folder / "meta.json").unlink()
    data.load()
    assert not junk.exists()


# ----------------------------------------------------------------------------------------------------- predict


def test_new_images_are_read_for_predictions(tmp_path):
    train = tmp_path / "train"
    written = write_images(train, 6)
    data = folder_data(train).load()
    found = data.read(train)
    names, records = found.names, found.records
    assert names == sorted(written) and set(everything(records)) == {"inputs"}
    assert np.array_equal(everything(records)["inputs"], np.stack([written[name] for name in names]))
    found = data.read(train / "cat" / "3.png")
    names, records = found.names, found.records
    assert names == ["3.png"] and np.array_equal(everything(records)["inputs"][0], written["cat/3.png"])
    (tmp_path / "new").mkdir()
    for name, raw, message in (("a.png", b"?", "1 image is corrupt: .*a.png .no PNG"),
                               ("a.png", encoded(pixels(1, 9, 9, 3)[0]), "a.png is 9x9 RGB")):
        (tmp_path / "new" / name).write_bytes(raw)
        with pytest.raises(UserError, match=message):
            data.read(tmp_path / "new")
    (tmp_path / "new" / "a.png").unlink()
    with pytest.raises(UserError, match="has no PNG or JPEG file"):
        data.read(tmp_path / "new")
    with pytest.raises(UserError, match="does not exist"):
        data.read(tmp_path / "new" / "b.png")


def test_an_idx_file_is_read_for_predictions(tmp_path):
    folder = write_idx(tmp_path)
    data = Images(Idx(str(folder)), (6, 5, 1)).load()
    path = folder / "train-images-idx3-ubyte"
    found = data.read(path)
    names, records = found.names, found.records
    assert names[:2] == [f"{path.name} 0", f"{path.name} 1"] and set(everything(records)) == {"inputs"}
    assert np.array_equal(everything(records)["inputs"][..., 0], read_idx(path))
    with pytest.raises(UserError, match="not a batch of images"):
        data.read(folder / "train-labels-idx1-ubyte")
    with pytest.raises(UserError, match="6x5 grey"):
        dataclasses.replace(data, form=dataclasses.replace(data.form, height=9)).read(path)
