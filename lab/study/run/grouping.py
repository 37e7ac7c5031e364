"""Groups cells that can share one program: their experiments differ only in numbers that the step treats as data.

A learning rate or a weight decay is only multiplied in, so it can be an argument of the compiled program. A number that
Python branches on (dropout rate, number of layers) cannot: tracing it fails, and its cells get separate programs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax.errors import FlaxError

from lab.configuration.values import digest, flat, override, to_json
from lab.errors import UserError
from lab.experiment import Checkpoint, Experiment, Log
from lab.train.shapes import abstract_state, batch_spec, one_record
from lab.train.step import init_state, make_train_step

INGREDIENTS = ("optim.", "model.", "task.")  # numbers elsewhere (e.g. data splits) act outside the step


@dataclass(frozen=True)
class Group:
    """Arms that share one compiled program."""

    numbers: tuple[str, ...]
    """Dotted fields that are arguments of the program, besides the seed."""
    arms: tuple[str, ...]


def groups(arms: Mapping[str, Experiment]) -> list[Group]:
    """Partitions arms into as few programs as possible, keeping their order. Only traces them."""
    found: list[Group] = []
    for alike in _parted(arms, lambda e: _without(e, _floats(e))):
        found += _by_tracing({name: arms[name] for name in alike})
    first = {name: i for i, name in enumerate(arms)}
    return sorted(found, key=lambda group: first[group.arms[0]])


def _by_tracing(arms: Mapping[str, Experiment]) -> list[Group]:
    """Groups arms that differ only in numbers."""
    numbers = [path for path in _floats(next(iter(arms.values())))
               if len({flat(to_json(e))[path] for e in arms.values()}) > 1]
    first = next(iter(arms.values()))
    if not traceable(first, numbers):
        numbers = [path for path in numbers if traceable(first, [path])]
    found = []
    for alike in _parted(arms, lambda e: [_without(e, numbers), str(abstract_state(e))]):
        own = {name: arms[name] for name in alike}
        if len(own) < len(arms):  # a smaller set may need fewer numbers
            found += _by_tracing(own)
        elif numbers and _structure(first, numbers) != str(abstract_state(first)):  # e.g. momentum 0 in all arms
            found += [Group((), (name,)) for name in own]
        else:
            found.append(Group(tuple(numbers), tuple(own)))
    return found


def traceable(experiment: Experiment, numbers: Sequence[str]) -> bool:
    """Whether a step can be traced with these numbers as arguments."""
    try:
        _structure(experiment, numbers)
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, FlaxError, UserError):
        return False  # JAX's tracer errors are TypeErrors; model code may raise others on tracers
    return True


def _structure(experiment: Experiment, numbers: Sequence[str]) -> str:
    """Shapes of the state when the numbers are arguments."""
    spec = batch_spec(experiment)

    def begin_and_update(given: Mapping[str, Any], batch: Any) -> Any:
        own = override(experiment, given)
        state = init_state(own, one_record(spec))
        make_train_step(own)(state, batch)
        return state

    given = {path: jax.ShapeDtypeStruct((), np.float32) for path in numbers}
    return str(jax.eval_shape(begin_and_update, given | {"seed": jax.ShapeDtypeStruct((), np.uint32)}, spec))


def _floats(experiment: Experiment) -> list[str]:
    return [path for path, value in flat(to_json(experiment)).items()
            if isinstance(value, float) and path.startswith(INGREDIENTS)]


def _without(experiment: Experiment, numbers: Sequence[str]) -> dict[str, Any]:
    """What identifies an experiment, except the seed and these numbers."""
    whole = flat(to_json(replace(experiment, seed=0, checkpoint=Checkpoint(), log=Log())))
    return whole | dict.fromkeys(numbers, "a number")


def program_key(experiment: Experiment, numbers: Sequence[str]) -> str:
    """Experiments with equal keys share a program (see `Program.like`)."""
    return digest([_without(experiment, numbers), list(numbers)])


def _parted(arms: Mapping[str, Experiment], key: Any) -> Iterator[list[str]]:
    """Names of arms with equal keys, in order."""
    found: dict[str, list[str]] = {}
    for name, experiment in arms.items():
        found.setdefault(digest(key(experiment)), []).append(name)
    yield from found.values()
