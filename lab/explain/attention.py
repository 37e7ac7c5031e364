"""Attention maps of the Transformers of lab/models, without a change to them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lab.models.layers import SelfAttention, Transformer

# `Transformer.stack` carries this collection through its scan over layers, and nothing else uses it without `decode`.
COLLECTION = "cache"


def _observe(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Stores the attention probabilities (B, L, N, S) of each layer: what its attention returns for values that are
    the rows of the identity. So mask, causality, rotary positions and grouped heads are the layer's own."""
    if isinstance(context.module, SelfAttention) and context.method_name == "_attend":
        q_BLNK, k_BSGK, _, *rest = args
        B, S, G, _ = k_BSGK.shape
        one_BSGS = jnp.broadcast_to(jnp.eye(S, dtype=q_BLNK.dtype)[None, :, None], (B, S, G, S))
        context.module.sow(COLLECTION, "probabilities", call(q_BLNK, k_BSGK, one_BSGS, *rest))
    return call(*args, **kwargs)


def attention_maps(model: nn.Module, variables: Any, inputs: Array, **kwargs: Any) -> np.ndarray | None:
    """Attention probabilities of one record, float32 (layers, heads, queries, keys); each row sums to 1. None for a
    model that is no `Transformer`.

    `inputs`: (1, ...); `kwargs`: of the model's call, such as `mask`.
    """
    if not isinstance(model, Transformer):
        return None
    plain = model.clone(attention="einsum")

    def run(variables: Any, inputs: Array, kwargs: Any) -> Any:
        with nn.intercept_methods(_observe):
            return plain.apply(variables, inputs, train=False, mutable=[COLLECTION], **kwargs)[1][COLLECTION]

    found = jax.tree_util.tree_leaves_with_path(jax.jit(run)(variables, inputs, kwargs))
    number = lambda path: [int(n) for n in re.findall(r"\d+", jax.tree_util.keystr(path))]  # block_10 after block_9
    layers = [np.asarray(x, np.float32) for _, x in sorted(found, key=lambda pair: number(pair[0]))]
    scanned = np.concatenate([x.reshape(-1, *x.shape[-3:]) for x in layers])  # (layers, L, N, S)
    return scanned.transpose(0, 2, 1, 3)
