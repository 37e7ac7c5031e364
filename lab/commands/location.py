"""Somebody else's weights where a command takes a run: `evaluate LOCATION --experiment FILE`, `predict LOCATION`."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab.commands.arguments import choose_config, find_experiment
from lab.compress.model import reading, reads
from lab.errors import UserError
from lab.experiment import Experiment
from lab.optim.sgd import SGD
from lab.train.check import load_data
from lab.train.experiment_file import load
from lab.train.program import Program
from lab.train.restore import fitting_program, leaves
from lab.train.step import State
from lab.weights.read import find
from lab.weights.start import Weights

log = logging.getLogger(__name__)


def open_location(name: Path, file: Path | None, **run_only: Any) -> tuple[Experiment, Any, Program, State]:
    """(experiment, its data, program, state of step 0) of weights on the data and the task of an experiment file.

    The model is that of the weights, with the context of the file's model, if that is shorter, and its classes, pooling
    and output, unless both classify. `run_only`: flags that make sense for a run only, which must be unset.

    Raises:
      UserError: no experiment, weights that do not fit its data, or a parameter that the weights do not have.
    """
    location = str(name)
    if given := [flag for flag, value in run_only.items() if value not in (None, False)]:
        raise UserError(f"--{given[0]} is for a run: {location} has no checkpoints.")
    if file is None:
        raise UserError(f"{location} are weights without data and task: name those of an experiment, such as "
                        f"--experiment experiments/gpt_small.py.")
    value, line = choose_config(load(find_experiment(str(file))), [])
    if line:
        log.info(line)
    return on_experiment(location, getattr(value, "base", value), file)


def on_experiment(location: str, value: Experiment, title: Any) -> tuple[Experiment, Any, Program, State]:
    """`open_location` for an experiment that is loaded. `title`: its name in errors."""
    found = find(location)
    model, own = found.model, value.model  # of two classes: `validate` says so
    own = reading(own) if reads(model) else own
    if type(model) is type(own):
        tops = ["context"] if getattr(own, "context", 0) < getattr(model, "context", 0) else []
        if getattr(model, "classes", None) is None or own.classes is None:
            tops += ["classes", "pool", "output"]
        own = model.clone(**{name: getattr(own, name) for name in tops if hasattr(own, name)})
    # Nothing is trained, so no memory for an optimizer's state.
    experiment = replace(value, model=own, init_from=Weights(location), optim=SGD(lr=0.0)).filled()
    experiment.validate()
    program = fitting_program(experiment)
    there = {path for rule in found.rules for path in rule.paths}
    if missing := [path for path in leaves(program.abstract.params) if path not in there]:
        raise UserError(f"{location} has no {missing[0]}, which the model of {title} needs: train it first, with "
                        f"init_from=Weights({location!r}, random=({missing[0]!r},)).")
    data = load_data(experiment)
    given, _ = Weights(location).load(program.abstract, data)
    return experiment, data, program, program.init(given)


def name_of(location: Path) -> str:
    """A file name for a location: its last part, without what only paths have."""
    return re.sub(r"[^\w.-]+", "_", location.stem if location.suffix == ".gguf" else location.name)
