"""Operations in reduced precision: what is rounded when, and derivatives that keep to it.

Products take operands of reduced precision and are accumulated in float32; between two products everything is computed
in float32 and rounded once; gradients of biases, positions and embeddings are summed in float32. Float32 operands keep
JAX's own rules, and with them forward-mode derivatives. Axis letters: see lab/models/layers.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def platform() -> str:
    """Of the devices that this is traced for, which need not be here: those of the mesh, else JAX's first."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def sequence_devices() -> int:
    """Devices that the length of activations is divided among, by the mesh that this is traced for."""
    return dict(jax.sharding.get_abstract_mesh().shape).get("sequence", 1)


def accumulation_dtype(dtype: Any) -> Any:
    """The type in which a product that `dtype` is wanted of is asked for. CPUs are fast at float32 only, TPUs round it
    on the chip, and GPUs, which also accumulate bfloat16 in float32, would write it to memory and read it again.
    """
    return dtype if platform() == "gpu" else jnp.float32


def product(spec: str, a: Array, b: Array, dtype: Any) -> Array:
    """``einsum(spec, a, b)`` in `dtype`, accumulated in float32. No letter may stand for a sum over one operand alone.

    Float32 operands keep JAX's own rule, and with it forward-mode derivatives.
    """
    if a.dtype == jnp.float32:
        return jnp.einsum(spec, a, b)
    return _reduced_product(spec, dtype, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _reduced_product(spec: str, dtype: Any, a: Array, b: Array) -> Array:
    """The derivative is written out so that its two products also take operands of reduced precision: left to autodiff,
    the float32 cotangent would turn both into mixed products, which no matrix unit (AMX, tensor core, MXU) runs.
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


def project(x: Array, kernel: Array, dtype: Any) -> Array:
    """``x (..., D) @ kernel (D, F) -> (..., F)`` by `product`."""
    if x.dtype == jnp.float32 and platform() == "cpu" and sequence_devices() == 1:
        # All rows as one matrix (no mesh may divide two axes of it): nanoGPT's update on 2 cores, 34 ms instead of 38.
        return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)
    rows = "ABCEGHI"[: x.ndim - 1]
    return product(f"{rows}D,DF->{rows}F", x, kernel, dtype)


def add_broadcast(y: Array, b: Array) -> Array:
    """``y + b`` in y's type, `b` broadcast; the gradient of `b` is summed in float32. GPUs add it as they multiply."""
    b = jnp.expand_dims(b.astype(y.dtype), range(y.ndim - b.ndim))
    return y + b if y.dtype == jnp.float32 else _reduced_add(y, b)


@jax.custom_vjp
def _reduced_add(y: Array, b: Array) -> Array:
    return y + b


def _add_backward(b: Array, g: Array) -> tuple[Array, Array]:
    axes = tuple(i for i, size in enumerate(b.shape) if size == 1)
    return g, g.astype(jnp.float32).sum(axes, keepdims=True).astype(b.dtype)


_reduced_add.defvjp(lambda y, b: (_reduced_add(y, b), b), _add_backward)


def rows_of(table: Array, ids: Array) -> Array:
    """``table[ids]``; the gradient is summed in float32. A sum of bfloat16 numbers soon stops to grow, and the same
    token comes hundreds of times in a batch.
    """
    return jnp.take(table, ids, axis=0) if table.dtype == jnp.float32 else _reduced_rows(table, ids)


@jax.custom_vjp
def _reduced_rows(table: Array, ids: Array) -> Array:
    return jnp.take(table, ids, axis=0)


def _rows_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, None]:
    table, ids = saved
    return jnp.zeros(table.shape, jnp.float32).at[ids].add(g.astype(jnp.float32)).astype(table.dtype), None


_reduced_rows.defvjp(lambda table, ids: (_reduced_rows(table, ids), (table, ids)), _rows_backward)


def elementwise(f: Callable[..., Array], *operands: Array) -> Array:
    """``f(*operands)`` computed in float32, in the type of the operands. The backward pass computes f again from them:
    what autodiff would keep is larger, and each rounding between two operations costs CPUs more than the operations.

    Float32 operands keep JAX's own rule, and with it forward-mode derivatives.
    """
    return f(*operands) if operands[0].dtype == jnp.float32 else _reduced_elementwise(f, *operands)


def _in_float32(f: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *operands: f(*(x.astype(jnp.float32) for x in operands)).astype(operands[0].dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reduced_elementwise(f: Callable[..., Array], *operands: Array) -> Array:
    return _in_float32(f)(*operands)


def _elementwise_backward(f: Callable[..., Array], operands: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    # Without barriers GPUs keep what the forward pass computed, as that is the same, and write the gradient, which two
    # products and a sum read, in float32 too: half as many bytes again in an MLP (CPUs: 3 % slower with them).
    once = jax.lax.optimization_barrier if platform() == "gpu" else lambda x: x
    operands, g = once((operands, g))
    return once(jax.vjp(_in_float32(f), *operands)[1](g))


_reduced_elementwise.defvjp(lambda f, *operands: (_in_float32(f)(*operands), operands), _elementwise_backward)


def softmax(scores: Array, dtype: Any) -> Array:
    """Over the last axis of float32 scores, in float32, rounded to `dtype`.

    In reduced precision the backward pass has the rounded probabilities, as the product after it does, and no others.
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
