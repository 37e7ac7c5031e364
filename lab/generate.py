"""Sampling from a causal language model: one prefill, then one compiled step per token over a key/value cache."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def pick(logits_BV: Array, key: Array, temperature: float | Array, top_k: int | None, top_p: float | Array) -> Array:
    """One token a row from float32 logits; returns int32 (B,).

    Temperature 0 is greedy. `top_k` keeps the k largest logits (Fan et al. 2018), `top_p` the smallest set of tokens
    with at least that probability (Holtzman et al. 2020), after the temperature.
    """
    greedy = jnp.argmax(logits_BV, axis=-1)
    scaled_BV = logits_BV / jnp.maximum(temperature, 1e-6)
    if top_k is not None:
        kth = jax.lax.top_k(scaled_BV, min(top_k, scaled_BV.shape[-1]))[0][:, -1:]
        scaled_BV = jnp.where(scaled_BV < kth, -jnp.inf, scaled_BV)
    sorted_BV = jnp.sort(scaled_BV, axis=-1, descending=True)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    top_p = jnp.where(top_p >= 1, jnp.inf, top_p)  # rounding lets the cumulative sum reach 1 before the last token
    last = jnp.maximum(jnp.sum(before_BV < top_p, axis=-1, keepdims=True) - 1, 0)
    scaled_BV = jnp.where(scaled_BV < jnp.take_along_axis(sorted_BV, last, axis=-1), -jnp.inf, scaled_BV)
    sampled = jax.random.categorical(key, scaled_BV, axis=-1)
    return jnp.where(temperature > 0, sampled, greedy).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "new_tokens", "top_k"))
def generate(model: nn.Module, params: Any, prompt_BL: Array, lengths_B: Array, key: Array, *, new_tokens: int,
             temperature: float | Array = 1.0, top_k: int | None = None, top_p: float | Array = 1.0,
             stop: int | Array = -1) -> Array:
    """Continues prompts of different lengths in one batch; returns the new tokens, int32 (B, new_tokens).

    Prompts are padded on the right to (B, L); row b has `lengths_B[b]` >= 1 real tokens. The padding needs no mask: a
    query sees the cache up to its own position only, and each padded slot is overwritten before it comes into view.
    After `stop` a row is filled with `stop`. L + new_tokens must not exceed ``model.context``: the cache would wrap.
    """
    B, L = prompt_BL.shape
    if L + new_tokens > model.context:
        raise ValueError(f"{L} prompt + {new_tokens} new tokens exceed the context of {model.context}")
    rows = jnp.arange(B)
    logits_BLV, cache = model.apply({"params": params}, prompt_BL, train=False, decode=True, positions=jnp.arange(L),
                                    mutable=["cache"])

    def step(carry: tuple, key: Array) -> tuple[tuple, Array]:
        logits_BV, cache, position_B, done_B = carry
        token_B = jnp.where(done_B, stop, pick(logits_BV, key, temperature, top_k, top_p))
        logits_B1V, cache = model.apply({"params": params, **cache}, token_B[:, None], train=False, decode=True,
                                        positions=position_B[:, None], mutable=["cache"])
        return (logits_B1V[:, 0], cache, position_B + 1, done_B | (token_B == stop)), token_B

    start = (logits_BLV[rows, lengths_B - 1], cache, lengths_B, jnp.zeros(B, bool))
    _, tokens = jax.lax.scan(step, start, jax.random.split(key, new_tokens))
    return tokens.T


def sample_texts(model: nn.Module, params: Any, text: Any, prompts: list[str], *, seed: int, new_tokens: int,
                 temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> list[str]:
    """Continues text prompts, all in one batch. `text` encodes and decodes (`encode`, `decode`, `eot`).

    A prompt keeps at most its last half context, and what is new is as much as still fits the context. An empty prompt
    starts from the end-of-text token, or from a line end where the tokenizer has none.
    """
    if not prompts:
        return []
    start = [text.eot] if text.eot is not None else list(text.encode("\n"))
    encoded = [list(text.encode(prompt)) or start for prompt in prompts]
    encoded = [ids[-max(1, model.context // 2):] for ids in encoded]
    longest = max(map(len, encoded))
    new_tokens = min(new_tokens, model.context - longest)
    width = min(model.context - new_tokens, 1 << (longest - 1).bit_length())  # few widths, so few compilations
    prompt_BL = np.zeros((len(encoded), width), np.int32)
    for row, ids in zip(prompt_BL, encoded, strict=True):
        row[: len(ids)] = ids
    stop = -1 if text.eot is None else text.eot
    out = generate(model, params, prompt_BL, np.array([len(ids) for ids in encoded]), jax.random.key(seed), stop=stop,
                   new_tokens=new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    ends = [list(row).index(stop) if stop in row else len(row) for row in np.asarray(out)]
    return [text.decode(row[:end]) for row, end in zip(np.asarray(out), ends, strict=True)]
