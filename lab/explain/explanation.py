"""An explanation: the question in words, the maps, and how far they can be trusted. As JSON, too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lab.explain.methods import Integrated, gradient_x_input, integrated_gradients, occlusion
from lab.explain.question import Question
from lab.explain.sanity import Stage, sanity


@dataclass(frozen=True)
class Subject:
    """A question in words."""

    question: Question
    kind: Literal["text", "image", "table"]
    title: str
    """The model and where it is from."""
    asked: str
    """The number that is explained: "the logit of 7"."""
    answers: str
    """What the model answers: "7 (probability 0.99)"."""
    baseline: str
    """What the record is compared with."""
    hides: str
    """What occlusion hides at a time."""
    names: Sequence[str]
    """A name per unit: tokens, columns; () for pixels."""
    modules: Sequence[str]
    """The model's parts, from the input to the output: see `top_modules`."""
    offset: float = 0.0
    """Added to the scores to show them, for numbers in units of a target."""
    image: np.ndarray | None = None
    """Of an image: (H, W, C) in [0, 1]."""
    cells: Sequence[str] = ()
    """Of a table: the value in each column."""
    attention: np.ndarray | None = None
    """(layers, heads, L, S), see `attention_maps`."""
    reader: int | None = None
    """The position that the model's output is read from; None: all of them."""
    grid: tuple[int, int] | None = None
    """Of an image's attention: rows and columns of patches, the last positions."""
    notes: Sequence[str] = ()
    """Warnings."""


@dataclass(frozen=True)
class Explanation:
    """What came out."""

    subject: Subject
    integrated: Integrated
    scores: tuple[float, float]
    """Of the record and of the baseline, with the offset."""
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Method -> float64 (U,)."""
    stages: Sequence[Stage] = ()


def explain(subject: Subject) -> Explanation:
    """Computes everything."""
    question = subject.question
    integrated = integrated_gradients(question)
    maps = {"integrated gradients": integrated.values, "gradient x input": gradient_x_input(question)}
    stages = sanity(question, maps, subject.modules)
    values = question.scores(np.stack([question.x, question.baseline])) + subject.offset
    return Explanation(subject, integrated, tuple(values.tolist()), maps | {"occlusion": occlusion(question)}, stages)


def as_json(found: Explanation) -> dict[str, Any]:
    """The numbers of an explanation, six digits each."""
    subject, integrated = found.subject, found.integrated
    shape = (-1,) if subject.image is None else subject.image.shape[:2]
    return {
        "model": subject.title, "kind": subject.kind, "explained": subject.asked, "answer": subject.answers,
        "baseline": subject.baseline, "score": found.scores[0], "baseline_score": found.scores[1],
        "completeness": {"steps": integrated.steps, "gap": _finite(integrated.gap),
                         "sum": _finite(float(integrated.values.sum())), "difference": integrated.difference},
        "units": list(subject.names), "values": list(subject.cells), "notes": list(subject.notes),
        "maps": {name: _digits(values.reshape(shape).tolist()) for name, values in found.maps.items()},
        "randomised": [{"modules": list(stage.modules), "signed": _digits(dict(stage.signed)),
                        "absolute": _digits(dict(stage.absolute))} for stage in found.stages],
    }


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None  # JSON has no NaN and no infinity


def _digits(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _digits(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_digits(x) for x in value]
    return _finite(float(f"{value:.6g}"))
