"""Every field of every part holds what its annotation says, or is refused in a sentence."""

import dataclasses
import typing
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.configuration.field_types import check_types, class_fits, fields, fits, hints_of
from lab.data.images.augment import Augment
from lab.data.images.images import Images
from lab.data.saved import Saved
from lab.data.tables.bundled import Sklearn
from lab.data.tables.csv_files import Csv
from lab.data.tokenizers import Bytes
from lab.errors import UserError
from lab.experiment import Experiment, Mesh
from lab.models.cnn import ConvNet
from lab.optim import AdamW, Cosine
from lab.pretrained import Pretrained, WordVectors
from lab.tasks.base import EvalResult
from lab.tasks.supervised import Classify
from lab.train.experiment_file import load
from tests.conftest import ROOT
from tests.test_layout import configuration_classes

IMAGES = Experiment(data=Images(Sklearn("digits"), shape=(8, 8, 1)), model=ConvNet(classes=10), task=Classify(),
                    optim=AdamW(lr=Cosine(1e-3)), steps=4, batch=8)


def held_by_experiments() -> list[type]:
    return [c for c in configuration_classes() if c is not EvalResult]


@pytest.mark.parametrize("cls", held_by_experiments(), ids=lambda c: f"{c.__module__}.{c.__name__}")
def test_every_annotation_says_something(cls):
    """It can be read, the default fits it, and no field takes an object that means nothing, or a text as a tuple."""
    hints = hints_of(cls)
    for f in fields(cls):
        hint = hints[f.name]
        assert not fits(object(), hint), f.name
        if f.default is not dataclasses.MISSING:
            assert fits(f.default, hint), f.name
        if "tuple" in str(hint):
            assert not fits("abc", hint) and not fits(("abc", object()), hint), f.name


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda p: p.stem)
def test_shipped_experiments_fit(path):
    module = load(path)
    for name in ("experiment", "local", "study"):
        if (value := getattr(module, name, None)) is not None:
            check_types(getattr(value, "base", value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"init_from": Pretrained("run", include="conv")},
            r"--init-from.include must be a tuple of str, .* not \'conv\'",
        ),
        ({"init_from": Pretrained("run", exclude="conv")}, "--init-from.exclude must be a tuple of str"),
        ({"init_from": WordVectors("f", freeze="^embedding")}, "--init-from.freeze must be a tuple of str"),
        (
            {"init_from": AdamW(lr=1e-3)},
            r"--init-from must be a beginning such as Pretrained\(...\) with frozen_rules\(\)",
        ),
        (
            {"optim": AdamW(lr=1e-3, lr_multipliers=("embedding", 0.1))},
            r"--optim.lr-multipliers must be a tuple of \(str, float\)",
        ),
        ({"optim": AdamW(lr=1e-3, lr_multipliers=(("embedding", "0.1"),))}, "--optim.lr-multipliers must be"),
        ({"optim": AdamW(lr=1e-3, grad_clip_norm=True)}, "--optim.grad-clip-norm must be float or None, not True"),
        ({"optim": AdamW(lr=Cosine("fast"))}, "--optim.lr.peak must be float, not 'fast'"),
        ({"optim": None}, r"--optim must be an optimizer such as AdamW\(...\) with build\(\), not None"),
        ({"model": ConvNet}, r"--model must be .* not the class ConvNet itself \(write ConvNet\(...\)\)"),
        ({"model": ConvNet(classes=10, channels="16")}, "--model.channels must be a tuple of int"),
        ({"model": ConvNet(classes=10, channels=(8, 16.0))}, "--model.channels must be a tuple of int"),
        ({"task": Classify(class_weights="balanced")}, "--task.class-weights must be a tuple of float"),
        ({"task": IMAGES.model}, r"--task must be a task such as Classify\(\) with loss\(\)"),
        ({"data": replace(IMAGES.data, mean=0.5)}, "--data.mean must be a tuple of float, .* not 0.5"),
        ({"data": replace(IMAGES.data, shape=(8, 8))}, r"--data.shape must be \(int, int, int\)"),
        ({"data": replace(IMAGES.data, augment=Bytes())}, "--data.augment must be Augment"),
        ({"data": replace(IMAGES.data, augment=Augment(flip="yes"))}, "--data.augment.flip must be"),
        (
            {"data": replace(IMAGES.data, source=Csv("a.csv", target="y"))},
            "--data.source must be Idx or ImageFolder or",
        ),
        ({"mesh": Mesh(rules=("a", "b"))}, r"--mesh.rules must be a tuple of \(str, str\)"),
        ({"mesh": Mesh(data=True)}, "--mesh.data must be int, not True"),
        ({"precision": "float64"}, "--precision must be 'float32', 'bfloat16', not 'float64'"),
        ({"steps": 4.0}, "--steps must be int, not 4.0"),
    ],
)
def test_what_does_not_fit_is_a_sentence(change, message):
    check_types(IMAGES)  # negative control
    with pytest.raises(UserError, match=message):
        replace(IMAGES, **change).validate()


def test_numbers_may_be_traced():
    """A learning rate is a float, an int, a NumPy number or a traced scalar; text and bools are none of these."""
    def step(peak):
        check_types(replace(IMAGES, optim=AdamW(lr=Cosine(peak))))
        return peak

    jax.jit(step)(1e-3)
    jax.vmap(step)(jnp.ones(3))
    for value in (1, 0.5, np.float32(1), jnp.ones(())):
        assert fits(value, float) and fits(value, float | None) and fits((("a", value),), tuple[tuple[str, float], ...])
    for value in (True, "1", None, jnp.ones(2), [1.0], 1j):
        assert not fits(value, float), value
    assert fits(3, int) and not fits(True, int) and not fits(3.0, int) and not fits(True, int | None)


def test_a_class_of_the_users_own_stands_where_it_has_the_methods():
    @dataclass(frozen=True)
    class Source:
        path: str = "p"
        identity = lab = load = documents = splits = validate = describe = lambda self: None

    @dataclass(frozen=True)
    class Empty:
        path: str = "p"

    union = hints_of(Images)["source"]
    common = set.intersection(*({m for m in dir(c) if callable(getattr(c, m))} for c in typing.get_args(union)))
    for name in common - set(dir(Source)):
        setattr(Source, name, lambda self: None)
    assert class_fits(Source, union) and not class_fits(Empty, union)
    assert not class_fits(Saved, union)  # nor one of lab's that is something else
    assert class_fits(Empty, Any) and class_fits(nn.Dense, nn.Module) and not class_fits(Empty, nn.Module)
