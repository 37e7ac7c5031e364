"""One table of path rules over the whole state: where arrays are born and stay, and what a bad table says."""

import functools
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lab.data import pipeline
from lab.data.pipeline import train_batch
from lab.errors import UserError
from lab.experiment import Mesh
from lab.parallel import sharding
from lab.parallel.sharding import batch_sharding, describe_state, make_mesh, path_of, process_rows, put, state_shardings
from lab.train.program import Program
from tests.test_step import apart, compiled_in_haste, reader, run, toy  # noqa: F401 (a fixture)

DIVIDED = (("hidden/kernel", "-, fsdp"), ("out/kernel", "fsdp, -"))


def arrays(**shapes: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def specs(state: Any, rules: sharding.Rules, mesh: Mesh = Mesh(1, 8)) -> dict[str, PartitionSpec]:  # noqa: B008
    found = state_shardings(state, make_mesh(mesh), rules)
    return {path_of(path): s.spec for path, s in jax.tree.leaves_with_path(found)}


def test_a_sharded_state_trains_like_a_replicated_one():
    plain, history = run(toy(), uneven=True)
    experiment = toy(mesh=Mesh(data=1, fsdp=8, rules=DIVIDED))
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


def test_embeddings_gradients_are_float32_sums_on_every_mesh(tiny, monkeypatch):
    """A table is gathered before it is looked up; how the gradient is summed must not depend on that."""
    experiment = replace(tiny, precision="bfloat16", batch=16)

    def scattered(mesh: Mesh) -> set[str]:
        program = Program(replace(experiment, mesh=mesh), devices=jax.devices()[: mesh.fsdp])
        return set(re.findall(r'"stablehlo.scatter".*?-> tensor<[\dx]*x(\w+)>', program.lower().as_text(), re.DOTALL))

    assert scattered(Mesh(data=1, fsdp=1)) == scattered(Mesh(data=1, fsdp=8)) == {"f32"}
    plain = staticmethod(functools.partial(jnp.take, axis=0))
    monkeypatch.setattr("lab.models.layers.Embed.embedding_lookup", plain)
    assert "bf16" in scattered(Mesh(data=1, fsdp=8))  # negative control


def test_the_default_replicates_everything():
    program = Program(toy(mesh=Mesh(data=8)))
    assert all(s.spec == PartitionSpec() and s.is_fully_replicated for s in jax.tree.leaves(program.shardings))


def test_without_a_rule_fsdp_takes_the_largest_dimension_that_it_divides():
    state = {"conv": arrays(kernel=(3, 3, 64, 128)), "odd": arrays(kernel=(4097, 8), bias=(4096,), small=(64,)),
             "none": arrays(kernel=(4097, 3))}
    assert specs(state, ()) == {
        "conv/kernel": PartitionSpec(None, None, None, "fsdp"), "odd/kernel": PartitionSpec(None, "fsdp"),
        "odd/bias": PartitionSpec("fsdp"), "odd/small": PartitionSpec(), "none/kernel": PartitionSpec()}


def test_transformers_have_rules_of_their_own():
    block = {"attn": {"query": arrays(kernel=(64, 64)), "out": arrays(kernel=(64, 64))},
             "ffn": {"up": arrays(kernel=(64, 256)), "down": arrays(kernel=(256, 64))}}
    state = {"params": {"block_0": block, "wte": arrays(embedding=(256, 64))}}
    found = specs(state, (), Mesh(2, 2, 2))
    assert found == {
        "params/block_0/attn/query/kernel": PartitionSpec("fsdp", "tensor"),
        "params/block_0/attn/out/kernel": PartitionSpec("tensor", "fsdp"),
        "params/block_0/ffn/up/kernel": PartitionSpec("fsdp", "tensor"),
        "params/block_0/ffn/down/kernel": PartitionSpec("tensor", "fsdp"),
        "params/wte/embedding": PartitionSpec("tensor", "fsdp")}
    stacked = {"blocks": {"attn": {"query": arrays(kernel=(12, 64, 64))}}}  # scanned: rules are of the last dimensions
    assert specs(stacked, (), Mesh(2, 2, 2)) == {"blocks/attn/query/kernel": PartitionSpec(None, "fsdp", "tensor")}


def test_the_first_rule_wins():
    state = {"params": arrays(kernel=(8, 16))}
    assert specs(state, (("kernel", "fsdp, -"), ("", "-, fsdp"))[:1]) == {"params/kernel": PartitionSpec("fsdp", None)}
    with pytest.raises(UserError, match="'params' matches no array"):  # it is never reached
        specs(state, (("kernel", "fsdp, -"), ("params", "-, fsdp")))


def test_rules_see_the_path_of_the_whole_state():
    state = {"params": {"block_0": arrays(kernel=(8, 8))}, "opt_state": (arrays(kernel=(8, 8)), {"mu": arrays(b=(8,))})}
    assert set(specs(state, ())) == {"params/block_0/kernel", "opt_state/0/kernel", "opt_state/1/mu/b"}
    found = specs(state, (("^opt_state/.*", "fsdp"),))
    assert {path for path, spec in found.items() if spec} == {"opt_state/0/kernel", "opt_state/1/mu/b"}


def test_a_rule_with_too_many_axes_is_passed_over():
    state = arrays(kernel=(8, 8), kernel_rows=(8,), kernel_scalar=())
    found = specs(state, (("kernel", "-, fsdp"), ("rows", "fsdp")))
    assert found == {"kernel": PartitionSpec(None, "fsdp"), "kernel_rows": PartitionSpec("fsdp"),
                     "kernel_scalar": PartitionSpec()}


def test_bad_rules_name_the_path():
    state = {"params": {"hidden": arrays(kernel=(6, 8))}}
    with pytest.raises(UserError, match=r"'model'.*data, fsdp, tensor, sequence"):
        specs(state, (("kernel", "model"),))
    with pytest.raises(UserError, match=r"params/hidden/kernel \(6, 8\).*8 devices.*6. 8 would do"):
        specs(state, (("kernel", "fsdp, -"),))
    assert specs(state, (("kernel", "fsdp, -"),), Mesh(1, 2))  # what does divide is no error
    with pytest.raises(UserError, match="'kernels' matches no array of the state"):
        specs(state, (("kernels", "fsdp"),))
    with pytest.raises(UserError, match="--mesh.tensor 2: .*no .*rule"):
        specs(state, (), Mesh(1, 1, 2))


def test_the_table_says_what_a_device_holds():
    params = {f"block_{i}": arrays(kernel=(64, 128)) for i in range(3)} | {"head": arrays(bias=(4,))}
    state = {"params": params, "opt_state": ({"mu": params}, arrays(count=()))}
    rows = describe_state(state, state_shardings(state, make_mesh(Mesh(1, 8))))
    assert sorted(rows) == [("block_*/kernel", (64, 128), "-, fsdp", 6, 6 * 64 * 128 * 4 // 8),
                            ("head/bias", (4,), "replicated", 2, 32),
                            ("opt_state/1/count", (), "replicated", 1, 4)]


def test_mesh():
    assert make_mesh(Mesh()).shape == {"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1}
    assert make_mesh(Mesh(3)).shape["data"] == 3
    assert make_mesh(Mesh(1, -1, 2)).shape == {"data": 1, "fsdp": 4, "tensor": 2, "sequence": 1}
    with pytest.raises(UserError, match="--mesh.data 9 needs 9 devices; this machine has 8"):
        make_mesh(Mesh(9))
    with pytest.raises(UserError, match="--mesh.fsdp 3 --mesh.tensor 3 .*9 devices.* 8"):
        make_mesh(Mesh(-1, 3, 3))
    with pytest.raises(UserError, match="--mesh.fsdp 3 .*8 devices.* --mesh.data N"):
        make_mesh(Mesh(-1, 3))
    with pytest.raises(UserError, match="Only one of"):
        Mesh(-1, -1).validate()
    with pytest.raises(UserError, match="--mesh.sequence must be at least 1"):
        Mesh(sequence=0).validate()


def test_slices_are_divided_by_data_only():
    class Device:
        platform, device_kind = "tpu", "a kind"

        def __init__(self, i: int):
            self.id, self.slice_index, self.process_index = i, i // 4, i // 4
            self.coords, self.core_on_chip = (i % 2, i // 2 % 2, 0), 0

    devices = [Device(i) for i in range(8)]
    grid = make_mesh(Mesh(-1, 4), devices).devices
    assert grid.shape == (2, 4, 1, 1)
    assert [{d.slice_index for d in row.flat} for row in grid] == [{0}, {1}]
    with pytest.raises(UserError, match="--mesh.data 1 is not divisible by the 2 TPU slices"):
        make_mesh(Mesh(1, 8), devices)


def test_batches_are_divided_or_refused():
    mesh = make_mesh(Mesh(2, 2))
    assert batch_sharding(mesh, 8).spec == PartitionSpec(("data", "fsdp"))
    assert batch_sharding(mesh, 8, 2, stacked=True).spec == PartitionSpec(None, ("data", "fsdp"))
    with pytest.raises(UserError, match="--batch 6 .*divisible by 4 .*multiple of 4"):
        batch_sharding(mesh, 6)
    with pytest.raises(UserError, match="--batch 8 .*4 devices x 4 microbatches.* multiple of 16"):
        batch_sharding(mesh, 8, 4)
    with pytest.raises(UserError, match="--batch 6"):
        Program(replace(toy(mesh=Mesh(data=4)), batch=6))


class Process:
    """The sharding of a batch as one process of several sees it."""

    def __init__(self, sharding: jax.NamedSharding, devices: set[Any]):
        self.spec, self.devices, self.whole = sharding.spec, devices, sharding

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict[Any, Any]:
        found = self.whole.devices_indices_map(shape)
        return {device: index for device, index in found.items() if device in self.devices}


@pytest.mark.parametrize(("mesh", "expected"), [
    (Mesh(8), [(0, 4), (4, 8), (8, 12), (12, 16)]),
    (Mesh(2, 2, 2), [(0, 4), (4, 8), (8, 12), (12, 16)]),
    (Mesh(1, 1, 8), [(0, 16)] * 4),  # all devices hold all rows
    (Mesh(1, 2, 4), [(0, 8), (0, 8), (8, 16), (8, 16)]),
])
@pytest.mark.parametrize("stacked", [False, True])
def test_each_process_reads_its_rows(mesh: Mesh, expected: list, stacked: bool):
    made = make_mesh(mesh)
    whole = batch_sharding(made, 16, stacked=stacked)
    order = list(made.devices.flat)
    found = [process_rows(Process(whole, set(order[2 * p: 2 * p + 2])), 16) for p in range(4)]
    assert [(rows.start, rows.stop) for rows in found] == expected


def test_the_global_batch_is_the_same_for_any_number_of_processes(monkeypatch):
    records = toy().data.load().train
    whole = train_batch(records, 3, 8, 0)
    expected = put(whole, batch_sharding(make_mesh(Mesh(8)), 8), 8)
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # the way of several processes, with all rows here
    for mesh in (Mesh(8), Mesh(2, 2, 2), Mesh(1, 1, 8)):
        found = put(whole, batch_sharding(make_mesh(mesh), 8), 8)
        assert apart(expected, found) == 0 and found["x"].shape == expected["x"].shape
    parts = [train_batch(records, 3, 8, 0, slice(i, i + 4)) for i in (0, 4)]
    assert np.array_equal(np.concatenate([part["index"] for part in parts]), whole["index"])
    other = put(train_batch(records, 4, 8, 0), batch_sharding(make_mesh(Mesh(8)), 8), 8)
    assert apart(expected, other) > 0.1  # negative control: another step


def test_batches_land_on_the_devices():
    program = Program(toy(mesh=Mesh(data=8), steps_per_call=4), toy().data.load().train)
    batch, read = program.batch(pipeline.reader(program), 1), reader(toy())
    assert batch["x"].shape == (4, 8, 6)
    assert {s.data.shape for s in batch["x"].addressable_shards} == {(4, 1, 6)}
    for i in range(4):
        assert np.array_equal(batch["y"][i], read(4 + i)["y"])
    assert not np.array_equal(batch["y"][0], read(0)["y"])
