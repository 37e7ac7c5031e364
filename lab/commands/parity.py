"""`./launch.sh parity LOCATION`: our outputs beside those of Hugging Face's transformers."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lab.commands.arguments import call
from lab.errors import UserError
from lab.files import ROOT

if TYPE_CHECKING:
    import numpy as np

    from lab.weights.parity import Batch


def main(args: Sequence[str]) -> int:
    """LOCATION"""
    return call("parity", parity, args)


def parity(location: Annotated[str, tyro.conf.Positional], length: int | None = None, text: Path | None = None,
           tolerance: float = 1e-4) -> int:
    """Compares our outputs in float32 with those of transformers: real text, random ids, the longest input, a padded
    batch, and decoding with the key/value cache. The exit status is 1 if any difference is above the tolerance.

    Needs torch and transformers: UV_TORCH_BACKEND=cpu LAB_EXTRAS=parity,gguf ./launch.sh parity ...

    Args:
      location: the weights: a folder, a .gguf file, hf:ORG/NAME or package:NAME/PATH.
      length: tokens of the longest input; by default the model's context, at most 1024.
      text: the file whose beginning is the real text; by default this project's README.md.
      tolerance: the largest difference allowed, in the units of the output.
    """
    from lab.compress.folder import refuse
    from lab.weights.parity import batches, check_packages, load_theirs, our_outputs, rounding
    from lab.weights.read import find, variables_of

    check_packages()
    start = time.monotonic()
    try:
        words = (text or ROOT / "README.md").read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--text {text} cannot be read as UTF-8 text.") from None
    found = find(location)
    refuse(found.place, "compared with transformers")
    model, variables = found.model, variables_of(found.arrays())
    print(f"{location}: {type(model).__name__}; read in {time.monotonic() - start:.1f} s, {_peak()}", flush=True)
    context = getattr(model, "context", 0)  # 0: a model of images
    length = min(context, 1024) if length is None else length
    if context and not 1 <= length <= context:
        raise UserError(f"--length {length} is not between 1 and the model's context of {context}.")
    rows = batches(found, length, words)
    if context and "real text" not in rows:
        print("There is no tokenizer at the location: no real text.")
    ours = our_outputs(model, variables, rows)
    del variables
    began = time.monotonic()
    theirs = load_theirs(found)
    print(f"transformers: {type(theirs).__name__}; loaded in {time.monotonic() - began:.1f} s, {_peak()}\n")
    worst, above = _table(theirs, model, rows, ours, tolerance)
    for kind, there in above.items():
        here, their = rounding(theirs, model, rows[kind], ours[kind], there)
        print(f"{kind}: from transformers in float64, ours differs by {here:.1e}, its own float32 by {their:.1e}.")
    print(f"\nThe largest difference, {worst:.1e}, is {'above' if above else 'within'} {tolerance:g}. "
          f"{time.monotonic() - start:.0f} s, {_peak()}.")
    return int(bool(above))


def _table(theirs: Any, model: Any, rows: Mapping[str, Batch], ours: Mapping[str, np.ndarray],
           tolerance: float) -> tuple[float, dict[str, np.ndarray]]:
    """Prints a line for each batch; returns the largest difference, and their outputs where it is above `tolerance`."""
    from lab.weights.parity import compare, gives_logits, their_output

    print(f"{'inputs':<24} {'shape':>17} {'max |diff|':>10} {'mean':>8} {'max |out|':>9} {'relative':>8} {'top-1':>7}")
    worst, above = 0.0, {}
    for kind, batch in rows.items():
        there = their_output(theirs, model, batch)
        row = compare(kind, batch, ours[kind], there, gives_logits(model))
        name = f"{kind} of {model.context:,}" if kind == "longest" else kind
        agree = "-" if row.agree is None else f"{row.agree:.2%}"
        print(f"{name:<24} {' x '.join(map(str, row.shape)):>17} {row.largest:10.1e} {row.mean:8.1e} "
              f"{row.output:9.3g} {row.largest / row.output:8.1e} {agree:>7}", flush=True)
        worst = worst if row.largest <= worst else row.largest
        if not row.largest <= tolerance:  # or it is NaN
            above[kind] = there
    return worst, above


def _peak() -> str:
    """The most memory that this process had so far."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return f"peak {kilobytes * 1024 / 1e9:.2f} GB"
