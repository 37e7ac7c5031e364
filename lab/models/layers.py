"""Layers that every Transformer here shares: projections, norms, attention, MLP, and the stack of blocks.

Axis letters, one legend for the whole project, used as suffixes of array names and in einsum specs:
B batch, L length (queries), S length (keys), D model width, N heads, G key/value heads, R query heads per
key/value head (N = G R), M their rows (R L), K head width, F hidden width of the MLP, V vocabulary.

Compute precision is not a field. The step casts the parameters (``Experiment.precision``) and every layer here
computes in the type of its parameters. Norms, softmax and logits are always computed in float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lab.errors import UserError
from lab.models import splash
from lab.models.attention import Attention, RopeScaling, added, attend, choose_attention, einsum_attention, rotary
from lab.models.dropout import dropout, is_zero
from lab.models.precision import (
    elementwise,
    platform,
    project,
    sequence_devices,
)

Norm = Literal["layernorm", "rmsnorm"]
Mlp = Literal["gelu", "gelu_exact", "swiglu", "relu", "relu2"]
Remat = Literal["none", "dots", "blocks"]

ACTIVATIONS = {"gelu": nn.gelu, "gelu_exact": functools.partial(nn.gelu, approximate=False),
               "relu": nn.relu, "relu2": lambda h: jnp.square(nn.relu(h))}
SAVED = "product"  # checkpoint name of the values that remat="dots" saves


class Dense(nn.Module):
    """`nn.Dense` (normal(0, stddev) weights, zero bias) that computes in the type of its parameters, with `project`."""

    features: int
    bias: bool
    stddev: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.normal(self.stddev), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.bias else None
        # Named, because a `jax.checkpoint` policy does not see matmuls inside a custom derivative.
        return checkpoint_name(project(x, kernel, bias, x.dtype), SAVED)


class Embed(nn.Module):
    """`nn.Embed` (normal(0, stddev)) in the type of its parameters; the gradient is summed in float32."""

    rows: int
    features: int
    stddev: float = 0.02

    @staticmethod
    def embedding_lookup(table: Array, ids: Array) -> Array:  # lab/parallel/sharding.py looks for this attribute
        """``table[ids]``, in float32 inside: a bfloat16 gradient would stop growing when a token occurs often."""
        return jnp.take(table.astype(jnp.float32), ids, axis=0).astype(table.dtype)

    def setup(self) -> None:
        self.embedding = self.param("embedding", nn.initializers.normal(self.stddev), (self.rows, self.features))

    def __call__(self, ids: Array) -> Array:
        return self.embedding_lookup(self.embedding, ids)


def norm(kind: Norm, *, bias: bool, name: str, epsilon: float = 1e-5) -> nn.Module:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019), statistics in float32."""
    if kind == "layernorm":
        return nn.LayerNorm(epsilon=epsilon, use_bias=bias, name=name)
    return nn.RMSNorm(epsilon=epsilon, name=name)


class Transformer(nn.Module):
    """The fields that a Transformer shares with its parts, defined once."""

    depth: int = 12
    """Number of blocks."""
    width: int = 768
    """Model width D."""
    heads: int = 12
    """Attention heads N; must divide the width."""
    kv_heads: int | None = None
    """Key/value heads G (grouped-query attention); must divide the heads. None: as many as heads."""
    head_width: int | None = None
    """Width K of an attention head; None: width / heads."""
    hidden_multiple: float = 4.0
    """Hidden width of the MLP as a multiple of the width (swiglu at 8/3 has as many parameters as gelu at 4)."""
    context: int = 1024
    """The longest sequence, in tokens."""
    norm: Norm = "layernorm"
    """Kind of normalisation."""
    norm_place: Literal["pre", "post"] = "pre"
    """Where blocks normalise. pre: the input of attention and MLP, and once after the last block (GPT-2). post: the sum
    after each residual connection (Vaswani et al. 2017, BERT)."""
    norm_epsilon: float = 1e-5
    """Added to the variance in norms."""
    position: Literal["learned", "rotary"] = "learned"
    """Position encoding: a learned table added to the input, or rotations of queries and keys."""
    rope_base: float = 10_000.0
    """Base of the wavelengths of rotary positions."""
    rope_scaling: RopeScaling | None = None
    """Longer wavelengths for a context beyond the pretrained one; None: as pretrained."""
    mlp: Mlp = "gelu"
    """Kind of MLP."""
    qk_norm: bool = False
    """RMSNorm on every query and key head before the scores (Dehghani et al. 2023)."""
    bias: bool = True
    """Biases in projections and LayerNorms."""
    qkv_bias: bool | None = None
    """Biases in the projections to queries, keys and values; None: as `bias`."""
    out_bias: bool | None = None
    """Bias in the output projection of attention; None: as `bias`."""
    mlp_bias: bool | None = None
    """Biases in the MLP; None: as `bias`."""
    layer_scale: bool = False
    """Scale the output of attention and MLP by a learned factor per channel, from 1e-5 (Touvron et al. 2021)."""
    dropout: float = 0.0
    """Dropout rate on embeddings, attention probabilities and both residual branches."""
    attention: Attention = "auto"
    """Attention backend; auto logs its choice and the reason. Decoding with a cache always uses einsum."""
    remat: Remat = "none"
    """What the backward pass recomputes. none: nothing; dots: everything except the outputs of projections and splash
    attention; blocks: each whole block. GPT small, 64 rows of 1,024 tokens on one H200, by `plan` (2026-11-23): 23.4,
    15.6 and 6.6 GiB of temporaries; CPU time of a small local config: 1, 1.09 and 1.17."""
    scan: bool = False
    """Scan one block over stacked parameters, which compiles faster, instead of unrolling `depth` blocks."""

    def validate(self) -> None:
        """Raises UserError if the fields contradict each other."""
        for name in ("depth", "width", "heads", "kv_heads", "head_width", "context"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--model.{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}.")
        if self.hidden_multiple * self.width < 1:
            raise UserError(f"--model.hidden-multiple {self.hidden_multiple} leaves the MLP no hidden width.")
        if self.head_width is None and self.width % self.heads:
            raise UserError(f"--model.width {self.width} is not divisible by --model.heads {self.heads}.")
        if self.heads % self.groups:
            raise UserError(f"--model.heads {self.heads} is not divisible by --model.kv-heads {self.groups}.")
        if self.position == "rotary" and self.head % 2:
            raise UserError(f"Rotary positions need an even head width, not {self.head}.")
        if self.rope_scaling is not None:
            self.rope_scaling.validate()
        for name in ("norm_epsilon", "rope_base"):
            if not getattr(self, name) > 0:  # or NaN
                raise UserError(f"--model.{name.replace('_', '-')} must be above 0, not {getattr(self, name)}.")
        if isinstance(self.dropout, int | float) and not 0 <= self.dropout < 1:
            raise UserError(f"--model.dropout must be in [0, 1), not {self.dropout}.")

    @property
    def groups(self) -> int:
        """Key/value heads G."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head(self) -> int:
        """Width K of an attention head."""
        return self.head_width or self.width // self.heads

    @property
    def residual_stddev(self) -> float:
        """Stddev of the 2 x depth projections that write to the residual stream, as in GPT-2."""
        return 0.02 / (2 * self.depth) ** 0.5

    def part(self, cls: type[Transformer], name: str) -> Transformer:
        """A child module `name` with the same fields."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(Transformer)}
        return cls(**(own | {"name": name, "parent": self}))

    def stack(self, x_BLD: Array, positions: Array, mask_BS: Array | None, *, causal: bool, train: bool,
              decode: bool = False, kind: type[Transformer] | None = None, more: tuple = ()) -> Array:
        """All blocks, of `kind` or `Block`, with the arguments `more`; and the final norm. For masks see `attend`."""
        static, kind = (causal, train, decode), kind or Block
        policy = jax.checkpoint_policies.save_only_these_names(SAVED) if self.remat == "dots" else None
        block = kind if self.remat == "none" else nn.remat(kind, static_argnums=(4, 5, 6), prevent_cse=not self.scan,
                                                           policy=policy)
        if self.scan:
            def body(module: nn.Module, x: Array, _: None) -> tuple[Array, None]:
                return module(x, positions, mask_BS, *static, *more), None

            over_layers = nn.scan(body, variable_axes={"params": 0, "cache": 0, "memory": 0}, length=self.depth,
                                  split_rngs={"params": True, "dropout": True})
            x_BLD, _ = over_layers(self.part(block, "blocks"), x_BLD, None)
        else:
            for i in range(self.depth):
                x_BLD = self.part(block, f"block_{i}")(x_BLD, positions, mask_BS, *static, *more)
        return x_BLD if self.norm_place == "post" else self.normed("final_norm", x_BLD)

    def normed(self, name: str, x_BLD: Array) -> Array:
        """A norm of this kind, applied."""
        return norm(self.norm, bias=self.bias, name=name, epsilon=self.norm_epsilon)(x_BLD)


class Block(Transformer):
    """x + attention(norm(x)), then x + mlp(norm(x)); post-norm: norm(x + attention(x)), then norm(x + mlp(x))."""

    def residual(self, name: str, part: Callable[[Array], Array], x_BLD: Array) -> Array:
        if self.norm_place == "post":
            return self.normed(f"{name}_norm", x_BLD + part(x_BLD))
        y_BLD = part(self.normed(f"{name}_norm", x_BLD))
        if self.layer_scale:
            y_BLD *= self.param(f"{name}_scale", nn.initializers.constant(1e-5), (self.width,))
        return x_BLD + y_BLD

    @nn.compact
    def __call__(self, x_BLD: Array, positions: Array, mask_BS: Array | None, causal: bool, train: bool,
                 decode: bool) -> Array:
        attention, mlp = self.part(SelfAttention, "attn"), self.part(FeedForward, "ffn")
        x_BLD = self.residual("attention", lambda h: attention(h, positions, mask_BS, causal, train, decode), x_BLD)
        return self.residual("mlp", lambda h: mlp(h, train), x_BLD)


class SelfAttention(Transformer):
    """Multi-head self-attention, causal or not, with a key/value cache when decoding."""

    @nn.compact
    def __call__(self, x_BLD: Array, positions: Array, mask_BS: Array | None, causal: bool, train: bool,
                 decode: bool) -> Array:
        B, L, D = x_BLD.shape
        K = self.head
        bias, out_bias = (self.bias if b is None else b for b in (self.qkv_bias, self.out_bias))

        def heads(name: str, n: int) -> Array:
            return rearrange(Dense(n * K, bias=bias, stddev=0.02, name=name)(x_BLD), "B L (N K) -> B L N K", K=K)

        q_BLNK, k_BSGK, v_BSGK = heads("query", self.heads), heads("key", self.groups), heads("value", self.groups)
        if self.qk_norm:
            q_BLNK = norm("rmsnorm", bias=False, name="query_norm", epsilon=self.norm_epsilon)(q_BLNK)
            k_BSGK = norm("rmsnorm", bias=False, name="key_norm", epsilon=self.norm_epsilon)(k_BSGK)
        if self.position == "rotary":
            turned = functools.partial(rotary, base=self.rope_base, scaling=self.rope_scaling)
            q_BLNK, k_BSGK = turned(q_BLNK, positions), turned(k_BSGK, positions)
        y_BLNK = (self._decode(q_BLNK, k_BSGK, v_BSGK, positions, mask_BS) if decode else
                  self._attend(q_BLNK, k_BSGK, v_BSGK, mask_BS, causal, train))
        y_BLD = rearrange(y_BLNK, "B L N K -> B L (N K)")
        y_BLD = Dense(D, bias=out_bias, stddev=self.residual_stddev, name="out")(y_BLD)
        return dropout(self, y_BLD, self.dropout, train)

    def _decode(self, q_BLNK: Array, k_BLGK: Array, v_BLGK: Array, positions: Array, mask: Array | None) -> Array:
        k_BSGK, v_BSGK = self._cached("keys", k_BLGK, positions), self._cached("values", v_BLGK, positions)
        visible_BLS = jnp.arange(self.context) <= jnp.broadcast_to(positions, q_BLNK.shape[:2])[..., None]
        return einsum_attention(q_BLNK, k_BSGK, v_BSGK, visible_BLS, bias=added(mask))

    def _cached(self, name: str, new_BLGK: Array, positions: Array) -> Array:
        """Writes the new rows at their positions and returns the whole cache (B, context, G, K)."""
        B, L, G, K = new_BLGK.shape
        # Heads before keys: the matmuls of `einsum_attention` read the cache as it is, not a transposed copy.
        cache = self.variable("cache", name, jnp.zeros, (B, G, self.context, K), new_BLGK.dtype)
        cache.value = cache.value.at[jnp.arange(B)[:, None], :, jnp.broadcast_to(positions, (B, L))].set(new_BLGK)
        return cache.value.swapaxes(1, 2)

    def _attend(self, q_BLNK: Array, k_BSGK: Array, v_BSGK: Array, mask_BS: Array | None, causal: bool,
                train: bool) -> Array:
        drops = train and not is_zero(self.dropout)
        L, K, dims = q_BLNK.shape[1], q_BLNK.shape[-1], 0 if mask_BS is None else mask_BS.ndim
        backend = choose_attention(self.attention, platform(), str(q_BLNK.dtype), K, L, mask_BS is not None, drops,
                                   sequence_devices() > 1, packed=dims == 3, biased=dims == 4)
        if backend == "splash" and not self.is_initializing():  # init has one record, which no mesh can shard
            return splash.OnDevice(causal, SAVED, name="own")(q_BLNK, k_BSGK, v_BSGK)
        return attend(q_BLNK, k_BSGK, v_BSGK, mask_BS, causal, backend, lambda p: dropout(self, p, self.dropout, train))


class FeedForward(Transformer):
    """Position-wise MLP: gelu (tanh form, as GPT-2; or exact), swiglu (Shazeer 2020), relu, relu2 (So et al. 2021)."""

    @nn.compact
    def __call__(self, x_BLD: Array, train: bool) -> Array:
        F = round(self.hidden_multiple * self.width)
        bias = self.bias if self.mlp_bias is None else self.mlp_bias
        h_BLF = Dense(F, bias=bias, stddev=0.02, name="up")(x_BLD)
        if self.mlp == "swiglu":
            gate_BLF = Dense(F, bias=bias, stddev=0.02, name="gate")(x_BLD)
            h_BLF = elementwise(lambda gate, h: nn.silu(gate) * h, gate_BLF, h_BLF)
        else:
            h_BLF = elementwise(ACTIVATIONS[self.mlp], h_BLF)
        y_BLD = Dense(self.width, bias=bias, stddev=self.residual_stddev, name="down")(h_BLF)
        return dropout(self, y_BLD, self.dropout, train)
