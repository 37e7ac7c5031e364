"""The experiment as a value: validation, fingerprint, JSON, differences."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from lab.configuration.rebuild import from_json
from lab.configuration.values import differences, to_json
from lab.errors import UserError
from lab.experiment import Checkpoint, Evaluate, Log, Mesh
from lab.models.gpt import GPT
from lab.train.experiment_file import load
from tests.conftest import ROOT

EXPERIMENTS = [p for p in sorted((ROOT / "experiments").glob("*.py")) if "\nstudy = " not in p.read_text()]


@pytest.fixture(params=EXPERIMENTS, ids=lambda p: p.stem)
def module(request):
    return load(request.param)


def test_json_round_trip(module):
    for experiment in (module.experiment, module.local):
        text = json.dumps(to_json(experiment))
        assert from_json(json.loads(text)) == experiment


def test_the_json_names_every_class(module):
    experiment, value = module.experiment, to_json(module.experiment)
    for part in (experiment.data, experiment.model, experiment.task, experiment.optim.lr):
        assert f"{type(part).__module__}.{type(part).__name__}" in json.dumps(value)


def test_fingerprint_is_the_same_in_another_process():
    """Also under another hash seed; and it is this literal value on every Python version."""
    code = ("from pathlib import Path; from lab.train.experiment_file import load;"
            "print(load(Path('experiments/gpt_char.py')).experiment.fingerprint())")
    seen = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True,
                           env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}).stdout.strip()
            for seed in ("1", "2")}
    assert seen == {load(ROOT / "experiments/gpt_char.py").experiment.fingerprint()}


def test_fingerprint_follows_what_is_computed_and_nothing_else(tiny):
    same = [replace(tiny, checkpoint=Checkpoint(every=77)), replace(tiny, log=Log(every=3)),
            replace(tiny, mesh=Mesh(data=1))]
    other = [replace(tiny, seed=1), replace(tiny, steps=10), replace(tiny, model=tiny.model.clone(norm="rmsnorm")),
             replace(tiny, evaluate=Evaluate(every=2)), replace(tiny, precision="bfloat16"),
             replace(tiny, optim=replace(tiny.optim, b1=0.8))]
    assert {e.fingerprint() for e in same} == {tiny.fingerprint()}
    assert len({e.fingerprint() for e in [tiny, *other]}) == len(other) + 1


def test_differences_name_the_path(tiny):
    changed = replace(tiny, seed=3, model=tiny.model.clone(depth=5))
    assert list(differences(to_json(tiny), to_json(changed))) == [("model.depth", 2, 5), ("seed", 0, 3)]


@pytest.mark.parametrize(("change", "message"), [
    ({"steps": 0}, "--steps must be at least 1"),
    ({"batch": 0}, "--batch must be at least 1"),
    ({"grad_accum_steps": 3}, "--batch 8 is not divisible by --grad-accum-steps 3"),
    ({"steps_per_call": 3}, "--steps 8 is not a multiple of --steps-per-call 3"),
    ({"evaluate": Evaluate(records=0)}, "--evaluate.records must be at least 1"),
    ({"checkpoint": Checkpoint(keep=0)}, "--checkpoint.keep must be at least 1"),
    ({"log": Log(every=0)}, "--log.every must be at least 1"),
    ({"mesh": Mesh(data=0)}, "--mesh.data must be at least 1"),
    ({"model": GPT(width=10, heads=4)}, "--model.width 10 is not divisible by --model.heads 4"),
])
def test_validation_says_what_is_wrong(tiny, change, message):
    tiny.validate()
    with pytest.raises(UserError, match=message):
        replace(tiny, **change).validate()


def test_validation_touches_no_device():
    code = ("import jax; from pathlib import Path; from lab.train.experiment_file import load;"
            "values = [getattr(m := load(p), 'study', m.__dict__.get('experiment'))"
            " for p in sorted(Path('experiments').glob('*.py'))];"
            "[v.validate() for v in values if type(getattr(v, 'init_from', None)).__name__ != 'Weights'];"
            "from jax._src import xla_bridge; assert not xla_bridge._backends, 'a device was touched'")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_only_plain_values_and_dataclasses_are_allowed(tiny):
    with pytest.raises(UserError, match="plain values and dataclasses"):
        to_json(replace(tiny, model=tiny.model.clone(softcap=object())))


def test_a_class_that_is_gone_is_one_sentence(tiny):
    value = to_json(tiny)
    value["model"]["class"] = "lab.models.gpt.Gone"
    with pytest.raises(UserError, match="made by other code: lab.models.gpt.Gone"):
        from_json(value)
