"""CLIP (Radford et al. 2021): an encoder of images and an encoder of texts, whose outputs share one space."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lab.errors import UserError
from lab.models.layers import Dense
from lab.models.linear import check_sizes

START, MOST = math.log(1 / 0.07), math.log(100)  # of the logarithm of the scale (section 2.5)


class CLIP(nn.Module):
    """Images (B, H, W, C) and texts (T, L), token ids padded with id 0 -> float32 "image" (B, E) and "text" (T, E), of
    length 1, and "scale" (), the learned factor of their cosines: 1 / temperature, from 1 / 0.07, at most 100.

    For `lab.tasks.contrastive.Contrastive`. The scale's logarithm is the parameter.
    """

    image: nn.Module
    """Encoder of images: (B, H, W, C) -> (B, D), such as ViT(classes=None)."""
    text: nn.Module
    """Encoder of texts: ids (T, L) and a mask -> (T, D), such as BERT(output="embedding")."""
    width: int = 512
    """Width E of the shared space."""

    def validate(self) -> None:
        """Raises UserError for a field out of range, here or in an encoder, or an encoder that has a head."""
        check_sizes(width=self.width)
        for name, encoder in (("image", self.image), ("text", self.text)):
            with _flags_of(name):
                getattr(encoder, "validate", lambda: None)()
        if getattr(self.image, "classes", None) is not None:
            raise UserError("--model.image.classes must be None: CLIP projects the features of its encoders.")
        if getattr(self.text, "output", "embedding") != "embedding":
            raise UserError(f"--model.text.output must be embedding, one vector of a text, not {self.text.output}.")

    def check(self, metadata: Mapping[str, int]) -> None:
        """Raises UserError if data with this metadata (height, width, vocab, text_length) does not fit the encoders."""
        longest = metadata.get("text_length", 0)
        if longest > getattr(self.text, "context", longest):
            raise UserError(f"The longest caption has {longest} words, and --model.text.context is "
                            f"{self.text.context}. Use at least {longest}.")
        own = {"image": metadata, "text": {"vocab": metadata.get("vocab", 0)}}
        for name, encoder in (("image", self.image), ("text", self.text)):
            with _flags_of(name):
                getattr(encoder, "check", lambda known: None)(own[name])

    @nn.compact
    def __call__(self, images: Array | None, texts: Array | None = None, *, train: bool) -> dict[str, Array]:
        """Without images or texts, the output has none."""
        found = {"scale": jnp.exp(capped(self.param("log_scale", nn.initializers.constant(START), ())
                                         .astype(jnp.float32)))}
        if images is not None:
            found["image"] = self._projected("image", self.image(images, train=train))
        if texts is not None:
            found["text"] = self._projected("text", self.text(texts, train=train, mask=texts > 0))
        return found

    def _projected(self, name: str, x_BD: Array) -> Array:
        project = Dense(self.width, bias=False, stddev=x_BD.shape[-1] ** -0.5, name=f"{name}_projection")
        x_BE = project(x_BD).astype(jnp.float32)
        return x_BE / jnp.maximum(jnp.linalg.norm(x_BE, axis=-1, keepdims=True), 1e-12)


@jax.custom_vjp
def capped(x: Array) -> Array:
    """min(x, MOST), straight-through: at the cap a gradient that would raise x is dropped, and any other passes. The
    plain gradient of the minimum is 0 there, so x could never come back."""
    return jnp.minimum(x, MOST)


capped.defvjp(lambda x: (capped(x), x), lambda x, g: (jnp.where((x >= MOST) & (g < 0), 0.0, g),))


@contextlib.contextmanager
def _flags_of(name: str) -> Iterator[None]:
    """Names the flags of an encoder in its errors."""
    try:
        yield
    except UserError as e:
        raise UserError(str(e).replace("--model.", f"--model.{name}.")) from None
