"""A function as a file of jax.export: StableHLO for CPUs, GPUs and TPUs, any batch size, any length of a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export

from lab.errors import UserError
from lab.exported.function import Function, difference, example

PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = {"float32": 1e-6, "bfloat16": 2e-2}
"""Of the check, by the type of the weights; see `lab.exported.function.difference`."""
LOADER = Path(__file__).with_name("loader.py")


def exported(function: Function, beside: bool) -> export.Exported:
    """The function with symbolic batch and length, for all platforms: (arrays by path, inputs by name) -> outputs by
    name. `beside`: the arrays are an argument; else they are constants inside, and the argument is {}.

    Raises:
      UserError: the model cannot be traced so; with JAX's reason.
    """
    arrays = flatten_dict(function.variables, sep="/")
    specs = _specs(function)

    def call(weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        return function.call(unflatten_dict(weights if beside else arrays, sep="/"), inputs)

    weights = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in arrays.items()} if beside else {}
    try:
        return export.export(jax.jit(call), platforms=PLATFORMS)(weights, specs)
    except UserError:
        raise
    except Exception as e:  # the model's own code, with symbolic shapes: any kind
        raise UserError(f"The model cannot be exported for any batch size: {_short(e)}") from e


def _specs(function: Function) -> dict[str, jax.ShapeDtypeStruct]:
    sides = {side for form in function.inputs.values() for side in form.shape if isinstance(side, str)}
    limits = [f"L <= {function.longest}"] if "L" in sides and function.longest else []
    scope = export.SymbolicScope(limits)
    return {name: jax.ShapeDtypeStruct(export.symbolic_shape(", ".join(map(str, form.shape)), scope=scope), form.dtype)
            for name, form in function.inputs.items()}


def serialized(found: export.Exported) -> bytearray:
    """The content of the file. UserError if it has more than fits into one file."""
    try:
        return found.serialize()
    except Exception as e:  # of the bytecode writer and of flatbuffers, whose files end at 2 GiB
        raise UserError(f"The model does not fit into one file ({_short(e)}). Use --weights beside.") from e


def check(content: bytearray, function: Function, beside: bool, batch: int = 3, length: int = 13) -> float:
    """The largest difference of the file's outputs from the model's, on random inputs; see `difference`.

    Raises:
      UserError: it is above the tolerance.
    """
    inputs = example(function, batch, length)
    weights = flatten_dict(function.variables, sep="/") if beside else {}
    found = jax.jit(export.deserialize(content).call)(weights, inputs)
    worst = difference(found, jax.jit(function.given)(function.variables, inputs))
    bound = TOLERANCE.get(kind_of(function), TOLERANCE["bfloat16"])
    if not worst <= bound:
        raise UserError(f"The exported model's outputs differ from the model's by {worst:.1e}, more than {bound:.0e}: "
                        f"nothing was written.")
    return worst


def kind_of(function: Function) -> str:
    """The type of the weights."""
    return next(str(x.dtype) for x in jax.tree.leaves(function.variables) if np.issubdtype(x.dtype, np.number)
                or x.dtype == jax.numpy.bfloat16)


def _short(e: Exception) -> str:
    line = next((line for line in str(e).splitlines() if line.strip()), "")
    return f"{type(e).__name__}: {line[:300]}"
