"""Every shipped experiment trains a few updates in its local form, through the loop that users run."""

import json
from dataclasses import replace

import pytest

from lab.console import Screen
from lab.experiment import Checkpoint, Evaluate, load
from lab.loop import train
from lab.plan import make_plan
from tests.conftest import ROOT

EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))
PARAMETERS = {"gpt_small": 124_439_808, "gpt_medium": 354_823_168, "gpt_xl": 1_557_611_200}  # GPT-2's own


def shrunk(experiment):
    """The same experiment, small enough for a test: two blocks, narrow, three updates."""
    optim = replace(experiment.optim, lr=replace(experiment.optim.lr, warmup=1))
    return replace(experiment, model=experiment.model.clone(depth=2, width=32, heads=2), optim=optim, steps=3, batch=8,
                   dispatch=1, evaluate=Evaluate(every=0, records=8), checkpoint=Checkpoint(every=0))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_the_twin_trains(path, tmp_path):
    experiment = shrunk(load(path).local)
    experiment.validate()
    later = [shrunk(load(other).local).fingerprint() for other in EXPERIMENTS[EXPERIMENTS.index(path) + 1:]]
    if experiment.fingerprint() in later:
        return  # one file's twin may be another's; that one runs it
    with Screen(quiet=True) as screen:
        assert train(experiment, tmp_path / "run", screen, path) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["steps"] == 3
    assert 2 < result["final"]["bits_per_byte"] < 9  # an untrained byte model has 8
    for name in ("plots/loss.png", "plots/norms.png", "plots/learning_rate.png", "samples/0.txt", "environment.json"):
        assert (tmp_path / "run" / name).stat().st_size


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_the_docstring_opens_with_a_summary_and_the_command(path):
    doc = load(path).__doc__
    assert doc.partition("\n")[0].endswith(".")
    assert f"./launch.sh experiments/{path.name}" in doc


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_real_one_has_the_published_size(name):
    plan = make_plan(load(ROOT / f"experiments/{name}.py").experiment)
    assert plan.parameters == PARAMETERS[name]
