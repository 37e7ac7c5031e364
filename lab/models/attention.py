"""Attention: rotary positions, the choice of backend, and plain einsum attention. Axis letters: see layers.py."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from lab.errors import UserError
from lab.models.cudnn import cudnn_attention
from lab.models.precision import product, softmax

Attention = Literal["auto", "einsum", "xla", "cudnn", "splash"]
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling of rotary frequencies (Grattafiori et al. 2024): wavelengths above `context / low` become
    `factor` times longer, those below `context / high` stay, and those between are interpolated."""

    factor: float = 8.0
    """Factor of the longest wavelengths."""
    low: float = 1.0
    """Wavelengths above context / low are scaled."""
    high: float = 4.0
    """Wavelengths below context / high are kept."""
    context: int = 8192
    """The context of the original pretraining, in tokens."""

    def validate(self) -> None:
        """Raises UserError for factors that scale nothing, or in the wrong order."""
        if not (self.factor > 0 and 0 < self.low < self.high and self.context > 0):
            raise UserError(f"Rotary scaling needs a factor and a context above 0, and low below high, not {self}.")

    def scaled(self, frequency_K: Array) -> Array:
        """Angular frequencies (K,), in radians per token, after scaling."""
        turns = self.context * frequency_K / (2 * jnp.pi)  # in the original context
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return frequency_K * (kept + (1 - kept) / self.factor)


def rotary(x_BLNK: Array, positions: Array, base: float = 10_000.0, scaling: RopeScaling | None = None) -> Array:
    """Rotary position embedding (Su et al. 2021), halves convention. `positions`: (L,) or (B, L)."""
    half = x_BLNK.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        frequency = scaling.scaled(frequency)
    angle = jnp.einsum("...,K->...K", positions[..., None].astype(jnp.float32), frequency)
    cos, sin = jnp.tile(jnp.cos(angle), 2), jnp.concatenate([-jnp.sin(angle), jnp.sin(angle)], axis=-1)
    x = x_BLNK.astype(jnp.float32)
    # Roll, do not concatenate the halves: on CPUs that is 5 times slower, forward and backward.
    return (x * cos + jnp.roll(x, half, axis=-1) * sin).astype(x_BLNK.dtype)


@functools.cache  # to log the choice once, however often the model is traced
def choose_attention(wanted: Attention, platform: str, dtype: str, head_width: int, length: int, padded: bool,
                     needs_probabilities: bool, divided: bool = False, packed: bool = False,
                     biased: bool = False) -> str:
    """The attention backend to run. "auto" logs its choice and the reason. `divided`: the mesh shards the length;
    `packed`: a window has several documents; `biased`: a number is added to every score.

    Raises:
      UserError: the requested backend does not support this platform, type, shape, padding, dropout or mesh.
    """
    against: dict[str, list[str]] = {"cudnn": [], "splash": []}
    for backend, needed, name in (("cudnn", "gpu", "NVIDIA GPUs"), ("splash", "tpu", "TPUs")):
        if platform != needed:
            against[backend].append(f"runs on {name} only, and this is {platform}")
    if dtype not in ("bfloat16", "float16"):
        against["cudnn"].append(f"needs --precision bfloat16, not {dtype}")
    if head_width > 128 or head_width % 8:
        against["cudnn"].append(f"needs a head width of at most 128 and a multiple of 8, not {head_width}")
    if divided:
        against["cudnn"].append("needs the whole length on every device, so no --mesh.sequence")
    if length % 128:
        against["splash"].append(f"needs a length that is a multiple of 128, not {length}")
    if packed or biased:
        for reasons in against.values():
            reasons.append("cannot add a bias to the scores" if biased else
                           "cannot keep the documents of a window apart")
    if padded:
        against["splash"].append("does not support padding")
    if needs_probabilities:
        for reasons in against.values():
            reasons.append("cannot drop out attention probabilities")
    if wanted == "auto":
        fused = "splash" if platform == "tpu" else "cudnn"
        reasons = against[fused]
        chosen, why = ("einsum", f"{fused} {reasons[0]}") if reasons else (fused, "fused, memory linear in the length")
        log.info("attention: %s (%s)", chosen, why)
        return chosen
    if against.get(wanted):
        raise UserError(f"Attention backend {wanted} {against[wanted][0]}. Use --model.attention auto or einsum.")
    if wanted == "xla" and needs_probabilities:
        raise UserError("Attention backend xla cannot drop out attention probabilities. Use einsum, or no dropout.")
    return wanted


def einsum_attention(q_BLNK: Array, k_BSGK: Array, v_BSGK: Array, visible: Array | None,
                     drop: Callable[[Array], Array] = lambda p: p, bias: Array | None = None) -> Array:
    """Scaled dot-product attention (Vaswani et al. 2017) with grouped queries (Ainslie et al. 2023).

    `visible`: boolean, broadcastable to (B, L, S). `bias`: float32, broadcastable to (B, N, L, S), added to the scores.
    Softmax in float32. Returns (B, L, N, K) in q's type.
    """
    L, K, G = q_BLNK.shape[1], q_BLNK.shape[3], k_BSGK.shape[2]
    # Batch axes first, and the queries of each key as the rows of one matrix: the only form that is fast on CPUs.
    q_BNLK, k_BGSK, v_BGSK = (rearrange(x, "B L N K -> B N L K") for x in (q_BLNK, k_BSGK, v_BSGK))
    q_BGMK = rearrange(q_BNLK, "B (G R) L K -> B G (R L) K", G=G)
    scores_BGMS = product("BGMK,BGSK->BGMS", q_BGMK, k_BGSK, jnp.float32)
    scores_BNLS = rearrange(scores_BGMS, "B G (R L) S -> B (G R) L S", L=L) * K**-0.5
    if bias is not None:
        scores_BNLS += bias
    if visible is not None:
        scores_BNLS = jnp.where(visible[:, None], scores_BNLS, jnp.finfo(jnp.float32).min)
    probabilities_BNLS = drop(softmax(scores_BNLS, q_BLNK.dtype))
    probabilities_BGMS = rearrange(probabilities_BNLS, "B (G R) L S -> B G (R L) S", G=G)
    y_BGMK = product("BGMS,BGSK->BGMK", probabilities_BGMS, v_BGSK, q_BLNK.dtype)
    y_BNLK = rearrange(y_BGMK, "B G (R L) K -> B (G R) L K", L=L)
    return rearrange(y_BNLK, "B N L K -> B L N K")


def within(documents_BL: Array | None, mask_BS: Array | None) -> Array | None:
    """The mask of attention that stays within a document, boolean (B, L, S); without documents, `mask_BS`."""
    if documents_BL is None:
        return mask_BS
    same_BLS = documents_BL[:, :, None] == documents_BL[:, None, :]
    return same_BLS if mask_BS is None else same_BLS & mask_BS[:, None, :].astype(bool)


def added(mask: Array | None) -> Array | None:
    """What a mask of `attend` adds to the scores: itself, if it is a bias (B or 1, N, L, S); else None."""
    return mask if mask is not None and mask.ndim == 4 else None


def attend(q_BLNK: Array, k_BSGK: Array, v_BSGK: Array, mask_BS: Array | None, causal: bool, backend: str,
           drop: Callable[[Array], Array]) -> Array:
    """Self-attention by a backend of `choose_attention` other than splash. `mask_BS`: 1 where a key is real; or the
    (B, L, S) of `within`, or a bias (see `added`), which cudnn does not support. `drop`: dropout of the probabilities,
    which only einsum supports. Returns (B, L, N, K) in q's type.
    """
    bias = added(mask_BS)
    mask_BS = None if bias is not None else mask_BS
    if backend == "cudnn":
        return cudnn_attention(q_BLNK, k_BSGK, v_BSGK, mask_BS, causal=causal)
    mask_BLS = mask_BS if mask_BS is None else (mask_BS if mask_BS.ndim == 3 else mask_BS[:, None, :]).astype(bool)
    if backend == "xla":
        visible = None if mask_BLS is None else mask_BLS[:, None]
        return jax.nn.dot_product_attention(q_BLNK, k_BSGK, v_BSGK, bias, mask=visible, is_causal=causal)
    L = q_BLNK.shape[1]
    visible = jnp.tril(jnp.ones((1, L, L), bool)) if causal else None
    if mask_BLS is not None:
        visible = mask_BLS if visible is None else visible & mask_BLS
    return einsum_attention(q_BLNK, k_BSGK, v_BSGK, visible, drop, bias)
