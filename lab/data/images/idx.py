"""Images in the IDX format of MNIST."""

import gzip
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab.data.images.sources import Opened, Pixels
from lab.errors import Absent, UserError
from lab.files import user_path

IMAGES = re.compile(r"-images[-.]idx\d-ubyte(\.gz)?$")


@dataclass(frozen=True)
class Idx:
    """Images in the IDX format of MNIST (LeCun, Cortes & Burges), plain or packed with gzip."""

    path: str
    """A folder with train-images-idx3-ubyte and train-labels-idx1-ubyte (t10k-... for the test split), or one image
    file. Its label file is next to it, with "labels" and "idx1" in the name instead of "images" and "idx3"."""
    names: tuple[str, ...] = ()
    """Names of the classes, in the order of the labels."""

    def validate(self) -> None:
        """UserError without a path."""
        if not self.path.strip():
            raise UserError("Idx needs a folder with the four files of MNIST, or a file of images.")

    def open(self) -> Opened:
        """Read everything. UserError names the file that is missing, damaged or inconsistent."""
        where = user_path(self.path)
        train = where if where.is_file() else _idx_in(where, "train")
        if train is None:
            raise Absent(f"{where} has no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in it."
                         if where.is_dir() else f"{where} does not exist (looked from {Path.cwd()}).")
        if not where.is_file():
            test = _idx_in(where, "t10k")
        else:
            other = [where.with_name(where.name.replace("train", word)) for word in ("t10k", "test")]
            test = next((p for p in other if p != where and p.is_file()), None)
        splits = {name: _idx_pair(path) for name, path in (("train", train), ("test", test)) if path}
        classes = len(self.names) or int(splits["train"].labels.max()) + 1
        return Opened(f"IDX files {self.path}", splits, classes, self.names)


def _idx_in(folder: Path, split: str) -> Path | None:
    found = sorted(p for p in folder.glob(f"{split}-images*") if IMAGES.search(p.name))
    return found[0] if found else None


def _idx_pair(path: Path) -> Pixels:
    """An image file, with the label file next to it."""
    plain = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1")
    labels = next((p for p in (path.with_name(plain), path.with_name(plain + ".gz")) if p.is_file()), None)
    if labels is None or plain == path.name.removesuffix(".gz"):
        raise UserError(f"The labels of {path} should be in {path.with_name(plain)} or {plain}.gz.")
    images, targets = read_idx(path), read_idx(labels)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or targets.ndim != 1 or len(images) != len(targets) or not len(images):
        raise UserError(f"{path} holds an array of shape {images.shape} and {labels} one of {targets.shape}: "
                        f"images and labels do not belong together.")
    return Pixels(path.name, images, targets.astype(np.int32))


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in an IDX file. UserError for a wrong header, or a size that differs from the header's."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}): copy it again.") from None
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from None
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != 8 or not 1 <= raw[3] <= 4 or len(raw) < 4 + 4 * raw[3]:
        raise UserError(f"{path} is not an IDX file of bytes: it begins with {raw[:4].hex(' ')}, not with 00 00 08 and "
                        f"the number of dimensions.")
    start = 4 + 4 * raw[3]
    shape = tuple(int(n) for n in np.frombuffer(raw[4:start], ">u4"))
    if len(raw) - start != math.prod(shape):
        raise UserError(f"{path} announces {math.prod(shape):,} bytes, shape {shape}, but has {len(raw) - start:,}: "
                        f"copy it again.")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
