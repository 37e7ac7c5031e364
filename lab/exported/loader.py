"""Runs an exported model without lab: pip install jax numpy flatbuffers (which jax.export reads files with).

    python LOADER MODEL.stablehlo inputs.npz outputs.npz      or: load("MODEL.stablehlo")(inputs=images)["logits"]
"""
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax import export


def load(path: str) -> Callable:
    """A function of arrays by name, which returns arrays by name; MODEL.json says which, and what they mean."""
    about = json.loads(Path(path).with_suffix(".json").read_text("utf-8"))
    model = jax.jit(export.deserialize(bytearray(Path(path).read_bytes())).call)
    weights = jax.device_put(read(Path(path).parent / about["weights"])) if about["weights"] != "inside" else {}

    def run(**arrays):
        inputs = {name: np.asarray(arrays[name], form["dtype"]) for name, form in about["inputs"].items()}
        if any(x.shape[1] > about["longest"] for x in inputs.values() if "longest" in about):
            raise ValueError(f"A text has more tokens than {about['longest']}.")
        return model(weights, inputs)

    return run


def read(path: Path) -> dict:
    """The arrays of a safetensors file."""
    raw = np.memmap(path, np.uint8, "r")
    start = 8 + int(raw[:8].view("<u8")[0])
    header = json.loads(bytes(raw[8:start]))
    kinds = {"F32": "float32", "F16": "float16", "BF16": jax.numpy.bfloat16, "I32": "int32"}
    return {name: raw[start + x["data_offsets"][0]:start + x["data_offsets"][1]].view(kinds[x["dtype"]]).reshape(
        x["shape"]) for name, x in header.items() if name != "__metadata__"}


if __name__ == "__main__":
    outputs = load(sys.argv[1])(**np.load(sys.argv[2], allow_pickle=False))
    np.savez(sys.argv[3], **{name: np.asarray(x, np.float32) for name, x in outputs.items()})
