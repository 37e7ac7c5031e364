"""What stands beside an exported file, as JSON: what its inputs and outputs are, and how the data prepared them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lab.data.images.images import ImageData
from lab.data.tables.table_data import TableData
from lab.exported.function import Function, example

MEANING = {
    "logits": "unnormalised log-probabilities", "probabilities": "of the classes",
    "prediction": "in units of the target", "images": "values in [-1, 1]", "latents": "standard normal numbers",
    "tokens": "token ids", "mask": "1 where a token is real, 0 for padding", "segments": "0 or 1: which text of a pair",
    "embedding": "of length 1", "hidden": "last states",
}
MOVED = ("Bytes", "Chars", "GPT2")  # tokenizers whose ids move up by one where id 0 is padding


def described(function: Function) -> dict[str, Any]:
    """Inputs and outputs: name -> shape ("B": any batch size, "L": any length), type and meaning."""
    batch, length = 3, min(7, function.longest or 7)
    given = example(function, batch, length)
    out = jax.eval_shape(function.call, function.variables, given)
    other = jax.eval_shape(function.call, function.variables, example(function, 2, max(length - 1, 1)))
    inputs = {name: _form(list(form.shape), form.dtype, name) for name, form in function.inputs.items()}
    outputs = {name: _form(["B" if i == 0 else "L" if a != b else a
                            for i, (a, b) in enumerate(zip(x.shape, other[name].shape, strict=True))], x.dtype, name)
               for name, x in out.items()}
    limits = {"longest": function.longest} if function.longest else {}
    return {"inputs": inputs, "outputs": outputs, **limits}


def _form(shape: list[int | str], kind: Any, name: str) -> dict[str, Any]:
    meaning = {"meaning": MEANING[name]} if name in MEANING else {}
    return {"shape": shape, "dtype": np.dtype(kind).name, **meaning}


def preprocessing(experiment: Any, data: Any, tokenizer: str | None) -> dict[str, Any]:
    """How the data of a run makes its records, which are the inputs. `tokenizer`: the content of the run's file."""
    if isinstance(data, ImageData):
        form = experiment.data.form
        return {"images": {"values": "0 to 255, uint8", "channels": "RGB" if form.channels == 3 else "grey",
                           "height": form.height, "width": form.width,
                           "resize": "largest centre crop of this aspect ratio, resized" if form.resize else "none"},
                "inside": {"normalisation": "(x / 255 - mean) / std", "mean": list(experiment.data.mean),
                           "std": list(experiment.data.std), "centre_crop": list(experiment.data.shape[:2])}}
    if isinstance(data, TableData):
        columns = [{"kind": type(feature).__name__, **asdict(feature)} for feature in data.features]
        return {"columns": columns, "rule": "Number: (value, or fill if missing, - mean) / scale; Category: 1 for its "
                                            "value among values, else 0. One after the other, float32.",
                "target": data.target.column}
    found = {name: getattr(experiment.data, name) for name in ("length", "truncate") if hasattr(experiment.data, name)}
    return {"text": found | tokens(tokenizer)} if tokenizer else found


def tokens(tokenizer: str) -> dict[str, Any]:
    """What turns text into ids, from the run's tokenizer.json: the tokenizer, its size and state, and its padding."""
    kept = json.loads(tokenizer)
    moved = {"ids_moved_by": int(kept["kind"] in MOVED)} if kept["padding"] else {}
    own = {} if kept["kind"] in ("BPE", "HuggingFaceTokenizer") else {"state": kept["state"]}
    return {"tokenizer": kept["kind"], "fields": kept["fields"], "ids": kept["size"], **own, **moved}


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """The versions of installed packages."""
    from importlib.metadata import version

    return {name: version(name) for name in names}


def written(about: Mapping[str, Any], path: Path) -> None:
    """Writes the JSON."""
    path.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")
