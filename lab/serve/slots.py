"""S texts that grow side by side in one static key/value cache: few compiled programs, whoever comes and goes.

A row of a batch is computed from that row alone. A step has as many rows as the texts need, from a few compiled
numbers; before any request, `compile` compares the bits of a row in all of them, and one that differs is not used. So
the tokens of a text do not depend on the other texts.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from lab.serve import decoding
from lab.serve.sampling import Rows, Sampled, Settings, pick_rows, rows_of

log = logging.getLogger(__name__)
WIDTHS = (16, 64, 256)  # tokens of a prompt that are computed at once, after padding


def _masked(logits_BV: Array, vocab: int) -> Array:
    """-inf for ids that only pad the model's vocabulary."""
    return jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab, logits_BV, -jnp.inf)


@functools.partial(jax.jit, static_argnames=("model", "vocab"), donate_argnames=("cache",))
def _prefill(model: nn.Module, params: Any, cache: Any, slot: Array, ids_1L: Array, first: Array, last: Array,
             rows: Rows, *, vocab: int) -> tuple[Any, Sampled]:
    """Writes ids to a slot's cache from position `first` on, and samples a token to follow index `last` of them."""
    logits_1V, cache = decoding.extend(model, params, cache, slot, ids_1L, first, last)
    return cache, pick_rows(_masked(logits_1V, vocab), rows, (first + last)[None])


@functools.partial(jax.jit, static_argnames=("model", "vocab"), donate_argnames=("cache",))
def _decode(model: nn.Module, params: Any, cache: Any, token_B: Array, position_B: Array, rows: Rows, *,
            vocab: int) -> tuple[Any, Sampled]:
    """Writes a token to each of the first B slots, at its position, and samples the next one of each."""
    logits_BV, cache = decoding.step(model, params, cache, token_B, position_B)
    return cache, pick_rows(_masked(logits_BV, vocab), rows, position_B)


def _cache_beside(model: nn.Module, params: Any, slots: int) -> Any:
    """An empty cache on the devices of the parameters."""
    cache = decoding.empty_cache(model, params, slots)
    place = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(place, NamedSharding):
        return jax.device_put(cache, place)

    def put(x: Array) -> Array:  # (..., S, G, C, K)
        heads = "tensor" if x.shape[-3] % place.mesh.shape["tensor"] == 0 else None
        return jax.device_put(x, NamedSharding(place.mesh, PartitionSpec(*[None] * (x.ndim - 3), heads)))

    return jax.tree.map(put, cache)


class Slots:
    """The cache of S texts, and what is in it: `ids[s]` are the tokens of slot s.

    Args:
      model: a GPT, whose context is the longest text.
      params: on the host, a device or a mesh, which then computes everything; its axis "tensor" divides the cache by
        heads, if it can.
      slots: S.
      vocab: the tokenizer's size; larger ids are never sampled.
      precision: of the stored matrices and of the operands of their products; all else is float32.
    """

    def __init__(self, model: nn.Module, params: Any, *, slots: int, vocab: int,
                 precision: Literal["float32", "bfloat16"] = "float32"):
        self.model, self.vocab, self.context = model, vocab, model.context
        self.widths = tuple(w for w in WIDTHS if w < self.context) or (self.context,)
        self.rows = [rows for rows in (8, 16, 64, 256) if rows < slots] + [slots]
        """Numbers of texts that a step can have."""
        self._empty = functools.partial(_cache_beside, model, params, slots)
        self.params = jax.jit(decoding.stored, static_argnums=1)(params, precision)
        self.ids: list[list[int]] = [[] for _ in range(slots)]
        self._cache = self._empty()

    def clear(self) -> None:
        """Forgets all texts."""
        self.ids = [[] for _ in self.ids]
        self._cache = self._empty()

    def compile(self) -> None:
        """Compiles all programs, by running them on a text in the first slot."""
        for width in self.widths:
            self.extend(0, [0] * width, Settings())
            self.rewind(0, 0)
        text = [i % self.vocab for i in range(1, min(8, self.context))]
        found = {}
        for rows in self.rows:
            self.extend(0, text[:1], Settings())
            steps = [self._step({0: token}, {0: Settings(temperature=0.0)}, rows) for token in text[1:]]
            found[rows] = [step.top_logp_BT[0] for step in steps]
            self.rewind(0, 0)
        same = [rows for rows in self.rows if np.array_equal(found[rows], found[self.rows[-1]])]
        if same != self.rows:
            log.info("steps of %s rows differ in the last bits here: all have one of %s", self.rows, same)
        self.rows = same

    def extend(self, slot: int, new: Sequence[int], settings: Settings) -> tuple[int, Sampled]:
        """Computes some of the ids `new` that follow a slot's text. Returns how many, and what follows the last one
        (which is of use if that was the last of all)."""
        known = self.ids[slot]
        width = next((w for w in self.widths if w >= len(new)), self.widths[-1])
        part = list(new[:width])
        text = known + part
        # Near the end of the context the padding has no room: some known tokens are computed again instead.
        first = min(len(known), self.context - width)
        ids_1L = np.zeros((1, width), np.int32)
        ids_1L[0, :len(text) - first] = text[first:]
        self._cache, found = _prefill(self.model, self.params, self._cache, np.int32(slot), ids_1L, np.int32(first),
                                      np.int32(len(text) - 1 - first), rows_of([settings]), vocab=self.vocab)
        self.ids[slot] = text
        return len(part), Sampled(*jax.device_get(found))

    def step(self, tokens: dict[int, int], settings: dict[int, Settings]) -> Sampled:
        """Appends a token to some slots, slot -> token, and samples the next; rows of other slots mean nothing. The
        last of the slots decides how many rows are computed."""
        return self._step(tokens, settings, self.rows_to(max(tokens)))

    def rows_to(self, slot: int) -> int:
        """The rows of the smallest step that computes a slot."""
        return next(rows for rows in self.rows if rows > slot)

    def _step(self, tokens: dict[int, int], settings: dict[int, Settings], rows: int) -> Sampled:
        token_B, position_B = np.zeros(rows, np.int32), np.full(rows, -1, np.int32)
        for slot, token in tokens.items():
            token_B[slot], position_B[slot] = token, len(self.ids[slot])
            self.ids[slot].append(token)
        idle = Settings(temperature=0.0)
        self._cache, found = _decode(self.model, self.params, self._cache, token_B, position_B,
                                     rows_of([settings.get(slot, idle) for slot in range(rows)]), vocab=self.vocab)
        return Sampled(*jax.device_get(found))

    def rewind(self, slot: int, length: int) -> None:
        """Forgets a slot's tokens from `length` on."""
        self.ids[slot] = self.ids[slot][:length]
