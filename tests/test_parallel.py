"""One experiment, however it is spread: data, fsdp, tensor and sequence axes, pmap, and sums in a fixed order."""

import functools
import importlib.util
import math
import re
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from lab.data.pipeline import train_batch
from lab.errors import UserError
from lab.experiment import Checkpoint, Experiment, Mesh
from lab.models.cnn import ResNet
from lab.models.gpt import GPT
from lab.optim import AdamW, Constant
from lab.parallel.sharding import bytes_per_device
from lab.planning import hlo, topologies
from lab.train.checkpoint import Checkpoints
from lab.train.metrics import means
from lab.train.program import Program
from tests.test_step import apart, compiled_in_haste, toy  # noqa: F401 (a fixture)

UPDATES = 20


@pytest.fixture(scope="module")
def gpt() -> Experiment:
    """A GPT that every axis of 8 devices can divide."""
    from experiments import gpt_char
    from lab.data.tokenizers import Bytes

    base = gpt_char.local
    return replace(
        base,
        data=replace(base.data, tokenizer=Bytes(), length=32),
        batch=16,
        grad_accum_steps=1,
        steps_per_call=1,
        model=GPT(depth=2, width=64, heads=8, context=32, vocab=256),
        precision="float32",
        optim=AdamW(lr=Constant(1e-3), grad_clip_norm=1.0),
        steps=UPDATES,
        mesh=Mesh(data=1),
    )


@functools.cache
def _records(data: Any) -> Any:
    return data.load().train


def trained(experiment: Experiment, updates: int = UPDATES) -> tuple[np.ndarray, Any, Program]:
    """The losses of the first updates, the parameters after them, and the program."""
    experiment.validate()
    program, losses = Program(experiment), []
    state, train = program.init(), _records(experiment.data)
    for step in range(updates):
        rows = train_batch(train, step, experiment.batch, experiment.seed, program.rows)
        state, values = program.train(state, program.batch(lambda _, rows=rows: rows, step))
        losses.append(means(jax.device_get(values))["loss"])
    return np.array(losses), jax.device_get(state.params), program


@pytest.fixture(scope="module")
def alone(gpt: Experiment) -> np.ndarray:
    losses, _, program = trained(gpt)
    assert losses[-1] < losses[0] - 0.5  # it learns
    assert bytes_per_device(program.abstract, program.shardings) == sum(x.nbytes for x in jax.tree.leaves(
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.abstract)))
    return losses


@pytest.mark.parametrize(("changes", "part"), [
    ({"mesh": Mesh(data=8)}, 1), ({"mesh": Mesh(1, fsdp=8)}, 8), ({"mesh": Mesh(1, tensor=8)}, 8),
    ({"mesh": Mesh(1, sequence=8)}, 1), ({"mesh": Mesh(2, 2, 2)}, 4), ({"mesh": Mesh(1, 2, 2, 2)}, 4),
    ({"mesh": Mesh(data=8), "grad_accum_steps": 2}, 1), ({"mesh": Mesh(data=8), "parallel": "pmap"}, 1),
    ({"mesh": Mesh(data=8), "exact": True}, 1),
], ids=["data", "fsdp", "tensor", "sequence", "data-fsdp-tensor", "fsdp-tensor-sequence", "grad_accum_steps", "pmap",
        "exact"])
def test_the_curve_is_that_of_one_device(gpt, alone, changes, part):
    losses, _, program = trained(replace(gpt, **changes))
    assert np.abs(losses - alone).max() < 1e-5
    held = bytes_per_device(program.abstract, program.shardings)
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(program.abstract))
    assert whole / part <= held < 1.25 * whole / part  # norms, biases and counters are on every device


def test_another_seed_is_another_curve(gpt, alone):
    losses, _, _ = trained(replace(gpt, seed=1), updates=3)  # negative control of all of the above
    assert np.abs(losses - alone[:3]).max() > 1e-3


def test_scanned_blocks_and_microbatches_are_divided_too(gpt):
    scanned = replace(gpt, model=gpt.model.clone(scan=True, remat="blocks"), grad_accum_steps=2)
    one, eight = trained(scanned, 4)[0], trained(replace(scanned, mesh=Mesh(2, 2, 2)), 4)
    assert np.abs(one - eight[0]).max() < 1e-5
    specs = {s.spec for s in jax.tree.leaves(eight[2].shardings) if len(s.spec) == 3}
    assert specs == {jax.sharding.PartitionSpec(None, "fsdp", "tensor"), jax.sharding.PartitionSpec(None, "tensor",
                                                                                                    "fsdp")}


def test_a_checkpoint_goes_from_any_mesh_to_any_other(gpt, tmp_path):
    meshes = [Mesh(1, 8), Mesh(1, 1, 8), Mesh(1), Mesh(2, 2, 2)]
    saved = Program(replace(gpt, mesh=meshes[0])).init()
    for i, mesh in enumerate(meshes[1:]):
        checkpoints = Checkpoints(tmp_path / str(i), Checkpoint())
        checkpoints.save(1, saved)
        checkpoints.wait()
        program = Program(replace(gpt, mesh=mesh))
        restored = checkpoints.restore(program.abstract)
        checkpoints.close()
        assert bits(jax.device_get(restored)) == bits(jax.device_get(saved))
        assert all(x.sharding == s for x, s in zip(jax.tree.leaves(restored), jax.tree.leaves(program.shardings),
                                                   strict=True))
        saved = restored


# ------------------------------------------------------------------------------------------------- communication


def moved(experiment: Experiment, devices: Any = None) -> tuple[dict[str, float], int]:
    """Bytes of each kind of collective in one update, and the bytes of the parameters, as they are computed with."""
    program = Program(experiment, devices=devices)
    found = hlo.HloModule(program.lower().compile().as_text()).collectives()
    kinds = {kind: sum(c.times * c.bytes for c in found if c.kind == kind) for kind in hlo.KINDS}
    return kinds, sum(2 * x.size for x in jax.tree.leaves(program.abstract.params))


@pytest.fixture(scope="module")
def larger(gpt: Experiment) -> Experiment:
    return replace(gpt, model=GPT(depth=2, width=256, heads=2, context=32, vocab=256), precision="bfloat16")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                    reason="compiling for a TPU needs libtpu (LAB_EXTRAS=plan)")
def test_fsdp_gathers_parameters_and_scatters_gradients(larger):
    devices = topologies.devices(topologies.find("v5e-8"))
    kinds, parameters = moved(replace(larger, mesh=Mesh(1, 8)), devices)
    assert 0.9 * parameters < kinds["all-gather"] < 2.2 * parameters  # forward, and at most again backward
    assert 0.9 * parameters < kinds["reduce-scatter"] < 2.2 * parameters  # in bfloat16 or float32
    assert kinds["all-reduce"] < 0.1 * parameters  # norms, biases, positions: no whole gradient
    kinds, _ = moved(replace(larger, mesh=Mesh(8)), devices)  # negative control
    assert kinds["all-gather"] == kinds["reduce-scatter"] == 0 and kinds["all-reduce"] > 0.9 * parameters


def test_a_cpu_gathers_parameters_too(larger):
    kinds, parameters = moved(replace(larger, mesh=Mesh(1, 8)))  # its compiler knows no reduce-scatter
    assert 0.9 * parameters < kinds["all-gather"] < 4.4 * parameters


def test_gradients_are_sent_once_however_many_microbatches(larger):
    once, parameters = moved(replace(larger, mesh=Mesh(8), grad_accum_steps=2))
    assert 2 * parameters <= once["all-reduce"] < 2.1 * parameters  # in float32
    dropping = larger.model.clone(dropout=0.1)  # negative control: masks are drawn for all rows, so it is as it was
    each, _ = moved(replace(larger, mesh=Mesh(8), grad_accum_steps=2, model=dropping))
    assert each["all-reduce"] > 3.9 * parameters


def test_dropout_is_that_of_one_device(gpt):
    small = replace(gpt, grad_accum_steps=2, model=gpt.model.clone(depth=1, width=32, dropout=0.1))
    one, eight = (trained(replace(small, mesh=mesh), 2)[0] for mesh in (Mesh(1), Mesh(8)))
    assert np.abs(one - eight).max() < 1e-5
    plain = trained(replace(small, model=small.model.clone(dropout=0.0)), 2)[0]
    assert np.abs(one - plain).max() > 1e-3  # negative control: other masks would be seen


# ------------------------------------------------------------------------------------------------------- exact


def bits(tree: Any) -> bytes:
    return b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))


def test_exact_gives_the_same_bits_on_every_number_of_devices(gpt):
    exact = replace(gpt, exact=True, batch=8, model=gpt.model.clone(depth=1, width=32, heads=2, dropout=0.1))
    found = {n: bits(trained(replace(exact, mesh=Mesh(data=n)), 3)[1]) for n in (1, 2, 4, 8)}
    assert len(set(found.values())) == 1
    plain = {n: bits(trained(replace(exact, exact=False, mesh=Mesh(data=n)), 3)[1]) for n in (1, 8)}
    assert len(set(plain.values())) == 2  # negative control: without it the bits differ


@pytest.mark.parametrize(("changes", "message"), [
    ({"exact": True, "mesh": Mesh(data=3), "batch": 24}, "divides it, not on 3"),
    ({"exact": True, "mesh": Mesh(1, 2)}, "--exact is for data parallelism"),
    ({"parallel": "pmap", "mesh": Mesh(1, 2)}, "pmap. is data parallelism"),
    ({"mesh": Mesh(1, 1, 1, 2)}, "--mesh.sequence 2 shards no activation"),
    ({"mesh": Mesh(1, 1, 2)}, "--mesh.tensor 2: no array"),
])
def test_what_cannot_be_spread_is_said(changes, message):
    with pytest.raises(UserError, match=message):
        Program(toy(**changes)).lower()


@pytest.mark.parametrize(("changes", "message"), [
    ({"exact": True, "grad_accum_steps": 2}, "leave out --grad-accum-steps"),
    ({"exact": True, "virtual_shards": 3}, "--batch 8 is not divisible by --virtual-shards 3"),
    ({"exact": True, "virtual_shards": 0}, "--virtual-shards must be at least 1"),
    ({"parallel": "pmap", "steps_per_call": 4}, "leave out --steps-per-call"),
    ({"parallel": "shmap"}, "--parallel must be 'jit', 'pmap'"),
])
def test_what_does_not_go_together_is_said(changes, message):
    with pytest.raises(UserError, match=message):
        toy(**changes).validate()


def test_exact_refuses_batch_statistics():
    from experiments import cifar_resnet

    small = replace(cifar_resnet.local, exact=True, batch=8, mesh=Mesh(data=2), grad_accum_steps=1)
    assert isinstance(small.model, ResNet)
    with pytest.raises(UserError, match="not for models with batch statistics"):
        Program(small).lower()


def test_a_dry_run_shows_where_the_state_lives(gpt, capsys, monkeypatch):
    from lab.commands.dry_run import show

    monkeypatch.setenv("COLUMNS", "120")
    show(replace(gpt, mesh=Mesh(2, 2, 2)))
    out = capsys.readouterr().out
    assert "The state on each device (data 2 x fsdp 2 x tensor 2)" in out
    assert any("attn/query/kernel" in line and "fsdp, tensor" in line for line in out.splitlines())
    show(replace(gpt, mesh=Mesh(8)))
    assert re.search(r"on each device \(data 8\): \d+ arrays, [\d.]+[kM]B, all replicated", capsys.readouterr().out)
    show(replace(gpt, mesh=Mesh(1, 16), exact=True))
    out = capsys.readouterr().out
    assert "The mesh needs 16 devices; this machine has 8." in out and "exact: 8 virtual shards of 2 records" in out
