"""Operations in reduced precision, whose gradients round where the forward pass rounds.

`project`: a matmul of reduced operands, accumulated in float32, and its bias; `product` is its general form, for
attention and recurrences. `elementwise`: what stands between two matmuls, computed in float32 and rounded once. Both
sum the gradients of what they broadcast in float32. Float32 operands use JAX's own rules, so forward-mode derivatives
work. Axis letters: see lab/models/layers.py.

A custom derivative is kept only if removing it costs 3 % of the bytes that a GPU moves or 3 % of the time on a CPU. By
autodiff of the same forward pass instead (2026-11-26, jax 0.10.2, bfloat16):

| custom derivative | GPU bytes | CPU time | gradient error, with and without | verdict |
|---|---|---|---|---|
| matmul (`product`) | gpt_small +24.8 % | +10, +52 % | 0.3, 0.3 % | kept |
| `elementwise` | gpt_small +6.2 % | +1, 0 % | 0.3, 0.3 % | kept |
| its barriers alone | gpt_small +6.2 % | GPUs only | 0.3, 0.3 % | kept |
| `jax.checkpoint` in place of `elementwise` | imagenet_vit_s16 +7.5 % | +1, +1 % | 0.3, 0.3 % | not taken |
| `softmax` | bert_base +3.8 % | +5, +3 % | < 0.001 % | kept |
| `jax.checkpoint` in place of `softmax` | bert_base +11.2 % | -, -1 % | not measured | not taken |
| bias, broadcast in float32 | gpt_small 0.0 % | +1, +3 % | 0.3, 0.3 % (a bfloat16 sum: 1.2 %) | removed |
| embedding, looked up in float32 | gpt_small +0.5 % | +1, +2 % | 0.2, 0.2 % (a bfloat16 sum: 41 %) | removed |

GPU: bytes of the train step compiled for one H200, as by `plan`, two blocks deep (64 rows of 1,024 tokens; 32 of 512;
256 images). CPU: processor time of the gradient of the local configs gpt_char and gpt_small, one block deep, on one
core of an Intel Xeon with AVX-512 and neither bfloat16 nor AMX instructions; medians of alternated pairs on a busy
machine, whose noise is 3 %. Gradient error: greatest error / greatest gradient against float64, 16,384 rows, CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def platform() -> str:
    """Platform of the devices traced for: the mesh's (possibly AOT topology devices), else JAX's first device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def sequence_devices() -> int:
    """Number of devices that shard the length axis of activations in the current mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape).get("sequence", 1)


def accumulation_dtype(dtype: Any) -> Any:
    """`preferred_element_type` for a matmul whose result is cast to `dtype`. CPUs are fast in float32 only, and TPUs
    round on the chip. GPUs accumulate bfloat16 in float32 anyway, and would write a float32 result to memory.
    """
    return dtype if platform() == "gpu" else jnp.float32


def product(spec: str, a: Array, b: Array, dtype: Any) -> Array:
    """``einsum(spec, a, b)`` in `dtype`, accumulated in float32. A summed letter must be in both operands.

    Float32 operands use JAX's own rule, so forward-mode derivatives work.
    """
    if a.dtype == jnp.float32:
        return jnp.einsum(spec, a, b)
    return _reduced_product(spec, dtype, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _reduced_product(spec: str, dtype: Any, a: Array, b: Array) -> Array:
    """Has a custom VJP, so that both matmuls of the gradient also take operands of reduced precision. Autodiff would
    pass the float32 cotangent to mixed-precision matmuls, which no matrix unit (AMX, tensor core, MXU) supports.
    """
    return jnp.einsum(spec, a, b, preferred_element_type=accumulation_dtype(dtype)).astype(dtype)


def _forward(spec: str, dtype: Any, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return _reduced_product(spec, dtype, a, b), (a, b)


def _backward(spec: str, dtype: Any, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    a, b = saved
    letters_a, letters_b, letters_out = spec.replace("->", ",").split(",")
    g = g.astype(a.dtype)
    return (_reduced_product(f"{letters_out},{letters_b}->{letters_a}", a.dtype, g, b),
            _reduced_product(f"{letters_out},{letters_a}->{letters_b}", b.dtype, g, a))


_reduced_product.defvjp(_forward, _backward)


def project(x: Array, kernel: Array, bias: Array | None, dtype: Any) -> Array:
    """``x (..., D) @ kernel (D, F) + bias (F,) -> (..., F)`` in `dtype`, accumulated in float32; see `product`."""
    if x.dtype == jnp.float32 and platform() == "cpu" and sequence_devices() == 1:
        # One matrix of all rows (valid while the mesh shards one axis only): a nanoGPT step on 2 cores, 34 ms, not 38.
        y = (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)
    else:
        rows = "ABCEGHI"[: x.ndim - 1]
        y = product(f"{rows}D,DF->{rows}F", x, kernel, accumulation_dtype(dtype))
    if bias is not None:
        # Broadcast in float32, so that the gradient is summed in float32. The compiler drops the two casts of the
        # values, and GPUs fuse the addition into the matmul.
        y += jnp.broadcast_to(bias.astype(jnp.float32), y.shape).astype(y.dtype)
    return y.astype(dtype)


def elementwise(f: Callable[..., Array], *operands: Array) -> Array:
    """``f(*operands)`` computed in float32, returned in the type of the operands. The backward pass recomputes f:
    autodiff's residuals are larger, and on CPUs the rounding between operations costs more than the operations.

    Float32 operands use JAX's own rule, so forward-mode derivatives work.
    """
    return f(*operands) if operands[0].dtype == jnp.float32 else _reduced_elementwise(f, *operands)


def _in_float32(f: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *operands: f(*(x.astype(jnp.float32) for x in operands)).astype(operands[0].dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reduced_elementwise(f: Callable[..., Array], *operands: Array) -> Array:
    return _in_float32(f)(*operands)


def _elementwise_backward(f: Callable[..., Array], operands: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    # Without barriers, XLA on GPUs merges the recomputation with the forward pass (CSE) and also writes the gradient in
    # float32, for two matmuls and a sum to read: 1.5 times the bytes in an MLP. On CPUs barriers cost 3 %.
    once = jax.lax.optimization_barrier if platform() == "gpu" else lambda x: x
    operands, g = once((operands, g))
    return once(jax.vjp(_in_float32(f), *operands)[1](g))


_reduced_elementwise.defvjp(lambda f, *operands: (_in_float32(f)(*operands), operands), _elementwise_backward)


def softmax(scores: Array, dtype: Any) -> Array:
    """Softmax over the last axis of float32 scores, computed in float32 and rounded to `dtype`.

    In reduced precision the backward pass uses the rounded probabilities only, as does the matmul that follows.
    """
    return jax.nn.softmax(scores) if dtype == jnp.float32 else _reduced_softmax(dtype, scores)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reduced_softmax(dtype: Any, scores: Array) -> Array:
    return jax.nn.softmax(scores).astype(dtype)


def _softmax_forward(dtype: Any, scores: Array) -> tuple[Array, Array]:
    return (probabilities := _reduced_softmax(dtype, scores)), probabilities


def _softmax_backward(dtype: Any, probabilities: Array, g: Array) -> tuple[Array]:
    p, g = probabilities.astype(jnp.float32), g.astype(jnp.float32)
    return (p * (g - (p * g).sum(-1, keepdims=True)),)


_reduced_softmax.defvjp(_softmax_forward, _softmax_backward)
