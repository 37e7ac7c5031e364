"""Augmentation of a whole batch of images inside the compiled step, in pure JAX.

A record's random numbers come from its own key, so its augmentation depends only on (seed, step, record), not on its
position in the batch, the batch size or the number of devices. Only mixup and cutmix use a second record, the next one
of the global batch. Switching one operation on or off does not change the random numbers of the rest.

Axis letters: B batch, H W C output image, h w input image (larger if `Images.border` is set).
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lab.errors import UserError

if TYPE_CHECKING:
    from jax import Array

# Each has its own four numbers per record. Append only: the index in this list is part of the random key.
OPERATIONS = ("crop", "flip", "resized_crop", "rotate", "shift", "zoom", "cutout", "mixup", "cutmix", "mixup_or_cutmix")


@dataclass(frozen=True)
class Augment:
    """Random augmentation of training images. All operations are off by default and then cost nothing.

    Order: crop; one bilinear resampling for resized_crop, zoom, shift and rotate together (with edge padding); flip;
    then, on normalised pixels, cutout and mixup or cutmix.
    """

    crop: int = 0
    """Pad each side by this many pixels and take a random crop of the model's size (4 is usual for CIFAR)."""
    padding: Literal["zero", "reflect"] = "zero"
    """Padding of `crop`: black, or the image mirrored at its edge."""
    flip: bool = False
    """Mirror left and right with probability 1/2."""
    rotate: float = 0.0
    """Rotate about the middle by up to this many degrees either way."""
    shift: float = 0.0
    """Move by up to this fraction of height and width."""
    zoom: float = 0.0
    """Enlarge or shrink by a factor in [1 - zoom, 1 + zoom]."""
    resized_crop: float = 0.0
    """Crop a random part of at least this fraction of the image's area, aspect ratio 3/4 to 4/3; 0: off, 0.08 is usual
    (Szegedy et al., "Going Deeper with Convolutions", CVPR 2015). A crop too long for the image is cut, not redrawn."""
    cutout: int = 0
    """Side of a square, centred on any pixel, that is set to the mean colour (DeVries & Taylor, arXiv:1708.04552)."""
    mixup: float = 0.0
    """Blend with the next record of the batch, weight ~ Beta(mixup, mixup) (Zhang et al., "mixup", ICLR 2018)."""
    cutmix: float = 0.0
    """Paste a box of the next record, area ~ Beta(cutmix, cutmix) (Yun et al., "CutMix", ICCV 2019). With mixup as
    well, each record gets one of the two with probability 1/2."""

    @property
    def mixes(self) -> bool:
        """Whether training targets become soft labels."""
        return self.mixup > 0 or self.cutmix > 0

    def validate(self, height: int, width: int) -> None:
        """UserError for a value that is invalid for images of height x width."""
        side = min(height, width)
        for name, value, low, high in (
            ("crop", self.crop, 0, side - 1), ("cutout", self.cutout, 0, 2 * max(height, width)),
            ("rotate", self.rotate, 0, 180), ("shift", self.shift, 0, 1), ("zoom", self.zoom, 0, 0.99),
            ("resized_crop", self.resized_crop, 0, 1), ("mixup", self.mixup, 0, 100), ("cutmix", self.cutmix, 0, 100),
        ):
            if not low <= value <= high:
                raise UserError(f"--data.augment.{name.replace('_', '-')} must be in [{low}, {high}], not {value}.")
        if self.crop and self.resized_crop:
            raise UserError("--data.augment.crop and --data.augment.resized-crop are two ways to crop: set one to 0.")

    def move(self, images: Array, numbers: dict[str, Array], size: tuple[int, int]) -> Array:
        """The geometric operations: (B, h, w, C) of any type -> (B, H, W, C), size = (H, W).

        `numbers`: from `draw`. Resampling returns float32; otherwise the type is kept.
        """
        import jax.numpy as jnp

        if self.crop:
            pad = (self.crop, self.crop)
            mode = "constant" if self.padding == "zero" else "reflect"
            images = jnp.pad(images, ((0, 0), pad, pad, (0, 0)), mode=mode)
            room = jnp.array([images.shape[1] - size[0], images.shape[2] - size[1]])
            images = window(images, jnp.floor(numbers["crop"][:, :2] * (room + 1)).astype(jnp.int32), size)
        if self.rotate or self.shift or self.zoom or self.resized_crop:
            return self._resampled(images, numbers, size)
        images = middle(images, size)
        if self.flip:
            images = jnp.where(numbers["flip"][:, 0, None, None, None] < 0.5, images[:, :, ::-1], images)
        return images

    def _resampled(self, images: Array, numbers: dict[str, Array], size: tuple[int, int]) -> Array:
        import jax.numpy as jnp

        whole, out = jnp.array(images.shape[1:3], jnp.float32), jnp.array(size, jnp.float32)
        scale = jnp.ones((len(images), 2))  # pixels of the input per pixel of the output
        centre = jnp.broadcast_to((whole - 1) / 2, scale.shape)
        if self.resized_crop:
            u = numbers["resized_crop"]
            area = self.resized_crop + (1 - self.resized_crop) * u[:, 0]
            aspect = jnp.exp((2 * u[:, 1] - 1) * math.log(4 / 3))  # width / height, relative to the image's own
            part = whole * jnp.minimum(jnp.sqrt(jnp.stack([area / aspect, area * aspect], 1)), 1)
            scale, centre = part / out, (whole - part) * u[:, 2:] + (part - 1) / 2
        if self.zoom:
            scale = scale / (1 + self.zoom * (2 * numbers["zoom"][:, :1] - 1))
        if self.shift:
            centre = centre + self.shift * out * (2 * numbers["shift"][:, :2] - 1)
        if self.flip:  # the result is mirrored
            mirror = jnp.where(numbers["flip"][:, :1] < 0.5, -1.0, 1.0)
            scale = scale * jnp.concatenate([jnp.ones_like(mirror), mirror], 1)
        angle = math.radians(self.rotate) * (2 * numbers["rotate"][:, 0] - 1) if self.rotate else None
        return resample(images, centre, scale, angle, size)

    def mix(self, images: Array, targets: Array, numbers: dict[str, Array], classes: int | None) -> tuple[Array, Array]:
        """Cutout, mixup and cutmix on normalised images (B, H, W, C); mixed targets are soft, (B, classes)."""
        import jax
        import jax.numpy as jnp

        rows, columns = (jnp.arange(n, dtype=jnp.float32)[None] for n in images.shape[1:3])
        extent = jnp.array(images.shape[1:3], jnp.float32)
        if self.cutout:
            first = jnp.floor(numbers["cutout"][:, :2] * extent) - self.cutout // 2
            inside = _box(rows, columns, first, first + self.cutout)
            images = jnp.where(inside, 0, images)
        if not self.mixes:
            return images, targets
        keep = 0.0  # weight of the record's own pixels (B, H or 1, W or 1, 1)
        if self.mixup:
            keep = symmetric_beta(numbers["mixup"], self.mixup)[:, None, None, None]
        if self.cutmix:
            u = numbers["cutmix"]
            half = extent * jnp.sqrt(1 - symmetric_beta(u[:, :2], self.cutmix))[:, None] / 2
            centre = extent * u[:, 2:] - 0.5
            paste = 1.0 - _box(rows, columns, centre - half, centre + half)
            blend = numbers["mixup_or_cutmix"][:, 0, None, None, None] < 0.5
            keep = jnp.where(blend, keep, paste) if self.mixup else paste
        labels = jax.nn.one_hot(targets, classes)
        share = jnp.broadcast_to(keep, (*images.shape[:3], 1)).mean((1, 2))
        return (keep * images + (1 - keep) * jnp.roll(images, -1, 0),
                share * labels + (1 - share) * jnp.roll(labels, -1, 0))


# ---------------------------------------------------------------------------------------------------- the parts


def draw(keys: Array) -> dict[str, Array]:
    """Uniform numbers in [0, 1) for each operation, float32 (B, 4), from one key per record (B,)."""
    import jax

    # One call: each call of the generator costs 0.5 s of compile time on a CPU.
    def record(key: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, zlib.crc32(b"augment")), (len(OPERATIONS), 4))

    numbers = jax.vmap(record)(keys)
    return {name: numbers[:, i] for i, name in enumerate(OPERATIONS)}


def window(images: Array, corner: Array, size: tuple[int, int]) -> Array:
    """Crops each image (B, h, w, C) at first row and column `corner`, int32 (B, 2): (B, *size, C)."""
    import jax

    def one(image: Array, at: Array) -> Array:
        return jax.lax.dynamic_slice(image, (at[0], at[1], 0), (*size, image.shape[2]))

    return jax.vmap(one)(images, corner)


def middle(images: Array, size: tuple[int, int]) -> Array:
    """Centre crop: (B, h, w, C) -> (B, *size, C)."""
    top, left = (images.shape[1] - size[0]) // 2, (images.shape[2] - size[1]) // 2
    return images[:, top : top + size[0], left : left + size[1]]


def resample(images: Array, centre: Array, scale: Array, angle: Array | None, size: tuple[int, int]) -> Array:
    """Bilinear: the output pixel at offset d from the middle samples the input at centre + rotation(angle) (scale * d).

    images (B, h, w, C); centre, scale (B, 2), rows before columns, in pixels; angle (B,), radians counter-clockwise, or
    None; result float32 (B, *size, C). Samples beyond the edge take the nearest edge pixel.
    """
    import jax
    import jax.numpy as jnp

    last = jnp.array(images.shape[1:3], jnp.float32) - 1
    images = images.astype(jnp.float32)
    rows, columns = ((jnp.arange(n) - (n - 1) / 2)[None] * scale[:, i, None] for i, n in enumerate(size))
    if angle is None:  # separable: two matmuls, fast on every accelerator
        sides = []
        for i, offsets in enumerate((rows, columns)):
            places = jnp.clip(centre[:, i, None] + offsets, 0, last[i])[..., None]
            sides.append(jnp.maximum(0, 1 - jnp.abs(places - jnp.arange(images.shape[1 + i]))))
        images = jnp.einsum("bHh,bhwc->bHwc", sides[0], images, precision="highest")
        return jnp.einsum("bWw,bHwc->bHWc", sides[1], images, precision="highest")

    def one(image: Array, centre: Array, dy: Array, dx: Array, angle: Array) -> Array:
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        y = jnp.clip(centre[0] + cos * dy[:, None] + sin * dx, 0, last[0])
        x = jnp.clip(centre[1] - sin * dy[:, None] + cos * dx, 0, last[1])
        top, left = jnp.minimum(jnp.floor(y), last[0] - 1), jnp.minimum(jnp.floor(x), last[1] - 1)
        below, right = (y - top)[..., None], (x - left)[..., None]
        i, j = top.astype(jnp.int32), left.astype(jnp.int32)

        def pixel(down: int, along: int) -> Array:
            return image.at[i + down, j + along].get(mode="promise_in_bounds")

        upper = pixel(0, 0) * (1 - right) + pixel(0, 1) * right
        lower = pixel(1, 0) * (1 - right) + pixel(1, 1) * right
        return upper * (1 - below) + lower * below

    return jax.vmap(one)(images, centre, rows, columns, angle)


def symmetric_beta(numbers: Array, alpha: float) -> Array:
    """Beta(alpha, alpha) from two uniform numbers each, (B, 2 or more) -> (B,); for every alpha > 0.

    L. Devroye, "Random variate generation in one line of code" (WSC 1996), from Bailey's generator of Student's t. No
    rejection loop: `jax.random.beta` took 3.5 to 5.7 s to compile on a CPU.
    """
    import jax.numpy as jnp

    turn = jnp.cos(2 * jnp.pi * numbers[:, 1])
    odds = jnp.expm1(-jnp.log(numbers[:, 0]) / alpha) * turn**2
    return 0.5 + 0.5 * jnp.sign(turn) / jnp.sqrt(1 + 1 / odds)


def _box(rows: Array, columns: Array, first: Array, end: Array) -> Array:
    """bool (B, H, W, 1): rows and columns (1, H) and (1, W) in [first, end), each (B, 2)."""
    vertical = (rows >= first[:, :1]) & (rows < end[:, :1])
    horizontal = (columns >= first[:, 1:]) & (columns < end[:, 1:])
    return (vertical[:, :, None] & horizontal[:, None, :])[..., None]
