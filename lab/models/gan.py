"""A generator and a discriminator in one module, for small images (as in DCGAN, Radford et al. 2016).

Axis letters: B batch, H W C image, Z latent. Both networks have one stage per halving of the image:
28 -> 14 -> 7, 8 -> 4.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from lab.errors import UserError
from lab.models.convolution import convolution

GeneratorNorm = Literal["batchnorm", "groupnorm"]
SLOPE = 0.2  # of the leaky rectifier, as in DCGAN
INIT = nn.initializers.normal(0.02)  # as in DCGAN; it also slows the norm-free discriminator's start
SMALLEST = 4  # minimum side of a feature map
conv = functools.partial(nn.Conv, kernel_init=INIT, conv_general_dilated=convolution)


def stages(height: int, width: int) -> int:
    """Number of times an image can be halved while both sides are even and the halves at least 4."""
    n = 0
    while height % 2 == width % 2 == 0 and min(height, width) >= 2 * SMALLEST:
        height, width, n = height // 2, width // 2, n + 1
    return n


def pixel_shuffle(x_BHWC: Array) -> Array:
    """(B, H, W, 4 C) -> (B, 2 H, 2 W, C): the 4 channel groups of a pixel become a 2x2 square (Shi et al. 2016)."""
    return rearrange(x_BHWC, "B H W (y x C) -> B (H y) (W x) C", y=2, x=2)


class Generator(nn.Module):
    """Latents (B, Z) -> images (B, H, W, C) in [-1, 1]."""

    width: int
    shape: tuple[int, int, int]
    norm: GeneratorNorm

    @nn.compact
    def __call__(self, z_BZ: Array, train: bool) -> Array:
        H, W, C = self.shape
        n = stages(H, W)
        channels = self.width * 2 ** (n - 1)
        h, w = H >> n, W >> n
        x = nn.Dense(h * w * channels, use_bias=False, kernel_init=INIT, name="latent")(z_BZ)
        x = nn.relu(self._normalise(x.reshape(-1, h, w, channels), train, "latent_norm"))
        for i in reversed(range(n)):
            # A transposed convolution's weight gradient is 10 times slower in XLA on a CPU.
            x = conv(4 * (self.width * 2**i // 2), (3, 3), use_bias=False, name=f"up_{i}")(x)
            x = nn.relu(self._normalise(pixel_shuffle(x), train, f"up_{i}_norm"))
        return nn.tanh(conv(C, (3, 3), name="out")(x))  # smooths the seams between the squares

    def _normalise(self, x: Array, train: bool, name: str) -> Array:
        if self.norm == "batchnorm":
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)(x)
        return nn.GroupNorm(num_groups=math.gcd(8, x.shape[-1]), epsilon=1e-5, name=name)(x)


class Discriminator(nn.Module):
    """Images (B, H, W, C) -> float32 logits (B,), above 0 for "real".

    Strided convolutions without a norm. With batch statistics, the output for one image would depend on the rest of the
    batch, and the statistics alone could tell a batch of fakes from a batch of real images.
    """

    width: int

    @nn.compact
    def __call__(self, x_BHWC: Array, train: bool) -> Array:
        x = x_BHWC
        for i in range(stages(*x.shape[1:3])):
            x = conv(self.width * 2**i, (4, 4), strides=2, name=f"down_{i}")(x)
            x = nn.leaky_relu(x, SLOPE)
        x = x.reshape(x.shape[0], -1).astype(jnp.float32)
        return nn.Dense(1, kernel_init=INIT, name="head")(x)[:, 0]


class GAN(nn.Module):
    """Generator and discriminator as the submodules "generator" and "discriminator", which begin the parameter paths.

    Two learning rates: ``optim=Adam(..., lr_multipliers=(("^generator/", 1.0), ("^discriminator/", 0.5)))``.
    """

    latent: int = 64
    """Size of the latent vector, drawn from a standard normal distribution."""
    width: int = 32
    """Channels of both networks at half the image size; each further halving doubles them."""
    shape: tuple[int, int, int] = (28, 28, 1)
    """Height, width and channels of an image."""
    norm: GeneratorNorm = "batchnorm"
    """Normalisation in the generator; the discriminator has none."""

    def setup(self) -> None:
        self.generator = Generator(self.width, self.shape, self.norm)
        self.discriminator = Discriminator(self.width)

    def generate(self, z_BZ: Array, train: bool) -> Array:
        """Latents (B, Z) -> images (B, H, W, C) in [-1, 1]."""
        return self.generator(z_BZ, train)

    def discriminate(self, x_BHWC: Array, train: bool) -> Array:
        """Images (B, H, W, C) with values in [-1, 1] -> float32 logits (B,), above 0 for "real"."""
        return self.discriminator(x_BHWC, train)

    def __call__(self, inputs: Array, *, train: bool, mask: Array | None = None) -> tuple[Array, Array]:
        """Images of zero latents, and the logits of `inputs` (B, H, W, C); uses all parameters, for initialisation."""
        z_BZ = jnp.zeros((inputs.shape[0], self.latent))
        return self.generate(z_BZ, train), self.discriminate(inputs, train)

    def validate(self) -> None:
        """Raises UserError for a field out of range."""
        for name, least in (("latent", 1), ("width", 2)):
            if getattr(self, name) < least:
                raise UserError(f"--model.{name} must be at least {least}, not {getattr(self, name)}.")
        if len(self.shape) != 3 or self.shape[2] not in (1, 3) or stages(*self.shape[:2]) == 0:
            raise UserError(f"--model.shape must be height, width (even, {2 * SMALLEST} or more) and 1 or 3 channels, "
                            f"not {self.shape}.")

    def check(self, metadata: Mapping[str, int]) -> None:
        """Raises UserError if the data's images do not have shape `shape`."""
        found = tuple(metadata.get(name, own) for name, own in zip(("height", "width", "channels"), self.shape,
                                                               strict=True))
        if found != tuple(self.shape):
            raise UserError(f"The images are {' x '.join(map(str, found))} (height, width, channels): "
                            f"use --model.shape {' '.join(map(str, found))}, not {' '.join(map(str, self.shape))}.")
