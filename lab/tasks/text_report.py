"""What a language model's run shows at its end: sampled texts, and bits per byte compared with gzip and xz."""

from __future__ import annotations

import gzip
import lzma

import numpy as np

from lab.errors import forgiving
from lab.files import make_folder, replace_file
from lab.tasks.base import EvalResult

COMPRESSED = 4_000_000  # bytes of validation text compressed with gzip and xz


def text_report(outcome: EvalResult, samples: int) -> list[str]:
    """Writes `samples` texts to samples/; returns lines to print. Nothing for data that cannot decode its tokens."""
    if not hasattr(outcome.data, "decode"):  # tokens that are no text
        return []
    lines = []
    with forgiving("The comparison with gzip and xz"):
        raw = outcome.data.validation_bytes(COMPRESSED)
        others = {"gzip -9": gzip.compress(raw, 9), "xz -9": lzma.compress(raw, preset=9)}
        beside = ", ".join(f"{name} {8 * len(packed) / len(raw):.3f}" for name, packed in others.items())
        lines.append(f"Validation text in bits per byte: this model {outcome.means['bits_per_byte']:.3f} on the "
                     f"records evaluated; {beside} on {len(raw) / 1e3:,.0f} kB")
    with forgiving("The samples"):
        lines += _samples(outcome, samples)
    return lines


def _samples(outcome: EvalResult, samples: int) -> list[str]:
    from lab.models.generate import sample_texts

    data, folder = outcome.data, outcome.folder
    spread = np.linspace(0, len(data.validation) - 1, min(samples, len(data.validation))).astype(int)
    found = data.validation[spread]
    rows = found["tokens"]
    # Where only answers count, the prompt is what comes before the first.
    ends = found["learn"].argmax(1) + 1 if "learn" in found else [min(32, rows.shape[1] // 4)] * len(rows)
    prompts = [data.decode(row[:end]) for row, end in zip(rows, ends, strict=True)]
    texts = sample_texts(outcome.compute, outcome.model.context, data, prompts, seed=outcome.seed, temperature=0.8,
                         top_k=50)
    place = make_folder(folder / "samples")
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        replace_file(place / f"{i}.txt", f"--- prompt\n{prompt}\n--- continuation\n{text}\n")
    shown = [prompt + text for prompt, text in zip(prompts, texts, strict=True)][:1]
    return [*(f"Sample (more in {folder / 'samples'}):" for _ in shown),
            *(f"  | {line}" for text in shown for line in text.splitlines())]
