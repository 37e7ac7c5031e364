"""The files of a model with integer weights, in a folder that commands take like a run or like pretrained weights.

quantized.safetensors has each array by its path, an integer matrix as PATH:values, PATH:scale and maybe PATH:incoming;
quantized.json says how they are to be read, and the sha256 of the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from lab.compress.quantized import Quantized, Weights, is_quantized
from lab.errors import UserError
from lab.files import make_folder, replace_file
from lab.train.json_files import read_json, write_json

FILE, ARRAYS = "quantized.json", "quantized.safetensors"
PARTS = ("values", "scale", "incoming")
Arrays = Mapping[str, Any]
"""Path -> array or `Quantized`: parameters as params/PATH, other collections as batch_stats/PATH."""


@dataclass(frozen=True)
class Stored:
    """What a folder holds."""

    arrays: dict[str, Any]
    """See `Arrays`."""
    about: dict[str, Any]
    """How it was made: `step`, `weights`, `made_from`, ..."""


def is_stored(folder: Path) -> bool:
    """Whether a folder holds integer weights."""
    return (folder / FILE).exists()


def write(folder: Path, arrays: Arrays, about: Mapping[str, Any]) -> None:
    """Writes both files to a folder. `about`: JSON values to keep."""
    from safetensors.numpy import save

    make_folder(folder)
    plain, how = {}, {}
    for path, x in arrays.items():
        if not is_quantized(x):
            plain[path] = np.asarray(x, order="C")
            continue
        how[path] = {"kind": x.kind, "inputs": x.inputs, "sizes": x.sizes, "products": x.products}
        plain |= {f"{path}:{part}": np.ascontiguousarray(y) for part in PARTS if (y := getattr(x, part)) is not None}
    content = save(plain)
    replace_file(folder / ARRAYS, content)
    write_json(folder / FILE, {**about, "sha256": hashlib.sha256(content).hexdigest(), "quantized": how})


def read(folder: Path) -> Stored:
    """The arrays of a folder.

    Raises:
      UserError: a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    about = read_json(folder / FILE, {"sha256": str, "quantized": dict, "step": int})
    try:
        content = (folder / ARRAYS).read_bytes()
        if hashlib.sha256(content).hexdigest() != about.pop("sha256"):
            raise ValueError("its sha256 is another one")
        plain = load(content)
        arrays = {path: x for path, x in plain.items() if path.rpartition(":")[2] not in PARTS}
        arrays |= {path: _one(path, plain, how) for path, how in about.pop("quantized").items()}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder / ARRAYS} is damaged ({e}). Make it again: ./launch.sh quantize "
                        f"{about.get('made_from', '...')}") from None
    return Stored(arrays, about)


def _one(path: str, plain: Mapping[str, np.ndarray], how: Mapping[str, Any]) -> Quantized:
    if how["kind"] not in get_args(Weights):
        raise ValueError(f"it has weights of kind {how['kind']}")
    return Quantized(*(plain.get(f"{path}:{part}") for part in PARTS), how["kind"], tuple(how["inputs"]),
                     tuple(how["sizes"]), how["products"])


def refuse(folder: Path, what: str) -> None:
    """Raises UserError if a folder holds integer weights. `what`: what cannot be done with them."""
    if is_stored(folder):
        raise UserError(f"{folder} holds quantised weights, which cannot be {what}: name what they were made from "
                        f"({read_json(folder / FILE).get('made_from')}).")
