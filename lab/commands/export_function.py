"""`./launch.sh export RUN|LOCATION --to stablehlo FILE`, or `--to onnx FILE`: a model as a pure function in a file."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from lab.commands.location import name_of, open_location
from lab.commands.sample_weights import check_flags
from lab.errors import UserError
from lab.exported import metadata, stablehlo
from lab.exported.function import Function, of_run, of_weights
from lab.train.description import finished
from lab.train.fitted import TOKENIZER, data_of
from lab.train.restore import open_run
from lab.train.step import eval_variables
from lab.weights.location import is_location
from lab.weights.read import find, variables_of

log = logging.getLogger(__name__)
Format = Literal["stablehlo", "onnx"]
OTHERS = (".json", ".safetensors", ".py", "")  # endings of the files beside


def export_function(run: str, to: Path, form: Format, weights: Literal["inside", "beside"], step: int | None,
                    best: bool, experiment: Path | None, tokenizer: str | None = None) -> None:
    """Writes the file and what stands beside it; all of them or nothing. See `lab.commands.export.export`.

    Raises:
      UserError: no such run, a place that cannot be written, or a model that has no such form.
    """
    beside = _free(to, form, weights)
    if form == "onnx":
        _check_onnx(run, to, weights)
    function, about = _opened(run, step, best, experiment, form)
    about = {"format": form, **about, **metadata.described(function), "weights": "inside"}
    try:
        with tempfile.TemporaryDirectory(prefix=f".{to.name}.", dir=to.parent) as scratch:
            place = Path(scratch, to.name)
            line = (_stablehlo if form == "stablehlo" else _onnx)(function, place, weights, about)
            if tokenizer is not None:
                about["preprocessing"]["text"]["tokenizer_file"] = beside["tokenizer"].name
                Path(scratch, beside["tokenizer"].name).write_text(tokenizer, "utf-8")
            metadata.written(about, Path(scratch, beside["json"].name))
            names = sorted(os.listdir(scratch), key=lambda name: name == to.name)  # the model last
            for name in names:
                os.replace(Path(scratch, name), to.with_name(name))
    except OSError as e:
        raise UserError(f"{to} cannot be written: {e.strerror or e}.") from None
    print(f"{to}: {line}")
    for what in ("inputs", "outputs"):
        print(f"{what:<9}" + ", ".join(f"{name} {x['dtype']} ({', '.join(map(str, x['shape']))})"
                                       for name, x in about[what].items()))
    print(f"{to.with_suffix('.json').name} says what they mean." + (
        f" {beside['loader'].name} runs the file without lab: load(file)(**inputs)."
        if form == "stablehlo" else ""))


def _free(to: Path, form: Format, weights: str) -> dict[str, Path]:
    """The files beside. UserError for a file that is there, or a folder that is not."""
    if to.suffix in OTHERS:
        raise UserError(f"--to {form} names a file such as {to.with_suffix(f'.{form}')}; files beside it end in .json, "
                        f".py and .safetensors.")
    if not to.parent.is_dir():
        raise UserError(f"There is no folder {to.parent}: create it, or give another --to.")
    beside = {"json": to.with_suffix(".json"), "tokenizer": to.with_suffix(".tokenizer.json")}
    if form == "stablehlo":
        beside |= {"loader": to.with_name(f"load_{to.stem}.py"), "weights": to.with_suffix(".safetensors")}
    for path in (to, *beside.values(), to.with_name(f"{to.name}.data")):
        if path.exists() or path.is_symlink():
            raise UserError(f"{path} is there already, perhaps beside another export: give another --to, or delete it.")
    return beside


def _check_onnx(run: str, to: Path, weights: str) -> None:
    if weights == "beside":
        raise UserError("--weights beside is for --to stablehlo: jax2onnx itself moves large weights to FILE.data.")
    try:
        import jax2onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as e:
        raise UserError(f"--to onnx needs the package {e.name}: LAB_EXTRAS=onnx ./launch.sh export {run} --to onnx "
                        f"{to}") from None


def _stablehlo(function: Function, place: Path, weights: str, about: dict[str, Any]) -> str:
    """Writes model, weights and loader; returns a line to print."""
    from safetensors.numpy import save

    beside = weights == "beside"
    found = stablehlo.exported(function, beside)
    content = stablehlo.serialized(found)
    worst = stablehlo.check(content, function, beside)
    place.write_bytes(content)
    place.with_name(f"load_{place.stem}.py").write_text(stablehlo.LOADER.read_text("utf-8"), "utf-8")
    if beside:
        about["weights"] = place.with_suffix(".safetensors").name
        arrays = flatten_dict(function.variables, sep="/")
        place.with_suffix(".safetensors").write_bytes(save({p: np.asarray(x, order="C") for p, x in arrays.items()}))
    about |= {"platforms": list(found.platforms), "calling_convention_version": found.calling_convention_version,
              "versions": metadata.versions(("jax", "jaxlib")), "largest_difference": worst}
    return (f"StableHLO for {', '.join(found.platforms)}, {len(content) / 1e6:.2f} MB, weights "
            f"{'in ' + about['weights'] if beside else 'inside'}; largest difference from the model {worst:.1e}")


def _onnx(function: Function, place: Path, weights: str, about: dict[str, Any]) -> str:
    """Writes the model; returns a line to print."""
    from lab.exported.onnx import write_onnx

    function, worst = write_onnx(function, place, place.stem)
    about |= {**metadata.described(function), "largest_difference": worst,
              "versions": metadata.versions(("jax", "jax2onnx", "onnx", "onnxruntime"))}
    size = sum(path.stat().st_size for path in place.parent.iterdir())
    return f"ONNX, {size / 1e6:.1f} MB; largest difference of onnxruntime from the model {worst:.1e}"


def _opened(run: str, step: int | None, best: bool, file: Path | None, form: Format) -> tuple[Function, dict[str, Any]]:
    """The function of a run or of weights, and what it is."""
    if is_location(run) and file is None:
        check_flags(run, step, best, file)
        weights = find(run)
        variables = variables_of(weights.arrays())
        about = {"name": name_of(Path(run)), "from": run, "model": type(weights.model).__name__, "precision": "float32"}
        images = tuple(weights.inputs.shape[1:])
        text = {} if len(images) == 3 else {"text": {"tokenizer": f"tokenizer.json of {run}"}}
        return of_weights(weights.model, variables, images), about | {"preprocessing": text}
    if is_location(run):
        trained, data, _, state = open_location(Path(run), file, step=step, best=best)
        kept = getattr(data, "tokenizer_state", None)
    else:
        trained, _, state = open_run(Path(run), step, best, file=file)
        data = data_of(Path(run), trained)
        kept = Path(run, TOKENIZER).read_text("utf-8") if Path(run, TOKENIZER).exists() else None
        if finished(Path(run)) is None:
            log.warning("warning: %s is not finished: step %d of %d", run, int(state.step), trained.steps)
    if form == "onnx":  # onnxruntime's CPU has no bfloat16
        trained = replace(trained, precision="float32")
    variables = jax.device_get(eval_variables(trained, state))
    about = {"name": name_of(Path(run)), "from": trained.fingerprint(), "step": int(state.step),
             "model": type(trained.model).__name__, "precision": trained.precision, "classes": list(data.classes),
             "preprocessing": metadata.preprocessing(trained, data, kept)}
    return of_run(trained, data, variables), about
