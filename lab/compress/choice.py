"""Which parameters get integer weights: the matrices of `lab.optim.matrices`, found by tracing the model, and by wish
the embeddings of tokens and the output layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lab.errors import UserError
from lab.models.members import Several
from lab.optim.matrices import Matrix

POSITIONS = re.compile(r"(^|/)wpe/embedding$")  # cut to a shorter context as they are read


@dataclass(frozen=True)
class Choice:
    """What is rounded besides the hidden matrices."""

    embeddings: bool = False
    """Embeddings of tokens; one tied to the output layer is among them."""
    heads: bool = False
    """Matrices whose product reaches the model's output through no other matrix."""
    keep: Sequence[str] = ()
    """Path regexes of parameters left as they are (searched in the path)."""


def input_axes(params: Mapping[str, Any], matrices: Mapping[str, Matrix], model: Any,
               choice: Choice) -> dict[str, tuple[int, ...]]:
    """Path of each parameter to round -> the axes that its product sums over, negative. `params`, `matrices`: by path.

    Raises:
      UserError: `keep` matches nothing, or nothing is left to round.
    """
    for rule in choice.keep:
        try:
            if not any(re.search(rule, path) for path in params):
                raise UserError(f"--keep {rule!r} matches no parameter; there are {', '.join([*params][:4])}, ...")
        except re.error as e:
            raise UserError(f"--keep {rule!r} is not a regular expression ({e}).") from None
    members = isinstance(model, Several)  # their matrices are described without the axis of members
    found = {path: tuple(sorted(axis - params[path].ndim + members for axis in matrix.inputs))
             for path, matrix in matrices.items() if choice.heads or not matrix.head}
    if choice.embeddings:
        found |= {path: (-1,) for path, x in params.items()
                  if re.search(r"(^|/)embedding$", path) and x.ndim == 2 + members and not POSITIONS.search(path)}
    found = {path: axes for path, axes in found.items() if not any(re.search(rule, path) for rule in choice.keep)}
    if not found:
        raise UserError(f"A {type(model).__name__} has no matrix to round but what is kept: --heads and --embeddings "
                        f"include more.")
    return found
