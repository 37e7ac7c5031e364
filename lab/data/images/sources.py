"""Sources of images: folders of PNG and JPEG files, and TFDS. Nothing is decoded here.

A *source* is part of an experiment's config. Its `open()` returns the splits: `Pixels`, images in memory
(`lab.data.images.idx`), or *encoded* images (`ImageFiles`, `Shards`) with

    len(split), name(i)   number of images, and the display name of one
    read(indices)         the PNG or JPEG files, as bytes or as paths, and the labels int32 (n,)
    outline()             names and sizes, to tell data sets apart without reading them
    identity()            cheap key of the files on disk (paths, sizes, times)
"""

import functools
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lab.data import digest
from lab.data.folders import Splits, labelled, printable, split_folders, suffixes, tree
from lab.data.prepared import described
from lab.errors import Absent, UserError
from lab.files import user_path

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif")


@dataclass(frozen=True, eq=False)
class Pixels:
    """Images held in memory, all of one size, uint8 (n, h, w, c), with labels int32 (n,)."""

    title: str
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        return f"image {i} of {self.title}"


class Encoded(Protocol):
    """Images that must be decoded; see the module docstring."""

    def __len__(self) -> int: ...
    def name(self, i: int) -> str: ...
    def read(self, indices: np.ndarray) -> tuple[list[bytes | Path], np.ndarray]: ...
    def outline(self) -> list[Any]: ...
    def identity(self) -> str: ...


@dataclass(frozen=True)
class Opened:
    """An opened source. `splits`: "train", optionally "validation" and "test". `names`: class names, or ()."""

    title: str
    splits: dict[str, Pixels | Encoded]
    classes: int
    names: tuple[str, ...] = ()
    notes: dict[str, str | int | float] = field(default_factory=dict)


def _with_test(splits: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str | int | float]]:
    """Without a test split, the validation split is used as the test split, as in ImageNet.

    Returns the splits, and a line to print about it.
    """
    if "test" in splits or "validation" not in splits:
        return splits, {}
    return ({"train": splits["train"], "test": splits["validation"]},
            {"test split": "what the source calls validation, which is all it holds out"})


# ------------------------------------------------------------------------------------------------------ folders


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files. `paths` below `root`; `labels` int32, one per file (all 0 if unlabelled)."""

    root: Path
    paths: list[Path]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return str(self.paths[i])

    def read(self, indices: np.ndarray) -> tuple[list[bytes | Path], np.ndarray]:
        return [self.paths[i] for i in indices], self.labels[indices]

    @functools.cached_property
    def _stats(self) -> list[os.stat_result]:
        try:
            return [path.stat() for path in self.paths]
        except OSError as error:
            raise UserError(f"Cannot read {error.filename}: {error.strerror}.") from None

    def outline(self) -> list[Any]:
        sizes = [stat.st_size for stat in self._stats]
        return [[p.relative_to(self.root).as_posix() for p in self.paths], sizes, self.labels.tolist()]

    def identity(self) -> str:
        return digest("files", str(self.root.absolute()), self.outline(), [stat.st_mtime_ns for stat in self._stats])


@dataclass(frozen=True)
class ImageFolder:
    """A folder with one subfolder of PNG and JPEG files per class, or with one such folder per split.

    Split names are case-insensitive: train or Training, test, val or dev, also as part of a name (seg_train,
    training_set, PublicTest). Without a test split, validation is the test split. The classes are the sorted names of
    the subfolders. Files of other types, and links to files listed already, are left out and counted.
    """

    path: str
    """The folder."""
    splits: Splits = "auto"
    """auto: folders with split names are splits, and an ambiguous layout is an error; folders: use the folders with
    split names and leave out the rest; none: every folder is a class."""

    def validate(self) -> None:
        """UserError without a path."""
        if not self.path.strip():
            raise UserError("ImageFolder needs a folder that holds one subfolder of images for each class.")

    def open(self) -> Opened:
        """List the files. UserError for a missing folder, an ambiguous layout, or a class without images."""
        root = user_path(self.path)
        if not root.is_dir():
            raise Absent(f"{root} is not a folder (looked from {Path.cwd()}).")
        found = tree(root)
        folders, left_out = split_folders(found, self.splits)
        names = found.folders[folders["train"]]
        if len(names) < 2:
            raise UserError(f"{folders['train']} needs a subfolder of images for each of at least two classes; it has "
                            f"{', '.join(names) or 'none'}.")
        others, splits = Counter(), {}
        for split in (split for split in ("train", "validation", "test") if split in folders):
            paths, labels, more = labelled(found, folders[split], names, is_image, "PNG or JPEG file")
            splits[split], others = ImageFiles(folders[split], paths, labels), others + more
        splits, notes = _with_test(splits)
        notes |= {"other files, left out": suffixes(others)} if others else {}
        notes |= found.notes() | ({"other folders, left out": ", ".join(left_out)} if left_out else {})
        return Opened(f"images in {self.path}", splits, len(names), tuple(map(printable, names)), notes)


def is_image(name: str) -> bool:
    """Whether a file name has a PNG or JPEG suffix."""
    return name.lower().endswith(SUFFIXES)


# --------------------------------------------------------------------------------------------------------- TFDS


@dataclass(frozen=True)
class TfdsImages:
    """Labelled images prepared by TFDS as ArrayRecord, read without TensorFlow and never downloaded here.

    `./launch.sh prepare NAME` prepares them, in a separate environment.
    """

    name: str
    """TFDS name, with configuration and version if needed: "mnist", "imagenet2012:5.1.0"."""
    data_dir: str | None = None
    """Folder of prepared data sets; default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    train: str = "train"
    """TFDS split expression for training, such as "train[:50%]"."""
    validation: str | None = None
    """TFDS split expression; default "validation" if the data set has both "validation" and "test"."""
    test: str | None = None
    """TFDS split expression; default "test", or "validation" if there is no "test"."""
    image_key: str = "image"
    """The record field with the image."""
    label_key: str = "label"
    """The record field with the class."""

    def validate(self) -> None:
        """UserError if the name is not a valid TFDS name."""
        if not re.fullmatch(r"\w+(/[\w.+-]+)?(:\d+\.\d+\.\d+)?", self.name):
            raise UserError(f'{self.name!r} is not a TFDS name: write "name", "name/config" or "name/config:1.0.0".')

    def open(self) -> Opened:
        """Find the prepared folder and read its descriptions (no TFDS import, no network). UserError if absent."""
        self.validate()
        folder, found, features = described(self.name, self.data_dir)
        for key, kind in ((self.image_key, "image"), (self.label_key, "classLabel")):
            if kind not in features.get(key, {}):
                have = ", ".join(f"{name} ({next((k for k in f if k != 'pythonClassName'), '?')})"
                                 for name, f in sorted(features.items()))
                raise UserError(f"{self.name} has no field {key!r} that is {kind}; its fields are {have}.")
        own = list(found)
        chosen = {"train": self.train, "validation": self.validation or ("validation" if "validation" in own else None),
                  "test": self.test or ("test" if "test" in own else None)}
        splits, notes = {split: expression for split, expression in chosen.items() if expression}, {}
        if not self.validation:  # an explicit validation split is kept
            splits, notes = _with_test(splits)
        labels = folder / f"{self.label_key}.labels.txt"
        names = tuple(labels.read_text("utf-8").split("\n")) if labels.is_file() else ()
        names = tuple(name for name in names if name)
        return Opened(f"TFDS {self.name}", {k: Shards(self, folder, e, own) for k, e in splits.items()},
                      int(features[self.label_key]["classLabel"]["numClasses"]), names, notes)


@dataclass(frozen=True, eq=False)
class Shards:
    """One split expression of a prepared data set; `own`: the data set's splits."""

    source: TfdsImages
    folder: Path
    expression: str
    own: list[str]

    @functools.cached_property
    def _records(self) -> Any:
        import tensorflow_datasets as tfds  # takes 1.5 s; import it only to read records

        raw = {self.source.image_key: tfds.decode.SkipDecoding()}
        try:
            return tfds.builder_from_directory(str(self.folder)).as_data_source(split=self.expression, decoders=raw)
        except ValueError:  # invalid expression, unknown split, or empty selection
            raise UserError(f"The split {self.expression!r} of {self.source.name} is unknown, badly written or empty; "
                            f"its splits are {', '.join(self.own)}.") from None

    def __len__(self) -> int:
        return len(self._records)

    def name(self, i: int) -> str:
        return f"image {i} of {self.source.name} {self.expression}"

    def read(self, indices: np.ndarray) -> tuple[list[bytes | Path], np.ndarray]:
        found = self._records.__getitems__([int(i) for i in indices])  # one at a time is up to 30 times slower
        labels = np.array([record[self.source.label_key] for record in found], np.int32)
        return [record[self.source.image_key] for record in found], labels

    def outline(self) -> list[Any]:
        shards = sorted(self.folder.glob("*.array_record*"))
        keys = [self.source.image_key, self.source.label_key]
        return [self.expression, keys, [[path.name, path.stat().st_size] for path in shards]]

    def identity(self) -> str:
        times = [path.stat().st_mtime_ns for path in sorted(self.folder.glob("*.array_record*"))]
        return digest("tfds", str(self.folder.absolute()), self.outline(), times)
