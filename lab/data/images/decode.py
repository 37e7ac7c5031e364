"""Decodes PNG and JPEG to arrays of a given form, and reports images that cannot be used."""

import io
import os
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lab.data import log
from lab.data.images.sources import Encoded, Pixels
from lab.errors import UserError

warnings.filterwarnings("ignore", module=r"PIL\.")  # damaged EXIF is ignored

T, R = TypeVar("T"), TypeVar("R")
BLOCK = 32  # images per thread task: decoding one small image is faster than submitting it
MODES = {1: "L", 3: "RGB"}
WORDS = {"L": "grey", "RGB": "RGB"}
ORIENTATION = 0x0112  # EXIF: 1 is upright, 2 to 8 are turned or mirrored
ALPHA = "transparency left out"
# Pillow modes to convert to grey or RGB, with the note to report.
SIMPLER = {"1": ("L", ""), "P": ("RGB", "palette made RGB"), "RGBA": ("RGB", ALPHA), "RGBa": ("RGB", ALPHA),
           "PA": ("RGB", ALPHA), "LA": ("L", ALPHA), "La": ("L", ALPHA), "CMYK": ("RGB", "CMYK made RGB"),
           "YCbCr": ("RGB", "YCbCr made RGB"), "LAB": ("RGB", "LAB made RGB"), "HSV": ("RGB", "HSV made RGB")}
DEEP, TURNED = "16 bits a channel made 8", "turned upright by their EXIF orientation"
# Exceptions that Pillow raises for damaged PNG and JPEG files.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error,
           Image.DecompressionBombError)


@dataclass(frozen=True)
class Form:
    """The required form of stored images (with `resize`: the target): height x width, 1 (grey) or 3 (RGB) channels."""

    height: int
    width: int
    channels: int
    resize: bool = False

    def __str__(self) -> str:
        return f"{self.height}x{self.width} {WORDS[MODES[self.channels]]}"


@dataclass(frozen=True)
class Problem:
    """Why an image cannot be used. `corrupt`: it cannot be decoded; otherwise it has the wrong form."""

    text: str
    corrupt: bool


@dataclass(frozen=True)
class Decoded:
    """A decoded image. `pixels`: uint8 (H, W, C); `changes`: conversions to report."""

    pixels: np.ndarray
    changes: tuple[str, ...] = ()


def decode(item: bytes | Path, form: Form) -> Decoded | Problem:
    """Decodes a PNG or JPEG file, or its bytes, to an upright image; returns a Problem if that fails."""
    raw = read_bytes(item)
    try:
        with Image.open(io.BytesIO(raw), formats=("PNG", "JPEG")) as image:
            image.load()
            result = fitted(image, form)
    except DAMAGED as error:
        why = "no PNG or JPEG" if isinstance(error, UnidentifiedImageError) else str(error)
        return Problem(why if raw else "empty file", corrupt=True)
    deep = raw[:8] == b"\x89PNG\r\n\x1a\n" and raw[24] == 16  # Pillow silently keeps the high bytes
    if isinstance(result, Decoded) and deep and DEEP not in result.changes:
        return replace(result, changes=(*result.changes, DEEP))
    return result


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if missing or damaged."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except DAMAGED:
        return 1
    return found if found in range(1, 9) else 1


def read_bytes(item: bytes | Path) -> bytes:
    """The bytes, or the content of the file. UserError if it cannot be read."""
    try:
        return item if isinstance(item, bytes) else item.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read {item}: {error.strerror or error}.") from None


def fitted(image: Image.Image, form: Form) -> Decoded | Problem:
    """Converts an image to this form: upright, 8 bits per channel, no transparency. `resize` also converts between
    grey and RGB, and resizes the largest centre crop of the right aspect ratio (bilinear, antialiased)."""
    changes = []
    if (turn := orientation(image)) != 1:
        image = _upright(image, turn)
        changes.append(TURNED)
    if image.mode[0] in "IF":  # 16-bit grey: several Pillow modes, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        changes.append(DEEP)
    elif image.mode in SIMPLER:
        simpler, change = SIMPLER[image.mode]
        if image.mode == "P" and "transparency" in image.info:
            image, change = image.convert("RGBA"), ALPHA
        image = image.convert(simpler)
        changes += [change] if change else []
    mode, size = MODES[form.channels], (form.width, form.height)
    if not form.resize and (image.mode != mode or image.size != size):
        own = f"{image.height}x{image.width} {WORDS.get(image.mode, image.mode)}"
        return Problem(f"is {own} (height x width), but {form} is wanted: convert it, or train with another "
                       f"data.shape, or with --data.resize, which makes every image fit", corrupt=False)
    image = image if image.mode == mode else image.convert(mode)
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    return Decoded(np.asarray(image).reshape(form.height, form.width, form.channels), tuple(changes))


def _upright(image: Image.Image, turn: int) -> Image.Image:
    """Applies the EXIF orientation `turn`, 2 to 8."""
    moves = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
             7: "TRANSVERSE", 8: "ROTATE_90"}
    info = image.info
    image = image.transpose(Image.Transpose[moves[turn]])
    image.info = {key: info[key] for key in ("transparency",) if key in info}
    return image


def check_labels(split: Pixels | Encoded, indices: np.ndarray, labels: np.ndarray, classes: int) -> None:
    """UserError for the first of the images `indices` whose label, in `labels`, is not a class."""
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise UserError(f"{split.name(int(indices[wrong[0]]))} has label {labels[wrong[0]]}, which is outside 0 to "
                        f"{classes - 1}.")


def in_threads(work: Callable[[T], R], items: list[T]) -> Iterator[R]:
    """`work(item)` for each item, in order, in one thread per core; decoding releases the GIL."""
    blocks = [items[i : i + BLOCK] for i in range(0, len(items), BLOCK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for results in pool.map(lambda block: [work(item) for item in block], blocks):
            yield from results


def decoded(split: Encoded, form: Form) -> np.ndarray:
    """All images of a split in memory, uint8 (n, H, W, C). UserError names up to three that cannot be used."""
    results = list(in_threads(lambda item: decode(item, form), split.read(np.arange(len(split)))[0]))
    bad = [(split.name(i), result) for i, result in enumerate(results) if isinstance(result, Problem)]
    complain([(name, p) for name, p in bad if not p.corrupt], [f"{n} ({p.text})" for n, p in bad], "")
    for change, n in sorted(Counter(change for result in results for change in result.changes).items()):
        log.warning("%d of the images: %s", n, change)
    return np.stack([result.pixels for result in results])


def complain(misfits: list[tuple[str, Problem]], corrupt: list[str], advice: str) -> None:
    """UserError if there are problems: names the first image of the wrong form, or up to three corrupt ones.

    `misfits`: names and problems; `corrupt`: names with the reason; `advice`: a further remedy for corrupt images.
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
    """The images in this form; fast if no conversion is needed."""
    if pixels.images.shape[1:] == (form.height, form.width, form.channels):
        return pixels.images
    if pixels.images.shape[3] not in MODES:
        raise UserError(f"{pixels.title} has images of {pixels.images.shape[3]} channels; 1 and 3 are known.")
    out = []
    for i, array in enumerate(pixels.images):
        result = fitted(Image.fromarray(array[..., 0] if array.shape[2] == 1 else array), form)
        if isinstance(result, Problem):
            raise UserError(f"{pixels.name(i)} {result.text}.")
        out.append(result.pixels)
    return np.stack(out)
