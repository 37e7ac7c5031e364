"""Greedy continuations until a stop text, in batches; like scores, each depends on its own prompt alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, PartitionSpec

from lab.harness.scoring import ROWS, Language, Progress, batches, by_length

STEPS = 16  # tokens per compiled call, after which the texts are searched for their stop


def _cache_spec(model: Any) -> PartitionSpec:
    return PartitionSpec(None, "rows") if model.scan else ROWS


@functools.partial(jax.jit, static_argnames=("model", "mesh", "vocab"))
def _prefill(variables: Any, prompt_BL: Array, lengths_B: Array, *, model: Any, mesh: Mesh,
             vocab: int) -> tuple[Array, Any]:
    """(first new token int32 (B,), cache) of prompts padded on the right."""
    def on_device(variables: Any, prompt_BL: Array, lengths_B: Array) -> tuple[Array, Any]:
        (x_BLD, kernel_DV), changed = model.apply(variables, prompt_BL, train=False, decode=True, head=False,
                                                  positions=jnp.arange(prompt_BL.shape[1]), mutable=["cache"])
        last_B1D = jnp.take_along_axis(x_BLD, (lengths_B - 1)[:, None, None], 1)
        return _greedy(model.logits(last_B1D, kernel_DV), vocab), changed["cache"]

    return jax.shard_map(on_device, mesh=mesh, in_specs=(PartitionSpec(), ROWS, ROWS),
                         out_specs=(ROWS, _cache_spec(model)), check_vma=False)(variables, prompt_BL, lengths_B)


@functools.partial(jax.jit, static_argnames=("model", "mesh", "vocab"), donate_argnames=("cache",))
def _extend(variables: Any, cache: Any, token_B: Array, position_B: Array, *, model: Any, mesh: Mesh,
            vocab: int) -> tuple[Array, Array, Any]:
    """(`STEPS` tokens from `token_B` on (B, STEPS), the token after them, cache)."""
    def on_device(variables: Any, cache: Any, token_B: Array, position_B: Array) -> tuple[Array, Array, Any]:
        def step(carry: tuple, i: Array) -> tuple[tuple, Array]:
            token_B, cache = carry
            # A row at its end waits for the others: it writes to its last place.
            place_B1 = jnp.minimum(position_B + i, model.context - 1)[:, None]
            logits_B1V, changed = model.apply({**variables, "cache": cache}, token_B[:, None], train=False,
                                              decode=True, positions=place_B1, mutable=["cache"])
            return (_greedy(logits_B1V, vocab), changed["cache"]), token_B

        (token_B, cache), tokens = jax.lax.scan(step, (token_B, cache), jnp.arange(STEPS))
        return tokens.T, token_B, cache

    spec = _cache_spec(model)
    return jax.shard_map(on_device, mesh=mesh, in_specs=(PartitionSpec(), spec, ROWS, ROWS),
                         out_specs=(ROWS, ROWS, spec), check_vma=False)(variables, cache, token_B, position_B)


def _greedy(logits_B1V: Array, vocab: int) -> Array:
    """Ids from `vocab` on only pad the model's vocabulary."""
    return jnp.argmax(jnp.where(jnp.arange(logits_B1V.shape[-1]) < vocab, logits_B1V[:, 0], -jnp.inf), -1).astype(
        jnp.int32)


def continue_greedily(language: Language, prompts: Sequence[Sequence[int]], new_tokens: int,
                      ended: Callable[[list[int]], bool]) -> list[list[int]]:
    """At most `new_tokens` (below the model's context) new tokens for each prompt, whose beginning is cut off if both
    do not fit the context; fewer once `ended(tokens)`, or from the end-of-text token on, which is left out.
    """
    context = language.context
    prompts = [list(ids)[-(context - new_tokens):] for ids in prompts]
    found: list[list[int]] = [[] for _ in prompts]
    done, progress = 0, Progress()
    for length, places in by_length([len(ids) for ids in prompts], context - new_tokens):
        model = language.model
        if model.position == "rotary":  # the cache has as many rows as the context
            model = model.clone(context=length + new_tokens)
        for chosen in batches(places, _rows(model, length, language) * language.mesh.size):
            rows = _group(language, model, length, [prompts[i] for i in chosen], new_tokens, ended)
            for place, tokens in zip(chosen, rows, strict=True):
                found[place] = tokens
            done += len(chosen)
            progress(f"continued {done:,} of {len(prompts):,} texts")
    return found


def _rows(model: Any, length: int, language: Language) -> int:
    """Rows of a device, by the memory of their cache and attention scores."""
    most, rows = 2 * language.memory, 32 if language.on_accelerator else 8
    one = 4 * model.context * (2 * model.depth * model.width + 2 * model.heads * length)
    return 1 << max(min(most // one, rows), 1).bit_length() - 1


def _group(language: Language, model: Any, length: int, prompts: Sequence[list[int]], new_tokens: int,
           ended: Callable[[list[int]], bool]) -> list[list[int]]:
    """The new tokens of prompts of one padded length, of at most one call."""
    size = _rows(model, length, language) * language.mesh.size
    prompt, lengths = np.zeros((size, length), np.int32), np.ones(size, np.int32)
    for i, ids in enumerate(prompts):
        prompt[i, : len(ids)], lengths[i] = ids, len(ids)
    how = {"model": model, "mesh": language.mesh, "vocab": language.text.size}
    token, cache = _prefill(language.placed, language.put(prompt), language.put(lengths), **how)
    out: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for first in range(0, new_tokens, STEPS):
        tokens, token, cache = _extend(language.placed, cache, token, language.put(lengths + np.int32(first)), **how)
        for i, new in enumerate(process_allgather(tokens, tiled=True)[: len(prompts)].tolist()):
            if not done[i]:
                out[i] = _until(out[i] + new, language.text.eot)[:new_tokens]
                done[i] = len(out[i]) < min(first + STEPS, new_tokens) or ended(out[i])
        if all(done):
            break
    return out


def _until(tokens: list[int], stop: int | None) -> list[int]:
    return tokens[: tokens.index(stop)] if stop in tokens else tokens
