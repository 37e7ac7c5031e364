"""Encoded dialogues to windows of one length, each with one dialogue or with several."""

from collections.abc import Sequence

import numpy as np

OPEN = 1024  # windows that may still get a dialogue; bounds the time of a search
Encoded = tuple[np.ndarray, np.ndarray]
"""(ids int32 (n,), learn uint8 (n,))."""


def first_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """The items of each window: each goes, in order, into the first window with room for it. `sizes`: at most `room`.

    Only the last `OPEN` windows are looked at.
    """
    windows: list[list[int]] = []
    left = np.zeros(len(sizes), np.int64)
    for item, size in enumerate(sizes):
        first = max(len(windows) - OPEN, 0)
        fits = left[first: len(windows)] >= size
        at = first + int(fits.argmax()) if fits.any() else len(windows)
        if at == len(windows):
            windows.append([])
            left[at] = room
        windows[at].append(item)
        left[at] -= size
    return windows


def windows_of(dialogues: Sequence[Encoded], length: int, packing: bool, pad: int,
               byte_counts: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of `Dialogues`' records. `dialogues`: of at most length + 1 tokens each; `byte_counts`: per id.

    A dialogue's tokens stand one after the other, and the token that follows its last one, of another dialogue or
    padding, never counts.
    """
    sizes = [len(ids) for ids, _ in dialogues]
    windows = first_fit(sizes, length + 1) if packing else [[i] for i in range(len(sizes))]
    shape = len(windows), length + 1
    tokens, learn = np.full(shape, pad, np.int32), np.zeros(shape, np.uint8)
    positions, documents = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, items in enumerate(windows):
        begin = 0
        for number, item in enumerate(items, 1):
            own = slice(begin, begin + sizes[item])
            tokens[row, own], learn[row, own] = dialogues[item]
            learn[row, begin] = 0  # nothing of its own comes before it
            positions[row, own], documents[row, own] = np.arange(sizes[item]), number
            begin += sizes[item]
    learn = learn[:, 1:]
    found = {"tokens": tokens, "bytes": (byte_counts.take(tokens[:, 1:]) * learn).sum(1, dtype=np.int32),
             "learn": learn}
    return found | ({"positions": positions[:, :-1], "documents": documents[:, :-1]} if packing else {})
