"""Vision Transformer (Dosovitskiy et al. 2021) from the blocks of GPT. The defaults are ViT-S/16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array

from lab.errors import UserError
from lab.models.dropout import dropout
from lab.models.layers import Dense, Embed, Transformer
from lab.models.linear import check_classes, check_sizes, output
from lab.models.precision import elementwise


def sincos(rows: int, columns: int, width: int) -> np.ndarray:
    """Fixed 2D position embedding, row-major, (rows * columns, width): sine and cosine of the column, then of the row,
    at width / 4 frequencies from 1 down to nearly 1 / 10,000 (Chen, Xie & He 2021).
    """
    frequency = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    y, x = (place.reshape(-1, 1) * frequency for place in np.mgrid[:rows, :columns])
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


class ViT(Transformer):
    """Image classifier: images (B, H, W, C) -> float32 logits (B, classes); H and W are multiples of `patch`.

    The original has `mlp="gelu_exact"` and `norm_epsilon=1e-12`; DINOv2 also `layer_scale` and `norm_epsilon=1e-6`.

    Published sizes (width, heads; all with depth 12): Ti 192, 3; S 384, 6; B 768, 12.
    """

    context: ClassVar[int] = 1  # not a field: the length follows from image and patch; only decoding uses it
    width: int = 384
    """Model width D."""
    heads: int = 6
    """Attention heads N; must divide the width."""
    position: Literal["learned", "sincos", "none"] = "learned"
    """Position embedding of the patches: a learned table, fixed sines and cosines of row and column, or none."""
    patch: int = 16
    """Side of the square patches, in pixels; each becomes one token."""
    pool: Literal["token", "mean", "token+mean"] = "token"
    """The image's features: a class token, the mean over the patches, or both, one after the other (Oquab et al. 2023).
    """
    classes: int | None = 1000
    """Number of classes; None: the features themselves, float32 (B, D), or (B, 2 D) for token+mean."""

    def validate(self) -> None:
        """Raises UserError if the fields contradict each other."""
        super().validate()
        check_sizes(patch=self.patch, classes=self.classes)
        if self.position == "sincos" and self.width % 4:
            raise UserError(f"--model.position sincos needs a --model.width divisible by 4, not {self.width}.")

    def check(self, metadata: Mapping[str, int]) -> None:
        """Raises UserError if data with this metadata (classes, height, width) does not fit the model."""
        if self.classes is not None:  # features have no classes
            check_classes(self.classes, metadata)
        for side in ("height", "width"):
            if metadata.get(side, 0) % self.patch:
                raise UserError(f"The images' {side} of {metadata[side]} pixels is not divisible by --model.patch "
                                f"{self.patch}.")

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        rows, columns = (side // self.patch for side in images.shape[1:3])
        x_BLP = rearrange(images, "B (rows y) (columns x) C -> B (rows columns) (y x C)", y=self.patch, x=self.patch)
        x_BLD = Dense(self.width, bias=True, stddev=x_BLP.shape[-1] ** -0.5, name="patches")(x_BLP)
        if self.pool != "mean":
            token_D = self.param("token", nn.initializers.zeros, (self.width,))
            token_BLD = elementwise(jnp.add, jnp.zeros_like(x_BLD[:, :1]), token_D[None, None])
            x_BLD = jnp.concatenate([token_BLD, x_BLD], axis=1)
        L = x_BLD.shape[1]
        if self.position == "learned":
            # An embedding of 0..L-1 named like GPT's, so that weight-decay rules treat it as an embedding.
            x_BLD = elementwise(jnp.add, x_BLD, Embed(L, self.width, name="wpe")(jnp.arange(L)[None]))
        elif self.position == "sincos":
            table_LD = np.pad(sincos(rows, columns, self.width), ((L - rows * columns, 0), (0, 0)))  # 0 for the token
            x_BLD = x_BLD + jnp.asarray(table_LD, x_BLD.dtype)[None]
        x_BLD = dropout(self, x_BLD, self.dropout, train)
        x_BLD = self.stack(x_BLD, jnp.arange(L), None, causal=False, train=train)
        x_BD = x_BLD[:, 0] if self.pool == "token" else x_BLD[:, L - rows * columns:].mean(1, dtype=jnp.float32)
        if self.pool == "token+mean":
            x_BD = jnp.concatenate([x_BLD[:, 0].astype(jnp.float32), x_BD], axis=-1)
        return x_BD.astype(jnp.float32) if self.classes is None else output(x_BD, self.classes)
