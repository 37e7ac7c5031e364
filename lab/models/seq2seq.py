"""Encoder-decoder Transformer (Vaswani et al. 2017; T5, Raffel et al. 2020) from the blocks of layers.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from lab.errors import UserError
from lab.models.attention import einsum_attention
from lab.models.dropout import dropout
from lab.models.layers import Block, Dense, Embed, FeedForward, SelfAttention, Transformer, norm
from lab.models.precision import elementwise, project

BUCKETS, DISTANCE = 32, 128  # T5's


def relative_bucket(offset: Array, bidirectional: bool) -> Array:
    """T5's bucket, int in [0, BUCKETS), of offsets key - query: one for each small offset, then logarithmically wider
    ones up to DISTANCE, and one for all beyond (Raffel et al. 2020, section 2.1). Bidirectional: half of the buckets
    are for keys that follow the query; else those share bucket 0.
    """
    buckets = BUCKETS // 2 if bidirectional else BUCKETS
    far = jnp.abs(offset) if bidirectional else jnp.maximum(-offset, 0)
    exact = buckets // 2
    scaled = jnp.log(jnp.maximum(far, 1) / exact) / math.log(DISTANCE / exact) * (buckets - exact)
    bucket = jnp.where(far < exact, far, jnp.minimum(exact + scaled.astype(jnp.int32), buckets - 1))
    return bucket + buckets * (offset > 0) if bidirectional else bucket


def sinusoids(positions: Array, width: int) -> Array:
    """Fixed position encoding, float32 (..., width): sines of the even, cosines of the odd channels, at wavelengths
    from 2 pi to 10,000 x 2 pi (Vaswani et al. 2017, section 3.5). `width`: even."""
    frequency = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    angle = positions[..., None] * frequency
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*positions.shape, width)


class Seq2Seq(Transformer):
    """Source ids (B, S) and target ids (B, L), which begin with a start token -> float32 logits (B, L, V) of the target
    tokens that follow. `depth` is the number of blocks of the encoder, and of the decoder.

    The original: `norm_place="post"`, `mlp="relu"`. T5 v1.0: `position="relative"`, `norm="rmsnorm"`, `mlp="relu"`,
    `bias=False`. T5 does not divide scores by the square root of the head width, and multiplies tied logits by
    width^-0.5: multiply its query weights and final norm by these factors.
    """

    context: int = 128
    """The longest source and the longest target, in tokens."""
    position: Literal["learned", "rotary", "sinusoidal", "relative"] = "sinusoidal"
    """Position encoding: a learned table; rotations of queries and keys; fixed sines and cosines, added to embeddings
    scaled by sqrt(width) (Vaswani et al. 2017); or T5's learned bias per distance and head, shared by all blocks."""
    dropout: float = 0.1
    """Dropout rate on embeddings, attention probabilities and residual branches."""
    vocab: int | None = None
    """Vocabulary size V of source and target, at least the tokenizer's; None: the tokenizer's."""
    embeddings: Literal["shared", "separate"] = "shared"
    """One token embedding for source and target, or one each."""
    tied: bool = True
    """The output projection is the transpose of the target's token embedding."""

    def validate(self) -> None:
        """Raises UserError if the fields contradict each other."""
        super().validate()
        if self.vocab is not None and self.vocab < 1:
            raise UserError(f"--model.vocab must be at least 1, not {self.vocab}.")
        if self.position == "sinusoidal" and self.width % 2:
            raise UserError(f"--model.position sinusoidal needs an even --model.width, not {self.width}.")

    def check(self, metadata: Mapping[str, int]) -> None:
        """Raises UserError if data with this metadata (vocab, source_length, target_length) does not fit the model."""
        if metadata.get("vocab", 0) > (self.vocab or math.inf):
            raise UserError(f"The vocabulary is too small: the tokenizer has {metadata['vocab']} tokens and the model "
                            f"{self.vocab}. Use --model.vocab {metadata['vocab']}.")
        for name in ("source_length", "target_length"):
            if metadata.get(name, 0) > self.context:
                raise UserError(f"--data.{name.replace('_', '-')} {metadata[name]} is longer than --model.context "
                                f"{self.context}.")

    @nn.compact
    def __call__(self, source_BS: Array | None, target_BL: Array, *, train: bool, mask: Array | None = None,
                 positions: Array | None = None, decode: bool = False) -> Array:
        """`mask` (B, S): 1 where a source token is real; padding after a target needs none. `positions` of the target:
        (L,) or (B, L), default 0..L-1.

        With `decode` the target's keys and values are written to the collection "cache" (`context` rows) at
        `positions`, and those of the encoded source to "memory". The first call has the source and the begin of the
        target; later calls have None as the source, and one target token each.
        """
        positions = jnp.atleast_2d(jnp.arange(target_BL.shape[1]) if positions is None else positions)
        wte = Embed(self.vocab, self.width, name="wte")
        memory_BSD = None
        if source_BS is not None:
            source_wte = wte if self.embeddings == "shared" else Embed(self.vocab, self.width, name="source_wte")
            places = jnp.atleast_2d(jnp.arange(source_BS.shape[1]))
            memory_BSD = self.part(Side, "encoder")(source_wte(source_BS), places, mask, causal=False, train=train)
        y_BLD = self.part(Side, "decoder")(wte(target_BL), positions, None, causal=True, train=train, decode=decode,
                                           kind=DecoderBlock, more=(memory_BSD, mask))
        if self.tied:
            kernel_DV = wte.embedding.T.astype(y_BLD.dtype)
        else:
            kernel_DV = self.param("head", nn.initializers.normal(0.02), (self.width, self.vocab)).astype(y_BLD.dtype)
        return project(y_BLD, kernel_DV, None, jnp.float32)


class Side(Transformer):
    """The encoder or the decoder: embedded ids (B, L, D) -> hidden states (B, L, D)."""

    @nn.compact
    def __call__(self, x_BLD: Array, positions: Array, mask: Array | None, *, causal: bool, train: bool,
                 decode: bool = False, kind: type[Transformer] = Block, more: tuple = ()) -> Array:
        if self.position == "learned":
            x_BLD = elementwise(jnp.add, x_BLD, Embed(self.context, self.width, name="wpe")(positions))
        elif self.position == "sinusoidal":
            scaled = lambda x, place: x * self.width**0.5 + place
            x_BLD = elementwise(scaled, x_BLD, sinusoids(positions, self.width).astype(x_BLD.dtype))
        elif self.position == "relative":
            keys = jnp.arange(self.context) if decode else positions[0]
            bucket_BLS = relative_bucket(keys - positions[..., None], bidirectional=not causal)
            bias_BLSN = Embed(BUCKETS, self.heads, name="relative")(bucket_BLS).astype(jnp.float32)
            bias_BNLS = rearrange(bias_BLSN, "B L S N -> B N L S")
            mask = bias_BNLS if mask is None else jnp.where(mask[:, None, None].astype(bool), bias_BNLS,
                                                            jnp.finfo(jnp.float32).min)
        x_BLD = dropout(self, x_BLD, self.dropout, train)
        return self.stack(x_BLD, positions, mask, causal=causal, train=train, decode=decode, kind=kind, more=more)


class DecoderBlock(Block):
    """A block with cross-attention to the encoded source between self-attention and MLP."""

    @nn.compact
    def __call__(self, x_BLD: Array, positions: Array, mask: Array | None, causal: bool, train: bool, decode: bool,
                 memory_BSD: Array | None, source_mask_BS: Array | None) -> Array:
        attention, cross, mlp = (self.part(cls, name) for cls, name in (
            (SelfAttention, "attn"), (CrossAttention, "cross_attn"), (FeedForward, "ffn")))
        x_BLD = self.residual("attention", lambda h: attention(h, positions, mask, causal, train, decode), x_BLD)
        x_BLD = self.residual("cross", lambda h: cross(h, memory_BSD, source_mask_BS, train, decode), x_BLD)
        return self.residual("mlp", lambda h: mlp(h, train), x_BLD)


class CrossAttention(Transformer):
    """Multi-head attention of target positions to the encoded source, whose keys and values are kept when decoding."""

    @nn.compact
    def __call__(self, x_BLD: Array, memory_BSD: Array | None, mask_BS: Array | None, train: bool,
                 decode: bool) -> Array:
        """`memory_BSD` None: the keys and values of an earlier call, in the collection "memory". Without `decode` that
        collection, if mutable, gets the attention "probabilities" (B, N, L, S)."""
        bias, out_bias = (self.bias if b is None else b for b in (self.qkv_bias, self.out_bias))

        def heads(name: str, n: int, x_BLD: Array) -> Array:
            x_BLNK = rearrange(Dense(n * self.head, bias=bias, stddev=0.02, name=name)(x_BLD),
                               "B L (N K) -> B L N K", K=self.head)
            if not self.qk_norm or name == "value":
                return x_BLNK
            return norm("rmsnorm", bias=False, name=f"{name}_norm", epsilon=self.norm_epsilon)(x_BLNK)

        def source(name: str) -> Array:
            if memory_BSD is None:
                return self.get_variable("memory", name)
            x_BSGK = heads(name, self.groups, memory_BSD)
            if decode:
                self.put_variable("memory", name, x_BSGK)
            return x_BSGK

        def drop(p_BNLS: Array) -> Array:
            if not decode and not self.is_initializing():
                self.sow("memory", "probabilities", p_BNLS)
            return dropout(self, p_BNLS, self.dropout, train)

        visible = None if mask_BS is None else mask_BS[:, None, :].astype(bool)
        y_BLNK = einsum_attention(heads("query", self.heads, x_BLD), source("key"), source("value"), visible, drop)
        y_BLD = rearrange(y_BLNK, "B L N K -> B L (N K)")
        y_BLD = Dense(self.width, bias=out_bias, stddev=self.residual_stddev, name="out")(y_BLD)
        return dropout(self, y_BLD, self.dropout, train)
