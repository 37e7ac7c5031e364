"""Do the maps depend on what the model learned? Model parameter randomisation (Adebayo et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from lab.explain.methods import gradient_x_input, integrated_gradients
from lab.explain.question import Question

STAGES, DRAWS, STEPS = 4, 3, 16
ALIKE = 0.5  # a mean rank correlation above this is a warning


@dataclass(frozen=True)
class Stage:
    """Maps of the model with some modules randomised, compared with those of the trained model."""

    modules: tuple[str, ...]
    """The randomised modules, from the output downwards."""
    signed: Mapping[str, float]
    """Method -> Spearman's rank correlation of the maps, mean over `DRAWS` draws of the weights."""
    absolute: Mapping[str, float]
    """Method -> the same of absolute values."""


def top_modules(run: Callable[[Any], Any], variables: Any) -> list[str]:
    """Names of the model's direct parts with parameters, in the order in which `run(variables)` calls them; then
    parameters of the model itself."""
    order: dict[str, None] = {}

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.module.scope is not None:  # not a function of the model that needs no parameters
            order.update(dict.fromkeys(context.module.path[:1]))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(run, variables)
    params = variables["params"]
    return [*(name for name in order if name in params), *(name for name in params if name not in order)]


def randomised(params: Mapping[str, Any], modules: Sequence[str], seed: int) -> dict[str, Any]:
    """The parameters, those of these modules redrawn from a normal distribution with each array's own mean and standard
    deviation. (Not by the initialisers: some output layers begin at zero, which would make every map zero.)"""
    rng = np.random.default_rng(seed)

    def redrawn(x: Any) -> np.ndarray:
        x = np.asarray(x)
        return (rng.standard_normal(x.shape, np.float32) * x.std() + x.mean()).astype(x.dtype)

    return {name: jax.tree.map(redrawn, value) if name in modules else value for name, value in params.items()}


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, of (n,) and (n,); NaN if one of them is constant or n < 3."""
    from scipy.stats import spearmanr

    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(a, b).statistic)


def sanity(question: Question, maps: Mapping[str, np.ndarray], modules: Sequence[str], seed: int = 0) -> list[Stage]:
    """Compares the trained model's maps with those of models that are randomised from the output downwards, in at most
    `STAGES` stages; in the last one all is random.

    Correlated are only units that differ from the baseline (`Question.moved`): the others are 0 in every map, whatever
    the weights, and would make all maps of a digit on black look alike.
    """
    downwards, found = list(reversed(modules)), []
    for count in np.unique(np.linspace(1, len(downwards), min(STAGES, len(downwards))).round().astype(int)):
        chosen = tuple(downwards[:count])
        rows: dict[str, list[tuple[float, float]]] = {name: [] for name in maps}
        for draw in range(DRAWS):
            params = randomised(question.variables["params"], chosen, seed + draw)
            others = jax.device_put({**question.variables, "params": params})
            new = {"integrated gradients": integrated_gradients(question, others, fewest=STEPS, most=STEPS).values,
                   "gradient x input": gradient_x_input(question, others)}
            for name, pairs in rows.items():
                a, b = maps[name][question.moved], new[name][question.moved]
                pairs.append((rank_correlation(a, b), rank_correlation(np.abs(a), np.abs(b))))
        signed, absolute = ({name: float(np.mean([pair[i] for pair in pairs])) for name, pairs in rows.items()}
                            for i in (0, 1))
        found.append(Stage(chosen, signed, absolute))
    return found
