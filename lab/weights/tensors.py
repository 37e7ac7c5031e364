"""Tensors of safetensors files, read one by one. Files are memory-mapped, and nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lab.errors import UserError
from lab.weights.location import CONVERT, PICKLED

DTYPES = ("F32", "F16", "BF16")


class Tensors(Protocol):
    """Named tensors of a file or folder."""

    shapes: Mapping[str, tuple[int, ...]]
    files: tuple[Path, ...]

    def check(self, name: str) -> None:
        """UserError if a tensor has a type that no weight has."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, float32, float16 or bfloat16."""


class SafeTensors:
    """The tensors of a folder's model.safetensors, or of the shards that model.safetensors.index.json names.

    Raises:
      UserError: a missing, truncated or pickled file, a shard outside the folder, or a tensor in two shards.
    """

    def __init__(self, folder: Path):
        self.files = _shards(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._holder: dict[str, Any] = {}
        self._types: dict[str, str] = {}
        for file in self.files:
            handle = opened(file)
            for name in handle.keys():  # noqa: SIM118 (a handle is not iterable)
                if name in self._holder:
                    raise UserError(f"{folder}: two files hold a tensor {name}, {file.name} is one of them.")
                part = handle.get_slice(name)
                self.shapes[name], self._types[name] = tuple(part.get_shape()), part.get_dtype()
                self._holder[name] = handle

    def check(self, name: str) -> None:
        """UserError if the tensor is not F32, F16 or BF16."""
        if (dtype := self._types[name]) not in DTYPES:
            raise UserError(f"{self.files[0].parent}: the tensor {name} is {dtype}; weights are {', '.join(DTYPES)}.")

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self._holder[name].get_tensor(name)


def _shards(folder: Path) -> tuple[Path, ...]:
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if one.exists():
        return (one,)
    if not index.exists():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
        if pickled:
            raise UserError(f"{folder / pickled[0]} is a pickle, which can run code when it is read. {CONVERT}")
        raise UserError(f"{folder} has no model.safetensors and no model.safetensors.index.json.")
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        plain = all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} has no weight_map from tensors to files.") from None
    if not plain:
        raise UserError(f"{index} names files that are outside its folder, or not .safetensors.")
    if missing := [name for name in names if not (folder / name).exists()]:
        raise UserError(f"{folder} lacks {len(missing)} of {len(names)} shards, such as {missing[0]}.")
    return tuple(folder / name for name in names)


def opened(file: Path) -> Any:
    """A safetensors file, memory-mapped. Raises UserError if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="numpy").__enter__()  # mapped as long as the handle lives
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file} is not a complete safetensors file ({str(e).splitlines()[0][:120]}).") from None
