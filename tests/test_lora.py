"""LoRA: the base stays, to the bit; only adapters are trained and saved; merged, unmerged, on devices; mistakes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from lab.adapt.lora import AdaptedState, LoRA, describe
from lab.commands.export import export
from lab.configuration.values import override
from lab.data import pipeline
from lab.data.pipeline import train_batch
from lab.errors import UserError
from lab.experiment import Checkpoint, Experiment, Mesh
from lab.models.gpt import GPT
from lab.optim import SGD, AdamW, Constant
from lab.optim.matrices import Matrix
from lab.pretrained import Continue, Pretrained
from lab.study.run.grouping import groups
from lab.study.run.units import can_be_stacked
from lab.train.cost import cost_of
from lab.train.program import Program
from lab.train.restore import leaves, open_run
from lab.train.step import eval_params, make_eval_step
from lab.weights import find
from lab.weights.peft import Merged, write_adapter
from lab.weights.read import parameter_shapes
from tests.test_loop import go, interrupt
from tests.test_pretrained import Normed
from tests.test_step import apart, compiled_in_haste, run, toy  # noqa: F401 (a fixture)
from tests.test_weights import LLAMA_CONFIG, llama_tensors, written
from tests.test_weights import experiment as experiment_on

ADAPT = LoRA(rank=2, alpha=8.0, targets="kernel")
TOY = toy(optim=AdamW(lr=Constant(0.05), ema=0.9))


def bits(tree: Any) -> dict[str, bytes]:
    return {path: np.asarray(x).tobytes() for path, x in leaves(tree).items()}


def loss_of(experiment: Experiment, state: Any) -> float:
    """Sum of the losses of the first 8 validation points."""
    rows = train_batch(experiment.data.load().validation, 0, 8, 0)
    return float(make_eval_step(experiment)(state, rows)["loss"][0])


# --------------------------------------------------------------------------------------------------- the parameters


def test_it_begins_as_the_base_to_the_bit():
    plain, adapted = (Program(e).init() for e in (toy(), toy(adapt=ADAPT)))
    assert bits(adapted.base) == bits(plain.params) and isinstance(adapted, AdaptedState)
    experiment = toy(adapt=ADAPT)
    assert bits(eval_params(experiment, adapted)) == bits(plain.params)
    assert loss_of(experiment, adapted) == loss_of(toy(), plain)
    assert {path: x.shape for path, x in leaves(adapted.params).items()} == {
        "hidden/lora_kernel/a": (6, 2), "hidden/lora_kernel/b": (2, 8), "out/lora_kernel/a": (8, 2),
        "out/lora_kernel/b": (2, 4)}
    a = np.abs(adapted.params["hidden"]["lora_kernel"]["a"])
    assert 0.5 * 6**-0.5 < a.max() <= 6**-0.5  # kaiming uniform, as in PEFT
    moved = adapted._replace(params=jax.tree.map(lambda x: x + 0.1, adapted.params))  # the negative control
    assert abs(loss_of(experiment, moved) - loss_of(toy(), plain)) > 1e-2


@pytest.fixture(scope="module")
def tuned() -> Any:
    """The state after 4 steps of an experiment with adapters."""
    return run(replace(TOY, adapt=ADAPT))


def test_the_base_stays_and_the_adapters_learn(tuned):
    state, history = tuned
    start = Program(replace(TOY, adapt=ADAPT)).init()
    assert bits(state.base) == bits(start.base)
    assert all(apart(x, leaves(start.params)[path]) > 1e-3 for path, x in leaves(state.params).items())
    assert history[3]["loss"][0] < history[0]["loss"][0] - 1
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.params, state.opt_state.inner)]
    assert sizes == [12 + 16 + 16 + 8, 2 * 52 + 2]  # two moments and two counts: no state for the base


@pytest.mark.parametrize("changes", [
    {"grad_accum_steps": 4}, {"steps_per_call": 2}, {"mesh": Mesh(data=8)}, {"mesh": Mesh(fsdp=8)},
    {"mesh": Mesh(data=4), "exact": True}, {"mesh": Mesh(data=4), "parallel": "pmap"}], ids=str)
def test_it_is_the_same_on_devices_and_in_microbatches(tuned, changes):
    state, _ = run(replace(TOY, adapt=ADAPT, **changes))
    assert apart(state, tuned[0]) < 1e-5
    assert bits(state.base) == bits(tuned[0].base)


@pytest.mark.parametrize("changes, distance", [({}, 1e-5), ({"alpha": 16.0}, None)])
def test_merged_equals_unmerged(tuned, changes, distance):
    """y + factor (x a) b in every layer. The negative control: a factor that is off by two."""
    experiment, state = replace(TOY, adapt=replace(ADAPT, **changes)), tuned[0]
    x = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)

    def dense(x: Any, name: str) -> Any:
        layer, own = state.base[name], state.params[name]["lora_kernel"]
        return x @ layer["kernel"] + layer["bias"] + ADAPT.factor * (x @ own["a"]) @ own["b"]

    merged = experiment.adapt.merged(state.params, state.base)
    here = TOY.model.apply({"params": merged}, x, train=False)
    difference = apart(here, dense(jnp.tanh(dense(x, "hidden")), "out"))
    assert difference < distance if distance else difference > 1e-2


class Many(nn.Module):
    """A convolution, a lookup table that is also the head, and a bias."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: Any = None) -> jax.Array:
        x = nn.Conv(4, (1, 3), name="conv")(x.reshape(-1, 2, 3, 1)).sum((1, 2))
        table = nn.Embed(4, 4, name="embed")
        return table.attend(x + table((x[:, 0] > 0).astype(int)))


def test_convolutions_and_embeddings():
    experiment = toy(model=Many(), adapt=LoRA(rank=1, targets="kernel|embedding", full=("bias",)), optim=SGD(lr=0.1))
    state, _ = run(experiment, updates=1)
    shapes = {path: x.shape for path, x in leaves(state.params).items()}
    assert shapes == {"conv/bias": (4,), "conv/lora_kernel/a": (1, 3, 1, 1), "conv/lora_kernel/b": (1, 4),
                      "embed/lora_embedding/a": (4, 1), "embed/lora_embedding/b": (1, 4)}
    start = Program(experiment).init()
    moved = {path for path, x in leaves(state.params).items() if apart(x, leaves(start.params)[path])}
    assert moved == {"conv/bias", "conv/lora_kernel/b", "embed/lora_embedding/a"}  # those that began at zero
    merged = experiment.adapt.merged(state.params, state.base)
    own, base = flatten_dict(state.params, sep="/"), flatten_dict(state.base, sep="/")
    by_hand = base["conv/kernel"] + 16 * np.einsum("yxcr,rf->yxcf", own["conv/lora_kernel/a"],
                                                   own["conv/lora_kernel/b"])
    assert apart(merged["conv"]["kernel"], by_hand) < 1e-6 and bits(merged["conv"]["bias"]) == bits(own["conv/bias"])


def test_stacked_layers_have_stacked_adapters(tiny):
    """nn.scan stacks the kernels, and so the adapters; weight decay sees the matrices among them."""
    scanned = replace(tiny, model=tiny.model.clone(scan=True), adapt=LoRA(rank=2), mesh=Mesh(data=1),
                      optim=SGD(lr=Constant(10.0), weight_decay=0.001))
    state, _ = run(scanned, updates=3)
    assert {path: x.shape for path, x in leaves(state.params).items()} == {
        f"blocks/attn/{name}/lora_kernel/{half}": shape for name in ("query", "value")
        for half, shape in (("a", (2, 16, 2)), ("b", (2, 2, 16)))}
    merged = scanned.adapt.merged(state.params, state.base)["blocks"]["attn"]["query"]["kernel"]
    own, base = (tree["blocks"]["attn"]["query"] for tree in (state.params, state.base))
    for i in range(2):
        a, b = (own["lora_kernel"][half][i] for half in "ab")
        assert apart(merged[i], base["kernel"][i] + 8 * a @ b) < 1e-6 and apart(merged[i], base["kernel"][i]) > 1e-3
    matrix = Matrix((0,), (1,), (2,), False)
    assert scanned.adapt.matrices({"x/attn/query/kernel": matrix, "x/attn/key/kernel": matrix}) == {
        "x/attn/query/lora_kernel/a": matrix, "x/attn/query/lora_kernel/b": matrix}
    beside = replace(scanned, adapt=replace(scanned.adapt, dropout=1e-7))  # unmerged, in every layer of the scan
    assert apart(run(beside, updates=3)[0].params, state.params) < 1e-4


def test_a_sharded_base_in_bfloat16(tiny):
    """FSDP and tensor parallelism with the rules of the model's own parameters, beside one device."""
    small = replace(tiny, model=tiny.model.clone(depth=1), optim=SGD(lr=Constant(10.0)),
                    adapt=LoRA(rank=2, base_dtype="bfloat16"))
    eight = Program(replace(small, mesh=Mesh(data=1, fsdp=4, tensor=2)))
    specs = {path: x.sharding.spec for path, x in leaves(eight.abstract.base).items()}
    assert tuple(specs["block_0/attn/query/kernel"]) == ("fsdp", "tensor")
    assert tuple(specs["block_0/attn/out/kernel"]) == ("tensor", "fsdp")
    one = Program(replace(small, mesh=Mesh(data=1)))
    assert {str(x.dtype) for x in jax.tree.leaves(one.abstract.base)} == {"bfloat16"}
    assert {str(x.dtype) for x in jax.tree.leaves(one.abstract.params)} == {"float32"}
    states = []
    for program in (one, eight):
        program.train_records = small.data.load().train
        state, read = program.init(), pipeline.reader(program)
        for call in range(3):
            state, _ = program.train(state, program.batch(read, call))
        states.append(jax.device_get(state))
    assert bits(states[0].base) == bits(states[1].base) == bits(one.init().base)
    assert apart(states[0].params, states[1].params) < 1e-5 and apart(states[0].params, one.init().params) > 1e-3


def test_what_it_costs():
    """FLOPs by hand, 8 points: forward, and backward without the input's gradient; the dry run's sentence."""
    adapted, plain = cost_of(toy(adapt=replace(ADAPT, targets="^out/kernel"))), cost_of(toy())
    hidden, out, merge, rows = 6 * 8, 8 * 4, 8 * 2 * 4, 8
    assert plain.flops == 3 * 2 * rows * (hidden + out)
    assert adapted.flops == 2 * (rows * (hidden + 2 * out) + 3 * merge)  # no gradient of or through the hidden layer
    assert adapted.parameters == plain.parameters + 24
    assert describe(adapted.state) == "Adapters: 24 parameters beside 1 matrices are trained; 92 are frozen, 0.0 MB."


def test_dropout_is_on_the_adapters_inputs():
    """Unmerged in training; with a rate near 0 it is the merged step."""
    small = toy(adapt=ADAPT, optim=SGD(lr=Constant(0.1)))
    plain, almost, half = (run(replace(small, adapt=replace(ADAPT, dropout=rate)))[0].params
                           for rate in (0.0, 1e-7, 0.5))
    assert apart(plain, almost) < 1e-5 and apart(plain, half) > 1e-3
    prints = {replace(small, adapt=replace(ADAPT, dropout=rate), grad_accum_steps=n).fingerprint()
              for rate in (0.0, 0.5) for n in (1, 2)}
    assert len(prints) == 3  # masks are per microbatch: with dropout they are another experiment


def test_frozen_statistics_stay():
    experiment = toy(model=Normed(), adapt=replace(ADAPT, full=("^out/",)))
    state, start = run(experiment)[0], Program(experiment).init()
    assert bits(state.model_state) == bits(start.model_state)
    assert apart(state.params["out"], start.params["out"]) > 1e-3 and "out" not in state.base
    trained = run(replace(experiment, adapt=replace(experiment.adapt, full=("^norm/",))))[0]  # the negative control
    assert apart(trained.model_state, start.model_state) > 1e-3


# -------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The folder of a pretrained run. Not to be written to."""
    folder = tmp_path_factory.mktemp("source") / "run"
    assert go(TOY, folder)[0] == 0
    return folder


def on(source: Path, **changes: Any) -> Experiment:
    """An experiment with adapters on a pretrained run."""
    return replace(TOY, adapt=ADAPT, init_from=Pretrained(str(source)), checkpoint=Checkpoint(every=4), **changes)


@pytest.fixture(scope="module")
def adapted(source, tmp_path_factory) -> Path:
    """The folder of a run with adapters. Not to be written to."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    status, said = go(on(source), folder)
    assert status == 0 and "Adapters: 52 parameters beside 2 matrices are trained; 92 are frozen, 0.0 MB." in said
    return folder


def test_a_checkpoint_holds_the_adapters_only(source, adapted):
    manifest = json.loads(next((adapted / "checkpoints" / "12").glob("manifest/*")).read_text())
    base = {path: entry for path, entry in manifest["arrays"].items() if path.startswith("base")}
    assert base == {"base": {"shape": [4], "dtype": "uint32", "checksum": base["base"]["checksum"]}}
    (_, program, state), pretrained = open_run(adapted), open_run(source)[2].opt_state.ema
    assert bits(state.base) == bits(pretrained)
    merged = eval_params(program.experiment, state)
    last = json.loads((adapted / "metrics.jsonl").read_text().splitlines()[-1])
    found = make_eval_step(program.experiment)(state, {**TOY.data.load().validation.columns, "index": np.arange(13),
                                                       "weight": np.ones(13, np.float32)})["loss"]
    assert float(found[0] / found[1]) == pytest.approx(last["loss"], rel=1e-6)
    assert apart(merged, pretrained) > 1e-2


def test_a_stopped_run_resumes_to_the_bit(source, adapted, tmp_path):
    assert go(on(source), tmp_path / "run", 6, interrupt())[0] == 75
    assert go(on(source), tmp_path / "run")[0] == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (adapted / "metrics.jsonl").read_bytes()
    assert bits(open_run(tmp_path / "run")[2]) == bits(open_run(adapted)[2])


def test_a_run_on_adapters_begins_merged(adapted, tmp_path):
    experiment = replace(TOY, init_from=Pretrained(str(adapted)), steps=4)
    assert go(experiment, tmp_path / "run")[0] == 0
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    last = json.loads((adapted / "metrics.jsonl").read_text().splitlines()[-1])
    assert first["loss"] == pytest.approx(last["loss"], rel=1e-6)
    again = replace(experiment, adapt=ADAPT)  # adapters on adapters
    assert go(again, tmp_path / "again")[0] == 0 and open_run(tmp_path / "again")[2].step == 4


def test_another_or_a_missing_base_is_refused(source, adapted, tmp_path):
    text = (adapted / "experiment.json").read_text()
    with pytest.raises(UserError, match="do not continue|begins with both merged"):
        go(replace(TOY, init_from=Continue(str(adapted)), steps=16), tmp_path / "continued")
    go(replace(TOY, seed=1), tmp_path / "other")
    for name, words in (("nowhere", "does not hold their base, which is missing: .*nowhere is not a run folder"),
                        ("other", "no longer what .*other.* gives: bring back its former files")):
        with pytest.raises(UserError, match=words):
            open_run(adapted, experiment=replace(on(source), init_from=Pretrained(str(tmp_path / name))))
    assert (adapted / "experiment.json").read_text() == text


def test_the_rank_is_an_arm_of_a_study():
    arms = {f"rank {r}": override(toy(adapt=ADAPT), {"adapt.rank": r}) for r in (1, 2)}
    assert [group.arms for group in groups(arms)] == [("rank 1",), ("rank 2",)]  # a program each
    assert can_be_stacked(toy()) and not can_be_stacked(arms["rank 1"])  # each cell would have a copy of the base


# ------------------------------------------------------------------------------------------------------ PEFT's format


@pytest.fixture(scope="module")
def assistant(tmp_path_factory) -> tuple[str, Path]:
    """(the location of Llama's shape, the folder of a run with adapters on it). Not to be written to."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    location = written(folder / "weights", LLAMA_CONFIG, llama_tensors())
    value = replace(experiment_on(location, str(folder / "a.txt")), optim=SGD(lr=Constant(1.0)), mesh=Mesh(data=1),
                    adapt=LoRA(rank=4, targets="(query|value|down)/kernel", scale="rslora"))
    assert go(value, folder / "run")[0] == 0
    return location, folder / "run"


def test_pefts_format_is_written_and_read(assistant, tmp_path, capsys):
    location, folder = assistant
    export(folder, tmp_path / "adapter", adapter=True)
    assert "adapters of 6 matrices, step 2" in capsys.readouterr().out
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["fan_in_fan_out"]) == (4, 16.0, True, False)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    value = "base_model.model.model.layers.1.self_attn.v_proj.lora_"
    assert (tensors[f"{value}A.weight"].shape, tensors[f"{value}B.weight"].shape) == ((4, 32), (16, 4))
    export(folder, tmp_path / "merged")
    merged, base = ({path: x for path, x in find(str(place)).arrays().items()}
                    for place in (tmp_path / "merged", location))

    def read_back() -> dict[str, np.ndarray]:
        found = find(location)
        return replace(found, tensors=Merged(found.tensors, found.names, tmp_path / "adapter")).arrays()

    assert max(apart(x, merged[path]) for path, x in read_back().items()) < 1e-6
    assert apart(merged["block_1/attn/value/kernel"], base["block_1/attn/value/kernel"]) > 1e-4
    config |= {"lora_alpha": 32.0}  # the negative control
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert max(apart(x, merged[path]) for path, x in read_back().items()) > 1e-4


def test_adapters_that_pefts_format_does_not_hold(assistant, adapted, tmp_path):
    model, b = GPT(depth=1, width=32, heads=4, vocab=300, context=24), np.zeros((2, 32), np.float32)
    with pytest.raises(UserError, match="in gpt2 block_0/attn/query/kernel, .* are one matrix, .*c_attn.weight"):
        write_adapter(model, parameter_shapes(model), {"block_0/attn/query/kernel": (b.T, b)}, tmp_path / "a", {})
    with pytest.raises(UserError, match="wte/embedding is transformer.wte.weight in gpt2, of whose adapters"):
        write_adapter(model, parameter_shapes(model), {"wte/embedding": (b.T, b)}, tmp_path / "a", {})
    found = find(assistant[0])
    name, zeros = "base_model.model.model.layers.0.self_attn.q_proj", np.zeros((2, 32), np.float32)
    for config, tensors, words in (
            ({"r": 2, "lora_alpha": 4, "use_dora": True}, {}, "use_dora is True; only False can be read"),
            ({"lora_alpha": 4}, {}, "is no configuration of a LoRA adapter"),
            ({"r": 2, "lora_alpha": 4}, {f"{name}.lora_A.weight": zeros}, "q_proj.lora_A.weight has no place"),
            ({"r": 2, "lora_alpha": 4}, {f"{name}.lora_A.weight": zeros, f"{name}.lora_B.weight": zeros},
             r"is \(2, 32\) and \(2, 32\), and .*q_proj.weight in the base \(32, 32\)")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(UserError, match=words):
            Merged(found.tensors, found.names, tmp_path)
    with pytest.raises(UserError, match="Perceptron has no format of weights to export to"):
        export(adapted, tmp_path / "new", adapter=True)


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("adapt, words", [
    ({"targets": "attn/query"}, r"--adapt.targets: 'attn/query' matches no parameter. Near: \w+/kernel, \w+/kernel"),
    ({"targets": "hidden"}, r"matches hidden/bias \(8,\), which is neither a matrix nor an embedding"),
    ({"targets": "("}, r"--adapt.targets: '\(' is not a regular expression"),
    ({"rank": 0}, "--adapt.rank must be at least 1, not 0"),
    ({"rank": 5}, "--adapt.rank 5 is above that of out/kernel, 8 x 4: at most 4"),
    ({"dropout": 1.0}, r"--adapt.dropout must be in \[0, 1\)"),
    ({"full": ("nothing",)}, "--adapt.full: 'nothing' matches no parameter"),
    ({"full": (".",)}, "matches no parameter but those of --adapt.full")])
def test_mistakes(adapt, words):
    with pytest.raises(UserError, match=words):
        experiment = toy(adapt=replace(ADAPT, **adapt))
        experiment.validate()
        Program(experiment)


def test_other_starts():
    with pytest.raises(UserError, match="leave out init_from.freeze"):
        toy(adapt=ADAPT, init_from=Pretrained(freeze=("^out",))).validate()
    with pytest.raises(UserError, match="does not continue another run's optimizer state"):
        toy(adapt=ADAPT, init_from=Continue("run")).validate()
    with pytest.raises(UserError, match="dropout is for dense layers, and conv/kernel"):
        Program(toy(model=Many(), adapt=LoRA(rank=1, targets="kernel", dropout=0.1)))


def test_the_scale_and_the_identity():
    assert (LoRA(rank=4).factor, LoRA(rank=4, scale="rslora").factor) == (4.0, 8.0)
    assert "adapt" not in toy().identity()
    assert len({toy(adapt=a).fingerprint() for a in (None, ADAPT, replace(ADAPT, rank=1), replace(ADAPT, full=("b",)),
                                                     replace(ADAPT, base_dtype="bfloat16"))}) == 5
    assert toy().fingerprint() == "be939d456943"  # as before adapters were a field
