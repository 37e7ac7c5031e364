"""cuDNN fused attention for NVIDIA GPUs, with padding masks; memory is linear in the length."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def cudnn_attention(q_BLNK: Array, k_BSGK: Array, v_BSGK: Array, mask_BS: Array | None, *, causal: bool,
                    implementation: str = "cudnn") -> Array:
    """Same result as `einsum_attention` for the real tokens of each row; L = S. Returns (B, L, N, K) in q's type.

    `mask_BS`: 1 where a token is real; padding may be at any position. Padding queries get finite but meaningless
    values. `implementation`: of `jax.nn.dot_product_attention`; "xla" runs anywhere, for tests.

    cuDNN takes padding as a count of real keys per row, so the real tokens are moved to the front. A mask of
    (B, 1, L, S) would take O(L x S) memory, and so would its unused gradient. JAX rejects odd lengths in training, so
    those are padded by one token.
    """
    B, L = q_BLNK.shape[:2]

    def attend(q: Array, k: Array, v: Array, lengths: Array | None) -> Array:
        q, k, v = (jnp.pad(x, ((0, 0), (0, L % 2), (0, 0), (0, 0))) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, key_value_seq_lengths=lengths,
                                            implementation=implementation)[:, :L]

    if mask_BS is None:  # causal queries do not attend to later keys
        return attend(q_BLNK, k_BSGK, v_BSGK, jnp.full((B,), L, jnp.int32) if L % 2 and not causal else None)
    real_BS = mask_BS.astype(bool)
    order_BS = jnp.argsort(~real_BS, axis=1, stable=True)
    # A row without real tokens attends to its first token: a softmax over no keys would make the batch's loss NaN.
    lengths_B = jnp.maximum(real_BS.sum(1, dtype=jnp.int32), 1)
    front_BS = jnp.arange(L) < lengths_B[:, None]

    def to_front(x: Array) -> Array:
        # Zeros after the real tokens, also in the gradient: cuDNN's output there is unspecified.
        return jnp.where(front_BS[..., None, None], _rows(x, order_BS), 0)

    # Causal attention depends on positions, so the queries are moved too, in order, and the results moved back.
    q_BLNK = _rows(q_BLNK, order_BS) if causal else q_BLNK
    y_BLNK = attend(q_BLNK, to_front(k_BSGK), to_front(v_BSGK), lengths_B)
    return _rows(y_BLNK, jnp.argsort(order_BS, axis=1)) if causal else y_BLNK


def _rows(x_BSNK: Array, order_BS: Array) -> Array:
    """``x[b, order[b]]``. Indices are unique, so the gradient needs no atomic additions."""
    take = lambda x, order: x.at[order].get(unique_indices=True, mode="promise_in_bounds")
    return jax.vmap(take)(x_BSNK, order_BS)
