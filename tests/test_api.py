"""The Python API: the examples of the README run as they stand, `import lab` is light, mistakes are sentences."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import lab
from lab.errors import UserError
from lab.experiment import Evaluate, Mesh
from lab.train.program import Program
from tests.conftest import ROOT
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

EXAMPLES = re.findall(r"```python\n(.*?)```", re.search(
    r"^## From Python\n(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)[1], re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The examples work in one folder, one after another."""
    return tmp_path_factory.mktemp("api")


def test_the_examples_of_the_readme(place, monkeypatch, capsys, compiled_in_haste):  # noqa: F811
    """In order, in one namespace, as in a notebook."""
    monkeypatch.chdir(place)
    assert len(EXAMPLES) == 3
    names: dict = {}
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), names)
    assert names["run"].result["final"]["accuracy"] > 0.9 and 0.8 < names["accuracy"] <= 1
    assert set(names["accuracies"]) == {0.05, 0.5} and len(list(place.glob("runs/notebook-*"))) == 3
    assert "Finished after 200 steps" in capsys.readouterr().out


def apply_model(model, variables, tokens):
    return model.apply(variables, tokens, train=False)


def test_apply_is_the_model_and_metrics_are_the_file(place, monkeypatch, tiny, compiled_in_haste):  # noqa: F811
    monkeypatch.chdir(place)
    run = lab.fit(replace(tiny, steps=4), "tiny", quiet=True)
    again = lab.open_run("tiny", step=2)
    assert (run.step, again.step) == (4, 2) and again.experiment == run.experiment
    tokens = run.batch(8)["tokens"][:, :-1]
    logits = run.apply(tokens)
    wanted = Program(run.experiment).compute(run.state, apply_model, tokens)
    np.testing.assert_array_equal(logits, wanted)
    assert np.abs(again.apply(tokens) - logits).max() > 1e-6  # another checkpoint, other parameters
    np.testing.assert_array_equal(run.apply(tokens, params=again.params), again.apply(tokens))
    loss = jax.grad(lambda p: run.apply(tokens, params=p).sum())(run.params)
    assert jax.tree.structure(loss) == jax.tree.structure(run.params)
    rows = [json.loads(line) for line in Path("tiny/metrics.jsonl").read_text().splitlines()]
    monkeypatch.setitem(sys.modules, "pandas", None)  # not installed
    assert run.metrics() == rows
    assert run.metrics("validation") == [row for row in rows if row["split"] == "validation"] != rows
    for look in (run.metrics, lambda split: run.batch(1, split)):
        with pytest.raises(UserError, match="'valid' is not a split; the splits are train, validation, test"):
            look("valid")
    before = (Path("tiny") / "metrics.jsonl").stat().st_mtime_ns
    assert lab.fit(replace(tiny, steps=4), "tiny", quiet=True).result == run.result  # only opened
    assert (Path("tiny") / "metrics.jsonl").stat().st_mtime_ns == before
    np.testing.assert_array_equal(run.batch([3, 1])["tokens"], run.batch(4)["tokens"][np.array([3, 1])])
    for wrong in (0, [-1], 10**6):
        with pytest.raises(UserError, match="validation split has"):
            run.batch(wrong)
    with pytest.raises(UserError, match="is the run of another experiment"):
        lab.fit(replace(tiny, steps=4, seed=1), "tiny", quiet=True)


@pytest.mark.parametrize("mesh", [Mesh(data=2, fsdp=2, tensor=2), Mesh(fsdp=4, sequence=2)], ids=["tensor", "sequence"])
def test_apply_of_a_sharded_run_is_its_evaluation(tmp_path, tiny, mesh, compiled_in_haste):  # noqa: F811
    """Also of a number of rows that the devices do not divide. (Outside the mesh, the first call hung.)"""
    sharded = replace(tiny, model=tiny.model.clone(width=64), steps=4, mesh=mesh, evaluate=Evaluate(every=0))
    run = lab.fit(sharded, tmp_path / "run", quiet=True)
    assert any(run.params["wte"]["embedding"].sharding.spec)
    last = len(run.data.validation)
    tokens = np.concatenate([run.batch(range(i, min(i + 64, last)))["tokens"] for i in range(0, last, 64)])
    logits = np.concatenate([run.apply(tokens[i : i + 51, :-1]) for i in range(0, last, 51)])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    assert run.result["final"]["loss"] == pytest.approx(float(nats.mean()), rel=1e-5)


def test_metrics_are_a_data_frame_where_pandas_is(place, monkeypatch):
    """A stand-in: the class is given the rows."""
    class Pandas:
        DataFrame = tuple

    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, "pandas", Pandas)
    assert isinstance(lab.open_run("tiny").metrics("train"), tuple)


def test_mistakes_are_sentences(place, tmp_path, tiny):
    with pytest.raises(UserError, match="is not a run folder"):
        lab.open_run(tmp_path)
    with pytest.raises(UserError, match="--steps must be at least 1"):
        lab.fit(replace(tiny, steps=0), tmp_path / "x")
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        lab.trian  # noqa: B018


def test_import_lab_is_light():
    code = "import sys, lab; lab.__all__; print([n for n in ('jax', 'numpy', 'flax', 'lab.api') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done
