"""Images of noise: how fast a model trains does not depend on what is in them."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab.data.images.sources import Opened, Pixels


@dataclass(frozen=True)
class Noise:
    """`records` images (side, side, 3) of noise with random labels, in memory."""

    side: int
    classes: int
    records: int

    def validate(self) -> None:
        """Nothing can be wrong."""

    def open(self) -> Opened:
        """One split, drawn with seed 0."""
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (self.records, self.side, self.side, 3), np.uint8)
        labels = rng.integers(0, self.classes, self.records).astype(np.int32)
        return Opened(f"{self.records} images of noise", {"train": Pixels("noise", images, labels)}, self.classes, ())


def write_idx(folder: Path, side: int, records: int) -> Path:
    """MNIST's two training files with images of noise (side, side); returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (records, side, side), np.uint8)
    labels = np.arange(records, dtype=np.uint8) % 10
    for name, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        header = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
        (folder / name).write_bytes(header + array.tobytes())
    return folder
