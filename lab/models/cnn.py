"""Convolutional networks for images: a small ConvNet, and ResNet-18, 34 and 50.

BatchNorm's running statistics are float32 in the collection "batch_stats". A training step computes its statistics over
the (micro)batch of all devices, because the compiled step sees the batch as one array.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lab.errors import UserError
from lab.models.convolution import convolution
from lab.models.depthwise import depthwise as by_channel
from lab.models.dropout import dropout
from lab.models.layers import Dense
from lab.models.linear import check_classes, check_rates, check_sizes, output

Norm = Literal["batch", "group"]
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


def conv(features: int, size: int, *, stride: int = 1, bias: bool = False, depthwise: bool = False,
         name: str) -> nn.Conv:
    """`size` x `size` convolution of (B, H, W, C), padded by size // 2 on all sides, with He fan-out weights.

    The padding is explicit: with stride 2, "SAME" pads even sizes on one side only, unlike every published ResNet.
    `depthwise`: each of the `features` channels is convolved alone; kernel (size, size, 1, features).
    """
    # Flax would count the outputs of all channels; a channel's own fan-out is its fan-in.
    he = nn.initializers.variance_scaling(2.0, "fan_in" if depthwise else "fan_out", "normal")
    return nn.Conv(features, (size, size), strides=stride, padding=size // 2, use_bias=bias, kernel_init=he,
                   feature_group_count=features if depthwise else 1,
                   conv_general_dilated=by_channel if depthwise else convolution, name=name)


def image_norm(kind: Norm, channels: int, train: bool, *, zero: bool = False, name: str) -> nn.Module:
    """BatchNorm (Ioffe & Szegedy 2015; momentum 0.9) or GroupNorm (Wu & He 2018; 32 groups, or as many as divide the
    channels), statistics in float32, epsilon 1e-5. `zero`: the scale starts at 0.
    """
    scale = nn.initializers.zeros if zero else nn.initializers.ones
    if kind == "batch":
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, scale_init=scale, name=name)
    return nn.GroupNorm(num_groups=math.gcd(32, channels), epsilon=1e-5, scale_init=scale, name=name)


def max_pool(x_BHWC: Array, window: int, padding: int = 0) -> Array:
    """`window` x `window` maxima with stride 2; incomplete windows at the right and bottom are dropped.

    Same result as `nn.max_pool`, whose gradient is 20 times slower in XLA on a CPU.
    """
    for axis in (1, 2):
        pad = [(padding * (i == axis),) * 2 for i in range(4)]
        x_BHWC = jnp.pad(x_BHWC, pad, constant_values=-jnp.inf) if padding else x_BHWC
        last = (x_BHWC.shape[axis] - window) // 2 * 2 + 1
        x_BHWC = functools.reduce(jnp.maximum, [jax.lax.slice_in_dim(x_BHWC, i, i + last, 2, axis)
                                                for i in range(window)])
    return x_BHWC


class ConvNet(nn.Module):
    """Stages of 3x3 convolutions, each ending in 2x2 max pooling, then a hidden dense layer and the class logits.

    Images (B, H, W, C) -> float32 logits (B, classes). The defaults take 8 million multiply-adds for a 28x28 image,
    because the image is halved before the wide convolutions.
    """

    classes: int = 10
    """Number of classes."""
    channels: tuple[int, ...] = (32, 64, 128)
    """Channels of the convolutions, stage by stage."""
    convs: tuple[int, ...] = (1, 1, 1)
    """Number of convolutions, stage by stage."""
    batch_norm: bool = True
    """BatchNorm after every convolution; the convolutions then have no bias."""
    dense: int | None = 256
    """Units of the hidden dense layer; None: no such layer."""
    dropout: float = 0.1
    """Dropout rate after every pooling."""
    dense_dropout: float = 0.3
    """Dropout rate after the hidden dense layer."""
    activation: Literal["relu", "tanh"] = "relu"
    """tanh bounds the activations, so that private training clips less (Papernot et al. 2021, tempered sigmoids)."""

    def validate(self) -> None:
        """Raises UserError if fields are out of range or contradict each other."""
        check_sizes(classes=self.classes, dense=self.dense)
        check_rates(dropout=self.dropout, dense_dropout=self.dense_dropout)
        if not self.channels or len(self.channels) != len(self.convs):
            raise UserError(f"--model.channels {self.channels} and --model.convs {self.convs} must have one number "
                            f"for each stage.")
        if min(self.channels + self.convs) < 1:
            raise UserError("--model.channels and --model.convs must be at least 1 in every stage.")

    def check(self, metadata: Mapping[str, int]) -> None:
        """Raises UserError if data with this metadata (classes, height, width) does not fit the model."""
        check_classes(self.classes, metadata)
        least = 2 ** len(self.channels)
        for side in ("height", "width"):
            if metadata.get(side, least) < least:
                raise UserError(f"{len(self.channels)} stages halve the image as often, and its {side} is only "
                                f"{metadata[side]}. Give fewer --model.channels and --model.convs.")

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        x, activate = images, nn.relu if self.activation == "relu" else nn.tanh
        for i, (channels, convs) in enumerate(zip(self.channels, self.convs, strict=True)):
            for j in range(convs):
                x = conv(channels, 3, bias=not self.batch_norm, name=f"conv_{i}_{j}")(x)
                if self.batch_norm:
                    x = image_norm("batch", channels, train, name=f"norm_{i}_{j}")(x)
                x = activate(x)
            x = dropout(self, max_pool(x, 2), self.dropout, train)
        x = x.reshape(x.shape[0], -1)
        if self.dense is not None:
            x = activate(Dense(self.dense, bias=True, stddev=(2 / x.shape[1]) ** 0.5, name="dense")(x))
            x = dropout(self, x, self.dense_dropout, train)
        return output(x, self.classes)


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + f(x)): f is two 3x3 convolutions, or 1x1, 3x3 and 1x1 with 4 times the channels (bottleneck).

    (B, H, W, C) -> (B, H / stride, W / stride, channels x (4 if bottleneck else 1)). The (first) 3x3 convolution
    has the stride (ResNet v1.5). The shortcut is the identity if the shapes are equal, else a projection.
    """

    channels: int
    stride: int
    bottleneck: bool
    norm: Norm
    zero_init: bool

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        layers = ((1, 1, 1), (3, self.stride, 1), (1, 1, 4)) if self.bottleneck else ((3, self.stride, 1), (3, 1, 1))
        normed: Callable[..., nn.Module] = functools.partial(image_norm, self.norm, train=train)
        h = x
        for i, (size, stride, multiple) in enumerate(layers, 1):
            channels, last = self.channels * multiple, i == len(layers)
            h = conv(channels, size, stride=stride, name=f"conv{i}")(h)
            h = normed(channels, zero=last and self.zero_init, name=f"norm{i}")(h)
            h = h if last else nn.relu(h)
        if x.shape != h.shape:
            x = conv(channels, 1, stride=self.stride, name="shortcut")(x)
            x = normed(channels, name="shortcut_norm")(x)
        return nn.relu(x + h)


class ResNet(nn.Module):
    """ResNet version 1.5 (He et al. 2016): images (B, H, W, C) -> float32 logits (B, classes)."""

    depth: Literal[18, 34, 50] = 50
    """Number of weight layers: 18 and 34 use basic blocks, 50 bottleneck blocks."""
    classes: int = 1000
    """Number of classes."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers. imagenet: 7x7 convolution and max pooling, downsampling by 4; cifar: one 3x3 convolution."""
    norm: Norm = "batch"
    """Normalisation after every convolution; group is independent of the other records in the batch."""
    width: int = 64
    """Channels of the first stage; each of the next three stages doubles them."""
    zero_init: bool = True
    """Initialise the scale of each block's last norm to 0, so the block starts as its shortcut (Goyal et al. 2017)."""

    def validate(self) -> None:
        """Raises UserError for a field out of range."""
        check_sizes(classes=self.classes, width=self.width)

    def check(self, metadata: Mapping[str, int]) -> None:
        """Raises UserError if data with this metadata (classes) does not fit the model."""
        check_classes(self.classes, metadata)

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = conv(self.width, size, stride=stride, name="stem")(images)
        x = nn.relu(image_norm(self.norm, self.width, train, name="stem_norm")(x))
        if self.stem == "imagenet":
            x = max_pool(x, 3, padding=1)
        for i, blocks in enumerate(BLOCKS[self.depth]):
            for j in range(blocks):
                block = ResidualBlock(channels=self.width * 2**i, stride=2 if i > 0 and j == 0 else 1,
                                      bottleneck=self.depth == 50, norm=self.norm, zero_init=self.zero_init,
                                      name=f"stage{i + 1}_block{j + 1}")
                x = block(x, train)
        return output(x.mean((1, 2), dtype=jnp.float32), self.classes)
