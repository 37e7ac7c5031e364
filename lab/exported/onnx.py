"""A function as an ONNX file, written by jax2onnx and checked with onnxruntime (LAB_EXTRAS=onnx)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax

from lab.errors import UserError
from lab.exported.function import Function, difference, example

TOLERANCE = 1e-4
SIZES = ((3, 16), (1, 16), (5, 11), (2, 1))
"""(batch, length) of the checks."""


def write_onnx(function: Function, path: Path, name: str) -> tuple[Function, float]:
    """Writes the file, for any batch size; and for any length where jax2onnx can, else for the longest. Returns the
    function that was written, and its largest difference from JAX, as `check`.

    Raises:
      UserError: jax2onnx cannot convert the model, or onnxruntime computes something else.
    """
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # one line for every value without a known type
    try:
        _convert(function, path, name)
    except Exception as e:  # for what it does not know: any kind
        if function.longest is None:
            raise UserError(_refused(e)) from e
        function = of_longest(function)
        try:
            _convert(function, path, name)
        except Exception as e:
            raise UserError(_refused(e)) from e
    return function, check(path, function)


def _refused(e: Exception) -> str:
    line = (str(e).splitlines() or [""])[0][:300]
    return f"jax2onnx cannot convert this model ({type(e).__name__}: {line}). --to stablehlo can."


def of_longest(function: Function) -> Function:
    """The function of texts that are padded to the longest: jax2onnx does not follow positions along a length that is
    not known (0.17.1)."""
    return function._replace(inputs={
        name: form._replace(shape=tuple(function.longest if side == "L" else side for side in form.shape))
        for name, form in function.inputs.items()})


def _convert(function: Function, path: Path, name: str) -> None:
    import jax2onnx

    inputs = list(function.inputs)

    def call(*arrays: Any) -> list[Any]:
        return list(function.call(function.variables, dict(zip(inputs, arrays, strict=True))).values())

    given = example(function, 1, 8)
    outputs = list(jax.eval_shape(function.call, function.variables, given))
    specs = [jax.ShapeDtypeStruct(form.shape, form.dtype) for form in function.inputs.values()]
    jax2onnx.to_onnx(call, inputs=specs, model_name=name, return_mode="file", output_path=str(path),
                     input_names=inputs, output_names=outputs)


def check(path: Path, function: Function) -> float:
    """The largest difference of onnxruntime's outputs from JAX's for several batch sizes and lengths; see `difference`.

    Raises:
      UserError: it is above the tolerance, or onnxruntime refuses the file.
    """
    import onnxruntime

    worst, wanted, quiet = 0.0, jax.jit(function.call), onnxruntime.SessionOptions()
    quiet.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(path, quiet, providers=["CPUExecutionProvider"])
        for seed, (batch, length) in enumerate(SIZES):
            inputs = example(function, batch, length, seed)
            found = session.run(None, inputs)
            names = [output.name for output in session.get_outputs()]
            worst = max(worst, difference(dict(zip(names, found, strict=True)), wanted(function.variables, inputs)))
    except UserError:
        raise
    except Exception as e:  # onnxruntime's own kinds
        raise UserError(f"onnxruntime cannot run the file ({type(e).__name__}: {str(e)[:300]}).") from e
    if not worst <= TOLERANCE:
        raise UserError(f"onnxruntime's outputs differ from JAX's by {worst:.1e}, more than {TOLERANCE:.0e}: nothing "
                        f"was written.")
    return worst
