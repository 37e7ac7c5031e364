"""Beam search over an encoder-decoder: one prefill, then one compiled step per token over key/value caches."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

CACHES = ["cache", "memory"]  # of the target so far, and of the source, which is equal for all beams


def penalised(log_prob: Array, length: Array, penalty: float | Array) -> Array:
    """log P / ((5 + length) / 6)^penalty (Wu et al. 2016, equation 14, without coverage)."""
    return log_prob / ((5.0 + length) / 6.0) ** penalty


class _Beams(NamedTuple):
    step: Array
    tokens_BKL: Array
    log_prob_BK: Array
    """Of all tokens so far; -inf for beams that do not exist yet."""
    length_BK: Array
    """Tokens, with the one that ends; 0 while the hypothesis has not ended."""
    cache: Any


def _chosen(beams: _Beams, logits_BKV: Array, boundary: int | Array, vocab: int | Array | None) -> tuple[_Beams, Array]:
    """The beams one token longer, and the beam that each comes from (B, K)."""
    B, K, V = logits_BKV.shape
    ids_V = jnp.arange(V)
    if vocab is not None:
        logits_BKV = jnp.where(ids_V < vocab, logits_BKV, -jnp.inf)
    ended_BK1, end_V = beams.length_BK[..., None] > 0, ids_V == boundary
    # An ended hypothesis has one continuation, itself, and comes first: it keeps its place in the beam.
    value_BKV = jnp.where(ended_BK1, jnp.where(end_V, 0.0, -jnp.inf), jax.nn.log_softmax(logits_BKV))
    value_BKV += beams.log_prob_BK[..., None]
    order_BKV = jnp.where(ended_BK1 & end_V, jnp.inf, value_BKV)
    _, flat_BK = jax.lax.top_k(order_BKV.reshape(B, -1), K)
    from_BK, token_BK = flat_BK // V, flat_BK % V
    log_prob_BK = jnp.take_along_axis(value_BKV.reshape(B, -1), flat_BK, axis=1)
    tokens_BKL = jnp.take_along_axis(beams.tokens_BKL, from_BK[..., None], axis=1)
    before_BK = jnp.take_along_axis(beams.length_BK, from_BK, axis=1)
    length_BK = jnp.where(before_BK > 0, before_BK, jnp.where(token_BK == boundary, beams.step + 1, 0))
    return beams._replace(
        step=beams.step + 1, tokens_BKL=tokens_BKL.at[:, :, beams.step].set(token_BK), log_prob_BK=log_prob_BK,
        length_BK=jnp.where(jnp.isfinite(log_prob_BK), length_BK, 0)), from_BK  # fewer continuations than beams


@functools.partial(jax.jit, static_argnames=("model", "beams", "length"))
def beam_search(model: nn.Module, params: Any, source_BS: Array, mask_BS: Array, *, beams: int, length: int,
                penalty: float | Array = 0.0, boundary: int | Array = 0,
                vocab: int | Array | None = None) -> tuple[Array, Array]:
    """The most likely targets that beam search finds for each source, best first.

    `boundary`: the id that begins a target and ends it. Each step keeps the `beams` most likely continuations; one that
    has ended stays, and the search goes on with the others (Sutskever et al. 2014). At the end, or after `length`
    tokens, the hypotheses are ordered by `penalised`. With one beam this is greedy decoding, whatever the penalty.
    `vocab`: ids from `vocab` on only pad the model's vocabulary and are never chosen. A row does not depend on the
    others, up to rounding.

    Returns:
      tokens int32 (B, beams, length), filled up with `boundary`; and scores float32 (B, beams), -inf for hypotheses
      beyond the number of those that exist.
    """
    B, K = source_BS.shape[0], beams
    layers = int(getattr(model, "scan", False))  # scanned layers are stacked along a leading axis
    variables = {"params": params}
    begin_B1 = jnp.full((B, 1), boundary, jnp.int32)
    logits_B1V, cache = model.apply(variables, source_BS, begin_B1, train=False, mask=mask_BS, decode=True,
                                    positions=jnp.zeros(1, jnp.int32), mutable=CACHES)
    cache = jax.tree.map(lambda x: jnp.repeat(x, K, axis=layers), cache)
    mask_MS = jnp.repeat(mask_BS, K, axis=0)  # M: rows B K

    def forward(beams: _Beams) -> _Beams:
        last_BK = jax.lax.dynamic_index_in_dim(beams.tokens_BKL, beams.step - 1, axis=2, keepdims=False)
        logits_M1V, cache = model.apply({**variables, **beams.cache}, None, last_BK.reshape(-1, 1), train=False,
                                        mask=mask_MS, decode=True, positions=beams.step[None], mutable=CACHES)
        beams, from_BK = _chosen(beams, logits_M1V.reshape(B, K, -1), boundary, vocab)
        rows_M = (from_BK + K * jnp.arange(B)[:, None]).reshape(-1)
        moved = jax.tree.map(lambda x: jnp.take(x, rows_M, axis=layers), cache["cache"]) if K > 1 else cache["cache"]
        return beams._replace(cache={**cache, "cache": moved})

    start = _Beams(jnp.zeros((), jnp.int32), jnp.full((B, K, length), boundary, jnp.int32),
                   jnp.where(jnp.arange(K) == 0, 0.0, -jnp.inf) * jnp.ones((B, 1)), jnp.zeros((B, K), jnp.int32), cache)
    first, _ = _chosen(start, jnp.repeat(logits_B1V, K, axis=1), boundary, vocab)
    more = lambda beams: (beams.step < length) & jnp.any((beams.length_BK == 0) & jnp.isfinite(beams.log_prob_BK))
    last = jax.lax.while_loop(more, forward, first)
    score_BK = penalised(last.log_prob_BK, jnp.where(last.length_BK > 0, last.length_BK, length), penalty)
    score_BK, order_BK = jax.lax.top_k(score_BK, K)
    return jnp.take_along_axis(last.tokens_BKL, order_BK[..., None], axis=1), score_BK
