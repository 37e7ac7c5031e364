"""Sums over the positions of a batch, chunk by chunk, so that large intermediate arrays exist for one chunk only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from lab.errors import UserError


def check_chunk(chunk: int | None) -> None:
    """Raises UserError for a field `chunk` of a task below 1."""
    if chunk is not None and chunk < 1:
        raise UserError(f"--task.chunk must be at least 1, or None, not {chunk}.")


def check_head(model: Any, chunk: int | None) -> None:
    """Raises UserError if `chunk` is set, but the model cannot return hidden states without the head."""
    if chunk is not None and not hasattr(model, "logits"):
        raise UserError(f"--task.chunk needs a model with a method `logits` (see GPT); {type(model).__name__} has "
                        f"none. Leave it out.")


Sums = Callable[[Array, Array, Any, Any], tuple[Array, Any]]
"""(hidden (B, C, D), kernel, each of `given` (B, C), numbers) -> (objective, other sums)."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def over_chunks(sums: Sums, chunk: int, hidden_BLD: Array, kernel: Array, given: Any,
                numbers: Any) -> tuple[Array, Any]:
    """``sums(hidden_BLD, kernel, given, numbers)``, added up over chunks of `chunk` positions of every row.

    Chunk i of n holds positions i::n, so every device has an equal share of each chunk when the length is sharded. If
    `chunk` does not divide the length, the arrays are padded with zeros, which must add 0 (use a weight in `given`).

    Only the objective is differentiable, and only in `hidden_BLD` and `kernel`. The forward pass computes both
    gradients chunk by chunk, while the chunk's intermediate arrays exist. Nothing is recomputed, and the residuals are
    as large as `hidden_BLD` and `kernel`. The kernel's gradient is summed in float32. (The same idea: Wijmans et al.
    2024; Hsu et al. 2024, "Liger Kernel".)
    """
    parts = _chunks(chunk, (hidden_BLD, given))
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = _zeros(jax.eval_shape(lambda part: sums(part[0], kernel, part[1], numbers), first))

    def body(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, sums(part[0], kernel, part[1], numbers)), None

    return jax.lax.scan(body, zeros, parts)[0]


def _forward(sums: Sums, chunk: int, hidden_BLD: Array, kernel: Array, given: Any, numbers: Any) -> tuple[Any, Any]:
    def one(part: Any) -> tuple[Any, tuple[Array, Array]]:
        both = jax.value_and_grad(lambda *args: sums(*args, part[1], numbers), argnums=(0, 1), has_aux=True)
        total, (d_hidden, d_kernel) = both(part[0], kernel)
        return (total, d_kernel.astype(jnp.float32)), d_hidden

    parts = _chunks(chunk, (hidden_BLD, given))
    zeros = _zeros(jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))[0])

    def body(carry: Any, part: Any) -> tuple[Any, Array]:
        own, d_hidden = one(part)
        return jax.tree.map(jnp.add, carry, own), d_hidden

    (total, d_kernel), d_hidden = jax.lax.scan(body, zeros, parts)
    d_hidden_BLD = rearrange(d_hidden, "n B C D -> B (C n) D")[:, : hidden_BLD.shape[1]]
    return total, (d_hidden_BLD, d_kernel.astype(kernel.dtype))


def _backward(sums: Sums, chunk: int, saved: tuple[Array, Array], cotangents: tuple[Array, Any]) -> tuple[Any, ...]:
    return *((cotangents[0] * g).astype(g.dtype) for g in saved), None, None


over_chunks.defvjp(_forward, _backward)


def row_sums(f: Callable[..., Array], chunk: int, hidden_BLD: Array, kernel: Array, *given: Array) -> Array:
    """``f(hidden_BLD, kernel, *given)``, sums over the positions of each row (B,), added up over chunks as in
    `over_chunks`.

    Any function of the sums may follow. Its gradient is not known before the last chunk, so the backward pass computes
    each chunk again.
    """
    def body(total_B: Array, part: Any) -> tuple[Array, None]:
        return total_B + jax.checkpoint(f)(part[0], kernel, *part[1]), None

    return jax.lax.scan(body, jnp.zeros(len(hidden_BLD)), _chunks(chunk, (hidden_BLD, given)))[0]


def _chunks(chunk: int, tree: Any) -> Any:
    """(B, L, ...) -> (n, B, C, ...) for every array."""
    def cut(x: Array) -> Array:
        L = x.shape[1]
        n = -(-L // min(chunk, L))
        size = -(-L // n)
        x = jnp.pad(x, [(0, 0), (0, n * size - L)] + [(0, 0)] * (x.ndim - 2)) if n * size > L else x
        return rearrange(x, "B (C n) ... -> n B C ...", n=n)

    return jax.tree.map(cut, tree)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
