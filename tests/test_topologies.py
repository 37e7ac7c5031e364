"""Machines by name, the bound on time, and ``plan`` as it is typed: what fits, what does not, and what is not there."""

import importlib.util
import math
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from lab.__main__ import main
from lab.data.text.sources import PythonStdlib
from lab.data.text.text import Text
from lab.data.tokenizers import GPT2
from lab.errors import UserError
from lab.experiment import Mesh
from lab.models.gpt import GPT
from lab.parallel.sharding import bytes_per_device
from lab.planning import topologies
from lab.planning.compiled import CompiledPlan, Memory, alternatives, compile_plan, needed
from lab.planning.roofline import mfu, roofline
from lab.tasks.language import LanguageModel
from lab.train.cost import size_of
from lab.train.experiment_file import load
from lab.train.program import Program
from tests.conftest import ROOT
from tests.test_experiments import EXPERIMENTS, ready, shrunk
from tests.test_step import Perceptron, compiled_in_haste, toy  # noqa: F401 (a fixture)

needs_libtpu = pytest.mark.skipif(not topologies.can_compile(topologies.find("v5e-1")),
                                  reason="compiling for a TPU needs libtpu (LAB_EXTRAS=plan)")
needs_cuda = pytest.mark.skipif(not topologies.can_compile(topologies.find("h200:1")),
                                reason="compiling for a GPU needs JAX's packages for it (LAB_ACCELERATOR=cuda12)")


@pytest.fixture
def without_cuda(monkeypatch):
    """As where JAX's packages for GPUs are not installed."""
    monkeypatch.setattr(topologies, "can_compile", lambda topology: topology.chip.kind == "cpu")


@pytest.fixture(autouse=True)
def same_environment(monkeypatch):
    """`plan` sets variables for its process; tests share one."""
    before = dict(os.environ)
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    yield
    os.environ.clear()
    os.environ.update(before)


# ------------------------------------------------------------------------------------------------------------ names

@pytest.mark.parametrize("name,devices,shape", [
    ("v5e-1", 1, (1, 1)), ("v5e-8", 8, (2, 4)), ("v5e-256", 256, (16, 16)), ("v6e-16", 16, (4, 4)),
    ("v4-8", 4, (2, 2, 1)), ("v4-32", 16, (2, 2, 4)), ("v5p-64", 32, (2, 4, 4)), ("cpu:8", 8, ()), ("H100:8", 8, ())])
def test_names(name, devices, shape):
    found = topologies.find(name)
    assert (found.devices, found.shape) == (devices, shape)
    assert not shape or math.prod(shape) == devices


@pytest.mark.parametrize("name", ["v5e-7", "v4-9", "v4:8", "cpu-8", "cpu:0", "h100:", "v99-8", "", "v5e", "cpu:-3"])
def test_a_machine_that_is_not_there_is_one_sentence_with_the_list(name):
    with pytest.raises(UserError, match=r"is not a machine .* There are cpu:N, v5e-\{1,4,8,.*h100:N"):
        topologies.find(name)


def test_more_gpus_than_a_host_has():
    assert topologies.find("h100:16").devices == 16
    with pytest.raises(UserError, match="--on h100:12: more than 8 GPUs must be a multiple of 8"):
        topologies.find("h100:12")


def test_links():
    """A chip in the middle has 2 neighbours in each direction, 1 where there are only 2 chips."""
    links = {name: topologies.find(name).links for name in ("v5e-1", "v5e-4", "v5e-8", "v5e-256", "v4-8", "v4-128")}
    assert links == {"v5e-1": 0, "v5e-4": 2, "v5e-8": 3, "v5e-256": 4, "v4-8": 2, "v4-128": 6}
    assert topologies.find("v5e-256").network == pytest.approx(200e9)  # half of the 400 GB/s in both directions
    assert topologies.find("v5p-128").network == pytest.approx(600e9)
    assert topologies.find("v5e-1").network is None and topologies.find("h100:1").network is None


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e-1", "v5e-8", "v5e-256", "v4-32", "v4-4096", "v5p-64", "v6e-4"])
def test_the_compiler_knows_these_machines(name):
    topology = topologies.find(name)
    os.environ.update(topologies.environment(topology))
    found = topologies.devices(topology)
    assert len(found) == topology.devices
    extent = tuple(max(d.coords[i] for d in found) + 1 for i in range(len(topology.shape)))
    assert extent == topology.shape


@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e-1", "v4-8", "v5p-8", "v6e-1"])
def test_the_memory_of_a_chip_is_what_its_compiler_allows(chip):
    topology = topologies.find(chip)
    os.environ.update(topologies.environment(topology))
    where = jax.sharding.SingleDeviceSharding(topologies.devices(topology)[0])
    x = jax.ShapeDtypeStruct((2**37,), "bfloat16", sharding=where)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as refused:
        jax.jit(lambda x: x + 1).lower(x).compile()
    allowed = float(re.search(r"available HBM \(([\d.]+)G\)", str(refused.value))[1])
    assert topology.chip.memory / 2**30 == pytest.approx(allowed, rel=1e-3)  # versions differ in the last digit
    assert needed(str(refused.value)) == 2 * 2 * 2**37  # the argument and the result


def test_what_the_compiler_says_it_would_need():
    first = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (78.55G) ..."
    second = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.5G of"
    assert needed(first) == round(78.55 * 2**30) and needed(second) == round(20.5 * 2**30)
    with pytest.raises(UserError, match="INTERNAL: no such"):
        needed("INTERNAL: no such thing (3.0G)\nmore")


# ------------------------------------------------------------------------------------------------------------- bound

def test_the_bound():
    """v5e-8: 8 x 197 TFLOP/s, 819 GB/s, 3 links of 50 GB/s."""
    topology = topologies.find("v5e-8")
    bound = roofline(topology, "bfloat16", flops=8 * 197e12, traffic=819e9 // 2, sent=300e9)
    assert (bound.compute, bound.memory, bound.network) == pytest.approx((1.0, 0.5, 2.0))
    assert bound.seconds == pytest.approx(2.0) and bound.limit == "network"
    assert bound.one_by_one == pytest.approx(3.5)
    assert mfu(topology, "bfloat16", 8 * 197e12, bound.seconds) == pytest.approx(0.5)
    assert roofline(topology, "bfloat16", 8 * 197e12, 819e9, 0).limit in ("compute", "memory")
    gpus = roofline(topologies.find("h100:1"), "float32", 494e12, 0, 1e9)
    assert gpus.compute == pytest.approx(1.0) and gpus.network == 0
    assert roofline(topologies.find("cpu:8"), "float32", 1e12, 1e9, 1e9) is None


# ------------------------------------------------------------------------------------------------------------- plans

@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_every_experiment_can_be_planned(path, without_cuda):
    """Traced for GPUs; the next test compiles."""
    experiment = shrunk(load(path).local)
    later = [shrunk(load(other).local).fingerprint() for other in EXPERIMENTS[EXPERIMENTS.index(path) + 1:]]
    if experiment.fingerprint() in later:
        return  # one file's local config may be another's; that one is planned
    plan = compile_plan(ready(experiment), topologies.find("h200:8"))
    assert 0 < plan.memory.parameters + plan.memory.optimizer < plan.topology.chip.memory
    assert plan.model_flops > 0 and plan.roofline.seconds == plan.roofline.compute > 0
    assert plan.fits is None and plan.memory.total is None and plan.mesh == {"data": 8}


@pytest.mark.parametrize("name", ["gpt_xl", "fashion_gan", "linear_regression", "newsgroups_lstm"])
def test_plans_compiled_for_this_machine(name, compiled_in_haste):  # noqa: F811
    plan = compile_plan(shrunk(load(ROOT / f"experiments/{name}.py").local), topologies.find("cpu:8"))
    memory = plan.memory
    assert memory.total == sum([memory.parameters, memory.optimizer, memory.other, memory.outputs, memory.temporaries,
                                memory.code])
    assert memory.parameters > 0 <= memory.other and memory.temporaries > 0
    assert plan.collectives and plan.traffic > memory.parameters and plan.model_flops > 0
    assert plan.fits is None and plan.roofline is None


def typed(capsys, *words):
    """(exit status, stdout, stderr) of a command."""
    capsys.readouterr()
    status = main(["plan", *words])
    return status, *capsys.readouterr()


def test_typed(capsys, without_cuda):
    """The whole command, in this process, which has 8 CPU devices."""
    words = ["experiments/linear_regression.py", "--local", "--on", "cpu:8"]
    status, out, _ = typed(capsys, *words)
    assert status == 0
    for row in (r"Memory of each of 8 devices \(data 8\)", r"parameters +│ +[\d.]+ [MG]iB", r"optimizer state",
                r"temporaries +│", r"all +│", r"FLOPs, all devices", r"all-reduce +│ +\d+ x, arrays of", r"compiled in",
                r"No bound on time"):
        assert re.search(row, out), row
    status, out, _ = typed(capsys, *words[:-1], "h100:8")
    assert status == 0 and re.search(r"compute +│ +[\d.]+ ms +│ +\d+% ", out) and "Not compiled" in out
    assert "LAB_ACCELERATOR=cuda12 ./launch.sh plan" in out


@pytest.mark.parametrize("words,said", [
    ([], "Say what to plan"),
    (["--on", "v5e-8"], "Say what to plan"),
    (["experiments/gpt_small.py"], r"--on NAME, which is one of cpu:N, v5e-"),
    (["experiments/gpt_small.py", "--on"], r"--on NAME, which is one of cpu:N, v5e-"),
    (["experiments/gpt_small.py", "--on", "v5e-9"], r"--on v5e-9 is not a machine .* There are cpu:N"),
    (["experiments/gpt_smal.py", "--on", "v5e-8"], r"Perhaps you meant experiments/gpt_small.py"),
    (["experiments/gpt_small.py", "--local", "--on=cpu:4096"], r"needs 4096 CPU devices; JAX has started with 8"),
    (["experiments/gpt_small.py", "--local", "--batch", "12", "--on", "cpu:8"], r"12 .*8"),
])
def test_mistakes_are_a_sentence(capsys, words, said):
    status, _, err = typed(capsys, *words)
    assert status == 2 and err.startswith("error: ") and re.search(said, err), err
    assert "Traceback" not in err and len(err.splitlines()) == 1


def test_without_the_compiler(capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else find_spec(name, *a))
    status, _, err = typed(capsys, "experiments/gpt_small.py", "--local", "--on", "v5e-8")
    assert status == 2 and "LAB_EXTRAS=plan ./launch.sh plan" in err and len(err.splitlines()) == 1


# ------------------------------------------------------------------------------------------------ GPUs, without one

@pytest.fixture(scope="module")
def on_h200():
    """A GPT with GPT-2's vocabulary, compiled for one H200: its plan, and the program's text."""
    model = GPT(depth=2, width=256, heads=4, vocab=50304, context=512)
    experiment = replace(load(ROOT / "experiments/gpt_small.py").experiment, model=model, batch=16, grad_accum_steps=2,
                         data=Text(PythonStdlib(), GPT2(), length=512), task=LanguageModel(chunk=128))
    topology = topologies.find("h200:1")
    os.environ.update(topologies.environment(topology))
    text = Program(experiment, devices=topologies.devices(topology)).lower().compile().as_text()
    return experiment, compile_plan(experiment, topology), text


@needs_cuda
def test_compiled_for_a_gpu_that_is_not_there(on_h200):
    experiment, plan, text = on_h200
    memory = plan.memory
    assert plan.fits and memory.total == sum([memory.parameters, memory.optimizer, memory.other, memory.outputs,
                                              memory.temporaries, memory.code])
    assert plan.roofline.memory > 0 and not plan.collectives and plan.mesh == {}
    # Fused attention, forward and backward, and no scores in memory.
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text \
        and not re.search(r"\[(8,4|32),512,512\]", text)
    # Logits of 128 positions at a time, and their gradient in bfloat16 only. What all of them would take:
    assert not re.search(r"\b(f32|bf16)\[8,512,50304\]", text)
    assert memory.temporaries < 8 * 512 * 50304 * 4
    # Products are written in bfloat16: in float32 only the logits, and the parts of a sum that was split.
    wide = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
    assert "1024,50304" in wide and all(shape == "1024,50304" or shape.count(",") == 2 for shape in wide)
    assert len(re.findall(r"= bf16\[[\d,]+\]\S* dot\(", text)) > len(wide)


@needs_cuda
def test_the_loss_moves_few_bytes(on_h200, monkeypatch):
    """Float32 logits are written once and read three times; their gradient, in half as many bytes, is written once and
    read twice. The negative control, autodiff of the usual formula, moves more than twice as many.
    """
    experiment, plan, _ = on_h200
    logits = 16 * 512 * 50304 * 4

    def usual(x, targets):
        nll = jax.nn.logsumexp(x, -1) - jnp.take_along_axis(x, targets[..., None], -1)[..., 0]
        return nll, nll, (jnp.argmax(x, -1) == targets).astype(x.dtype)

    monkeypatch.setattr("lab.tasks.language.cross_entropy", usual)
    other = compile_plan(experiment, plan.topology)
    assert 5.5 * logits < plan.traffic < 9 * logits
    assert other.traffic > plan.traffic + 4.5 * logits


def test_what_the_compiler_for_gpus_is_told(monkeypatch):
    """Without the compiler: hosts of 8, and a text whose braces close; what it cannot do is a sentence."""
    told = []
    monkeypatch.setattr(topologies, "can_compile", lambda topology: True)
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc",
                        lambda **given: told.append(given) or SimpleNamespace(devices=[given["topology"]]))
    shapes = [topologies.devices(topologies.find(name)) for name in ("a100:1", "h100:8", "h200:16")]
    assert shapes == [["1x1x1"], ["1x1x8"], ["1x2x8"]]
    for given, memory in zip(told, ("85100068864", "84942979072", "151397597184"), strict=True):
        text = given["target_config"]
        assert f"device_memory_size: {memory} " in text and "%" not in text
        assert text.count("{") == text.count("}") and given["platform"] == "cuda"
    assert topologies.find("h200:1").chip.memory == round(0.75 * 151_397_597_184)

    def broken(**given):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", broken)
    with pytest.raises(UserError, match="does not start: topology not implemented for cuda"):
        topologies.devices(topologies.find("h200:1"))


@needs_cuda
def test_eight_gpus(compiled_in_haste):  # noqa: F811
    experiment = replace(shrunk(load(ROOT / "experiments/gpt_small.py").local), precision="bfloat16")
    topology = topologies.find("h100:8")
    os.environ.update(topologies.environment(topology))
    plan = compile_plan(experiment, topology)
    assert plan.mesh == {"data": 8} and {c.kind for c in plan.collectives} == {"all-reduce"}
    assert sum(c.bytes for c in plan.collectives) == pytest.approx(plan.memory.parameters, rel=0.05)


# -------------------------------------------------------------------------------------------------------------- FSDP

def per_device(program):
    return bytes_per_device(program.abstract, program.shardings)


def test_fsdp_divides_the_state(tiny):
    """Shardings alone say it: nothing is compiled."""
    experiment = replace(tiny, model=tiny.model.clone(width=512, heads=8, vocab=2048))
    whole = per_device(Program(experiment, devices=jax.devices()[:1]))
    for n in (2, 4, 8):
        program = Program(replace(experiment, mesh=Mesh(data=1, fsdp=n)), devices=jax.devices()[:n])
        assert per_device(program) == pytest.approx(whole / n, rel=0.15)
    replicated = Program(replace(experiment, mesh=Mesh(data=8)), devices=jax.devices())
    assert per_device(replicated) == whole  # negative control


@needs_libtpu
@pytest.mark.parametrize("chips", [8, 64, 256])
def test_fsdp_divides_the_state_of_gpt2_medium(chips):
    topology = topologies.find(f"v5e-{chips}")
    os.environ.update(topologies.environment(topology))
    experiment = load(ROOT / "experiments/gpt_medium.py").experiment
    experiment = replace(experiment, mesh=Mesh(data=1, fsdp=chips), grad_accum_steps=1,
                         model=experiment.model.clone(scan=True))  # else biases are too small to be divided
    program = Program(experiment, devices=topologies.devices(topology))
    whole = size_of(program.abstract)
    assert whole == pytest.approx(12 * 354_871_296, rel=1e-6)
    assert per_device(program) == pytest.approx(whole / chips, rel=0.15)


# ----------------------------------------------------------------------------------------------------------- too large

def too_large(experiment, mesh):
    """A plan that needs 40 GiB of 15.75."""
    return CompiledPlan(topologies.find("v5e-8"), mesh, Memory(2**30, 2**31, None, None, None, None, 40 * 2**30), 1, 1,
                        1, [], 0, None, None)


def test_alternatives(tiny):
    experiment = replace(tiny, batch=64)
    found = dict(alternatives(experiment, too_large(experiment, {"data": 8})))
    single = [flags for flags in found if flags.count("--") == 1]
    assert {"--mesh.fsdp 8", "--model.remat blocks", "--grad-accum-steps 4"} <= set(single)
    assert found["--mesh.fsdp 8"].mesh == Mesh(data=1, fsdp=8)
    assert found["--model.remat blocks"].model.remat == "blocks"
    assert found["--grad-accum-steps 4"].grad_accum_steps == 4
    *_, last = found.values()
    assert (last.mesh.fsdp, last.model.remat, last.grad_accum_steps) == (8, "blocks", 4)
    for changed in found.values():
        assert (changed.batch, changed.optim, changed.data) == (experiment.batch, experiment.optim, experiment.data)
    done = replace(last, grad_accum_steps=8)
    assert not list(alternatives(done, too_large(done, {"fsdp": 8})))  # nothing is left to change


@needs_libtpu
def test_a_plan_that_does_not_fit_says_what_would(capsys, compiled_in_haste):  # noqa: F811
    """Compiled for v5e-4: on each chip 65,536 points with 65,536 activations of 4 bytes are 16 GiB."""
    from lab.planning.tables import show

    experiment = toy(model=Perceptron(width=65_536), batch=2**18, mesh=Mesh(data=1, fsdp=4))
    os.environ.update(topologies.environment(topologies.find("v5e-4")))
    show(experiment, "v5e-4")
    out = capsys.readouterr().out
    assert "It does NOT fit" in out
    assert re.search(r"--grad-accum-steps \d+: [\d.]+ GiB, fits, at least [\d.]+ s/step", out), out
