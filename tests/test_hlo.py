"""Collectives and memory traffic, from programs whose counts are known: written by hand, and compiled here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lab.planning.hlo import HloModule, bytes_of, group_size, totals

# As a TPU's compiler prints: a loop whose trips only its condition tells, a pair of start and done, a gather fused in
# three pieces, a reduce-scatter as a fusion, an array on the chip (S(1)), updates in place.
TPU = """HloModule jit_step, is_scheduled=true, num_partitions=8, replica_count=1

%add.1 (x.1: f32[], y.1: f32[]) -> f32[] {
  %x.1 = f32[] parameter(0)
  %y.1 = f32[] parameter(1)
  ROOT %sum.1 = f32[]{:T(128)} add(%x.1, %y.1)
}

%all-reduce-scatter.6 (input.1: f32[64,768]) -> f32[8,768] {
  %input.1 = f32[64,768]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[64,768]{1,0:T(8,128)} all-reduce(%input.1), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add.1
  %zero.1 = s32[]{:T(128)} constant(0)
  ROOT %own.1 = f32[8,768]{1,0:T(8,128)} dynamic-slice(%all-reduce.9, %zero.1, %zero.1), dynamic_slice_sizes={8,768}
}

%piece.1 (p.1: bf16[64,96]) -> bf16[64,192] {
  %p.1 = bf16[64,96]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[64,192]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=8, replica_groups=[4,2]<=[8], dimensions={1}
}

%piece.2 (p.2: bf16[64,96]) -> bf16[64,192] {
  %p.2 = bf16[64,96]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[64,192]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.2), channel_id=8, replica_groups=[4,2]<=[8], dimensions={1}
}

%row.1 (all.1: f32[12,64,768], i.1: s32[]) -> f32[1,64,768] {
  %all.1 = f32[12,64,768]{2,1,0:T(8,128)} parameter(0)
  %i.1 = s32[]{:T(128)} parameter(1)
  %zero.2 = s32[]{:T(128)} constant(0)
  ROOT %row.2 = f32[1,64,768]{2,1,0:T(8,128)} dynamic-slice(%all.1, %i.1, %zero.2, %zero.2), dynamic_slice_sizes={1,64,768}
}

%write.1 (all.2: f32[12,64,768], new.1: f32[1,64,768], i.2: s32[]) -> f32[12,64,768] {
  %all.2 = f32[12,64,768]{2,1,0:T(8,128)} parameter(0)
  %new.1 = f32[1,64,768]{2,1,0:T(8,128)} parameter(1)
  %i.2 = s32[]{:T(128)} parameter(2)
  %zero.3 = s32[]{:T(128)} constant(0)
  ROOT %written.1 = f32[12,64,768]{2,1,0:T(8,128)} dynamic-update-slice(%all.2, %new.1, %i.2, %zero.3, %zero.3)
}

%condition.1 (state.1: (s32[], f32[12,64,768], bf16[64,96])) -> pred[] {
  %twelve.1 = s32[]{:T(128)} constant(12)
  %state.1 = (s32[]{:T(128)}, f32[12,64,768]{2,1,0:T(8,128)}, /*index=2*/bf16[64,96]{1,0:T(8,128)(2,1)}) parameter(0)
  %step.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less.1 = pred[]{:T(512)} compare(%step.1, %twelve.1), direction=LT
}

%body.1 (state.2: (s32[], f32[12,64,768], bf16[64,96])) -> (s32[], f32[12,64,768], bf16[64,96]) {
  %state.2 = (s32[]{:T(128)}, f32[12,64,768]{2,1,0:T(8,128)}, /*index=2*/bf16[64,96]{1,0:T(8,128)(2,1)}) parameter(0)
  %step.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  %stack.1 = f32[12,64,768]{2,1,0:T(8,128)} get-tuple-element(%state.2), index=1
  %small.1 = bf16[64,96]{1,0:T(8,128)(2,1)} get-tuple-element(%state.2), index=2
  %one.1 = s32[]{:T(128)S(1)} constant(1)
  %next.1 = s32[]{:T(128)S(1)} add(%step.2, %one.1)
  %fusion.1 = f32[1,64,768]{2,1,0:T(8,128)S(1)} fusion(%stack.1, %step.2), kind=kLoop, calls=%row.1
  %fusion.2 = bf16[64,192]{1,0:T(8,128)(2,1)S(1)} fusion(%small.1), kind=kCustom, calls=%piece.1
  %fusion.3 = bf16[64,192]{1,0:T(8,128)(2,1)S(1)} fusion(%small.1), kind=kCustom, calls=%piece.2
  %flat.1 = f32[64,768]{1,0:T(8,128)S(1)} bitcast(%fusion.1)
  %fusion.4 = f32[8,768]{1,0:T(8,128)S(1)} fusion(%flat.1), kind=kCustom, calls=%all-reduce-scatter.6
  %fusion.5 = f32[12,64,768]{2,1,0:T(8,128)} fusion(%stack.1, %fusion.1, %step.2), kind=kLoop, calls=%write.1
  ROOT %out.1 = (s32[]{:T(128)}, f32[12,64,768]{2,1,0:T(8,128)}, bf16[64,96]{1,0:T(8,128)(2,1)}) tuple(%next.1, %fusion.5, %small.1)
}

ENTRY %main.1 (a.1: f32[12,64,768], b.1: bf16[64,96]) -> f32[1024] {
  %a.1 = f32[12,64,768]{2,1,0:T(8,128)} parameter(0), sharding={replicated}
  %b.1 = bf16[64,96]{1,0:T(8,128)(2,1)} parameter(1)
  %zero.4 = s32[]{:T(128)} constant(0)
  %tuple.1 = (s32[]{:T(128)}, f32[12,64,768]{2,1,0:T(8,128)}, bf16[64,96]{1,0:T(8,128)(2,1)}) tuple(%zero.4, %a.1, %b.1)
  %while.1 = (s32[]{:T(128)}, f32[12,64,768]{2,1,0:T(8,128)}, bf16[64,96]{1,0:T(8,128)(2,1)}) while(%tuple.1), condition=%condition.1, body=%body.1
  %c.1 = bf16[64,96]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=2
  %permute-start = (bf16[64,96]{1,0:T(8,128)(2,1)}, bf16[64,96]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%c.1), channel_id=3, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %permute-done = bf16[64,96]{1,0:T(8,128)(2,1)} collective-permute-done(%permute-start)
  %g.1 = f32[1024]{0:T(1024)} constant({...})
  ROOT %sum.9 = f32[1024]{0:T(1024)} all-reduce(%g.1), channel_id=4, replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%add.1
}
"""  # noqa: E501


def test_collectives_of_a_recorded_program():
    program = HloModule(TPU)
    assert program.devices == 8
    found = {c.kind: c for c in program.collectives()}
    assert len(found) == len(program.collectives()) == 4
    assert (found["all-gather"].times, found["all-gather"].bytes, found["all-gather"].group) == (12, 64 * 192 * 2, 2)
    assert (found["reduce-scatter"].times, found["reduce-scatter"].bytes) == (12, 64 * 768 * 4)
    assert (found["collective-permute"].times, found["collective-permute"].bytes) == (1, 64 * 96 * 2)
    assert (found["all-reduce"].times, found["all-reduce"].bytes, found["all-reduce"].group) == (1, 4096, 4)
    assert totals(program.collectives()) == {
        "all-gather": (12, 12 * 24576, 12 * 24576 // 2), "reduce-scatter": (12, 12 * 196608, 12 * 196608 * 7 // 8),
        "all-reduce": (1, 4096, 4096 * 2 * 3 // 4), "collective-permute": (1, 12288, 12288)}


def test_a_change_of_the_program_is_seen():
    """Negative controls: trips, channels, the slice of a reduce-scatter."""
    def kinds(text):
        return {c.kind: c.times for c in HloModule(text).collectives()}

    assert kinds(TPU.replace("constant(12)", "constant(5)"))["all-gather"] == 5
    assert kinds(TPU.replace("%one.1 = s32[]{:T(128)S(1)} constant(1)", "%one.1 = s32[]{:T(128)S(1)} constant(2)"))[
        "all-gather"] == 6
    assert kinds(TPU.replace("%zero.4 = s32[]{:T(128)} constant(0)", "%zero.4 = s32[]{:T(128)} constant(4)"))[
        "all-gather"] == 8
    trips = 'body=%body.1, backend_config={"known_trip_count":{"n":"3"}}'
    assert kinds(TPU.replace("body=%body.1", trips))["all-gather"] == 3
    apart = TPU.replace("all-gather(%p.2), channel_id=8", "all-gather(%p.2), channel_id=9")
    assert len(HloModule(apart).collectives()) == 5
    assert "reduce-scatter" not in kinds(TPU.replace("dynamic-slice(%all-reduce.9", "pad(%all-reduce.9"))


def test_traffic_of_a_recorded_program():
    """Arrays on the chip are free; of the stack one row is read and one written in each trip."""
    row, small, gathered = 64 * 768 * 4, 64 * 96 * 2, 64 * 192 * 2
    trip = 4 + row + 4  # next.1 reads the step; fusion.1 its row and the step (5 bytes of scalars are noise)
    trip += 2 * small  # the two pieces; their results are on the chip
    trip += row + 4  # fusion.5 writes its row
    once = 2 * small + 4096 * 2  # the permutation, the sum
    assert HloModule(TPU).traffic() == pytest.approx(12 * trip + once, rel=1e-3)
    off_chip = TPU.replace("{1,0:T(8,128)(2,1)S(1)} fusion", "{1,0:T(8,128)(2,1)} fusion")
    assert HloModule(off_chip).traffic() - HloModule(TPU).traffic() == 12 * 2 * gathered  # negative control


def test_of_several_updates_in_place_the_rows_count():
    """As a scan keeps what its backward pass needs: one operation that writes a row of each of two stacks."""
    two = """HloModule jit_step

%write.1 (a.1: f32[12,64,768], b.1: f32[12,64,768], new.1: f32[1,64,768], i.1: s32[]) -> (f32[12,64,768], f32[64,768]) {
  %a.1 = f32[12,64,768]{2,1,0} parameter(0)
  %new.1 = f32[1,64,768]{2,1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %one.1 = f32[12,64,768]{2,1,0} dynamic-update-slice(%a.1, %new.1, %i.1, %zero.1, %zero.1)
  %flat.1 = f32[64,768]{1,0} bitcast(%new.1)
  ROOT %both.1 = (f32[12,64,768]{2,1,0}, f32[64,768]{1,0}) tuple(%one.1, %flat.1)
}

ENTRY %main.1 (a.2: f32[12,64,768], new.2: f32[1,64,768], i.2: s32[]) -> (f32[12,64,768], f32[64,768]) {
  %fresh.1 = f32[12,64,768]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %new.2 = f32[1,64,768]{2,1,0} parameter(0)
  %i.2 = s32[] parameter(1)
  ROOT %fusion.1 = (f32[12,64,768]{2,1,0}, f32[64,768]{1,0}) fusion(%fresh.1, %new.2, %i.2), kind=kLoop, calls=%write.1
}
"""
    row = 64 * 768 * 4
    assert HloModule(two).traffic() == 3 * row + 4  # the new row is read once and written twice
    # The same with the results in the other order; and inside another fusion, as GPUs' compilers print it.
    turned = two.replace("-> (f32[12,64,768], f32[64,768]) {", "-> (f32[64,768], f32[12,64,768]) {")
    for pair in ("(f32[12,64,768]{2,1,0}, f32[64,768]{1,0})", "tuple(%one.1, %flat.1)"):
        first, _, second = pair.partition("(")[2][:-1].partition(", ")
        turned = turned.replace(pair, f"{pair.partition('(')[0]}({second}, {first})")
    assert HloModule(turned).traffic() == 3 * row + 4
    nested = two.replace("ENTRY", """%outer.1 (a.3: f32[12,64,768]) -> (f32[12,64,768], f32[64,768]) {
  %a.3 = f32[12,64,768]{2,1,0} parameter(0)
  %new.3 = f32[1,64,768]{2,1,0} parameter(1)
  %i.3 = s32[] parameter(2)
  ROOT %inner.1 = (f32[12,64,768]{2,1,0}, f32[64,768]{1,0}) fusion(%a.3, %new.3, %i.3), kind=kLoop, calls=%write.1
}

ENTRY""").replace("fusion(%fresh.1, %new.2, %i.2), kind=kLoop, calls=%write.1",
                  "fusion(%fresh.1, %new.2, %i.2), kind=kLoop, calls=%outer.1")
    assert HloModule(nested).traffic() == 3 * row + 4
    # A tuple whose first part is two results of one operation, and whose last is an update in place.
    three = two.replace("(f32[12,64,768], f32[64,768]) {", "(f32[8], s32[8], f32[12,64,768]) {").replace(
        "(f32[12,64,768]{2,1,0}, f32[64,768]{1,0}) tuple(%one.1, %flat.1)",
        "((f32[8]{0}, s32[8]{0}), f32[12,64,768]{2,1,0}) tuple(%pair.1, %one.1)").replace(
        "  %flat.1", "  %pair.1 = (f32[8]{0}, s32[8]{0}) reduce(%new.1, %i.1), to_apply=%larger.1\n  %flat.1").replace(
        "ROOT %fusion.1 = (f32[12,64,768]{2,1,0}, f32[64,768]{1,0})",
        "ROOT %fusion.1 = ((f32[8]{0}, s32[8]{0}), f32[12,64,768]{2,1,0})")
    assert HloModule(three).traffic() == 2 * row + 4 + 2 * 32
    whole = two.replace("dynamic-update-slice(%a.1, %new.1, %i.1, %zero.1, %zero.1)", "add(%a.1, %a.1)")
    assert HloModule(whole).traffic() == (12 + 12 + 1 + 1) * row  # negative control
    made = two.replace('"AllocateBuffer"', '"Make"')
    assert HloModule(made).traffic() == HloModule(two).traffic() + 12 * row  # another one writes what it returns


def test_a_slice_that_is_started_moves_the_slice():
    """A quarter of an array, fetched to the chip (S(1)): its result is printed with the whole operand in it."""
    text = """HloModule jit_step

ENTRY %main.1 (a.1: f32[16,768]) -> f32[4,768] {
  %a.1 = f32[16,768]{1,0} parameter(0)
  %slice-start.1 = ((f32[16,768]{1,0}), f32[4,768]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a.1), slice={[0:4], [0:768]}
  ROOT %slice-done.1 = f32[4,768]{1,0:S(1)} slice-done(%slice-start.1)
}
"""
    assert HloModule(text).traffic() == 4 * 768 * 4
    assert HloModule(text.replace(":S(1)", "")).traffic() == 2 * 4 * 768 * 4  # negative control: into memory


def test_shapes_and_groups():
    assert bytes_of("(f32[2,3]{1,0}, bf16[4]{0:T(8,128)(2,1)S(1)}, pred[5], token[], u8[])") == 24 + 8 + 5 + 1
    assert bytes_of("(f32[2,3]{1,0}, bf16[4]{0:T(8,128)(2,1)S(1)})", memory=True) == 24
    assert bytes_of("f8e4m3fn[16]") == 16 and bytes_of("s4[16]") == 8 and bytes_of("c64[2]") == 16
    assert group_size("replica_groups={{0,1},{2,3}}", 4) == 2
    assert group_size("replica_groups=[2,4]<=[4,2]T(1,0)", 8) == 4
    assert group_size("replica_groups=mesh['a'=2,'b'=4,'c'=3] {'a', 'c'}", 24) == 6
    assert group_size("replica_groups=mesh['a'=64,'b'=4], device_ids=([4,64]T(1,0)) {'a'}, x={1}", 256) == 64
    assert group_size("replica_groups=mesh['a'=64,'b'=4] {'a':(2)4, 'b'}", 256) == 16
    assert group_size("channel_id=1", 8) == 8


@functools.cache
def compiled(repeats: int) -> HloModule:
    """Every kind, in a scan of `repeats`, on 8 fake devices."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def body(x, _):
        x = x + jax.lax.psum(x, "a")
        x = jnp.sin(jax.lax.psum_scatter(jax.lax.all_gather(x, "b", tiled=True) * x.sum(), "b", tiled=True))
        x = jax.lax.all_to_all(x.reshape(4, -1), "b", 0, 0).reshape(-1)
        return jax.lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)]), None

    spec = PartitionSpec(("a", "b"))
    run = jax.jit(jax.shard_map(lambda x: jax.lax.scan(body, x, None, length=repeats)[0], mesh=mesh, in_specs=spec,
                                out_specs=spec))
    x = jax.ShapeDtypeStruct((8 * 256,), np.float32, sharding=NamedSharding(mesh, spec))
    return HloModule(run.lower(x).compile().as_text())


@pytest.mark.parametrize("repeats", [5, 7])
def test_what_this_machine_compiles(repeats):
    """256 numbers on every device: 1 KiB, of which 4 are gathered."""
    sent = {kind: values for kind, values in totals(compiled(repeats).collectives()).items()}
    assert sent == {"all-gather": (repeats, repeats * 4096, repeats * 3072),
                    "reduce-scatter": (repeats, repeats * 4096, repeats * 3072),
                    "all-reduce": (repeats, repeats * 1024, repeats * 1024),
                    "all-to-all": (repeats, repeats * 1024, repeats * 768),
                    "collective-permute": (repeats, repeats * 1024, repeats * 1024)}
    assert 0 < compiled(5).traffic() < compiled(7).traffic() < 2 * compiled(5).traffic()


def test_traffic_is_what_xla_counts_where_nothing_repeats():
    """And what its analysis leaves out where something does."""
    def layer(x, w):
        return jnp.sin(x @ w) + x[:1] * 2

    def counted(f):
        found = jax.jit(f).lower(np.ones((64, 256), np.float32), np.ones((256, 256), np.float32)).compile()
        costs = found.cost_analysis()
        return HloModule(found.as_text()).traffic(), (costs[0] if isinstance(costs, list) else costs)["bytes accessed"]

    ours, xla = counted(lambda x, w: layer(layer(x, w), w))
    assert ours == pytest.approx(xla, rel=0.1)
    ours, xla = counted(lambda x, w: jax.lax.scan(lambda x, _: (layer(x, w), None), x, None, length=20)[0])
    assert ours > 10 * xla
