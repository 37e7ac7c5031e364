"""Splash attention: JAX's flash attention (Dao et al. 2022) for TPUs, with memory linear in the length."""

from __future__ import annotations

import flax.linen as nn
import jax
from einops import rearrange
from jax import Array

BLOCKS = (512, 256, 128)  # block sizes of the kernel, in queries and keys


def splash_attention(q_BLNK: Array, k_BSGK: Array, v_BSGK: Array, *, causal: bool, save: str | None = None,
                     interpret: bool = False) -> Array:
    """Same result as `einsum_attention` without padding; L = S, a multiple of 128. Returns (B, L, N, K) in q's type.

    `save`: checkpoint name of the kernel's residuals, for `jax.checkpoint` policies. `interpret`: run on a CPU, slowly.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    L, N, K = q_BLNK.shape[1:]
    block = next(size for size in BLOCKS if L % size == 0)
    mask = (splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask)((L, L))
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, use_fused_bwd_kernel=True)
    with jax.ensure_compile_time_eval():  # the block mask must be concrete
        kernel = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * N), block_sizes=sizes, head_shards=1, q_seq_shards=1,
            residual_checkpoint_name=save, interpret=interpret)
    q_BNLK, k_BGSK, v_BGSK = (rearrange(x, "B L N K -> B N L K") for x in (q_BLNK * K**-0.5, k_BSGK, v_BSGK))
    y_BNLK = jax.vmap(kernel)(q_BNLK, k_BGSK, v_BGSK)
    return rearrange(y_BNLK, "B N L K -> B L N K").astype(q_BLNK.dtype)


class OnDevice(nn.Module):
    """`splash_attention` as a separate module, because XLA cannot partition a custom kernel: lab/parallel/sharding.py
    shards it by rows and heads."""

    causal: bool
    save: str

    def __call__(self, q_BLNK: Array, k_BSGK: Array, v_BSGK: Array) -> Array:
        """See `splash_attention`."""
        return splash_attention(q_BLNK, k_BSGK, v_BSGK, causal=self.causal, save=self.save)
