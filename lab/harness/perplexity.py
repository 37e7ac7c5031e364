"""Perplexity and bits per byte of a text, by a sliding window with a stride."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lab.errors import UserError
from lab.harness.scoring import Language, score

UNPACK = {".gz": gzip.open, ".xz": lzma.open}


def windows(tokens: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, new) of each window: it moves on by `stride`, and scores the positions from `new` on, those that no
    window before had. The first token of a window is never scored: nothing stands before it.

    Source: transformers, "Perplexity of fixed-length models".
    """
    found, new = [], 0
    for begin in range(0, tokens, stride):
        end = min(begin + context, tokens)
        found.append((begin, end, new))
        new = end
        if end == tokens:
            break
    return [(begin, end, new) for begin, end, new in found if end > max(new, begin + 1)]


def perplexity(language: Language, ids: Sequence[int], size: int, context: int, stride: int) -> dict[str, float]:
    """Numbers of a text of `ids`, of `size` bytes.

    `perplexity` is exp of the sum of all negative log-likelihoods over their number. The recipe of transformers
    weights the mean of each window by its new tokens less one, which is their number in the first window only:
    `perplexity_recipe`. Bytes are those of the scored tokens.
    """
    ids = np.asarray(ids)
    places = windows(len(ids), context, stride)
    sums, counts = [], []
    for (logs, _), (begin, _, new) in zip(score(language, [ids[b:e].tolist() for b, e, _ in places]), places,
                                          strict=True):
        own = logs[max(new - begin - 1, 0):]
        sums.append(-own.sum(dtype=np.float64))
        counts.append(len(own))
    total, number = math.fsum(sums), sum(counts)
    weights = [end - new - 1 for _, end, new in places]
    means = [s / n for s, n in zip(sums, counts, strict=True)]
    recipe = sum(weights) and math.fsum(m * w for m, w in zip(means, weights, strict=True)) / sum(weights)
    unscored = np.ones(len(ids), bool)
    for begin, end, new in places:
        unscored[max(new, begin + 1):end] = False
    size -= int(language.text.byte_counts[ids[unscored]].sum())
    return {"loss": total / number, "perplexity": exp(total / number), "perplexity_recipe": exp(recipe),
            "bits_per_byte": total / math.log(2) / size, "tokens": number, "bytes": size, "windows": len(places),
            "context": context, "stride": stride}


def exp(loss: float) -> float:
    """e^loss, infinite where that is no float64."""
    return math.inf if loss > 709 else math.exp(loss)


def check_window(language: Language, context: int | None, stride: int | None) -> tuple[int, int]:
    """(the window's length, by default the model's context, at most 1,024; its stride, by default half of that).
    UserError for numbers that do not fit."""
    context = min(language.context, 1024) if context is None else context
    if not 2 <= context <= language.context:
        raise UserError(f"--context {context} is not between 2 and the model's context of {language.context}.")
    stride = context // 2 if stride is None else stride
    if not 1 <= stride <= context:
        raise UserError(f"--stride {stride} is not between 1 and the window's {context} tokens: tokens would be left "
                        f"out.")
    return context, stride


def read_text(file: Path) -> str:
    """The text of a file, also .gz or .xz. UserError if it is no UTF-8 text."""
    try:
        with UNPACK.get(file.suffix, open)(file, "rb") as opened:
            return opened.read().decode()
    except (OSError, UnicodeDecodeError, EOFError, lzma.LZMAError) as e:
        raise UserError(f"--text {file} cannot be read as UTF-8 text ({type(e).__name__}).") from None


def text_perplexity(language: Language, text: str, context: int | None, stride: int | None) -> dict[str, float]:
    """`perplexity` of a text. UserError if it has less than two tokens, or the window does not fit the model."""
    context, stride = check_window(language, context, stride)
    ids = language.text.encode(text).tolist()
    if len(ids) < 2:
        raise UserError(f"--text has {len(ids)} tokens: nothing can be predicted.")
    return perplexity(language, ids, len(text.encode()), context, stride)
