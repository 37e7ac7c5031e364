"""Which parameter is a matrix, and which matrix a head: of every shipped model, and where names would mislead."""

import re
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.data.dataset import Data, Dataset
from lab.data.pipeline import Arrays
from lab.errors import UserError
from lab.experiment import Experiment
from lab.models.bert import BERT
from lab.models.cnn import ConvNet, ResNet
from lab.models.efficientnet import EfficientNet
from lab.models.gpt import GPT
from lab.models.linear import MLP, Ensemble
from lab.models.members import Several
from lab.models.rnn import LSTM
from lab.models.vit import ViT
from lab.optim import SGD, Adafactor, Adam, AdamW, Lion, Muon, ScheduleFreeAdamW
from lab.optim.matrices import Matrix, matrices
from lab.tasks.supervised import Classify
from lab.train.experiment_file import load
from lab.train.restore import leaves
from lab.train.shapes import abstract_state, batch_spec
from lab.train.step import init_state, make_optimizer, make_train_step
from tests.test_experiments import EXPERIMENTS, STUDIES, shrunk
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

# What every parameter of the shipped models is: decay goes to hidden matrices and heads, Muon trains hidden ones.
# Numbers in names are a `*`; a `blocks/` stands for scanned layers.
GOLDEN = {
    "ConvNet": {
        "hidden": "conv_*_*/kernel dense/kernel",
        "head": "head/kernel",
        "none": "conv_*_*/bias dense/bias head/bias norm_*_*/bias norm_*_*/scale",
    },
    "GPT": {
        "hidden": (
            "block_*/attn/key/kernel block_*/attn/out/kernel block_*/attn/query/kernel "
            "block_*/attn/value/kernel block_*/ffn/down/kernel block_*/ffn/up/kernel "
            "block_*/ffn/gate/kernel blocks/attn/key/kernel blocks/attn/out/kernel "
            "blocks/attn/query/kernel blocks/attn/value/kernel blocks/ffn/down/kernel "
            "blocks/ffn/up/kernel"),
        "head": "head",
        "none": (
            "block_*/attention_norm/bias block_*/attention_norm/scale block_*/attn/key/bias "
            "block_*/attn/out/bias block_*/attn/query/bias block_*/attn/value/bias block_*/ffn/down/bias "
            "block_*/ffn/up/bias block_*/mlp_norm/bias block_*/mlp_norm/scale final_norm/bias "
            "final_norm/scale wpe/embedding wte/embedding block_*/attn/key_norm/scale "
            "block_*/attn/query_norm/scale block_*/ffn/gate/bias blocks/attention_norm/bias "
            "blocks/attention_norm/scale blocks/attn/key/bias blocks/attn/out/bias blocks/attn/query/bias "
            "blocks/attn/value/bias blocks/ffn/down/bias blocks/ffn/up/bias blocks/mlp_norm/bias "
            "blocks/mlp_norm/scale"),
    },
    "Seq2Seq": {
        "hidden": (
            "encoder/block_*/attn/key/kernel encoder/block_*/attn/out/kernel encoder/block_*/attn/query/kernel "
            "encoder/block_*/attn/value/kernel encoder/block_*/ffn/down/kernel encoder/block_*/ffn/up/kernel "
            "decoder/block_*/attn/key/kernel decoder/block_*/attn/out/kernel decoder/block_*/attn/query/kernel "
            "decoder/block_*/attn/value/kernel decoder/block_*/ffn/down/kernel decoder/block_*/ffn/up/kernel "
            "decoder/block_*/cross_attn/key/kernel decoder/block_*/cross_attn/out/kernel "
            "decoder/block_*/cross_attn/query/kernel decoder/block_*/cross_attn/value/kernel"),
        "head": "head",
        "none": (
            "wte/embedding source_wte/embedding encoder/block_*/attention_norm/bias "
            "encoder/block_*/attention_norm/scale encoder/block_*/attn/key/bias encoder/block_*/attn/out/bias "
            "encoder/block_*/attn/query/bias encoder/block_*/attn/value/bias encoder/block_*/ffn/down/bias "
            "encoder/block_*/ffn/up/bias encoder/block_*/mlp_norm/bias encoder/block_*/mlp_norm/scale "
            "encoder/final_norm/bias encoder/final_norm/scale decoder/block_*/attention_norm/bias "
            "decoder/block_*/attention_norm/scale decoder/block_*/attn/key/bias decoder/block_*/attn/out/bias "
            "decoder/block_*/attn/query/bias decoder/block_*/attn/value/bias decoder/block_*/cross_attn/key/bias "
            "decoder/block_*/cross_attn/out/bias decoder/block_*/cross_attn/query/bias "
            "decoder/block_*/cross_attn/value/bias decoder/block_*/cross_norm/bias decoder/block_*/cross_norm/scale "
            "decoder/block_*/ffn/down/bias decoder/block_*/ffn/up/bias decoder/block_*/mlp_norm/bias "
            "decoder/block_*/mlp_norm/scale decoder/final_norm/bias decoder/final_norm/scale"),
    },
    "BERT": {
        "hidden": (
            "block_*/attn/key/kernel block_*/attn/out/kernel block_*/attn/query/kernel "
            "block_*/attn/value/kernel block_*/ffn/down/kernel block_*/ffn/up/kernel mlm_dense/kernel"),
        "head": "classify/kernel",
        "none": (
            "block_*/attention_norm/bias block_*/attention_norm/scale block_*/attn/key/bias "
            "block_*/attn/out/bias block_*/attn/query/bias block_*/attn/value/bias block_*/ffn/down/bias "
            "block_*/ffn/up/bias block_*/mlp_norm/bias block_*/mlp_norm/scale embedding_norm/bias "
            "embedding_norm/scale final_norm/bias final_norm/scale mlm_bias mlm_dense/bias mlm_norm/bias "
            "mlm_norm/scale wpe/embedding wte/embedding wse/embedding classify/bias"),
    },
    "ResNet": {
        "hidden": "stage*_block*/conv*/kernel stage*_block*/shortcut/kernel stem/kernel",
        "head": "head/kernel",
        "none": (
            "head/bias stage*_block*/norm*/bias stage*_block*/norm*/scale "
            "stage*_block*/shortcut_norm/bias stage*_block*/shortcut_norm/scale stem_norm/bias "
            "stem_norm/scale"),
    },
    "EfficientNet": {
        "hidden": (
            "last/kernel stage*_block*/depthwise/kernel stage*_block*/excite/kernel stage*_block*/expand/kernel "
            "stage*_block*/project/kernel stage*_block*/squeeze/kernel stem/kernel"),
        "head": "head/kernel",
        "none": (
            "head/bias last_norm/bias last_norm/scale stage*_block*/depthwise_norm/bias "
            "stage*_block*/depthwise_norm/scale stage*_block*/excite/bias stage*_block*/expand_norm/bias "
            "stage*_block*/expand_norm/scale stage*_block*/project_norm/bias stage*_block*/project_norm/scale "
            "stage*_block*/squeeze/bias stem_norm/bias stem_norm/scale"),
    },
    "MLP": {
        "hidden": "dense_*/kernel",
        "head": "head/kernel",
        "none": "dense_*/bias head/bias",
    },
    "Ensemble(MLP)": {
        "hidden": "member/dense_*/kernel",
        "head": "member/head/kernel",
        "none": "member/dense_*/bias member/head/bias",
    },
    "GAN": {
        "hidden": "discriminator/down_*/kernel generator/latent/kernel generator/up_*/kernel",
        "head": "discriminator/head/kernel generator/out/kernel",
        "none": (
            "discriminator/down_*/bias discriminator/head/bias generator/latent_norm/bias "
            "generator/latent_norm/scale generator/out/bias generator/up_*_norm/bias "
            "generator/up_*_norm/scale"),
    },
    "ViT": {
        "hidden": (
            "block_*/attn/key/kernel block_*/attn/out/kernel block_*/attn/query/kernel "
            "block_*/attn/value/kernel block_*/ffn/down/kernel block_*/ffn/up/kernel patches/kernel"),
        "head": "head/kernel",
        "none": (
            "block_*/attention_norm/bias block_*/attention_norm/scale block_*/attn/key/bias "
            "block_*/attn/out/bias block_*/attn/query/bias block_*/attn/value/bias block_*/ffn/down/bias "
            "block_*/ffn/up/bias block_*/mlp_norm/bias block_*/mlp_norm/scale final_norm/bias "
            "final_norm/scale head/bias patches/bias token wpe/embedding"),
    },
    "CLIP": {
        "hidden": " ".join(f"{tower}/block_*/{part}/kernel" for tower in ("image", "text") for part in (
            "attn/key", "attn/out", "attn/query", "attn/value", "ffn/down", "ffn/up")) + " image/patches/kernel",
        "head": "image_projection/kernel text_projection/kernel",
        "none": " ".join(f"{tower}/{part}" for tower in ("image", "text") for part in (
            "block_*/attention_norm/bias", "block_*/attention_norm/scale", "block_*/attn/key/bias",
            "block_*/attn/out/bias", "block_*/attn/query/bias", "block_*/attn/value/bias", "block_*/ffn/down/bias",
            "block_*/ffn/up/bias", "block_*/mlp_norm/bias", "block_*/mlp_norm/scale", "final_norm/bias",
            "final_norm/scale", "wpe/embedding")) + (
            " image/patches/bias text/wte/embedding text/embedding_norm/bias text/embedding_norm/scale log_scale"),
    },
    "MinGRU": {
        "hidden": "conv/kernel gate/kernel candidate/kernel",
        "head": "out/kernel",
        "none": "conv/bias gate/bias candidate/bias out/bias",
    },
    "Linear": {
        "hidden": "",
        "head": "head/kernel",
        "none": "head/bias",
    },
    "ClassifyAndReconstruct": {
        "hidden": "code_layer/kernel conv_*/kernel decoder/kernel decoder_conv_*/kernel",
        "head": "class_head/kernel group_head/kernel image_head/kernel",
        "none": (
            "class_head/bias code_layer/bias conv_*/bias decoder/bias decoder_conv_*/bias group_head/bias "
            "image_head/bias"),
    },
    "LSTM": {
        "hidden": (
            "layer_*/backward_input layer_*/backward_recurrent layer_*/forward_input "
            "layer_*/forward_recurrent"),
        "head": "classify/kernel",
        "none": "classify/bias embedding/embedding layer_*/backward_bias layer_*/forward_bias",
    },
}


def parts_of(experiment: Experiment) -> dict[str, tuple[str, Matrix | None]]:
    """Path -> (hidden, head or none; the matrix), of all parameters of the model."""
    experiment = replace(experiment, adapt=None)
    found = matrices(experiment, batch_spec(experiment))
    params = leaves(abstract_state(experiment).params)
    assert found.keys() <= params.keys()
    each = {path: found.get(path) for path in params}
    return {path: ("none" if m is None else "head" if m.head else "hidden", m) for path, m in each.items()}


@pytest.mark.parametrize("path", [*EXPERIMENTS, *STUDIES], ids=lambda p: p.stem)
def test_every_parameter_of_every_experiment_is_what_the_list_says(path):
    module = load(path)
    values = [getattr(module, name, None) for name in ("experiment", "local", "study")]
    found = {}
    for value in values:
        try:
            arms = [arm for _, arm in value.experiments().items()] if hasattr(value, "arms") else [value]
        except UserError as e:  # weights of records are counted in the data, which not every machine has
            assert value is not module.local, e
            continue
        for experiment in (arm[1] if isinstance(arm, tuple) else arm for arm in arms if arm is not None):
            found[str(experiment.model)] = experiment
    for experiment in found.values():
        model = experiment.model
        name = f"Ensemble({type(model.member).__name__})" if isinstance(model, Several) else type(model).__name__
        listed = {p: kind for kind, text in GOLDEN[name].items() for p in text.split()}
        try:
            parts = parts_of(experiment if isinstance(model, ConvNet) else shrunk(experiment))
        except UserError as e:  # tables and messages are read to know their width, and not every machine has them
            assert experiment is not getattr(module, "local", None), e
            continue
        for parameter, (kind, matrix) in parts.items():
            pattern = re.sub(r"\d+", "*", parameter)
            assert listed.get(pattern) == kind, f"{name}: {parameter} is {kind}; the list says {listed.get(pattern)}"
            if matrix:
                axes = len(matrix.stack + matrix.inputs + matrix.outputs)
                assert matrix.stack == ((0,) if parameter.startswith("blocks/") else ())
                assert matrix.outputs == (axes - 1,) and matrix.inputs == tuple(range(len(matrix.stack), axes - 1))


PLAIN = SimpleNamespace(transform=lambda batch, train: batch,
                        init=lambda model, key, batch: model.init(key, batch["inputs"], train=False))
TOKENS, IMAGES = np.zeros((1, 8), np.int32), np.zeros((1, 16, 16, 3), np.float32)
small = {"depth": 2, "width": 16, "heads": 2}


def of(model: nn.Module, inputs: np.ndarray) -> dict[str, Matrix]:
    batch = {"inputs": inputs, "index": np.zeros(1, np.int32)}
    return matrices(SimpleNamespace(model=model, task=PLAIN, data=PLAIN), batch)


@pytest.mark.parametrize("model, inputs", [
    (LSTM(vocab=9, width=4, hidden=4, depth=2), TOKENS), (BERT(vocab=9, classes=2, **small), TOKENS),
    (ViT(patch=8, classes=3, **small), IMAGES), (ConvNet(channels=(4, 4), convs=(1, 1), dense=8), IMAGES),
    (ResNet(depth=18, width=4, classes=3, stem="cifar"), IMAGES), (EfficientNet(0.25, 0.1, 3), IMAGES),
    (MLP(classes=3, width=4), IMAGES),
    (ViT(patch=8, classes=3, scan=True, **small), IMAGES)], ids=lambda x: type(x).__name__)
def test_in_an_ensemble_everything_is_what_it_is_alone(model, inputs):
    alone, together = of(model, inputs), of(Ensemble(model, 2), inputs)
    assert {f"member/{path}": matrix for path, matrix in alone.items()} == together and together


def test_scanned_layers_are_what_they_are_in_a_row():
    for make in (lambda scan: GPT(vocab=9, context=8, tied=False, scan=scan, **small),
                 lambda scan: BERT(vocab=9, context=8, classes=2, scan=scan, remat="dots", **small)):
        once, stacked = of(make(False), TOKENS), of(make(True), TOKENS)
        for path, matrix in once.items():
            found = stacked[re.sub(r"block_\d", "blocks", path)]
            assert found.head == matrix.head
            assert (len(found.inputs), len(found.outputs)) == (len(matrix.inputs), len(matrix.outputs))
            assert found.stack == ((0,) if "block_" in path else ())


class Misleading(nn.Module):
    """Names that say the opposite; parameters of its own; an output that goes on after its last matrix."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Dense(8, name="head")(x))
        x = x * self.param("kernel", nn.initializers.ones, (3, 8)).sum(0)  # multiplies nothing as a matrix does
        experts = self.param("bias", nn.initializers.normal(), (2, 8, 4))
        x = nn.relu(jnp.einsum("EBD,EDF->BEF", jnp.stack([x, -x]), experts).reshape(len(x), -1))
        x = nn.DenseGeneral((2, 3), name="embedding")(x)
        x = nn.DenseGeneral(5, axis=(-2, -1), name="scale")(nn.relu(x))
        kernel = self.param("wte", nn.initializers.normal(), (7, 5))
        return nn.softmax(jnp.tanh(x @ kernel.T) * self.param("temperature", nn.initializers.ones, (1, 1)))


def test_names_do_not_mislead():
    assert of(Misleading(), np.zeros((1, 6), np.float32)) == {
        "head/kernel": Matrix((), (0,), (1,), False), "bias": Matrix((0,), (1,), (2,), False),
        "embedding/kernel": Matrix((), (0,), (1, 2), False), "scale/kernel": Matrix((), (0, 1), (2,), False),
        "wte": Matrix((), (1,), (0,), True)}


def test_tables_that_are_output_layers_too_are_tables():
    tied, own = (of(GPT(vocab=9, context=8, tied=tied, **small), TOKENS) for tied in (True, False))
    assert not [path for path, matrix in tied.items() if matrix.head or "wte" in path]
    assert own.keys() - tied.keys() == {"head"} and own["head"].head


# ---------------------------------------------------------------------------------------------- members of an ensemble


@dataclass(frozen=True)
class Blobs(Data):
    """Points in 4 dimensions, of 3 classes."""

    def load(self) -> Dataset:
        y = np.arange(96, dtype=np.int32) % 3
        x = np.random.default_rng(0).normal(size=(96, 4)).astype(np.float32) + y[:, None]
        return Dataset(Arrays({"inputs": x, "targets": y}), Arrays({"inputs": x[:9], "targets": y[:9]}),
                       classes=("a", "b", "c"))


class Normed(nn.Module):
    """With statistics, and matrices large enough for Adafactor to factor."""

    classes: int = 3

    def validate(self) -> None:
        """Nothing can be wrong."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(8, use_bias=False, name="first")(x)  # whose gradient would be nothing but rounding
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return nn.Dense(3, name="last")(nn.relu(nn.Dense(8, name="second")(x)))


MEMBERS = 3
OPTIMIZERS = {
    "sgd": SGD(0.1, momentum=0.9, grad_clip_norm=0.3, l2=0.1),
    "adam": Adam(0.05, l1=0.01),
    "adamw": AdamW(0.05, grad_clip_norm=0.3, ema=0.9),
    "lion": Lion(0.02, grad_clip_norm=0.3),
    "muon": Muon(0.05, ema=0.9),
    "muon, clipped": Muon(0.05, grad_clip_norm=0.3, lr_multipliers=(("first", 0.5), ("second/bias", 0.0))),
    "adafactor": Adafactor(0.1, factored_from=4, momentum=0.5),
    "schedule-free": ScheduleFreeAdamW(0.05),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_members_train_exactly_as_alone(name, monkeypatch):
    """Each member's parameters, statistics and averages after 4 updates, against runs of one model each."""
    model = MLP(classes=3, width=8) if name == "schedule-free" else Normed()
    whole = Experiment(data=Blobs(), model=Ensemble(model, MEMBERS), task=Classify(), optim=OPTIMIZERS[name], steps=8,
                       batch=24)
    single = replace(whole, model=model)
    batches = [{**whole.data.load().train[np.arange(24) + 24 * i], "weight": np.ones(24, np.float32),
                "index": np.arange(24, dtype=np.int32)} for i in range(4)]
    start = jax.jit(lambda: init_state(whole, batches[0]))()

    def trained(experiment: Experiment, state: Any, step: Any) -> Any:
        for batch in batches:
            state, _ = step(state, batch)
        evaluated = experiment.optim.eval_params(state.opt_state, state.params)
        return (
            state.params,
            state.model_state,
            evaluated,
            experiment.optim.eval_model_state(state.opt_state, state.model_state),
        )

    def alone(m: int) -> Any:
        params = jax.tree.map(lambda x: x[m], start.params["member"])
        model_state = jax.tree.map(lambda x: x[m], {k: v["member"] for k, v in start.model_state.items()})
        return trained(
            single, start._replace(params=params, model_state=model_state, opt_state=begin(params, model_state)), step
        )

    def gap(together: Any) -> float:
        params, model_state, evaluated, statistics = together
        found = [(params["member"], evaluated["member"],
                  [{k: v["member"] for k, v in tree.items()} for tree in (model_state, statistics)])]
        differences = []
        for m in range(MEMBERS):
            own = jax.tree.map(lambda x, m=m: x[m], found[0])
            p, x, e, s = alones[m]
            differences += jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), own, (p, e, [x, s])))
        return max(differences)

    begin, step = jax.jit(make_optimizer(single, batches[0]).init), jax.jit(make_train_step(single))
    alones = [alone(m) for m in range(MEMBERS)]
    assert gap(trained(whole, start, jax.jit(make_train_step(whole)))) < 1e-5
    if name in ("sgd", "adafactor"):  # the negative control: one optimizer for all members together
        monkeypatch.setattr("lab.train.step.per_member", lambda tx: tx)
        state = start._replace(
            opt_state=jax.jit(make_optimizer(whole, batches[0]).init)(start.params, start.model_state)
        )
        assert gap(trained(whole, state, jax.jit(make_train_step(whole)))) > 1e-3
