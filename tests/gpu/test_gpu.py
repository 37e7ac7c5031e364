"""What needs a GPU to be known: `pytest -m gpu`, started by run.py. Rehearsed on a CPU, where einsum attention and one
CPU stand in for cuDNN and the GPU; elsewhere the tests skip.

What a test measured goes to the file that LAB_TEST_GPU names.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.data.pipeline import reader
from lab.models.attention import einsum_attention
from lab.models.bert import BERT
from lab.models.cudnn import cudnn_attention
from lab.models.generate import generate
from lab.models.gpt import GPT
from lab.models.vit import ViT
from lab.optim import Muon
from lab.tasks.language import LanguageModel
from lab.train.program import Program
from tests.conftest import ROOT

GPU = os.environ.get("LAB_TEST_PLATFORM") == "gpu"
pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif("LAB_TEST_GPU" not in os.environ, reason="tests/gpu/run.py starts these, on a GPU")]
BF16 = jnp.bfloat16
FUSED = "cudnn" if GPU else "xla"


def figure(**values):
    """A line of JSON that steps.py collects."""
    with open(os.environ["LAB_TEST_GPU"], "a") as file:
        file.write(json.dumps(values) + "\n")


def test_jax_uses_the_device_that_these_tests_are_for():
    assert jax.default_backend() == ("gpu" if GPU else "cpu")


# ------------------------------------------------------------------------------------------------------- attention

@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("padding", ["none", "right", "holes"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("length", [256, 197])
def test_attention_is_einsum_attention(length, causal, padding, groups):
    """bfloat16, forward and gradients, beside float32."""
    rng = np.random.default_rng(length)
    shapes = [(3, length, n, 64) for n in (4, groups, groups)]
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    mask = {"none": None, "right": np.arange(length) < np.array([[length], [100], [1]]),
            "holes": rng.random((3, length)) < 0.7}[padding]
    real = jnp.ones((3, length)) if mask is None else jnp.asarray(mask, jnp.float32)
    weights = jnp.asarray(rng.normal(size=q.shape)) * real[..., None, None] / length**0.5

    def results(attend, *arrays):
        loss = lambda q, k, v: (attend(q, k, v).astype(jnp.float32) * weights).sum()
        values = jax.jit(lambda *x: (attend(*x) * real[..., None, None], *jax.grad(loss, (0, 1, 2))(*x)))(*arrays)
        return [np.asarray(x, np.float32) for x in values]

    def visible(mask):
        see = np.tril(np.ones((1, length, length), bool)) if causal else np.ones((1, length, length), bool)
        return jnp.asarray(see if mask is None else see & mask[:, None])

    fused = functools.partial(cudnn_attention, mask_BS=None if mask is None else jnp.asarray(mask, jnp.uint8),
                              causal=causal, implementation=FUSED)
    ours = results(fused, *(x.astype(BF16) for x in (q, k, v)))
    exact = results(functools.partial(einsum_attention, visible=visible(mask)), q, k, v)
    other = results(functools.partial(einsum_attention, visible=visible(None)), q, k, v)
    for a, b in zip(ours, exact, strict=True):
        assert np.isfinite(a).all()
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)
    if padding == "holes":  # negative control: attention that sees the padding
        assert np.linalg.norm(other[0] - exact[0]) > 0.1 * np.linalg.norm(exact[0])


def gradient_of(model, params, inputs, more):
    loss = lambda p: jnp.square(model.apply({"params": p}, inputs, train=True, **more).astype(jnp.float32)).mean()
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    return float(value), jnp.concatenate([g.astype(jnp.float32).ravel() for g in jax.tree.leaves(gradient)])


@pytest.mark.parametrize("name", ["GPT", "BERT", "ViT"])
def test_a_transformer_on_fused_attention_is_the_one_on_einsum(name):
    rng = np.random.default_rng(0)
    sizes = {"depth": 2, "width": 128, "heads": 2}
    model, inputs, more = {
        "GPT": (GPT(**sizes, vocab=300, context=96), rng.integers(0, 300, (4, 95)), {}),
        "BERT": (BERT(**sizes, vocab=300, context=96, dropout=0.0), rng.integers(0, 300, (4, 95)),
                 {"mask": jnp.asarray(np.arange(95) < np.array([[95], [40], [1], [0]]), jnp.uint8)}),
        "ViT": (ViT(**sizes, patch=8, classes=7), rng.normal(size=(4, 64, 64, 3)), {}),  # 65 tokens
    }[name]
    inputs = jnp.asarray(inputs, BF16 if name == "ViT" else jnp.int32)
    params = model.init(jax.random.key(0), inputs, train=False)["params"]
    params = jax.tree.map(lambda x: (x + rng.normal(0, 0.02, x.shape)).astype(BF16), params)  # ViT's head begins as 0
    found = {kind: gradient_of(model.clone(attention=kind), params, inputs, more) for kind in (FUSED, "einsum")}
    (value, gradient), (plain, other) = found[FUSED], found["einsum"]
    assert value == pytest.approx(plain, rel=0.01)
    assert jnp.linalg.norm(gradient - other) < 0.03 * jnp.linalg.norm(other)


# ------------------------------------------------------------------------------------------------- one step, and two

def experiment_of(tiny, **fields):
    return replace(tiny, model=tiny.model.clone(width=64, heads=1), **fields)


def trained(experiment, device=None, steps=3):
    """(losses, change of the parameters) of a few steps on a device."""
    program = Program(experiment, experiment.data.load().train, [device or jax.devices()[0]])
    read, state, losses = reader(program), program.init(), []
    begun = jax.device_get(state.params)
    for step in range(steps):
        state, metrics = program.train(state, program.batch(read, step))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    moved = jax.tree.map(lambda a, b: a - b, jax.device_get(state.params), begun)
    return np.array(losses), np.concatenate([x.ravel() for x in jax.tree.leaves(moved)])


@pytest.mark.parametrize("what", ["AdamW", "Muon", "chunks"])
def test_steps_here_are_those_of_the_cpu(tiny, what):
    experiment = experiment_of(tiny, **{
        "AdamW": {}, "Muon": {"optim": Muon(lr=1e-2)}, "chunks": {"task": LanguageModel(chunk=4)}}[what])
    here, moved = trained(experiment)
    there, expected = trained(experiment, jax.devices("cpu")[0])
    np.testing.assert_allclose(here, there, rtol=5e-4)  # TF32 rounds to 11 bits
    assert np.linalg.norm(moved - expected) < 0.05 * np.linalg.norm(expected)
    other, _ = trained(replace(experiment, seed=1))
    assert np.abs(other - here).max() > 0.01  # negative control: another seed


def test_bfloat16_is_as_near_to_float32_here_as_on_the_cpu(tiny):
    """Its roundings differ from device to device, and AdamW makes a whole step of a small gradient's sign."""
    cpu, reduced = jax.devices("cpu")[0], experiment_of(tiny, precision="bfloat16")
    (exact, expected), (there, theirs) = trained(experiment_of(tiny), cpu), trained(reduced, cpu)
    here, moved = trained(reduced)
    figure(what="bfloat16 from float32: losses here, losses on the CPU, moves here, moves on the CPU",
           found=[float(np.linalg.norm(x)) for x in (here - exact, there - exact, moved - expected, theirs - expected)])
    assert np.linalg.norm(here - exact) < 3 * np.linalg.norm(there - exact) + 1e-3
    assert np.linalg.norm(moved - expected) < 2 * np.linalg.norm(theirs - expected)
    other, _ = trained(replace(reduced, seed=1))
    assert np.linalg.norm(other - exact) > 3 * np.linalg.norm(there - exact) + 1e-3  # negative control: another seed


def test_a_loss_in_chunks_is_the_whole_one(tiny):
    whole, moved = trained(experiment_of(tiny, precision="bfloat16"))
    parts, same = trained(experiment_of(tiny, precision="bfloat16", task=LanguageModel(chunk=4)))
    np.testing.assert_allclose(parts, whole, rtol=1e-3)
    assert np.linalg.norm(moved - same) < 0.1 * np.linalg.norm(moved)


def test_dropout_is_a_function_of_the_seed(tiny):
    experiment = experiment_of(tiny, precision="bfloat16")
    experiment = replace(experiment, model=experiment.model.clone(dropout=0.3))
    first, again = trained(experiment)[0], trained(experiment)[0]
    np.testing.assert_allclose(first, again, rtol=1e-3)
    assert np.abs(first - trained(experiment_of(tiny, precision="bfloat16"))[0]).max() > 1e-3  # without it


def test_greedy_sampling_with_a_cache_is_the_full_forward_pass():
    model = GPT(depth=2, width=64, heads=2, vocab=97, context=64)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (3, 8)), jnp.int32)
    params = model.init(jax.random.key(1), tokens, train=False)["params"]
    params = jax.tree.map(lambda x: 3 * x, params)  # far from uniform
    keys = jax.random.split(jax.random.key(0), 3)
    new = np.asarray(generate(model, params, tokens, np.full(3, 8, np.int32), keys, new_tokens=8, temperature=0.0))
    text, forward = np.asarray(tokens), jax.jit(functools.partial(model.apply, train=False))
    for i in range(8):
        logits = np.asarray(forward({"params": params}, jnp.asarray(text)))[:, -1]
        chosen = logits[np.arange(3), new[:, i]]
        assert (logits.max(-1) - chosen < 2e-2).all()  # a tie within TF32's rounding may go either way
        text = np.concatenate([text, new[:, i:i + 1]], axis=1)


# --------------------------------------------------------------------------------------- whole runs, as a user starts

STEPS, EVERY = (2000, 200) if GPU else (60, 10)  # long enough to be killed in time
FLAGS = ["experiments/gpt_small.py", "--local", "--steps", str(STEPS), "--evaluate.every", "0", "--evaluate.records",
         "32", "--checkpoint.every", str(EVERY), "--model.depth", "2"]
SMALL = [] if GPU else ["--batch", "4", "--model.width", "32", "--task.samples", "0"]


def start(folder, *flags, cpu=False):
    """A run as a process."""
    environ = {**os.environ, "XLA_FLAGS": "", "LAB_ACCELERATOR": "cpu" if cpu or not GPU else "",
               "LAB_PYTHON": sys.executable}
    for name in ("LAB_PLATFORM", "JAX_PLATFORMS"):
        environ.pop(name, None)
    environ = {name: value for name, value in environ.items() if value or name == "XLA_FLAGS"}
    return subprocess.Popen([ROOT / "launch.sh", *FLAGS, *SMALL, "--run-dir", str(folder), *flags], env=environ,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(process, folder):
    """The result of a run that ends well."""
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out[-3000:]
    return json.loads((folder / "result.json").read_text())


def stopped(process, folder, number, by):
    """Stops a run with a signal after its `number`-th checkpoint; returns its exit status."""
    deadline = time.monotonic() + 180
    while not any(int(path.name) >= number * EVERY for path in (folder / "checkpoints").glob("[0-9]*")
                  if path.name.isdigit()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-3000:]
        time.sleep(0.02)
    os.killpg(process.pid, by)
    process.communicate()
    assert not (folder / "result.json").exists()
    return process.returncode


def test_killed_and_resumed_is_bit_equal_when_deterministic(tmp_path):
    whole = start(tmp_path / "whole", "--deterministic")
    stopped(start(tmp_path / "killed", "--deterministic"), tmp_path / "killed", 2, signal.SIGKILL)
    finish(whole, tmp_path / "whole")
    names = ["killed", "plain", "other"] if GPU else ["killed"]  # elsewhere the flag changes nothing
    running = {name: start(tmp_path / name, *(["--deterministic"] if name == "killed" else [])) for name in names}
    loss = {name: finish(process, tmp_path / name)["final"]["loss"] for name, process in running.items()}
    rows = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed")]
    assert rows[0] == rows[1]
    figure(what="two runs without --deterministic are equal", equal=loss.get("plain") == loss.get("other"))


def test_a_checkpoint_goes_from_here_to_the_cpu_and_back(tmp_path):
    folder = tmp_path / "run"
    stopped(start(folder), folder, 2, signal.SIGKILL)
    assert stopped(start(folder, cpu=True), folder, 4, signal.SIGTERM) == 75
    mixed = finish(start(folder), folder)
    straight = finish(start(tmp_path / "straight"), tmp_path / "straight")
    assert mixed["final"]["loss"] == pytest.approx(straight["final"]["loss"], abs=0.05)
    figure(what="GPU to CPU and back", loss=mixed["final"]["loss"], straight=straight["final"]["loss"])


@pytest.mark.skipif(not GPU, reason="a CPU's allocator does not count")
def test_memory_is_what_plan_predicts():
    program = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from dataclasses import replace
from lab.commands.bench import BenchOptions, measure
from lab.planning.compiled import compile_plan
from lab.planning import topologies
from lab.configuration.values import override
from tests.gpu.gpt_stdlib import experiment
experiment = override(experiment, {{"model.depth": 4, "batch": 16, "grad_accum_steps": 1, "steps": 1000}})
import jax
kind = jax.devices()[0].device_kind.lower()
name = next(n for n in ("a100", "h200", "h100") if n in kind)
found = measure(experiment, BenchOptions(timed_steps=3, breakdown=False))
plan = compile_plan(experiment, topologies.find(name + ":1"))
print(json.dumps([found["peak_device_bytes"], plan.memory.total]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "JAX_PLATFORMS": "cuda,cpu"})
    assert done.returncode == 0, done.stderr[-3000:]
    peak, predicted = json.loads(done.stdout.strip().splitlines()[-1])
    figure(what="memory", peak=peak, predicted=predicted, ratio=peak / predicted)
    assert peak == pytest.approx(predicted, rel=0.1)
