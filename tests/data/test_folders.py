"""Folders of labelled files: which are splits, which are classes, links, and encodings, for images and texts alike."""

import os
from pathlib import Path

import pytest

from lab.data.folders import split_folders, split_of, tree
from lab.data.images.sources import ImageFolder
from lab.data.messages.sources import TextFolder
from lab.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))


def fill(root: Path, *folders: str, n: int = 2) -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for i in range(n):
            (root / folder / f"{i}.png").write_text(f"{folder} {i}")
    return root


@pytest.mark.parametrize(("name", "kind"), [
    *[(name, "train") for name in ("train", "Train", "TRAINING", "training_set", "Training Set", "seg_train",
                                   "trainset", "train-images", "TrainData", "train2017", "20news-bydate-train",
                                   "data.train", "train-jpg", "train_resized", "train_224x224", "TrainSamples")],
    *[(name, "test") for name in ("test", "Testing", "test_set", "seg_test", "testset", "Test Images", "my-test-data",
                                  "held-out", "test_examples")],
    *[(name, "validation") for name in ("val", "valid", "validation", "dev", "Val", "dev_set", "eval", "validate",
                                        "validation-split")],
    *[(name, None) for name in ("trains", "retrain", "training_wheels", "protest", "contest", "value", "device", "cat",
                                "test_tube", "valley", "dataset", "images", "interval", "trainer")]])
def test_names_of_splits(name, kind):
    assert split_of(name) == kind


@pytest.mark.parametrize("names", [("Training", "Testing"), ("Train", "Test"), ("seg_train", "seg_test"),
                                   ("training_set", "test_set"), ("train", "val"), ("TRAIN", "Valid"),
                                   ("train", "dev")])
@pytest.mark.parametrize("shape", ["{0}/{1}", "archive/{0}/{1}", "{0}/{0}/{1}", "a/b/{0}/{0}/{1}"])
def test_images_and_texts_find_the_same_splits(tmp_path, names, shape):
    fill(tmp_path, *(shape.format(split, c) for split in names for c in ("top", "bottom")))
    opened = ImageFolder(str(tmp_path)).open()
    held = split_of(names[1])
    assert set(opened.splits) == {"train", "test"}  # a single held-out split of images is the test split
    assert opened.names == ("bottom", "top") and len(opened.splits["train"]) == len(opened.splits["test"]) == 4
    found = TextFolder(str(tmp_path)).load()
    assert found.classes == ("bottom", "top") and set(found.splits) == {"train", held}
    assert found.splits["train"][0][0].startswith(shape.format(names[0], "bottom"))


@pytest.mark.parametrize(("folders", "words"), [
    (("train/a", "train/b", "car/a"), "not clear what car is"),
    (("train/a", "train/b", "Training/a", "test/a"), "not clear what Training is"),
    (("val/a", "val/b", "dev/a", "train/a"), "not clear what val is"),
    (("test/a", "val/b"), "which folder is for training"),
    (("cat/train", "cat/test", "dog/train", "dog/test"), "cat is named like a class but holds the splits test, train"),
    (("train_v2b/a", "train_v2b/b", "test_v2b/a", "test_v2b/b"), "test_v2b, train_v2b, or a, b in each")])
def test_what_is_not_clear_is_refused_with_the_field_that_decides_it(tmp_path, folders, words):
    fill(tmp_path, *folders)
    for source in (ImageFolder(str(tmp_path)).open, TextFolder(str(tmp_path)).load):
        with pytest.raises(UserError, match=words) as caught:
            source()
        assert "--data.source.splits" in str(caught.value)


def test_the_field_decides(tmp_path):
    vehicles = fill(tmp_path / "v", "train", "car", "bus")
    assert ImageFolder(str(vehicles), splits="none").open().names == ("bus", "car", "train")
    mixed = fill(tmp_path / "m", "train/a", "train/b", "other/a")
    opened = ImageFolder(str(mixed), splits="folders").open()
    assert opened.names == ("a", "b") and opened.notes["other folders, left out"] == "other"
    intel = fill(tmp_path / "i", "seg_train/seg_train/a", "seg_train/seg_train/b", "seg_test/seg_test/a",
                 "seg_pred/seg_pred")
    opened = ImageFolder(str(intel)).open()  # two splits are clear; the rest is left out and said
    assert opened.names == ("a", "b") and opened.notes["other folders, left out"] == "seg_pred"
    by_class = fill(tmp_path / "c", "cat/train", "cat/test", "dog/train", "dog/test")
    assert len(ImageFolder(str(by_class), splits="none").open().splits["train"]) == 8
    alike = fill(tmp_path / "d", "amazon/mug", "amazon/pen", "webcam/mug", "webcam/pen")
    assert ImageFolder(str(alike), splits="none").open().names == ("amazon", "webcam")
    unlike = fill(tmp_path / "u", "cat/indoor", "cat/outdoor", "dog/indoor")
    assert ImageFolder(str(unlike)).open().names == ("cat", "dog")


# ------------------------------------------------------------------------------------------------------- links


def count(source: Path) -> int:
    return len(ImageFolder(str(source)).open().splits["train"])


@pytest.mark.parametrize("target", [".", "..", "../..", "../bottom", "../bottom/deep", "../top"])
def test_every_real_file_is_taken_once_whatever_links_there_are(tmp_path, target):
    root = fill(tmp_path / "data", "top", "bottom", "bottom/deep")
    assert count(root) == 6
    for folder in ("top", "bottom"):
        os.symlink(target, root / folder / "a_link")
        os.symlink("0.png", root / folder / "again.png")
    assert count(root) == 6
    assert ImageFolder(str(root)).open().notes["links to files already listed, left out"] == 4
    assert len(TextFolder(str(root)).load().splits["train"][0]) == 6
    files = tree(root).below(root / "bottom")
    assert files == sorted(root / "bottom" / name for name in ("0.png", "1.png", "deep/0.png", "deep/1.png"))


def test_links_to_elsewhere_are_followed_once(tmp_path):
    root = fill(tmp_path / "data", "top", "bottom")
    outside = fill(tmp_path / "outside", "more", "more/inner")
    for i in range(2):
        os.symlink(outside / "more", root / "top" / f"link{i}")
        os.symlink(outside / "more" / "inner", root / "bottom" / f"link{i}")
        os.symlink(outside / "more" / "0.png", root / "bottom" / f"file{i}.png")
    assert count(root) == 8
    pool = fill(tmp_path / "pool", "x")  # a data set that is made of links only
    links = tmp_path / "links"
    for name in ("a", "b"):
        (links / name).mkdir(parents=True)
        os.symlink(pool / "x" / ("0.png" if name == "a" else "1.png"), links / name / "image.png")
    assert count(links) == 2
    os.symlink(root, tmp_path / "whole")
    assert count(tmp_path / "whole") == 8  # the root itself may be a link


def test_a_loop_of_links_between_two_folders_ends(tmp_path):
    root = fill(tmp_path / "data", "a", "b")
    os.symlink(root / "b", root / "a" / "to_b")
    os.symlink(root / "a", root / "b" / "to_a")
    os.symlink(root / "self", root / "self")
    assert tree(root).copies == 2 and count(root) == 4


def test_a_split_that_is_a_link_to_another_is_no_split(tmp_path):
    root = fill(tmp_path / "data", "train/a", "train/b")
    os.symlink("train", root / "test")
    splits, _ = split_folders(tree(root), "auto")
    assert list(splits) == ["train"]


# ---------------------------------------------------------------------------------------------------- encodings


def test_a_name_that_is_not_utf8_can_be_written(tmp_path):
    fill(tmp_path, "good")
    try:
        os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")) / "1.png").write_text("x")
    names = ImageFolder(str(tmp_path)).open().names
    assert names == ("caf\ufffd", "good") and all(name.encode() for name in names)


def test_public_and_private_test_sets(tmp_path):
    """FER2013: Training, PublicTest and PrivateTest."""
    fill(tmp_path, *(f"{split}/{c}" for split in ("Training", "PublicTest", "PrivateTest") for c in ("a", "b")))
    opened = ImageFolder(str(tmp_path)).open()
    assert opened.names == ("a", "b") and set(opened.splits) == {"train", "validation", "test"}
    assert opened.splits["test"].root.name == "PrivateTest"
    assert [split_of(name) for name in ("public_test", "Private Test", "publictests", "public")] == [
        "validation", "test", None, None]


@pytest.mark.parametrize("names", [("trainA", "trainB", "testA", "testB"), ("Train (1)", "Test (1)"),
                                   ("train_clean", "val_clean"), ("train - Copy", "test copy")])
def test_names_with_words_of_splits_are_asked_about(tmp_path, names):
    fill(tmp_path, *names)
    for source in (ImageFolder(str(tmp_path)).open, TextFolder(str(tmp_path)).load):
        with pytest.raises(UserError, match="not clear whether .* --data.source.splits none"):
            source()
    assert ImageFolder(str(tmp_path), splits="none").open().names == tuple(sorted(names))
    fill(tmp_path / "trains", "train_steam", "bus")  # the control: nothing there is held out
    assert ImageFolder(str(tmp_path / "trains")).open().names == ("bus", "train_steam")


@pytest.mark.parametrize("n", [0, 3])
def test_a_held_out_folder_without_classes_is_left_out(tmp_path, n):
    """Kaggle's test sets."""
    fill(tmp_path, "train/a", "train/b", "val/a", "val/b")
    fill(tmp_path, "test", n=n)
    opened = ImageFolder(str(tmp_path)).open()
    assert set(opened.splits) == {"train", "test"} and opened.splits["test"].root.name == "val"
    assert opened.notes["other folders, left out"] == "test (no class folders)"
    assert set(TextFolder(str(tmp_path)).load().splits) == {"train", "validation"}


def test_pipes_are_not_read_and_other_types_are_named(tmp_path):
    fill(tmp_path, "a", "b")
    os.mkfifo(tmp_path / "a/pipe.png")
    (tmp_path / "b/link.png").symlink_to(tmp_path / "a/pipe.png")
    (tmp_path / "a/x.webp").touch()
    opened = ImageFolder(str(tmp_path)).open()
    assert len(opened.splits["train"]) == 4 and opened.notes["pipes and devices, left out"] == 2
    assert opened.notes["other files, left out"] == "1 .webp"
    (tmp_path / "c").mkdir()
    (tmp_path / "c/x.webp").touch()
    with pytest.raises(UserError, match="c has no PNG or JPEG file in it but 1 .webp: convert them"):
        ImageFolder(str(tmp_path)).open()
