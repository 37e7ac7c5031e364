"""One convolutional trunk with several heads: the class, a coarse group of classes, and a reconstructed image."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lab.errors import UserError
from lab.models.cnn import conv, max_pool
from lab.models.convolution import convolution
from lab.models.dropout import dropout
from lab.models.linear import check_classes, check_rates, check_sizes


class ClassifyAndReconstruct(nn.Module):
    """A convolutional encoder and heads for class, group and image. For `lab.tasks.multitask.MultiTask`."""

    classes: int = 10
    """Classes of the output "class"."""
    groups: int = 0
    """Groups of the output "group"; 0: no such output."""
    reconstruct: bool = True
    """Add the output "image"."""
    channels: tuple[int, ...] = (32, 64)
    """Channels of each 3x3 convolution; each is followed by 2x2 pooling."""
    code: int = 128
    """Width of the code, the input of all heads."""
    dropout: float = 0.0
    """Dropout rate on the code, for the class and group heads."""

    def validate(self) -> None:
        """Raises UserError for a field out of range."""
        check_sizes(classes=self.classes, code=self.code)
        check_rates(dropout=self.dropout)
        if self.groups < 0:
            raise UserError(f"--model.groups must be 0 or more, not {self.groups}.")
        if not self.channels or min(self.channels) < 1:
            raise UserError("--model.channels must be one number or more, each at least 1.")

    def check(self, metadata: Mapping[str, int]) -> None:
        """Raises UserError if data with this metadata (classes, height, width) does not fit the model."""
        check_classes(self.classes, metadata)
        least = 2 ** len(self.channels)
        for side in ("height", "width"):
            if metadata.get(side, least) < least:
                raise UserError(f"{len(self.channels)} poolings halve the image as often, and its {side} is only "
                                f"{metadata[side]}. Give fewer --model.channels.")

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> dict[str, Array]:
        """Images (B, H, W, C) -> float32 "class" (B, classes), "group" (B, groups), "image" (B, H, W, C)."""
        x_BHWC = inputs
        sizes = []
        for i, width in enumerate(self.channels):
            sizes.append(x_BHWC.shape[1:3])
            x_BHWC = max_pool(nn.relu(conv(width, 3, bias=True, name=f"conv_{i}")(x_BHWC)), 2)
        code_BD = nn.relu(nn.Dense(self.code, name="code_layer")(x_BHWC.reshape(x_BHWC.shape[0], -1)))
        kept_BD = dropout(self, code_BD, self.dropout, train)
        outputs = {"class": nn.Dense(self.classes, dtype=jnp.float32, name="class_head")(kept_BD)}
        if self.groups:
            outputs["group"] = nn.Dense(self.groups, dtype=jnp.float32, name="group_head")(kept_BD)
        if self.reconstruct:
            outputs["image"] = self._image(code_BD, x_BHWC.shape, sizes, inputs.shape[-1])
        return outputs

    def _image(self, code_BD: Array, shape: tuple[int, ...], sizes: list[tuple[int, ...]], C: int) -> Array:
        """The decoder: nearest-neighbour upsampling to each of the trunk's `sizes`, then a convolution."""
        x_BHWC = nn.relu(nn.Dense(shape[1] * shape[2] * shape[3], name="decoder")(code_BD)).reshape(shape)
        for i in reversed(range(len(sizes))):
            B, _, _, K = x_BHWC.shape
            x_BHWC = jax.image.resize(x_BHWC, (B, *sizes[i], K), "nearest")
            if i:
                x_BHWC = nn.relu(conv(self.channels[i - 1], 3, bias=True, name=f"decoder_conv_{i}")(x_BHWC))
        return nn.Conv(C, (3, 3), dtype=jnp.float32, conv_general_dilated=convolution, name="image_head")(x_BHWC)
