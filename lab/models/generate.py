"""Sampling from a causal language model: one prefill, then one compiled step per token over a key/value cache."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lab.errors import UserError

log = logging.getLogger(__name__)


def check_numbers(new_tokens: int, temperature: float, top_k: int | None, top_p: float) -> None:
    """Raises UserError for a setting of sampling out of range."""
    for name, value, good in (("new-tokens", new_tokens, new_tokens >= 1),
                              ("top-k", top_k, top_k is None or top_k >= 1),
                              ("temperature", temperature, temperature >= 0), ("top-p", top_p, 0 < top_p <= 1)):
        if not good:
            raise UserError(f"--{name} {value} is out of range.")


def pick(logits_BV: Array, keys_B: Array, temperature: float | Array, top_k: int | None,
         top_p: float | Array) -> Array:
    """Samples one token per row from float32 logits, each with its own random key; returns int32 (B,). Temperature 0 is
    greedy."""
    def sampled() -> Array:
        possible_BV = truncated(logits_BV, temperature, top_k, top_p)
        return jax.vmap(jax.random.categorical)(keys_B, possible_BV).astype(jnp.int32)

    # A branch: sorting 100 rows of 49,152 logits takes a CPU as long as a small model.
    return jax.lax.cond(temperature > 0, sampled, lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32))


def truncated(logits_BV: Array, temperature: float | Array, top_k: int | None, top_p: float | Array) -> Array:
    """Logits divided by the temperature, and -inf for tokens that cannot be sampled.

    `top_k` keeps the k largest logits (Fan et al. 2018), `top_p` the smallest set of tokens whose total probability is
    at least `top_p` (Holtzman et al. 2020). Both apply after the temperature.
    """
    scaled_BV = logits_BV / jnp.maximum(temperature, 1e-6)
    if top_k is not None:
        kth = jax.lax.top_k(scaled_BV, min(top_k, scaled_BV.shape[-1]))[0][:, -1:]
        scaled_BV = jnp.where(scaled_BV < kth, -jnp.inf, scaled_BV)

    def likely() -> Array:
        sorted_BV = jnp.sort(scaled_BV, axis=-1, descending=True)
        probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        last = jnp.maximum(jnp.sum(before_BV < top_p, axis=-1, keepdims=True) - 1, 0)
        return jnp.where(scaled_BV < jnp.take_along_axis(sorted_BV, last, axis=-1), -jnp.inf, scaled_BV)

    return jax.lax.cond(top_p < 1, likely, lambda: scaled_BV)


@functools.partial(jax.jit, static_argnames=("model", "new_tokens", "top_k", "vocab"))
def generate(model: nn.Module, params: Any, prompt_BL: Array, lengths_B: Array, keys_B: Array, *, new_tokens: int,
             temperature: float | Array = 1.0, top_k: int | None = None, top_p: float | Array = 1.0,
             stop: int | Array = -1, vocab: int | None = None) -> Array:
    """Continues prompts of different lengths in one batch; returns the new tokens, int32 (B, new_tokens). A row's
    tokens depend on its prompt and its key only, up to the rounding of a product with other rows.

    Prompts are padded on the right to (B, L); row b has `lengths_B[b]` >= 1 real tokens. The padding needs no mask: a
    query attends up to its own position only, and each padded cache slot is overwritten before a query reaches it.
    After `stop` a row is filled with `stop`. L + new_tokens must not exceed ``model.context``: the cache would wrap.
    `vocab`: ids from `vocab` on only pad the model's vocabulary and are never sampled.
    """
    B, L = prompt_BL.shape
    if L + new_tokens > model.context:
        raise ValueError(f"{L} prompt + {new_tokens} new tokens exceed the context of {model.context}")
    rows = jnp.arange(B)
    fill = functools.partial(model.apply, {"params": params}, prompt_BL, train=False, decode=True,
                             positions=jnp.arange(L), mutable=["cache"])
    if hasattr(model, "logits"):  # of the last tokens only
        (x_BLD, kernel_DV), cache = fill(head=False)
        logits_BV = model.logits(x_BLD[rows, lengths_B - 1][:, None], kernel_DV)[:, 0]
    else:
        logits_BLV, cache = fill()
        logits_BV = logits_BLV[rows, lengths_B - 1]

    def step(carry: tuple, _: None) -> tuple[tuple, Array]:
        logits_BV, cache, position_B, done_B = carry
        if vocab is not None and vocab < logits_BV.shape[-1]:
            logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab, logits_BV, -jnp.inf)
        own_B = jax.vmap(jax.random.fold_in)(keys_B, position_B - 1)  # as in session.py
        token_B = jnp.where(done_B, stop, pick(logits_BV, own_B, temperature, top_k, top_p))
        logits_B1V, cache = model.apply({"params": params, **cache}, token_B[:, None], train=False, decode=True,
                                        positions=position_B[:, None], mutable=["cache"])
        return (logits_B1V[:, 0], cache, position_B + 1, done_B | (token_B == stop)), token_B

    start = (logits_BV, cache, lengths_B, jnp.zeros(B, bool))
    _, tokens = jax.lax.scan(step, start, length=new_tokens)
    return tokens.T


def _generate(model: nn.Module, variables: Mapping[str, Any], prompt_BL: Array, lengths_B: Array, keys_B: Array,
              temperature: Array, top_p: Array, stop: Array, *, new_tokens: int, top_k: int | None,
              vocab: int | None) -> Array:
    """`generate` with the signature that `EvalResult.compute` takes."""
    return generate(model, variables["params"], prompt_BL, lengths_B, jax.random.wrap_key_data(keys_B),
                    new_tokens=new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, stop=stop, vocab=vocab)


def sample_texts(compute: Callable[..., Any], context: int, text: Any, prompts: list[str], *, seed: int | Sequence[int],
                 new_tokens: int | None = None, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float = 1.0) -> list[str]:
    """Continues text prompts, all in one batch. `text`: the tokenizer (`encode`, `decode`, `eot`; optional:
    `continuation`, where ids at the beginning of a text decode otherwise); `compute`: see
    `lab.tasks.base.EvalResult`; `context`: the model's; `seed`: of all, or one for each prompt, whose text does
    not depend on the other prompts while it fits the context; `new_tokens` None: fill the context.

    If prompt and new tokens exceed the context, generation uses a sliding window: a full window is cut to its last
    half, so each later token sees at least half a context. An empty prompt starts from the end-of-text token, or from
    a token that separates words.
    """
    if not prompts:
        return []
    half = context // 2
    if not half:
        raise UserError(f"A model with a context of {context} token has no room for a text.")
    encoded = [list(text.encode(prompt)) or _start(text) for prompt in prompts]
    longest = max(map(len, encoded))
    new_tokens = max(1, context - longest) if new_tokens is None else new_tokens
    if longest + new_tokens > context:
        log.info("prompt and new tokens (%d + %d) exceed the model's context of %d: each token sees the last %d to %d",
                 longest, new_tokens, context, half, context)
        encoded = [ids[-max(half, context - new_tokens):] for ids in encoded]
    stop = -1 if text.eot is None else text.eot
    vocab = getattr(text, "metadata", {}).get("vocab")
    numbers = np.float32(temperature), np.float32(top_p), np.int32(stop)
    out = np.zeros((len(encoded), 0), np.int32)
    seeds = [seed] * len(encoded) if isinstance(seed, int) else seed
    keys = [jax.random.key(one) for one in seeds]
    while out.shape[1] < new_tokens and not (out == stop).any(1).all():
        part = out.shape[1]
        windows = [(ids + row)[-half:] if part else ids for ids, row in zip(encoded, out.tolist(), strict=True)]
        longest = max(map(len, windows))
        count = context - longest if part else min(new_tokens, context - longest)
        width = min(context - count, 1 << (longest - 1).bit_length())  # powers of two, to compile for few widths
        prompt_BL = np.zeros((len(windows), width), np.int32)
        for row, ids in zip(prompt_BL, windows, strict=True):
            row[: len(ids)] = ids
        own = np.stack([jax.random.key_data(jax.random.fold_in(key, part) if part else key) for key in keys])
        found = compute(_generate, prompt_BL, np.array([len(ids) for ids in windows]), own, *numbers, new_tokens=count,
                        top_k=top_k, vocab=vocab)
        out = np.concatenate([out, found], 1)
    out = out[:, :new_tokens]
    ends = [list(row).index(stop) if stop in row else len(row) for row in out]
    decode = getattr(text, "continuation", lambda before, ids: text.decode(ids))
    return [decode(ids, row[:end]) for ids, row, end in zip(encoded, out, ends, strict=True)]


def _start(text: Any) -> list[int]:
    """The tokens that replace an empty prompt."""
    if text.eot is not None:
        return [text.eot]
    for between in ("\n", " "):
        try:
            if len(ids := list(text.encode(between))):
                return ids
        except UserError:  # this character is not in the vocabulary
            continue
    return [0]
