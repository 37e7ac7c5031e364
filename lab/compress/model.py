"""A model that reads integer weights: the same class, whose `apply` first turns them into arrays.

So no model knows of it. Inside a compiled function the integers are the arguments, and the arrays exist while they are
used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.linear import canonicalize_padding
from jax import Array

from lab.compress.quantized import Quantized, restored
from lab.models.layers import Dense

MARK = "reads_quantized"
Call = Callable[..., Any]
PADDINGS = ("CIRCULAR", "CAUSAL", "REFLECT")  # those that nn.Conv makes itself


def reading(model: nn.Module) -> nn.Module:
    """The same model, whose `apply` takes variables with `Quantized` parameters."""
    return _reading(type(model))(**{name: getattr(model, name) for name in model.__dataclass_fields__
                                    if name not in ("parent", "name")})


def reads(model: nn.Module) -> bool:
    """Whether it is a model of `reading`."""
    return MARK in vars(type(model))


@functools.cache  # equal models have one class
def _reading(cls: type[nn.Module]) -> type[nn.Module]:
    if MARK in vars(cls):
        return cls

    @nn.nowrap
    def apply(self: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(_multiplying):
            return cls.apply(self, restored(variables), *args, **kwargs)

    # Its JSON, and so the run's fingerprint, are those of the class.
    own = {"apply": apply, MARK: True, "__module__": cls.__module__, "__qualname__": cls.__qualname__,
           "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), own)


def _multiplying(call: Call, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
    """An interceptor: layers whose kernel is still `Quantized` multiply integers."""
    layer = context.module
    if context.method_name != "__call__" or not is_layer(layer) or not layer.has_variable("params", "kernel"):
        return call(*args, **kwargs)
    kernel = layer.get_variable("params", "kernel")
    if not isinstance(kernel, Quantized):
        return call(*args, **kwargs)
    x = args[0]
    scale = jnp.abs(x).max().astype(jnp.float32) / 127 if kernel.incoming is None else kernel.incoming
    scale = jnp.where(scale > 0, scale, 1)
    rounded = jnp.clip(jnp.rint(x.astype(jnp.float32) / scale), -127, 127).astype(jnp.int8)
    y = _product(layer, rounded, kernel.values).astype(jnp.float32) * (scale * kernel.scale.astype(jnp.float32).ravel())
    if layer.has_variable("params", "bias"):
        y += layer.get_variable("params", "bias").astype(jnp.float32)
    return y.astype(getattr(layer, "dtype", None) or x.dtype)


def is_layer(layer: nn.Module) -> bool:
    """Whether it is a layer that can multiply integers: dense, or a plain convolution."""
    if isinstance(layer, nn.Conv):
        plain = layer.feature_group_count == 1 and layer.mask is None
        return plain and layer.padding not in PADDINGS
    return isinstance(layer, Dense) or (isinstance(layer, nn.Dense) and layer.dot_general is None)


def _product(layer: nn.Module, x: Array, kernel: Array) -> Array:
    """int32, of int8 inputs and an int8 kernel."""
    if not isinstance(layer, nn.Conv):
        return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    rank = len(layer.kernel_size)

    def each(value: Any) -> tuple[int, ...]:
        return (value or 1,) * rank if value is None or isinstance(value, int) else tuple(value)

    letters = "".join("HWDXYZ"[:rank])
    return jax.lax.conv_general_dilated(
        x, kernel, each(layer.strides), canonicalize_padding(layer.padding, rank), each(layer.input_dilation),
        each(layer.kernel_dilation), (f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        preferred_element_type=jnp.int32)


class Incoming:
    """The largest |input| of each layer that can multiply integers, over all calls of a model traced within `seen`."""

    def __init__(self) -> None:
        self.layers: set[str] = set()
        """Paths of their kernels."""
        self.largest: dict[str, float] = {}

    def seen(self) -> Any:
        """A context."""
        return nn.intercept_methods(self._note)

    def _note(self, call: Call, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        layer = context.module
        if context.method_name == "__call__" and is_layer(layer):
            path = "/".join((*layer.path, "kernel"))
            self.layers.add(path)
            # A callback, since a value cannot leave the body of a scan otherwise.
            jax.debug.callback(functools.partial(self._keep, path), jnp.abs(args[0]).max().astype(jnp.float32))
        return call(*args, **kwargs)

    def _keep(self, path: str, largest: Any) -> None:
        self.largest[path] = max(self.largest.get(path, 0.0), float(largest))
