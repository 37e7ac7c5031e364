"""`./launch.sh export RUN --to FOLDER`: a trained model for Hugging Face's transformers or timm, or as one file: GGUF,
StableHLO or ONNX."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lab.commands.arguments import call
from lab.data.tokenizers import EOT
from lab.errors import UserError

FORMATS = ("stablehlo", "onnx")


def main(args: Sequence[str]) -> int:
    """RUN --to FOLDER|FILE.gguf, RUN|LOCATION --to stablehlo|onnx FILE"""
    return call("export", export, _in_flags(args))


def _in_flags(args: Sequence[str]) -> list[str]:
    """`--to stablehlo FILE` as `--to FILE --format stablehlo`. UserError without a file."""
    for i, (flag, kind) in enumerate(itertools.pairwise(args)):
        if flag == "--to" and kind in FORMATS:
            if len(args) == i + 2 or args[i + 2].startswith("-"):
                raise UserError(f"--to {kind} needs a file, too: --to {kind} model.{kind} (a folder: --to ./{kind}).")
            return [*args[:i], "--to", args[i + 2], "--format", kind, *args[i + 3:]]
    return list(args)


def export(run: Annotated[str, tyro.conf.Positional], to: Path, type: Literal["F32", "F16", "Q8_0"] | None = None,
           adapter: bool = False, step: int | None = None, best: bool = False, experiment: Path | None = None,
           format: Literal["stablehlo", "onnx"] | None = None, weights: Literal["inside", "beside"] = "inside") -> None:
    """Writes config.json, model.safetensors, tokenizer.json, generation_config.json and a model card; or one .gguf
    file, for llama.cpp; or any model as one function, for jax.export (--to stablehlo FILE) or ONNX (--to onnx FILE).

    Args:
      run: the run folder of a GPT, BERT, ViT or ResNet. For stablehlo and onnx: of any model but an
        encoder-decoder, or pretrained weights.
      to: the folder to write, new or empty; or a new .gguf file (LAB_EXTRAS=gguf), for a model of Llama's shape; or
        a new file of `format`, which --to stablehlo FILE and --to onnx FILE also say.
      type: how a .gguf file stores matrices: F32, F16 (the default) or Q8_0, 8 bits and a scale for 32 values.
      adapter: write only the adapters of a run with adapt=LoRA(...), in PEFT's format; by default they are merged.
      step: use the checkpoint of this step; by default the latest.
      best: use the checkpoint with the best validation metric.
      experiment: the run's experiment file, needed if it defines classes and was not run on this machine.
      format: stablehlo: a file of jax.export, for CPUs, GPUs and TPUs; onnx: checked with onnxruntime. By default by
        the ending of the file.
      weights: where a stablehlo file has its weights: inside, or beside it as .safetensors.
    """
    if format or to.suffix[1:] in FORMATS:
        _function(run, to, format or to.suffix[1:], weights, type, adapter, step, best, experiment)
    else:
        _export(Path(run), to, type, adapter, step, best, experiment)


def _function(run: str, to: Path, form: Any, weights: Any, type: str | None, adapter: bool, *which: Any) -> None:
    from lab.commands.export_function import export_function

    if type is not None or adapter:
        raise UserError(f"--type and --adapter are for other formats than {form}.")
    export_function(run, to, form, weights, *which, tokenizer=_tokenizer(Path(run))[0])


def _export(run: Path, to: Path, type: Literal["F32", "F16", "Q8_0"] | None, adapter: bool, step: int | None,
            best: bool, experiment: Path | None) -> None:
    """Writes a folder or a .gguf file."""
    import jax
    import numpy as np

    from lab.compress.folder import refuse
    from lab.train.restore import leaves, open_run
    from lab.train.step import eval_variables
    from lab.weights.gguf_write import check, write_gguf
    from lab.weights.write import architecture_of

    if to.exists() and (to.suffix == ".gguf" or not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} is there already; --to names a new or empty folder, or a new .gguf file.")
    if type is not None and to.suffix != ".gguf":
        raise UserError(f"--type {type} is for a .gguf file, such as --to {to}.gguf.")
    refuse(run, "exported")
    found, _, state = open_run(run, step, best, file=experiment)
    (check if to.suffix == ".gguf" else architecture_of)(found.model)  # before anything is written
    arrays = {path.removeprefix("params/"): np.asarray(jax.device_get(x))
              for path, x in leaves(eval_variables(found, state)).items()}
    if adapter:
        print(_adapter(found, state, arrays, to))
        return
    tokenizer, about = _tokenizer(run)
    ids = {name: about.pop(name, None) for name in ("eos_token_id", "bos_token_id")}
    size = f"{sum(x.size for x in arrays.values()):,} parameters, step {int(state.step)}"
    if to.suffix == ".gguf":
        if tokenizer is None:
            raise UserError(f"A .gguf file holds a tokenizer of byte-level BPE, and that of {run} is another one. "
                            f"--to FOLDER writes the model without it.")
        write_gguf(found.model, arrays, to, type or "F16", tokenizer, ids, run.name)
        print(f"{to}: {type or 'F16'}, {size}")
        return
    try:
        name = _folder(run, found, arrays, to, int(state.step), tokenizer, about, ids)
    except BaseException:  # a full disk, Ctrl-C: leave no part of a model
        shutil.rmtree(to, ignore_errors=True)
        raise
    without = hasattr(found.model, "vocab") and not tokenizer
    print(f"{to}: {name}, {size}" + ("; no tokenizer.json: this run's tokenizer has no such form" if without else ""))


def _folder(run: Path, found: Any, arrays: dict[str, Any], to: Path, step: int, tokenizer: str | None,
            about: dict[str, Any], ids: dict[str, Any]) -> str:
    """Writes everything but a .gguf file; returns the name of the class that reads it."""
    from lab.files import replace_file
    from lab.models.gpt import GPT
    from lab.models.vit import ViT
    from lab.train.description import finished
    from lab.train.fitted import data_of
    from lab.weights.write import write

    data = data_of(run, found)
    height, width = (data.metadata.get(side) for side in ("height", "width"))
    if isinstance(found.model, ViT) and height != width:
        raise UserError(f"Only ViTs of square images can be exported, and these are {height} x {width}.")
    config = write(found.model, arrays, to, data.classes)
    if isinstance(found.model, GPT):
        replace_file(to / "generation_config.json", json.dumps(ids) + "\n")
    if "image_size" in config and hasattr(found.data, "mean"):
        replace_file(to / "preprocessor_config.json", json.dumps(_pixels(found.data, config), indent=2) + "\n")
    if tokenizer:
        write_tokenizer(to, tokenizer, about, found.model.context)
    replace_file(to / "README.md", _card(run, config, finished(run), step, found.fingerprint()))
    return config["architectures"][0]


def write_tokenizer(folder: Path, tokenizer: str, about: dict[str, Any], context: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json. `about`: fields of the latter."""
    from lab.files import replace_file

    replace_file(folder / "tokenizer.json", tokenizer)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **about, "model_max_length": context}
    replace_file(folder / "tokenizer_config.json", json.dumps(about, indent=2) + "\n")


def _adapter(experiment: Any, state: Any, paths: Any, to: Path) -> str:
    """Writes the adapters of a run; returns a line to print. `paths`: those of the model's parameters."""
    import jax

    from lab.weights.peft import write_adapter

    adapt, start = experiment.adapt, experiment.init_from
    if adapt is None or to.suffix == ".gguf":
        raise UserError("--adapter writes a folder, for a run with adapt=LoRA(...).")
    if adapt.full:
        raise UserError(f"--adapter writes adapters only, and this run also trained {', '.join(adapt.full)} in full. "
                        f"Export the merged model: leave out --adapter.")
    pairs = adapt.pairs(jax.device_get(experiment.optim.eval_params(state.opt_state, state.params)))
    base = getattr(start, "location", None) or getattr(start, "run", None)
    config = write_adapter(experiment.model, paths, pairs, to, {
        "r": adapt.rank, "lora_alpha": adapt.alpha, "lora_dropout": adapt.dropout,
        "use_rslora": adapt.scale == "rslora", "base_model_name_or_path": base and base.removeprefix("hf:")})
    return f"{to}: adapters of {len(config['target_modules'])} matrices, step {int(state.step)}"


def _tokenizer(run: Path) -> tuple[str | None, dict[str, Any]]:
    """(tokenizer.json, its special tokens and their ids) of a run with byte-level BPE or a pretrained model's
    tokenizer; (None, {}) for other tokenizers."""
    from lab.data.saved import revived

    try:
        text = (run / "tokenizer.json").read_text("utf-8")
        saved = json.loads(text)
        if saved["kind"] == "HuggingFaceTokenizer":
            return revived(text, str(run)).described()
        state = json.loads(saved["state"]) if saved["kind"] == "BPE" else {}
    except (OSError, ValueError, KeyError, TypeError):
        return None, {}
    ends = [token["id"] for token in state.get("added_tokens", []) if token["content"] == EOT]
    if not ends:
        return None, {}
    return saved["state"], {"eos_token": EOT, "bos_token": EOT, "eos_token_id": ends[0], "bos_token_id": ends[0]}


def _pixels(data: Any, config: dict[str, Any]) -> dict[str, Any]:
    """How transformers turns an image into the model's input."""
    size, channels = config["image_size"], config["num_channels"]
    mean, std = ([*values] * (channels if len(values) == 1 else 1) for values in (data.mean, data.std))
    return {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": size, "width": size},
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": mean, "image_std": std}


PIPELINES = {"CausalLM": "text-generation", "LMHeadModel": "text-generation", "MaskedLM": "fill-mask",
             "SequenceClassification": "text-classification", "ImageClassification": "image-classification",
             "Model": "feature-extraction"}


def _card(run: Path, config: dict[str, Any], result: dict[str, Any] | None, step: int, fingerprint: str) -> str:
    """The model card: how it was trained and what was measured."""
    rows = {name: value for name, value in (result or {}).get("final", {}).items() if isinstance(value, float)}
    table = "\n".join(f"| {name} | {value:.6g} |" for name, value in rows.items())
    measured = f"\n| validation, step {result['final']['step']} | |\n|---|---|\n{table}\n" if result else ""
    (name,) = config["architectures"]
    pipeline = next((tag for end, tag in PIPELINES.items() if name.endswith(end)), "image-classification")
    library = "transformers" if "model_type" in config else "timm"
    return (f"---\nlibrary_name: {library}\npipeline_tag: {pipeline}\n---\n\n# {run.name}\n\n"
            f"{name}, trained from the experiment {fingerprint}; weights of step {step}.\n{measured}")
