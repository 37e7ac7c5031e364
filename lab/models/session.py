"""A text that grows turn by turn: its key/value cache stays, so that each token is computed once."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lab.models.generate import pick


@functools.partial(jax.jit, static_argnames=("model", "top_k", "vocab"), donate_argnames=("cache",))
def _extend(model: nn.Module, params: Any, cache: Any, ids_1L: Array, first: Array, last: Array, key: Array,
            temperature: Array, top_p: Array, *, top_k: int | None, vocab: int) -> tuple[Array, Any]:
    """Writes tokens to the cache from position `first` on; returns a token to follow index `last`, and the cache."""
    positions = first + jnp.arange(ids_1L.shape[1])
    logits_1LV, changed = model.apply({"params": params, "cache": cache}, ids_1L, train=False, decode=True,
                                      positions=positions, mutable=["cache"])
    logits_1V = jnp.where(jnp.arange(logits_1LV.shape[-1]) < vocab, logits_1LV[:, last], -jnp.inf)
    token_1 = pick(logits_1V, jax.random.fold_in(key, first + last)[None], temperature, top_k, top_p)
    return token_1[0], changed["cache"]


class Session:
    """Generates tokens after a text of one row, and keeps the cache for the next, longer text.

    ``computed`` counts the tokens that went through the model. The token at a position depends on the text before it,
    the seed and the position only.
    """

    def __init__(self, model: nn.Module, params: Any, *, vocab: int, seed: int = 0, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float = 1.0):
        self.model, self.params, self.context = model, jax.device_put(params), model.context  # once, not per token
        self._how = {"top_k": top_k, "vocab": vocab}
        self._numbers = np.float32(temperature), np.float32(top_p)
        self._key = jax.random.key(seed)
        shapes = jax.eval_shape(lambda: model.apply({"params": params}, jnp.zeros((1, 1), int), train=False,
                                                    decode=True, positions=jnp.zeros(1, int), mutable=["cache"])[1])
        self._cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes["cache"])
        self.ids: list[int] = []
        self.computed = 0

    def tokens(self, ids: Sequence[int], stop: Sequence[int] = ()) -> Iterator[int]:
        """The tokens that follow `ids`, one at a time, until one of `stop` (which is not returned) or a full context.

        Computes only what `ids` adds to the longest beginning that is in the cache.
        """
        ids = [int(i) for i in ids]
        if not 0 < len(ids) <= self.context:
            raise ValueError(f"{len(ids)} tokens in a context of {self.context}")
        known = next((i for i, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b),
                     min(len(self.ids), len(ids)))
        known = min(known, len(ids) - 1)  # the last token's logits are needed
        token = self._extend(known, ids[known:])
        while token not in stop:
            yield token
            if len(self.ids) == self.context:
                return
            token = self._extend(len(self.ids), [token])

    def _extend(self, first: int, new: list[int]) -> int:
        # Padded to a power of two, to compile for few widths. Padding is overwritten before a query reaches it.
        width = min(1 << (len(new) - 1).bit_length(), self.context - first)
        ids_1L = np.zeros((1, width), np.int32)
        ids_1L[0, :len(new)] = new
        token, self._cache = _extend(self.model, self.params, self._cache, ids_1L, np.int32(first),
                                     np.int32(len(new) - 1), self._key, *self._numbers, **self._how)
        self.ids[first:] = new
        self.computed += len(new)
        return int(token)
