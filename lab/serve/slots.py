"""S texts that grow side by side in one static key/value cache: two kinds of compiled program, whoever comes and goes.

A row of a batch is computed from that row alone, and the shapes never change. So the tokens of a text do not depend on
the other texts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lab.serve.sampling import Rows, Sampled, Settings, pick_rows, rows_of

WIDTHS = (16, 64, 256)  # tokens of a prompt that are computed at once, after padding


def _masked(logits_BV: Array, vocab: int) -> Array:
    """-inf for ids that only pad the model's vocabulary."""
    return jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab, logits_BV, -jnp.inf)


@functools.partial(jax.jit, static_argnames=("model", "vocab", "axes"), donate_argnames=("cache",))
def _prefill(model: nn.Module, params: Any, cache: Any, slot: Array, ids_1L: Array, first: Array, last: Array,
             rows: Rows, *, vocab: int, axes: tuple[int, ...]) -> tuple[Any, Sampled]:
    """Writes ids to a slot's cache from position `first` on, and samples a token to follow index `last` of them."""
    leaves, tree = jax.tree.flatten(cache)
    own = [jax.lax.dynamic_slice_in_dim(x, slot, 1, axis) for x, axis in zip(leaves, axes, strict=True)]
    apply = functools.partial(model.apply, {"params": params, "cache": tree.unflatten(own)}, ids_1L, train=False,
                              decode=True, positions=first + jnp.arange(ids_1L.shape[1]), mutable=["cache"])
    (x_1LD, kernel_DV), changed = apply(head=False)
    logits_1V = model.logits(jax.lax.dynamic_slice_in_dim(x_1LD, last, 1, 1), kernel_DV)[:, 0]
    new = [jax.lax.dynamic_update_slice_in_dim(x, row, slot, axis)
           for x, row, axis in zip(leaves, jax.tree.leaves(changed["cache"]), axes, strict=True)]
    return tree.unflatten(new), pick_rows(_masked(logits_1V, vocab), rows, (first + last)[None])


@functools.partial(jax.jit, static_argnames=("model", "vocab"), donate_argnames=("cache",))
def _decode(model: nn.Module, params: Any, cache: Any, token_S: Array, position_S: Array, rows: Rows, *,
            vocab: int) -> tuple[Any, Sampled]:
    """Writes one token per slot, at its position, and samples the next one of each."""
    logits_S1V, changed = model.apply({"params": params, "cache": cache}, token_S[:, None], train=False, decode=True,
                                      positions=position_S[:, None], mutable=["cache"])
    return changed["cache"], pick_rows(_masked(logits_S1V[:, 0], vocab), rows, position_S)


class Slots:
    """The cache of S texts, and what is in it: `ids[s]` are the tokens of slot s.

    Args:
      model: a GPT, whose context is the longest text.
      params: on the host or a device.
      slots: S.
      vocab: the tokenizer's size; larger ids are never sampled.
    """

    def __init__(self, model: nn.Module, params: Any, *, slots: int, vocab: int):
        self.model, self.params, self.vocab, self.context = model, jax.device_put(params), vocab, model.context
        self.widths = tuple(w for w in WIDTHS if w < self.context) or (self.context,)
        self._shapes = self._shapes_of(slots)
        one, two = (jax.tree.leaves(self._shapes_of(n)) for n in (1, 2))
        # The axis of the slots, in each leaf: scanned layers have theirs in front of it.
        self._axes = tuple(next(i for i, (a, b) in enumerate(zip(x.shape, y.shape, strict=True)) if a != b)
                           for x, y in zip(one, two, strict=True))
        self.clear(slots)

    def _shapes_of(self, slots: int) -> Any:
        start = jnp.zeros((slots, 1), int)
        return jax.eval_shape(lambda: self.model.apply({"params": self.params}, start, train=False, decode=True,
                                                       positions=start, mutable=["cache"])[1])["cache"]

    def clear(self, slots: int | None = None) -> None:
        """Forgets all texts."""
        self.ids: list[list[int]] = [[] for _ in range(slots or len(self.ids))]
        self._cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._shapes)

    def compile(self) -> None:
        """Compiles all programs, by running them on empty slots."""
        for width in self.widths:
            self.extend(0, [0] * width, Settings())
        self.step({}, {})
        self.clear()

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
                                      np.int32(len(text) - 1 - first), rows_of([settings]), vocab=self.vocab,
                                      axes=self._axes)
        self.ids[slot] = text
        return len(part), Sampled(*jax.device_get(found))

    def step(self, tokens: dict[int, int], settings: dict[int, Settings]) -> Sampled:
        """Appends a token to some slots, slot -> token, and samples the next; rows of other slots mean nothing."""
        # The row of an idle slot is written behind its text, where it is overwritten before a query reaches it.
        ends = [min(len(ids), self.context - 1) for ids in self.ids]
        idle = Settings(temperature=0.0)
        rows = rows_of([settings.get(s, idle) for s in range(len(self.ids))])
        token_S = np.array([tokens.get(s, 0) for s in range(len(self.ids))], np.int32)
        self._cache, found = _decode(self.model, self.params, self._cache, token_S, np.array(ends, np.int32), rows,
                                     vocab=self.vocab)
        for slot, token in tokens.items():
            self.ids[slot].append(token)
        return Sampled(*jax.device_get(found))

    def rewind(self, slot: int, length: int) -> None:
        """Forgets a slot's tokens from `length` on. An idle slot must forget the last position of the context, over
        which the steps of the others write."""
        self.ids[slot] = self.ids[slot][:length]
