"""Tensors and metadata of .gguf files, dequantised by the `gguf` library one tensor at a time."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from lab.errors import UserError

FACTORS = "rope_freqs.weight"  # (K / 2,): how much longer each wavelength is, in files of Llama 3.1 and later

class GGUF:
    """The tensors of a .gguf file, memory-mapped; axes in NumPy's order, the outputs of a matrix first.

    Raises:
      UserError: the `gguf` package is missing, or the file is none of this format or damaged.
    """

    def __init__(self, file: Path):
        try:
            import gguf
        except ImportError:
            raise UserError(f"{file} needs the package gguf: LAB_EXTRAS=gguf ./launch.sh ...") from None
        self.files, self._quants = (file,), gguf.quants
        try:
            reader = _reader(file, (stat := file.stat()).st_mtime_ns, stat.st_size)
            self.metadata = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as e:  # the library raises many kinds, also from NumPy
            raise UserError(f"{file} is not a complete GGUF file ({(str(e).splitlines() or [''])[0][:120]}).") from None
        self._tensors = {t.name: t for t in reader.tensors}
        self.shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}

    def check(self, name: str) -> None:
        """UserError for a quantisation that the library cannot undo."""
        self._dequantised(name, self._tensors[name].data[:1])

    def read(self, name: str) -> np.ndarray:
        """One tensor, float32. UserError as `check`."""
        return self._dequantised(name, self._tensors[name].data).reshape(self.shapes[name])

    def _dequantised(self, name: str, data: np.ndarray) -> np.ndarray:
        kind = self._tensors[name].tensor_type
        try:
            return self._quants.dequantize(data, kind)
        except (NotImplementedError, KeyError, ValueError) as e:
            raise UserError(f"{self.files[0]}: {name} is {kind.name}, which the gguf library does not dequantise "
                            f"({str(e).splitlines()[0][:80]}).") from None


@functools.lru_cache(maxsize=1)  # seconds, and the tokenizer is in the same file as the tensors
def _reader(file: Path, changed: int, size: int) -> Any:
    import gguf

    return gguf.GGUFReader(file)


def config_of(file: GGUF) -> dict[str, Any]:
    """The model's fields without the architecture's name in front, "model_type", and what only the tensors say: "tied",
    and the factors of rotary wavelengths, "rope_freqs", if there are some."""
    kind, fields = file.metadata.get("general.architecture", "?"), {}
    for name, value in file.metadata.items():
        if name.startswith(f"{kind}."):  # numbers are float32 in the file: 9.999999747378752e-06 is 1e-05
            fields[name.removeprefix(f"{kind}.")] = float(str(np.float32(value))) if isinstance(value, float) else value
    if FACTORS in file.shapes:
        fields["rope_freqs"] = file.read(FACTORS)
    return fields | {"model_type": f"{kind} (GGUF)", "vocab": len(file.metadata.get("tokenizer.ggml.tokens", ())),
                     "tied": "output.weight" not in file.shapes}
