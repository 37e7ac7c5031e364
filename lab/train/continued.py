"""Transfers optimizer state to another optimizer, or to the same one with other settings.

Arrays are matched by optax transformation, state field and parameter, not by their position in the chain, so stateless
transformations (clipping, weight decay) may be added or removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

WRAPPERS = {"inner", "inner_state", "inner_states"}  # state fields of wrapper transformations
SETTINGS = {"ScheduleFreeState.b1"}  # state fields that are set from the experiment
COUNTS = {"ScaleByScheduleState.count", "EmaState.count", "PruneState.count"}  # always the run's step count


def take_over(there: Any, here: Any, step: int) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Arrays for the (abstract) optimizer state `here`, from another run's state `there` after `step` steps.

    Returns ({path in `here`: array}, paths of `here` that are newly initialised, unused paths of `there`).
    """
    old = {key: (path, x) for key, path, x in places(there)}
    given, fresh, taken = {}, [], set()
    for key, path, x in places(here):
        if key[-1] in SETTINGS:
            continue
        there_path, found = old.get(key, ("", None))
        if found is not None and (found.shape, found.dtype) == (x.shape, x.dtype):
            given[path] = np.asarray(found)
            taken.add(there_path)
        elif key[-1] in COUNTS:
            given[path] = np.asarray(step, x.dtype)
        else:
            fresh.append(path)
    return given, fresh, [path for key, (path, _) in old.items() if path not in taken and key[-1] not in SETTINGS]


def places(node: Any, key: tuple[str, ...] = (), path: str = "") -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """(key, path, array) of every array of an optimizer state, such as key ("ScaleByAdamState.mu", "head", "kernel")
    and path "1/0/mu/head/kernel".
    """
    under = f"{path}/" if path else ""
    if hasattr(node, "_fields"):
        for name in node._fields:
            own = key if name in WRAPPERS else (*key, f"{type(node).__name__}.{name}")
            yield from places(getattr(node, name), own, f"{under}{name}")
    elif isinstance(node, tuple | list):
        for i, item in enumerate(node):
            yield from places(item, key, f"{under}{i}")
    elif isinstance(node, Mapping):
        for name, item in node.items():
            yield from places(item, key if not key and name == "trained" else (*key, str(name)), f"{under}{name}")
    elif hasattr(node, "shape"):
        yield key, path, node
