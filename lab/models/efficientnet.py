"""EfficientNet (Tan & Le 2019): inverted bottlenecks with depthwise convolutions and squeeze-excitation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lab.errors import UserError
from lab.models.cnn import Norm, conv, image_norm
from lab.models.dropout import dropout
from lab.models.layers import Dense
from lab.models.linear import check_classes, check_rates, check_sizes, output
from lab.models.precision import elementwise

Stage = tuple[int, int, int, int, int]
"""Expansion, side of the depthwise kernel, stride, channels and blocks, at width 1 and depth 1."""
STAGES: tuple[Stage, ...] = (
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1))
"""Those of the paper, table 1."""
SIZES = {"b0": {"width_multiple": 1.0, "depth_multiple": 1.0, "dropout": 0.2},
         "b1": {"width_multiple": 1.0, "depth_multiple": 1.1, "dropout": 0.2},
         "b2": {"width_multiple": 1.1, "depth_multiple": 1.2, "dropout": 0.3},
         "b3": {"width_multiple": 1.2, "depth_multiple": 1.4, "dropout": 0.3}}
"""Fields of the published models, which were trained on images of side 224, 240, 260 and 300."""


def rounded(channels: float) -> int:
    """The nearest multiple of 8, at least 8, or the next one where the nearest loses more than 10 % of the channels.

    As in the paper's code and in torchvision.
    """
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


class MBConv(nn.Module):
    """Inverted bottleneck (Sandler et al. 2018) with squeeze-excitation (Hu et al. 2018).

    (B, H, W, C) -> (B, H / stride, W / stride, channels): 1x1 convolution to expansion x C channels (none if expansion
    is 1), depthwise convolution, squeeze-excitation, 1x1 convolution without activation. The input is added where the
    shapes are equal.
    """

    channels: int
    expansion: int
    size: int
    stride: int
    squeezed: int
    """Width of the squeeze-excitation; 0: none."""
    drop: float
    """Probability that a record skips the block in training."""
    norm: Norm

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        h, wide = x, x.shape[-1] * self.expansion
        if self.expansion > 1:
            h = conv(wide, 1, name="expand")(h)
            h = elementwise(nn.silu, image_norm(self.norm, wide, train, name="expand_norm")(h))
        h = conv(wide, self.size, stride=self.stride, depthwise=True, name="depthwise")(h)
        h = elementwise(nn.silu, image_norm(self.norm, wide, train, name="depthwise_norm")(h))
        if self.squeezed:
            h = self.recalibrated(h)
        h = conv(self.channels, 1, name="project")(h)
        h = image_norm(self.norm, self.channels, train, name="project_norm")(h)
        if self.stride > 1 or x.shape[-1] != self.channels:
            return h
        kept_B111 = dropout(self, jnp.ones((h.shape[0], 1, 1, 1), h.dtype), self.drop, train)  # 0 or 1 / (1 - drop)
        return x + h * kept_B111

    def recalibrated(self, h_BHWC: Array) -> Array:
        """Each channel times a factor in (0, 1), which follows from the means of all channels over the image."""
        mean_BC = h_BHWC.mean((1, 2), dtype=jnp.float32).astype(h_BHWC.dtype)
        wide = h_BHWC.shape[-1]
        squeeze, excite = (Dense(features, bias=True, stddev=(2 / features) ** 0.5, name=name)  # He fan-out
                           for features, name in ((self.squeezed, "squeeze"), (wide, "excite")))
        gate_BC = elementwise(nn.sigmoid, excite(elementwise(nn.silu, squeeze(mean_BC))))
        return h_BHWC * gate_BC[:, None, None]


class EfficientNet(nn.Module):
    """EfficientNet: images (B, H, W, C) -> float32 logits (B, classes). The defaults are B0; B1 to B3 are in `SIZES`.

    Torchvision's architecture: symmetric padding, BatchNorm with epsilon 1e-5 and momentum 0.9. The paper's code has
    "SAME" padding, 1e-3 and 0.99.
    """

    width_multiple: float = 1.0
    """Channels as a multiple of B0's, rounded to multiples of 8."""
    depth_multiple: float = 1.0
    """Blocks of each stage as a multiple of B0's, rounded up."""
    classes: int = 1000
    """Number of classes."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First convolution. imagenet: with stride 2, downsampling by 32 in all; cifar: with stride 1, so by 16."""
    norm: Norm = "batch"
    """Normalisation after every convolution; group is independent of the other records in the batch."""
    squeeze_ratio: float = 0.25
    """Width of a block's squeeze-excitation as a fraction of its input channels; 0: none."""
    dropout: float = 0.2
    """Dropout rate before the output layer."""
    stochastic_depth: float = 0.2
    """Probability that a record skips a block in training (Huang et al. 2016): 0 at the first block, linear to this
    rate after the last."""
    stages: tuple[Stage, ...] = STAGES
    """The stages of blocks between the first convolution and the last."""

    def validate(self) -> None:
        """Raises UserError for a field out of range."""
        check_sizes(classes=self.classes)
        check_rates(dropout=self.dropout, stochastic_depth=self.stochastic_depth)
        if not self.stages or min(map(min, self.stages)) < 1:
            raise UserError("--model.stages must have one stage or more, of numbers from 1.")
        for name in ("width_multiple", "depth_multiple"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--model.{name.replace('_', '-')} must be above 0, not {getattr(self, name)}.")
        if not 0 <= self.squeeze_ratio <= 1:
            raise UserError(f"--model.squeeze-ratio must be in [0, 1], not {self.squeeze_ratio}.")

    def check(self, metadata: Mapping[str, int]) -> None:
        """Raises UserError if data with this metadata (classes) does not fit the model."""
        check_classes(self.classes, metadata)

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        def convolved(x: Array, features: int, size: int, stride: int, name: str) -> Array:
            x = conv(features, size, stride=stride, name=name)(x)
            return elementwise(nn.silu, image_norm(self.norm, features, train, name=f"{name}_norm")(x))

        x = convolved(images, rounded(32 * self.width_multiple), 3, 1 if self.stem == "cifar" else 2, "stem")
        blocks = [math.ceil(stage[-1] * self.depth_multiple) for stage in self.stages]
        for i, (expansion, size, stride, channels, _) in enumerate(self.stages):
            for j in range(blocks[i]):
                block = MBConv(channels=rounded(channels * self.width_multiple), expansion=expansion, size=size,
                               stride=1 if j else stride,
                               squeezed=math.ceil(x.shape[-1] * self.squeeze_ratio),
                               drop=self.stochastic_depth * (sum(blocks[:i]) + j) / sum(blocks), norm=self.norm,
                               name=f"stage{i + 1}_block{j + 1}")
                x = block(x, train)
        x = convolved(x, 4 * x.shape[-1], 1, 1, "last")
        return output(dropout(self, x.mean((1, 2), dtype=jnp.float32), self.dropout, train), self.classes)
