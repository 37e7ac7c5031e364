"""PNG and JPEG to arrays of the form that is wanted, and what people are told about images that cannot be used."""

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lab.data.image_sources import Encoded, Pixels
from lab.errors import UserError

T, R = TypeVar("T"), TypeVar("R")
BLOCK = 32  # images handed to a thread at once: small ones take less time than the handing over
MODES = {1: "L", 3: "RGB"}
WORDS = {"L": "grey", "RGB": "RGB", "RGBA": "RGB with transparency", "LA": "grey with transparency"}
# What Pillow raises for damaged PNG and JPEG files.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error,
           Image.DecompressionBombError)


@dataclass(frozen=True)
class Form:
    """What every stored image must be, or with `resize` is made to be: height x width, 1 (grey) or 3 (RGB) channels."""

    height: int
    width: int
    channels: int
    resize: bool = False

    def __str__(self) -> str:
        return f"{self.height}x{self.width} {WORDS[MODES[self.channels]]}"


@dataclass(frozen=True)
class Problem:
    """Why an image cannot be used. `corrupt`: it cannot be decoded; else it is of another form."""

    text: str
    corrupt: bool


def decode(item: bytes | Path, form: Form) -> np.ndarray | Problem:
    """A PNG or JPEG file, or its bytes -> uint8 (H, W, C), or what is wrong with it."""
    raw = read_bytes(item)
    try:
        with Image.open(io.BytesIO(raw), formats=("PNG", "JPEG")) as image:
            image.load()
            return fitted(image, form)
    except DAMAGED as error:
        why = "no PNG or JPEG" if isinstance(error, UnidentifiedImageError) else str(error)
        return Problem(why if raw else "empty file", corrupt=True)


def read_bytes(item: bytes | Path) -> bytes:
    """The bytes, or the file's. UserError when it cannot be read."""
    try:
        return item if isinstance(item, bytes) else item.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read {item}: {error.strerror or error}.") from None


def fitted(image: Image.Image, form: Form) -> np.ndarray | Problem:
    """An image in this form. With `resize`, grey and RGB become each other, transparency is dropped, the largest middle
    part of the right aspect ratio is taken and resized (bilinear, with antialiasing). Without, only what loses nothing
    is done: black and white is grey, and a palette is RGB."""
    if image.mode[0] in "IF":
        return Problem("has more than 8 bits per channel: convert it", corrupt=False)
    if image.mode in ("1", "P"):
        has_alpha = "transparency" in image.info
        image = image.convert("L" if image.mode == "1" else "RGBA" if has_alpha else "RGB")
    mode, size = MODES[form.channels], (form.width, form.height)
    if not form.resize and (image.mode != mode or image.size != size):
        own = f"{image.height}x{image.width} {WORDS.get(image.mode, image.mode)}"
        return Problem(f"is {own} (height x width), but {form} is wanted: change data.shape, or set --data.resize to "
                       f"make every image fit", corrupt=False)
    image = image if image.mode == mode else image.convert(mode)
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(form.height, form.width, form.channels)


def check_labels(split: Pixels | Encoded, indices: np.ndarray, labels: np.ndarray, classes: int) -> None:
    """UserError for the first of these images, `indices` with `labels`, whose label is no class."""
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise UserError(f"{split.name(int(indices[wrong[0]]))} has label {labels[wrong[0]]}, which is outside 0 to "
                        f"{classes - 1}.")


def in_threads(work: Callable[[T], R], items: list[T]) -> Iterator[R]:
    """`work` of each item, in order; on all cores as far as Python's lock allows, which decoding does not hold."""
    blocks = [items[i : i + BLOCK] for i in range(0, len(items), BLOCK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for results in pool.map(lambda block: [work(item) for item in block], blocks):
            yield from results


def decoded(split: Encoded, form: Form) -> np.ndarray:
    """All images of a split in memory, uint8 (n, H, W, C). UserError names up to three that cannot be used."""
    results = list(in_threads(lambda item: decode(item, form), split.read(np.arange(len(split)))[0]))
    bad = [(split.name(i), result) for i, result in enumerate(results) if isinstance(result, Problem)]
    complain([(name, p) for name, p in bad if not p.corrupt], [f"{n} ({p.text})" for n, p in bad], "")
    return np.stack(results)


def complain(misfits: list[tuple[str, Problem]], corrupt: list[str], advice: str) -> None:
    """UserError where there is anything to complain of: the first image of another form, or up to three corrupt ones.

    `misfits`: names and problems; `corrupt`: names with the reason; `advice`: what else could be done about the latter.
    """
    if misfits:
        name, problem = misfits[0]
        more = f" ({len(misfits) - 1} more)" if len(misfits) > 1 else ""
        raise UserError(f"{name} {problem.text}{more}.")
    if corrupt:
        these = "1 image is corrupt" if len(corrupt) == 1 else f"{len(corrupt)} images are corrupt"
        raise UserError(f"{these}: {', '.join(corrupt[:3])}{', ...' if len(corrupt) > 3 else ''}. Repair or delete "
                        f"{'it' if len(corrupt) == 1 else 'them'}{advice}.")


def reshaped(pixels: Pixels, form: Form) -> np.ndarray:
    """The images in this form; quick where they have it already."""
    if pixels.images.shape[1:] == (form.height, form.width, form.channels):
        return pixels.images
    if pixels.images.shape[3] not in MODES:
        raise UserError(f"{pixels.title} has images of {pixels.images.shape[3]} channels; 1 and 3 are known.")
    out = []
    for i, array in enumerate(pixels.images):
        result = fitted(Image.fromarray(array[..., 0] if array.shape[2] == 1 else array), form)
        if isinstance(result, Problem):
            raise UserError(f"{pixels.name(i)} {result.text}.")
        out.append(result)
    return np.stack(out)
