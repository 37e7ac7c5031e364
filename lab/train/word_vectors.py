"""Word vectors from a text file, as the initial embedding of a run."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from lab.errors import UserError
from lab.files import user_path
from lab.pretrained import WordVectors

NUMBER = re.compile(r"[-+.]?\d")


def from_word_vectors(start: WordVectors, state: Any, data: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The embedding filled with the file's vectors, and the number of words found.

    Raises:
      UserError: no such file or parameter, a line that is not a vector of the right size, or no known word.
    """
    path, wanted = start.parameter, flatten_dict(state.params, sep="/")
    if path not in wanted:
        raise UserError(f"--init-from.parameter {start.parameter}: the model has no such parameter; it has "
                        f"{', '.join(list(wanted)[:5])}, ...")
    words = getattr(data, "vocabulary", None)
    if not words:
        raise UserError("Word vectors need data with a vocabulary of words: tokenizer=Words(...).")
    if wanted[path].ndim != 2:
        raise UserError(f"--init-from.parameter {path} has shape {wanted[path].shape}: it is not an embedding.")
    size, dimension = wanted[path].shape
    place = {word: i for i, word in enumerate(words[:size])}
    # Normal like torch.nn.Embedding, but small compared with GloVe's vectors. Depends only on the shape.
    rows = np.random.default_rng(0).normal(0, 0.1, (size, dimension)).astype(np.float32)
    found = _read_vectors(start.path, place, rows)
    if not found:
        raise UserError(f"{start.path} has none of the {len(words)} words of this data.")
    return {path: rows}, {"from": start.path, "loaded": [f"{path}: {found:,} of {len(words):,} words"],
                          "random": [p for p in wanted if p != path], "not taken": []}


def _read_vectors(path: str, place: dict[str, int], rows: np.ndarray) -> int:
    """Writes the file's vectors of the words in `place` to `rows` (vocabulary, dimension); returns their number."""
    found, number, dimension = 0, 0, rows.shape[1]
    try:
        with user_path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                first, *values = line.rstrip().split(" ")
                if number == 1 and len(values) == 1 and dimension > 1 and first.isdigit() and values[0].isdigit():
                    if int(values[0]) != dimension:
                        raise UserError(f"{path} has vectors of {values[0]} numbers, as its first line says, "
                                        f"and the embedding has {dimension}.")
                    continue
                spaced = values[:-dimension]  # some words of glove.840B contain spaces
                if len(values) < dimension or (spaced and NUMBER.match(spaced[-1])):
                    raise UserError(f"{path}, line {number}: {len(values)} numbers after {first[:30]!r}, and "
                                    f"the embedding has {dimension}.")
                if first in place and not spaced:
                    row = np.array(values, np.float64)
                    if not (good := np.abs(row) < 1e30).all():  # also False for NaN
                        bad = values[int(np.argmin(good))]
                        raise UserError(f"{path}, line {number}: the vector of {first[:30]!r} contains "
                                        f"{bad!r}. Correct or delete the line.")
                    rows[place[first]] = row
                    found += 1
    except OSError as e:
        raise UserError(f"Cannot read the word vectors {path}: {e.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}, after line {number}, is not UTF-8 text.") from None
    except ValueError as e:
        raise UserError(f"{path}, line {number} is not a word and {dimension} numbers ({e}).") from None
    return found
