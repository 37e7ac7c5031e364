"""One table of path rules over the whole state: where arrays are born and stay, and what a bad table says."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lab import program as program_module
from lab import sharding
from lab.errors import UserError
from lab.experiment import Mesh
from lab.program import Program
from lab.sharding import batch_sharding, make_mesh, path_of, process_rows, state_shardings
from tests.test_step import apart, compiled_in_haste, reader, run, toy  # noqa: F401 (a fixture)

ZERO = ((r"hidden/kernel", (None, "data")), (r"out/kernel", ("data",)), (r".*", ()))


def arrays(**shapes: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def specs(state: Any, rules: sharding.Rules, devices: int = 8) -> dict[str, PartitionSpec]:
    found = state_shardings(state, make_mesh(devices), rules)
    return {path_of(path): s.spec for path, s in jax.tree.leaves_with_path(found)}


def test_a_sharded_state_trains_like_a_replicated_one(monkeypatch):
    plain, history = run(toy(), uneven=True)
    monkeypatch.setattr(program_module, "state_shardings", functools.partial(state_shardings, rules=ZERO))
    experiment = toy(mesh=Mesh(data=8))
    program = Program(experiment)
    state, seen = program.init(), []
    paths = {path_of(path): x for path, x in jax.tree.leaves_with_path(state)}
    kernels = {path for path in paths if path.endswith("kernel")}
    assert len(kernels) == 6 and any("mu" in p for p in kernels) and any("nu" in p for p in kernels)  # AdamW's too
    for path, x in paths.items():  # born sharded: no device ever held a whole kernel
        shard = x.addressable_shards[0].data
        assert len(x.addressable_shards) == 8
        assert shard.size == (x.size // 8 if path in kernels else x.size), path
    read = reader(experiment, uneven=True)
    for step in range(4):
        state, values = program.train(state, program.batch(read, step))
        seen.append(jax.device_get(values))
    assert all(x.sharding == s for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(program.shardings), strict=True))
    assert apart(jax.device_get(state), plain) < 1e-5
    assert apart(seen, history) < 1e-4
    assert apart(jax.device_get(program.init()), plain) > 1e-2  # negative control: it is not the state at the start


def test_the_default_replicates_everything():
    program = Program(toy(mesh=Mesh(data=8)))
    assert all(s.spec == PartitionSpec() and s.is_fully_replicated for s in jax.tree.leaves(program.shardings))


def test_the_first_rule_wins():
    state = {"params": arrays(kernel=(8, 16))}
    rules = ((r"kernel", ("data",)), (r"params", (None, "data")))
    assert specs(state, rules) == {"params/kernel": PartitionSpec("data")}
    assert specs(state, rules[::-1]) == {"params/kernel": PartitionSpec(None, "data")}


def test_rules_see_the_path_of_the_whole_state():
    state = {"params": {"block_0": arrays(kernel=(8, 8))}, "opt_state": (arrays(kernel=(8, 8)), {"mu": arrays(b=(8,))})}
    assert set(specs(state, ())) == {"params/block_0/kernel", "opt_state/0/kernel", "opt_state/1/mu/b"}
    found = specs(state, ((r"^opt_state/.*", ("data",)),))
    assert {path for path, spec in found.items() if spec} == {"opt_state/0/kernel", "opt_state/1/mu/b"}


def test_a_rule_with_too_many_axes_is_passed_over():
    state = arrays(kernel=(8, 8), kernel_rows=(8,), kernel_scalar=())
    found = specs(state, ((r"kernel", (None, "data")), (r"rows", ("data",))))
    assert found == {"kernel": PartitionSpec(None, "data"), "kernel_rows": PartitionSpec("data"),
                     "kernel_scalar": PartitionSpec()}


def test_bad_rules_name_the_path():
    state = {"params": {"hidden": arrays(kernel=(6, 8))}}
    with pytest.raises(UserError, match=r"params/hidden/kernel.*'model'.*data"):
        specs(state, ((r"kernel", ("model",)),))
    with pytest.raises(UserError, match=r"params/hidden/kernel \(6, 8\).*8 devices.*6"):
        specs(state, ((r"kernel", ("data",)),))
    assert specs(state, ((r"kernel", ("data",)),), devices=2)  # what does divide is no error


def test_mesh():
    assert make_mesh().shape == {"data": 8} and make_mesh(3).shape == {"data": 3}
    with pytest.raises(UserError, match="--mesh.data 9 needs 9 devices; this machine has 8"):
        make_mesh(9)


def test_batches_are_divided_or_refused():
    mesh = make_mesh(4)
    assert batch_sharding(mesh, 8).spec == PartitionSpec("data")
    assert batch_sharding(mesh, 8, 2, stacked=True).spec == PartitionSpec(None, "data")
    with pytest.raises(UserError, match="--batch 6 is not divisible by 4 devices. Use a multiple of 4"):
        batch_sharding(mesh, 6)
    with pytest.raises(UserError, match="--batch 8 is not divisible by 4 devices x 4 microbatches. .* multiple of 16"):
        batch_sharding(mesh, 8, 4)
    with pytest.raises(UserError, match="--batch 6"):
        Program(replace(toy(mesh=Mesh(data=4)), batch=6))


def test_each_process_reads_its_rows(monkeypatch):
    assert process_rows(12) == slice(0, 12)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    rows = []
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        rows.append(np.arange(12)[process_rows(12)])
    assert [len(r) for r in rows] == [4, 4, 4]
    assert np.array_equal(np.concatenate(rows), np.arange(12))


def test_batches_land_on_the_devices():
    program = Program(toy(mesh=Mesh(data=8), dispatch=4))
    batch, read = program.batch(reader(toy()), 1), reader(toy())
    assert batch["x"].shape == (4, 8, 6)
    assert {s.data.shape for s in batch["x"].addressable_shards} == {(4, 1, 6)}
    for i in range(4):
        assert np.array_equal(batch["y"][i], read(4 + i)["y"])
    assert not np.array_equal(batch["y"][0], read(0)["y"])
