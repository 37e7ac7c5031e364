"""Integer weights with a scale: a pytree node that stands in a tree of parameters in the place of an array.

Symmetric, rounded to nearest: w is about q s, with s the largest |w| of a group over the largest integer. int8: a group
is an output channel (all weights that are summed into it). int4: 64 neighbouring inputs of one output channel, two
numbers to a byte, as in GGUF's Q4_0 (which has groups of 32).

A scale is rounded up to bfloat16 before the weights are divided by it. So the compute type, to which the step casts
parameters, never changes it; and the type of the scale is the type of `Quantized.array`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lab.errors import UserError

Weights = Literal["int8", "int4"]
GROUP = 64  # inputs that share a scale in int4
LARGEST = {"int8": 127, "int4": 7}


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "scale", "incoming"),
                   meta_fields=("kind", "inputs", "sizes", "products"))
@dataclass(frozen=True)
class Quantized:
    """A parameter with integer weights. All axes are counted from the last one: a scan over stacked layers takes the
    first one away."""

    values: Any
    """int8, of the parameter's shape; int4: uint8, with (inputs / 64, 32) in the place of the input axes. A byte holds
    weights i and i + 32 of a group, each plus 8."""
    scale: Any
    """int8: of the parameter's shape, with 1 for each input axis; int4: (inputs / 64, 1) in their place."""
    incoming: Any = None
    """Scale of the layer's input (stack...), if it is known beforehand; None: from each input itself."""
    kind: Weights = "int8"
    inputs: tuple[int, ...] = (-2,)
    """The axes that a product sums over, ascending and negative."""
    sizes: tuple[int, ...] = ()
    """Their lengths."""
    products: bool = False
    """Whether the layer rounds its input to int8, too, and multiplies integers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        if self.kind == "int8":
            return self.values.shape
        end = len(self.values.shape) + self.inputs[-1] + 1
        return (*self.values.shape[:end - 2], *self.sizes, *self.values.shape[end:])

    @property
    def array(self) -> Array:
        """The parameter, in the type of the scale."""
        if self.kind == "int8":
            return self.values.astype(self.scale.dtype) * self.scale
        group = self.values.ndim + self.inputs[-1]
        halves = [(half.astype(jnp.int8) - 8) for half in (self.values & 15, self.values >> 4)]
        return (jnp.concatenate(halves, group).astype(self.scale.dtype) * self.scale).reshape(self.shape)


def quantized(x: np.ndarray, inputs: Sequence[int], kind: Weights, path: str = "") -> Quantized:
    """Rounds an array. `inputs`: the axes that a product sums over, negative; `path`: names the array in errors.

    Raises:
      UserError: for int4, inputs that 64 does not divide, or that are not neighbouring axes.
    """
    axes = tuple(sorted(inputs))
    sizes = tuple(x.shape[a] for a in axes)
    x = np.asarray(x, np.float32)
    if kind == "int8":
        values, scale = _rounded(x, axes, kind)
        return Quantized(values, scale, kind=kind, inputs=axes, sizes=sizes)
    if math.prod(sizes) % GROUP or axes != tuple(range(axes[0], axes[-1] + 1)):
        raise UserError(f"{path} {x.shape} has {math.prod(sizes)} inputs, which groups of {GROUP} do not divide: leave "
                        f"it as it is with --keep '^{path}$', or use --weights int8.")
    begin, end = x.ndim + axes[0], x.ndim + axes[-1] + 1
    grouped = x.reshape(*x.shape[:begin], -1, GROUP, *x.shape[end:])
    values, scale = _rounded(grouped, (begin + 1,), kind)
    low, high = np.split((values + 8).astype(np.uint8), 2, begin + 1)
    return Quantized(low | high << 4, scale, kind=kind, inputs=axes, sizes=sizes)


def _rounded(x: np.ndarray, axes: tuple[int, ...], kind: Weights) -> tuple[np.ndarray, np.ndarray]:
    """(int8 numbers, float32 scales with 1 for each of `axes`)."""
    scale = rounded_up(np.abs(x).max(axes, keepdims=True) / LARGEST[kind])
    return np.rint(x / scale).astype(np.int8), scale


def rounded_up(scale: np.ndarray) -> np.ndarray:
    """Scales as the next larger numbers of type bfloat16, as float32; 0 becomes 1."""
    bits = np.asarray(np.where(scale > 0, scale, 1), np.float32).view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def is_quantized(x: Any) -> bool:
    """Whether it is a `Quantized`, for `jax.tree.map(..., is_leaf=is_quantized)`."""
    return isinstance(x, Quantized)


def restored(tree: Any) -> Any:
    """A tree with arrays in the place of `Quantized`, but where the layer itself multiplies integers."""
    return jax.tree.map(lambda x: x.array if is_quantized(x) and not x.products else x, tree, is_leaf=is_quantized)


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays in a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))
