"""Decoding for many texts: weights are read once for all of them, and the key/value cache as far as it is filled.

Two things differ from the model's own decoding. A Flax interceptor does them, so that the models know nothing of it:

* Kernels are stored as (F, D), and a matmul has them on the left: for few rows the fast form on CPUs.
* The cache of a text is divided into blocks of keys, and a block that no text has reached is skipped at run time.

A row's numbers come from that row alone, in products of the same shape whatever the other rows hold. Letters: see
lab/models/layers.py, and C keys of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from lab.models.layers import Dense, SelfAttention

ROWS = 2  # of a product, at least: one bfloat16 row takes tenfold the time
SAME = 16  # rows of a float32 product
KEYS = 64  # of the first block
LEAST = jnp.finfo(jnp.float32).min
Blocks = tuple[Array, ...]
"""The keys or values of all slots: arrays (S, G, C, K), with an axis of layers in front if the model scans them."""


def blocks_of(context: int) -> tuple[int, ...]:
    """Keys of the blocks: 64, 64, 128, 256, ..., as many as the context."""
    parts: list[int] = []
    while (done := sum(parts)) < context:
        parts.append(min(max(done, KEYS), context - done))
    return tuple(parts)


def stored(params: Any, dtype: Any) -> Any:
    """Parameters as used here: kernels as (F, D). Matrices and tables are rounded to `dtype`; norms and biases are
    not."""
    def one(path: tuple[Any, ...], x: Array) -> Array:
        last = getattr(path[-1], "key", None)
        if last == "kernel":
            return x.swapaxes(-1, -2).astype(dtype)
        return x.astype(dtype) if last in ("embedding", "head") else x

    return jax.tree_util.tree_map_with_path(one, params)


def empty_cache(model: nn.Module, params: Any, slots: int) -> Any:
    """The cache of a model without any text: a tree of `Blocks`. `params`: the model's own."""
    start = jnp.zeros((1, 1), int)
    shapes = jax.eval_shape(lambda params: model.apply({"params": params}, start, train=False, decode=True,
                                                       positions=start, mutable=["cache"])[1], params)["cache"]
    return jax.tree.map(lambda x: tuple(jnp.zeros((*x.shape[:-4], slots, x.shape[-3], keys, x.shape[-1]))
                                        for keys in blocks_of(model.context)), shapes)


def step(model: nn.Module, params: Any, cache: Any, ids_B: Array, positions_B: Array) -> tuple[Array, Any]:
    """A token of each of the first B slots: (float32 logits (B, V), the cache with the new keys and values).

    Args:
      params: see `stored`.
      positions_B: -1 for a row that is idle: it writes nothing.
    """
    B = len(ids_B)
    ids_B1, positions_B1 = _padded(ids_B[:, None]), _padded(positions_B[:, None], -1)
    x_B1D, kernel_DV, cache = _apply(model, params, cache, ids_B1, positions_B1, texts=B, slot=None)
    return _logits(model, params, x_B1D[:, 0], kernel_DV)[:B], cache


def extend(model: nn.Module, params: Any, cache: Any, slot: Array, ids_1L: Array, first: Array,
           last: Array) -> tuple[Array, Any]:
    """Tokens of one slot from position `first` on: (float32 logits (1, V) after index `last` of them, the cache)."""
    positions_1L = first + jnp.arange(ids_1L.shape[1])[None]
    x_1LD, kernel_DV, cache = _apply(model, params, cache, ids_1L, positions_1L, texts=1, slot=slot)
    x_1D = jax.lax.dynamic_index_in_dim(x_1LD, last, 1, keepdims=False)
    return _logits(model, params, _padded(x_1D), kernel_DV)[:1], cache


def _padded(x: Array, value: int = 0) -> Array:
    return jnp.pad(x, ((0, max(ROWS - len(x), 0)), (0, 0)), constant_values=value)


def _apply(model: nn.Module, params: Any, cache: Any, ids_BL: Array, positions_BL: Array, **rows: Any) -> tuple[
        Array, Array, Any]:
    """(last hidden states (B, L, D), output kernel (D, V), cache). `rows`: see `_attention`."""
    with nn.intercept_methods(functools.partial(_intercept, **rows)):
        (x_BLD, kernel_DV), changed = model.apply({"params": params, "cache": cache}, ids_BL, train=False, decode=True,
                                                  positions=positions_BL, mutable=["cache"], head=False)
    return x_BLD, kernel_DV, changed["cache"]


def _logits(model: nn.Module, params: Any, x_BD: Array, kernel_DV: Array) -> Array:
    dtype = params["wte"]["embedding"].dtype
    return model.logits(x_BD[:, None].astype(dtype), kernel_DV.astype(dtype))[:, 0]


def _intercept(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any, *,
               texts: int, slot: Array | None) -> Any:
    module = context.module
    if isinstance(module, Dense) and context.method_name == "__call__":
        return _dense(module, *args, whole=slot is not None)
    if isinstance(module, SelfAttention) and context.method_name == "_decode":
        return _attention(module, *args[:4], texts=texts, slot=slot)  # without a bias, which GPT has none of
    return own(*args, **kwargs)


def _dense(module: Dense, x: Array, *, whole: bool) -> Array:
    kernel_FD = module.get_variable("params", "kernel")
    rows_MD = x.reshape(-1, x.shape[-1]).astype(kernel_FD.dtype)
    # In float32 a CPU's order of summation depends on the number of rows, from 32 on.
    count = len(rows_MD) if whole or kernel_FD.dtype != jnp.float32 else SAME
    parts = [jax.lax.dot_general(kernel_FD, rows_MD[at:at + count], (((1,), (1,)), ((), ())),
                                 preferred_element_type=jnp.float32) for at in range(0, len(rows_MD), count)]
    # Without the barrier the compiler exchanges the operands.
    y_MF = jnp.concatenate([y_FM.T for y_FM in jax.lax.optimization_barrier(parts)])
    y = y_MF.reshape(*x.shape[:-1], -1)
    return y + module.get_variable("params", "bias") if module.bias else y


def _attention(module: SelfAttention, q_BLNK: Array, k_BLGK: Array, v_BLGK: Array, positions_BL: Array, *, texts: int,
               slot: Array | None) -> Array:
    """Writes keys and values to the cache, and attends to it. `texts`: rows that are no padding, in the first slots, or
    one in `slot`."""
    q_BLNK, rest = q_BLNK[:texts], q_BLNK[texts:]
    at_BL = jnp.broadcast_to(positions_BL, (len(k_BLGK), q_BLNK.shape[1]))[:texts]
    slots_B = jnp.arange(texts) if slot is None else slot[None]
    both = []
    for name, new_BLGK in (("keys", k_BLGK), ("values", v_BLGK)):
        both.append(_written(module.get_variable("cache", name), new_BLGK[:texts], slots_B, at_BL))
        module.put_variable("cache", name, both[-1])
    return jnp.concatenate([_attend(q_BLNK, *both, at_BL, slot), jnp.zeros_like(rest)])


def _written(blocks: Blocks, new_BLGK: Array, slots_B: Array, positions_BL: Array) -> Blocks:
    done, start = [], 0
    for block in blocks:
        C = block.shape[-2]
        place_BL = positions_BL - start
        place_BL = jnp.where(place_BL < 0, C, place_BL)  # outside of the block: dropped
        done.append(block.at[slots_B[:, None], :, place_BL].set(new_BLGK, mode="drop"))
        start += C
    return tuple(done)


def _attend(q_BLNK: Array, keys: Blocks, values: Blocks, positions_BL: Array, slot: Array | None) -> Array:
    """Attention of each query to the keys up to its position, block by block: the softmax over all from the maximum and
    the sum of each (Milakov & Gimelshein 2018)."""
    B, L, N, K = q_BLNK.shape
    G = keys[0].shape[1]
    q_BGMK = rearrange(q_BLNK, "B L (G R) K -> B G (R L) K", G=G)
    at_BM = jnp.tile(positions_BL, N // G)

    def attended(keys_SGCK: Array, values_SGCK: Array, start: int) -> tuple[Array, Array, Array]:
        k_BGCK, v_BGCK = (x[:B] if slot is None else jax.lax.dynamic_slice_in_dim(x, slot, 1)
                          for x in (keys_SGCK, values_SGCK))
        scores_BGMC = jnp.einsum("BGMK,BGCK->BGMC", q_BGMK, k_BGCK) * K**-0.5
        visible_BMC = start + jnp.arange(k_BGCK.shape[2]) <= at_BM[..., None]
        scores_BGMC = jnp.where(visible_BMC[:, None], scores_BGMC, LEAST)
        most_BGM = scores_BGMC.max(-1)
        weights_BGMC = jnp.exp(scores_BGMC - most_BGM[..., None])
        return most_BGM, weights_BGMC.sum(-1), jnp.einsum("BGMC,BGCK->BGMK", weights_BGMC, v_BGCK)

    def skipped(keys_SGCK: Array, values_SGCK: Array) -> tuple[Array, Array, Array]:
        zeros_BGM = jnp.zeros(q_BGMK.shape[:3])
        return zeros_BGM + LEAST, zeros_BGM, jnp.zeros_like(q_BGMK)

    parts, start = [], 0
    for block in zip(keys, values, strict=True):
        reached = positions_BL.max() >= start
        parts.append(jax.lax.cond(reached, functools.partial(attended, start=start), skipped, *block))
        start += block[0].shape[2]
    most_BGM = functools.reduce(jnp.maximum, [most for most, _, _ in parts])
    scales = [jnp.exp(most - most_BGM) for most, _, _ in parts]
    total_BGM = sum(scale * whole for scale, (_, whole, _) in zip(scales, parts, strict=True))
    y_BGMK = sum(scale[..., None] * y for scale, (_, _, y) in zip(scales, parts, strict=True))
    return rearrange(y_BGMK / total_BGM[..., None], "B G (R L) K -> B L (G R) K", L=L)
