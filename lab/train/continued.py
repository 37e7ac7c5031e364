"""An optimizer's state found again in that of another optimizer, or of the same one under other settings.

Arrays are matched by the optax transformation that holds them, their field and their parameter, not by their place in
the chain: clipping or weight decay, which hold nothing, may come and go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

WRAPPERS = {"inner", "inner_state", "inner_states"}  # fields of what only wraps another transformation
SETTINGS = {"ScheduleFreeState.b1"}  # in the state, but given by the experiment
COUNTS = {"ScaleByScheduleState.count", "EmaState.count"}  # of updates of the run, whatever else is known


def take_over(there: Any, here: Any, step: int) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Arrays for an (abstract) optimizer state from another run's after `step` updates.

    Returns ({path in `here`: array}, paths that begin afresh, paths of `there` that are not taken).
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
    """(what names it, its path, array) of every array of an optimizer state: ("ScaleByAdamState.mu", "head", "kernel"),
    "1/0/mu/head/kernel".
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
