"""Mistakes in an experiment's own file: `--dry-run` says each in a sentence with the author's file and line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

HEAD = '''"""One part of this is wrong."""
import sys
from dataclasses import dataclass, replace
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from lab.data.dataset import Data, Dataset
from lab.data.pipeline import Arrays
from lab.experiment import Evaluate, Experiment
from lab.models.gpt import GPT
from lab.models.linear import Linear
from lab.optim import SGD, Optax
from lab.tasks.base import Task
from lab.tasks.language import LanguageModel
from lab.tasks.supervised import Classify
from lab.tasks.regress import Regress
X = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int32)
def dataset(x=X, y=Y):
    return Dataset(Arrays({"inputs": x, "targets": y}), Arrays({"inputs": X[:9], "targets": Y[:9]}), classes=("a", "b"))
@dataclass(frozen=True)
class Good(Data):
    def load(self):
        return dataset()
e = Experiment(data=Good(), model=Linear(classes=2), task=Classify(), optim=SGD(0.1), steps=2, batch=8,
               evaluate=Evaluate(every=0))
'''
DATA = '''@dataclass(frozen=True)
class Mine(Data):
    def load(self):
        return {}
experiment = replace(e, data=Mine())
'''
MODEL = '''class Mine(nn.Module):
    @nn.compact
    def __call__(self, inputs, *, train):
        {}
experiment = replace(e, model=Mine())
'''
TASK = '''@dataclass(frozen=True)
class Mine({}):
    def loss(self, model, variables, batch, rngs, train):
        {}
experiment = replace(e, task=Mine())
'''
LOSS = "total, *rest = Classify.loss(self, model, variables, batch, rngs, train); return {}, *rest"
# What is wrong, the line after HEAD that is named (None: none), and what is said.
WRONG = {
    "model None": ("experiment = replace(e, model=None)", 1, "model is None; give a dataclass such as"),
    "model string": ('experiment = replace(e, model="Linear")', 1, "model is 'Linear', a str; give"),
    "model class": ("experiment = replace(e, model=Linear)", 1, "model is the class Linear; give an object"),
    "task class": ("experiment = replace(e, task=Classify)", 1, "task is the class Classify; give an object"),
    "data None": ("experiment = replace(e, data=None)", 1, "data is None"),
    "optim None": ("experiment = replace(e, optim=None)", 1, "optim is None"),
    "optim raw": ("experiment = replace(e, optim=optax.adam(1e-3))", 1, "wrap it, so that a run can be told from "
                  "others: optim=Optax(optax.adam(1e-3))"),
    "optax of nothing": ("experiment = replace(e, optim=Optax(3))", None, "--optim.transformation must be "),
    "no loss": ("@dataclass(frozen=True)\nclass Mine:\n    pass\nexperiment = replace(e, task=Mine())", 1,
                "Mine cannot be the task: it has no loss, "),
    "loss no tuple": (TASK.format("Classify", "return jnp.float32(1.0)"), 3, "Mine.loss returns an array. It must "),
    "loss of three": (TASK.format("Task", "return jnp.float32(1.0), jnp.float32(1.0), {}"), 3, "returns 3 values"),
    "loss (B,)": (TASK.format("Task", 'return batch["weight"], 1.0, {"loss": (1.0, 1.0)}, {}'), 3,
                  "the sum of losses must be one number, not (8,)"),
    "metric no pair": (TASK.format("Task", 'return jnp.ones(()), 1.0, {"loss": jnp.ones(())}, {}'), 3, "(sum, weight)"),
    "loss of two arguments": ("@dataclass(frozen=True)\nclass Mine(Classify):\n    def loss(self, model, batch):\n"
                              "        return 0\nexperiment = replace(e, task=Mine())", 3,
                              "Mine.loss cannot be called as loss(self, model, variables, batch, rngs, train=...)"),
    "loss of int32": (TASK.format("Classify", LOSS.format("total.astype(int)")), 3, "the sum of losses is int32"),
    "loss a number": (TASK.format("Task", 'return 1.0, 1.0, {"loss": (1.0, 1.0)}, {}'), 3, "is the number 1.0, which"),
    "loss NaN": (TASK.format("Classify", LOSS.format("total * jnp.nan")), 3, "Mine.loss is nan for the first 8"),
    "loss async": (TASK.format("Classify", "return 1").replace("def", "async def"), 3, "Mine.loss is async"),
    "loss yields": (TASK.format("Classify", "yield 1"), 3, "Mine.loss is async or has yield in it"),
    "model of int32": (MODEL.format('return nn.Dense(2, name="out")(inputs).astype(int)'), 1, "Mine returns int32"),
    "model branches": (MODEL.format("return inputs if inputs.sum() > 0 else -inputs"), 4, "bool[]."),
    "model of initializers": ("experiment = replace(e, model=nn.Sequential([nn.Dense(2)]))", 1, "--model.layers.0."),
    "metric": ('experiment = replace(e, evaluate=Evaluate(metric="acuracy"))', None, "acuracy is not computed; there"),
    "not frozen": (DATA.format("dataset()").replace("(frozen=True)", ""), 1, "@dataclass(frozen=True)"),
    "steps 1e3": ("experiment = replace(e, steps=1e3)", 1, "--steps must be int, not 1000.0"),
    "loss raises": (TASK.format("Task", 'raise KeyError("nothing here")'), 4, "KeyError: 'nothing here'"),
    "GPT, table": ("experiment = replace(e, model=GPT(depth=1, width=8, heads=2, vocab=9))", None,
                   "GPT cannot be applied to this data's records (inputs float32 (4,), targets int32 ())"),
    "LM, table": ("experiment = replace(e, task=LanguageModel())", None, "LanguageModel needs records with tokens, and "
                  "this data has inputs, targets"),
    "model raises": (MODEL.format("return inputs @ inputs"), 4, "TypeError: dot_general requires"),
    "model None back": (MODEL.format('nn.Dense(2, name="out")(inputs)'), 1, "Mine returns None; it must return"),
    "model without train": (MODEL.replace(", *, train", "").format("return nn.Dense(2)(inputs)"), 1,
                            "Mine cannot be applied to this data's records"),
    "model of two": (MODEL.format('return (nn.Dense(2, name="out")(inputs),) * 2'), 1, "output must be an array"),
    "(B, 1, 7)": (MODEL.format('return nn.Dense(7, name="out")(inputs)[:, None]'), 1,
                  "Classify needs logits of shape (records, classes), and the model's output is of shape (1, 1, 7)"),
    "one number": (MODEL.format('return nn.Dense(2, name="out")(inputs).sum()'), 1, "output must have an axis of "),
    "7 of 2 classes": (MODEL.format('return nn.Dense(7, name="out")(inputs)'), 1, "The data has 2 classes and"),
    "regress (B, 3)": (MODEL.format('return nn.Dense(3, name="out")(inputs)') + "experiment = replace(experiment, "
                       "task=Regress())", 1, "Regress needs an output of the targets' shape, (records), and the "
                       "model's is of shape (1, 3)"),
    "object": (DATA.format("dataset(X.astype(object))"), 3, "'inputs' is object; a model computes with real numbers"),
    "ragged": (DATA.format("dataset(np.array([list(range(i % 5)) for i in range(60)], object))"), 3, "is object"),
    "strings": (DATA.format("dataset(X.astype(str))"), 3, "'inputs' is <U32; a model computes with real numbers only"),
    "complex": (DATA.format("dataset(X.astype(np.complex64))"), 3, "'inputs' is complex64"),
    "list": (DATA.format("dataset(X.tolist())"), 3, "'inputs' is a list; it must be a NumPy array"),
    "float targets": (DATA.format('Dataset(*[Arrays({"inputs": X, "targets": Y.astype(np.float32)})] * 2)'), 3,
                      "Classify needs targets that are whole numbers"),
    "other targets": (DATA.format("dataset(y=Y.astype(np.float32))"), 3, "'targets' of record 0 is int32 (), and "),
    "targets + 5": (DATA.format("dataset(y=Y + 5)"), 3, "The train split has targets from 5 to 6, and the model has "
                    "the 2 classes 0 to 1"),
    "targets - 1": (DATA.format("dataset(y=Y - 1)"), 3, "targets from -1 to 0"),
    "one target": (DATA.format("dataset(y=np.where(np.arange(60) == 41, 2, Y).astype(np.int32))"), 3, "from 0 to 2"),
    "lengths": (DATA.format("dataset(y=Y[:30])"), 3, "has arrays of unequal lengths: 60 inputs, 30 targets"),
    "shape": (DATA.format('Dataset(Arrays({"inputs": X, "targets": Y}), Arrays({"inputs": X[:, :3], "targets": Y}))'),
              3, "the validation split: 'inputs' of record 0 is float32 (3,), and record_spec() says float32 (4,)"),
    "empty": (DATA.format("dataset(X[:0], Y[:0])"), None, "training records, not an empty one"),
    "load None": (DATA.format("None"), None, "must return a Dataset"),
    "load raises": (DATA.format('dataset(np.load("/nowhere.npy"))'), 4, "FileNotFoundError: [Errno 2] No such file "),
    "sys.exit": ('sys.exit("bye")', 1, "SystemExit: bye"),
    "NUL": ("x = 1\0", None, "null bytes"),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_a_sentence_with_its_line(place: Path, mistake: Callable, name: str):
    text, line, said = WRONG[name]
    file = place / "mine.py"
    file.write_text(HEAD + text + "\n")
    found = mistake(file, "--dry-run")
    assert said in found, found
    if line is not None:
        number = HEAD.count("\n") + line
        lines = {number, number + 1} if "@dataclass" in text and line == 1 else {number}
        assert any(f"{file}, line {n}: " in found for n in lines), found
    assert str(file) in found or line is None
    assert "/lab/" not in found.replace(str(file), "")  # nothing of ours


@pytest.mark.parametrize(("gap", "status"), [("X[30, 2] = np.nan", 0), ("X[3, 1] = np.inf", 2)])
def test_numbers_that_are_not_finite_are_said(place: Path, typed: Callable, caplog: Any, gap: str, status: int):
    """A model may know what to do with them, so that only a loss that is NaN is refused."""
    (place / "mine.py").write_text(HEAD + f"{gap}\n" + DATA.format("dataset()"))
    found, out, err = typed(place / "mine.py", "--dry-run")
    record = gap[2:].partition(",")[0]
    assert found == status and ("loss is nan" in err) == (status == 2), (out, err)
    assert f"Mine.load(): the train split: 'inputs' of record {record} is not finite" in caplog.text


def test_what_is_right_is_not_refused(place: Path, typed: Callable):
    """The same file without a mistake, also with a model and data that have nothing but what they must have."""
    right = ["experiment = e\n", "experiment = replace(e, optim=Optax(optax.adam(1e-3), grad_clip_norm=1.0))\n",
             DATA.format("dataset()"), MODEL.format('return nn.Dense(2, name="out")(inputs)')]
    for i, text in enumerate(right):
        (place / f"right_{i}.py").write_text(HEAD + text)
        status, out, err = typed(place / f"right_{i}.py", "--dry-run")
        assert status == 0 and "FLOPs/step" in out, (out, err)


def test_an_optax_transformation_trains_and_is_told_from_others(place: Path, typed: Callable):
    """Its learning rate and its code are part of the run's fingerprint."""
    from lab.train.experiment_file import load

    prints = set()
    for rate in ("1e-2", "2e-2"):
        (place / "mine.py").write_text(HEAD + f"experiment = replace(e, optim=Optax(optax.adam({rate})), steps=30)\n")
        prints |= {load(place / "mine.py").experiment.fingerprint() for _ in range(2)}
    assert len(prints) == 2
    status, out, err = typed(place / "mine.py", "--run-dir", place / "run")
    assert status == 0 and "Finished after 30 steps" in err + out, (out, err)


def test_the_worked_example_is_short_and_right(place: Path, typed: Callable):
    """experiments/own_parts.py: a model, a task and data in one file, none with more than it needs."""
    text = (ROOT / "experiments/own_parts.py").read_text()
    assert text.count("\n") <= 60 and "validate" not in text and "hints" not in text
    (place / "own.py").write_text(text)
    status, out, err = typed(place / "own.py", "--run-dir", place / "run", "--steps", "100")
    assert status == 0, (out, err)
    assert float((out + err).split("Test split")[1].split("accuracy ")[1].split()[0]) > 0.9
