"""Somebody else's weights where commands take a run: `evaluate` and `predict`, with an experiment's data and task."""

import csv
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.commands.location import name_of
from lab.data.pipeline import eval_batches
from lab.models.bert import BERT
from lab.train.experiment_file import load
from lab.weights import read
from lab.weights.location import is_location
from lab.weights.read import parameter_shapes
from lab.weights.write import write
from tests.test_cli import furnished
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)
from tests.test_weights import GPT2_CONFIG, gpt2_tensors, random, written

pytestmark = pytest.mark.usefixtures("compiled_in_haste")
CLASSIFIER = '''from lab.data.messages import Messages
from lab.data.tables import Csv
from lab.data.tokenizers import Bytes
from lab.experiment import Experiment
from lab.data.pipeline import eval_batches
from lab.models.bert import BERT
from lab.optim import AdamW
from lab.tasks.supervised import Classify

experiment = Experiment(Messages(Csv("m.csv", target="kind", text="text"), Bytes(), 8),
                        BERT(classes=2, pool="mean", vocab=257), Classify(), AdamW(lr=1e-3), steps=1, batch=8)
'''
MODEL = BERT(depth=1, width=16, heads=2, vocab=260, context=16, norm_place="post", norm_epsilon=1e-12,
             mlp="gelu_exact")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Experiments, their data, a GPT-2, and a BERT with a classifier and without."""
    folder = furnished(tmp_path_factory.mktemp("weights"))
    written(folder / "gpt2", GPT2_CONFIG, gpt2_tensors())
    (folder / "classifier.py").write_text(CLASSIFIER)
    rows = "".join(f"message {i},{'ab'[i % 2]}\n" for i in range(40))
    (folder / "m.csv").write_text("text,kind\n" + rows)
    for name, model in (("bert", MODEL.clone(output="hidden")), ("classified", MODEL.clone(classes=2, pool="pooler"))):
        write(model, {path: random(*shape, seed=i) for i, (path, shape) in enumerate(parameter_shapes(model).items())},
              folder / name)
    return folder


def test_a_location_is_no_run(place):
    assert all(map(is_location, ("hf:openai-community/gpt2", "package:llm/x.gguf", str(place / "gpt2"))))
    assert not is_location(str(place)) and not is_location("nowhere")
    assert name_of(Path("hf:openai-community/gpt2@main")) == "gpt2_main"
    assert name_of(Path("package:a/b.Q4.gguf")) == "b.Q4"


def test_pretrained_weights_are_evaluated(typed, place):
    before = sorted(place.rglob("*"))
    status, out, err = typed("evaluate", "gpt2", "--experiment", "small.py", "--records", "16")
    assert status == 0, err
    row = json.loads((place / "evaluation-gpt2" / "evaluation-validation-0.json").read_text())
    new = {path.relative_to(place).parts[0] for path in set(place.rglob("*")) - set(before)}
    assert new <= {"evaluation-gpt2", "__pycache__"}, new
    records = load(place / "small.py").experiment.data.load().validation
    tokens = np.concatenate([batch["tokens"] for batch in eval_batches(records, 8, 16)])
    model, variables, _ = read(str(place / "gpt2"))
    logits = model.apply(variables, jnp.asarray(tokens[:, :-1]), train=False)
    found = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(tokens[:, 1:, None]), -1).mean()
    assert row["loss"] == pytest.approx(float(found), abs=1e-4) and row["step"] == 0 and str(row["loss"])[:4] in out


def test_pretrained_weights_predict(typed, place):
    status, _, err = typed("predict", "classified", "--experiment", "classifier.py", "--input", "m.csv")
    assert status == 0, err
    with (place / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    model, variables, _ = read(str(place / "classified"))
    data = load(place / "classifier.py").experiment.data.load()
    records = data.read(place / "m.csv").records[np.arange(40)]
    logits = model.apply(variables, jnp.asarray(records["inputs"]), train=False, mask=jnp.asarray(records["mask"]))
    assert len(rows) == 40
    np.testing.assert_allclose([float(row["p_b"]) for row in rows], jax.nn.softmax(logits)[:, 1], atol=1e-5)


def test_mistakes(mistake, place):
    assert "without data and task: name those of an experiment, such as --experiment" in mistake("evaluate", "gpt2")
    small = ("--experiment", "small.py")
    assert "--step is for a run: gpt2 has no checkpoints" in mistake("evaluate", "gpt2", *small, "--step", "3")
    assert "--best is for a run" in mistake("predict", "gpt2", *small, "--best", "--split", "validation")
    assert "bert has no classify/" in mistake("evaluate", "bert", "--experiment", "classifier.py")
    assert "There is no experiment absent.py" in mistake("evaluate", "gpt2", "--experiment", "absent.py")
    assert "There is no nowhere.gguf" in mistake("evaluate", "nowhere.gguf", *small)
    assert "classified is a BERT, and the experiment's model a GPT" in mistake("evaluate", "classified", *small)
