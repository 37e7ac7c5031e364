"""`./launch.sh quantize RUN|LOCATION --weights int8|int4`: integer weights, and a table of what they save and cost."""

from __future__ import annotations

import dataclasses
import functools
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from lab.commands.arguments import call
from lab.errors import UserError

log = logging.getLogger(__name__)


def main(args: Sequence[str]) -> int:
    """RUN or LOCATION, --weights int8|int4"""
    return call("quantize", quantize, args)


def quantize(
    run: Annotated[Path, tyro.conf.Positional],
    weights: Literal["int8", "int4"],
    activations: Literal["int8"] | None = None,
    calibrate: int | None = None,
    embeddings: bool = False,
    heads: bool = False,
    keep: tuple[str, ...] = (),
    to: Path | None = None,
    records: int | None = None,
    step: int | None = None,
    best: bool = False,
    experiment: Path | None = None,
) -> None:
    """Writes a model with integer weights to a folder that serve, evaluate, sample, chat and predict take in the place
    of a run or of weights, and a table that compares both on the validation split (comparison.json in that folder).

    Args:
      run: the folder of a finished run; or weights: hf:ORG/NAME, package:NAME/PATH, a .gguf file, a folder with
        config.json.
      weights: int8: a scale for each output channel. int4: a scale for 64 inputs of each output channel.
      activations: int8: dense and convolution layers round their inputs, too, and multiply integers. By default weights
        are turned back to the compute type as they are used.
      calibrate: with --activations: take the scale of a layer's inputs from this many training batches; by default
        from each input itself.
      embeddings: round the embeddings of tokens, too; an output layer tied to them is among them.
      heads: round the output layer, too.
      keep: path regexes of parameters to leave as they are, such as '^conv0_0/' (searched in the path).
      to: the folder to write, new or empty; by default <name>-<weights> beside the run, for weights in this folder.
      records: compare on this many evenly spaced records; by default all.
      step: use the checkpoint of this step; by default the latest.
      best: use the checkpoint with the best validation metric.
      experiment: for weights: the experiment file that has the data and the task; language models have Python's own
        standard library by default. For a run: its experiment file, needed if it defines classes and was not run here.
    """
    from lab.commands.quantize_table import Side, compare, show
    from lab.compress.choice import Choice
    from lab.compress.folder import ARRAYS
    from lab.train.json_files import write_json

    _check_flags(weights, activations, calibrate, records)
    original = _opened(run, step, best, experiment)
    to = to or _place(run, weights, activations)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} is there already; --to names a new or empty folder.")
    arrays = _rounded(original, weights, Choice(embeddings, heads, keep), activations, calibrate)
    about = {"weights": weights, "activations": activations, "calibrate": calibrate, "embeddings": embeddings,
             "heads": heads, "keep": keep, "made_from": str(run), "step": int(original.state.step)}
    try:
        original.store(to, arrays, about)
    except BaseException:  # a full disk, Ctrl-C: leave no part of a model
        shutil.rmtree(to, ignore_errors=True)
        raise
    log.info("%s: written; comparing both on the validation split ...", to)
    sides = (Side(original.program, original.state, original.disk),
             Side(*_again(to, original.program.experiment), (to / ARRAYS).stat().st_size))
    table = compare(*sides, original.data, records)
    write_json(to / "comparison.json", {**about, **table})
    print("\n".join(show(table, f"{weights}" + (f", {activations} inputs" if activations else ""))))
    print(f"{to}: {_counted(arrays)}")


def _check_flags(weights: str, activations: str | None, calibrate: int | None, records: int | None) -> None:
    if activations and weights != "int8":
        raise UserError(f"--activations int8 needs --weights int8: the groups of {weights} have a scale each, so their "
                        f"integer products cannot be added.")
    if calibrate is not None and not activations:
        raise UserError("--calibrate needs --activations int8: weights are rounded without data.")
    for flag, value in (("calibrate", calibrate), ("records", records)):
        if value is not None and value < 1:
            raise UserError(f"--{flag} must be at least 1, not {value}.")


class Original(NamedTuple):
    """What is quantised, on its data."""

    program: Any
    state: Any
    data: Any
    variables: Any
    """The model's variables in float32; those of a location are whole, also where the data needs less of them."""
    disk: int
    """Bytes of the parameters on disk."""
    store: Callable[..., None]
    """Writes a folder: (to, arrays, about)."""


def _opened(run: Path, step: int | None, best: bool, file: Path | None) -> Original:
    """Raises UserError for an unfinished run, a GAN, weights that are quantised already; see also `evaluate`."""
    from lab.commands import evaluate
    from lab.commands.location import on_experiment
    from lab.commands.sample_weights import check_flags
    from lab.compress.folder import refuse
    from lab.compress.quantized import bytes_of
    from lab.models.gpt import GPT
    from lab.tasks.adversarial import Adversarial
    from lab.train.description import finished
    from lab.train.step import eval_variables
    from lab.weights.location import is_location
    from lab.weights.read import find, variables_of

    refuse(run, "quantised again")
    if is_location(str(run)):
        weights = find(str(run))
        if file is None and isinstance(weights.model, GPT):
            check_flags(str(run), step, best, None)
            _, data, program, state = on_experiment(str(run), _own_text(str(run), weights.model), "this text")
        else:
            _, data, program, state, _ = evaluate.opened(run, step, best, file)
        disk = sum(path.stat().st_size for path in weights.tensors.files)
        return Original(program, state, data, variables_of(weights.arrays()), disk,
                        functools.partial(_store_location, weights))
    if (run / "experiment.json").exists() and finished(run) is None:
        raise UserError(f"The run in {run} is not finished: type its command again, and quantise what it ends with.")
    found, data, program, state, _ = evaluate.opened(run, step, best, file)
    if isinstance(found.task, Adversarial):
        raise UserError(f"{run} is a GAN, whose samples have no validation metric to compare: only models with outputs "
                        f"for given inputs can be quantised.")
    variables = eval_variables(dataclasses.replace(found, precision="float32"), state)
    return Original(program, state, data, variables, bytes_of(variables),
                    functools.partial(_store_run, run, found, data))


def _own_text(location: str, model: Any) -> Any:
    """The data and the task of a language model without an experiment: Python's standard library, as in gpt_small."""
    from lab.data.hugging_face import HuggingFaceTokenizer
    from lab.data.text import PythonStdlib, Text
    from lab.experiment import Experiment
    from lab.optim.sgd import SGD
    from lab.tasks.language import LanguageModel

    text = Text(PythonStdlib(), HuggingFaceTokenizer(location), length=min(model.context, 256))
    return Experiment(data=text, model=model, task=LanguageModel(), optim=SGD(lr=0.0), steps=1, batch=4)


def _place(run: Path, weights: str, activations: str | None) -> Path:
    from lab.commands.location import name_of
    from lab.weights.location import is_location

    name = f"{name_of(run)}-{weights}" + ("-activations" if activations else "")
    return Path(name) if is_location(str(run)) else run.parent / name


def _rounded(original: Original, weights: str, choice: Any, activations: str | None,
             calibrate: int | None) -> dict[str, Any]:
    """The arrays of a folder: params/PATH -> array or `Quantized`, and those of other collections."""
    import jax
    import numpy as np

    from lab.compress.choice import input_axes
    from lab.compress.quantized import quantized
    from lab.optim.matrices import matrices
    from lab.train.restore import leaves

    program = original.program
    found = {path: np.asarray(x) for path, x in leaves(jax.device_get(original.variables)).items()}
    params = {path.removeprefix("params/"): x for path, x in found.items() if path.startswith("params/")}
    axes = input_axes(params, matrices(program.experiment, program.spec), program.experiment.model, choice)
    rounded = {path: quantized(params[path], axes[path], weights, path) for path in axes}
    if activations:
        rounded = _multiplying(rounded, original, calibrate)
    return found | {f"params/{path}": x for path, x in rounded.items()}


def _multiplying(rounded: Mapping[str, Any], original: Original, calibrate: int | None) -> dict[str, Any]:
    """The matrices with those of dense and convolution layers marked to multiply integers.

    Raises:
      UserError: there are none.
    """
    import jax
    import numpy as np

    from lab.compress.model import Incoming
    from lab.data.pipeline import eval_batches
    from lab.train.program import Program
    from lab.train.step import make_eval_step

    program, state = original.program, original.state
    incoming = Incoming()
    number = (calibrate or 1) * program.eval_batch
    batches = eval_batches(original.data.train, program.eval_batch, number, program.eval_rows)
    with incoming.seen():
        if calibrate is None:
            jax.eval_shape(make_eval_step(program.experiment), state, next(batches))
        else:  # a new program: what is compiled already would not be traced
            Program(program.experiment).evaluate(state, batches)
    jax.effects_barrier()
    if not (paths := incoming.layers & rounded.keys()):
        raise UserError("No matrix to round belongs to a dense or convolution layer: leave out --activations.")

    def scale(path: str) -> Any:
        return None if calibrate is None else np.full(rounded[path].shape[:-len(rounded[path].inputs) - 1],
                                                      incoming.largest[path] / 127, np.float32)

    return rounded | {path: dataclasses.replace(rounded[path], products=True, incoming=scale(path)) for path in paths}


def _store_run(run: Path, experiment: Any, data: Any, to: Path, arrays: Mapping[str, Any],
               about: Mapping[str, Any]) -> None:
    """Writes a folder like a run's: its description, what was fitted to its data, and the arrays."""
    from lab.compress import folder
    from lab.configuration.values import to_json
    from lab.files import make_folder
    from lab.optim.sgd import SGD
    from lab.pretrained import Pretrained
    from lab.train import fitted, own_file, reference
    from lab.train.description import read_description, sealed
    from lab.train.json_files import write_json
    from lab.train.source_code import code_of

    make_folder(to)
    # What is left of the experiment: nothing is trained, and averages and adapters are in the arrays.
    experiment = dataclasses.replace(experiment, optim=SGD(lr=0.0), adapt=None, init_from=Pretrained())
    value = read_description(run) | {"experiment": to_json(experiment), "fingerprint": experiment.fingerprint(),
                                     "code": code_of(experiment), "checkpoints": None}
    folder.write(to, arrays, about)
    for name in (fitted.FILE, fitted.TOKENIZER, own_file.COPY):
        if (run / name).exists():
            shutil.copyfile(run / name, to / name)
    if (run / own_file.BESIDE).exists():
        shutil.copytree(run / own_file.BESIDE, to / own_file.BESIDE)
    if getattr(experiment.task, "reference", None):
        reference.keep_reference(experiment, data, to)
    write_json(to / "experiment.json", sealed(value))


def _store_location(weights: Any, to: Path, arrays: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Writes a folder like that of pretrained weights: config.json, the tokenizer's files, and the arrays."""
    import json

    from lab.commands.export import write_tokenizer
    from lab.compress import folder
    from lab.files import make_folder, replace_file
    from lab.weights.tokenizer import tokenizer_of
    from lab.weights.write import architecture_of

    make_folder(to)
    folder.write(to, arrays, about)
    if weights.place.is_dir():
        for path in weights.place.rglob("*"):
            if path.suffix in (".json", ".txt", ".jinja") and "index" not in path.name:
                make_folder((to / path.relative_to(weights.place)).parent)
                shutil.copyfile(path, to / path.relative_to(weights.place))
        return
    model = weights.model
    replace_file(to / "config.json", json.dumps(architecture_of(model).config(model), indent=2) + "\n")
    write_tokenizer(to, *tokenizer_of(weights.location, model).described(), model.context)


def _again(to: Path, experiment: Any) -> tuple[Any, Any]:
    """(program, state) of the folder, as every command opens it."""
    from lab.commands.location import on_experiment
    from lab.train.restore import open_run
    from lab.weights.location import is_location

    if is_location(str(to)):
        return on_experiment(str(to), experiment, "this experiment")[2:]
    return open_run(to)[1:]


def _counted(arrays: Mapping[str, Any]) -> str:
    """What was rounded, in a line."""
    import math

    from lab.compress.quantized import is_quantized

    rounded = [x for x in arrays.values() if is_quantized(x)]
    numbers, whole = (sum(math.prod(x.shape) for x in xs) for xs in (rounded, arrays.values()))
    products = sum(x.products for x in rounded)
    return (f"{len(rounded)} matrices, {numbers / whole:.1%} of {whole:,} numbers, are integers"
            + (f"; {products} of them multiply integers" if products else ""))
