"""Checkpoints: what the checksum sees, damage of every file, other models, other device counts."""

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lab.errors import UserError
from lab.experiment import Checkpoint, Mesh
from lab.parallel.sharding import make_mesh
from lab.train.checkpoint import Checkpoints, checksum, manifest
from lab.train.description import finished
from lab.train.program import Program
from lab.train.restore import _best_step
from tests.test_loop import (  # noqa: F401 (fixtures)
    final,
    go,
    interrupt,
    program_of,
    quick,
    reference,
    restored,
    same,
    steps_of,
)
from tests.test_step import Perceptron, apart, compiled_in_haste, toy  # noqa: F401 (a fixture)

sums = jax.jit(checksum)


# ------------------------------------------------------------------------------------------------------- checksum


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool"])
def test_every_bit_of_every_type_counts(dtype):
    size = 3 * 5
    raw = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 256, size * jnp.dtype(dtype).itemsize,
                                            dtype=np.uint8)
    bits = 1 if dtype == "bool" else 8

    def of(raw: np.ndarray) -> int:
        return int(sums(jnp.asarray(raw.view(jnp.dtype(dtype)).reshape(3, 5))))

    whole = of(raw)
    assert of(raw.copy()) == whole
    for byte in range(len(raw)):
        for bit in range(bits):
            damaged = raw.copy()
            damaged[byte] ^= np.uint8(1 << bit)
            assert of(damaged) != whole, (byte, bit)


def test_swapped_elements_are_seen():
    x = np.random.default_rng(1).normal(size=64).astype(np.float32)
    whole = int(sums(x))
    for i, j in [(0, 1), (3, 60), (31, 32), (0, 32)]:
        swapped = x.copy()
        swapped[[i, j]] = x[[j, i]]
        assert int(sums(swapped)) != whole
    assert int(sums(x.reshape(8, 8).T.copy())) != int(sums(x.reshape(8, 8)))
    assert int(sums(x[::-1].copy())) != whole
    assert int(jnp.sum(x.view(np.uint32))) == int(jnp.sum(x[::-1].view(np.uint32)))  # a plain sum would not see it


def test_signs_that_change_places_are_seen():
    x = np.ones(64, np.float32)
    x[5] = -1
    swapped = np.ones(64, np.float32)
    swapped[9] = -1
    assert int(sums(x)) != int(sums(swapped))
    assert int(sums(-x)) != int(sums(x))


def test_the_checksum_is_the_same_for_every_sharding():
    x = jnp.arange(64.0).reshape(8, 8) / 3
    mesh = make_mesh(Mesh())
    specs = [PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")]
    found = {int(sums(jax.device_put(x, NamedSharding(mesh, spec)))) for spec in specs}
    assert found == {int(sums(x))}
    assert int(sums(x.reshape(64))) == int(sums(x)) != int(sums(x + 1))


def test_manifest():
    found = manifest({"a": {"b": jnp.ones((2, 3))}, "n": (jnp.int32(4),)})
    assert {path: (e["shape"], e["dtype"]) for path, e in found.items()} == {"a/b": ([2, 3], "float32"),
                                                                           "n/0": ([], "int32")}
    assert found["n/0"]["checksum"] == int(checksum(jnp.int32(4))) != int(checksum(jnp.int32(5)))


# --------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, quick) -> Path:  # noqa: F811
    """A run that was stopped after step 10, with checkpoints at 4, 8 and 10. Not to be written to."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    assert go(toy(), folder, 9, interrupt())[0] == 75
    assert steps_of(folder) == [4, 8, 10]
    return folder


@pytest.fixture
def folder(interrupted, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


def largest(checkpoint: Path) -> Path:
    """The file with the arrays."""
    return max((p for p in (checkpoint / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(checkpoint: Path) -> None:
    path = largest(checkpoint)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(checkpoint: Path) -> None:
    path = largest(checkpoint)
    raw = bytearray(path.read_bytes())
    for quarter in (1, 2, 3):  # one byte may be one that nothing depends on
        raw[len(raw) * quarter // 4] ^= 1
    path.write_bytes(raw)


def empty(checkpoint: Path) -> None:
    for path in (checkpoint / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def without_arrays(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "state")


def without_manifest(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "manifest")


def scrambled_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest" / "metadata").write_text("{")


def wrong_checksum(checkpoint: Path) -> None:
    path = checkpoint / "manifest" / "metadata"
    value = json.loads(path.read_text())
    value["arrays"]["params/out/kernel"]["checksum"] ^= 1
    path.write_text(json.dumps(value))


def another_states_arrays(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "state")
    shutil.copytree(checkpoint.parent / "4" / "state", checkpoint / "state")


@pytest.mark.parametrize("damage", [truncate, flip, empty, without_arrays, without_manifest, scrambled_manifest,
                                    wrong_checksum, another_states_arrays])
def test_a_damaged_checkpoint_is_named_and_passed_over(folder, reference, damage):  # noqa: F811
    damage(folder / "checkpoints" / "10")
    status, said = go(toy(), folder)
    assert status == 0
    assert "checkpoint of step 10" in said and "is damaged" in said and "Resuming from step 8 of 12" in said
    assert same(folder, reference)
    assert (folder / "damaged-checkpoint-10").is_dir()  # nothing is thrown away
    assert not (folder / "damaged-checkpoint-8").exists()


def test_an_undamaged_one_is_used(folder, reference):  # noqa: F811
    status, said = go(toy(), folder)
    assert status == 0 and "is damaged" not in said and "Resuming from step 10 of 12" in said
    assert same(folder, reference)


def test_two_damaged_checkpoints(folder, reference):  # noqa: F811
    flip(folder / "checkpoints" / "10")
    without_arrays(folder / "checkpoints" / "8")
    status, said = go(toy(), folder)
    assert status == 0 and "step 10" in said and "step 8" in said and "Resuming from step 4" in said
    assert same(folder, reference)


def test_any_flipped_byte_is_seen(folder, interrupted):
    """Wherever a byte of the newest checkpoint flips, what comes back is that state, bit for bit, or the one before."""
    good = {step: jax.device_get(restored(interrupted, toy(), step)) for step in (8, 10)}
    assert apart(good[8], good[10]) > 1e-3
    passed_over = 0
    for path in sorted(p for p in (folder / "checkpoints" / "10").rglob("*") if p.is_file() and p.stat().st_size):
        raw = path.read_bytes()
        for at in {len(raw) // 2, len(raw) - 1}:
            path.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1:])
            try:
                state = jax.device_get(restored(folder, toy()))
            except UserError as e:
                pytest.fail(f"{path.relative_to(folder)}, byte {at}: {e}")
            assert apart(state, good[int(state.step)]) == 0, (path, at)
            passed_over += int(state.step) == 8
        path.write_bytes(raw)
    assert passed_over > 3  # they did hit something


def test_orbax_alone_returns_wrong_numbers(tmp_path, monkeypatch):
    """Why arrays have checksums. Should this fail with a later Orbax, they may go."""
    state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(512, 1024)), jnp.float32)}
    checkpoints = Checkpoints(tmp_path, Checkpoint())
    checkpoints.save(1, state)
    checkpoints.wait()
    flip(tmp_path / "1")
    with pytest.raises(UserError, match="damaged"):
        checkpoints.restore(state)
    monkeypatch.setattr("lab.train.checkpoint.manifest", lambda state: {})
    found = checkpoints.restore(state)["w"]
    assert found.shape == (512, 1024) and not np.array_equal(found, state["w"])
    checkpoints.close()


@pytest.mark.parametrize("old, new", [("params/out/kernel", "params/out/kernem"), ('[8, 4]', '[8, 5]')])
def test_a_flipped_bit_in_the_manifest_is_damage_and_no_other_model(folder, reference, old, new):  # noqa: F811
    path = folder / "checkpoints" / "10" / "manifest" / "metadata"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert go(toy(), folder)[0] == 0
    assert same(folder, reference)


@pytest.mark.parametrize("damage", [flip, without_arrays, without_manifest])
def test_when_all_are_damaged_nothing_starts_again_in_silence(folder, damage):
    for step in steps_of(folder):
        damage(folder / "checkpoints" / str(step))
    rows = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"Every checkpoint in .* is damaged \(steps \[4, 8, 10\]\).*start again"):
        go(toy(), folder)
    assert (folder / "metrics.jsonl").read_bytes() == rows and steps_of(folder) == [4, 8, 10]


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "commit_success.txt", "state/commit_success.txt",
                                  "manifest/commit_success.txt", "state/_METADATA", "state/manifest.ocdbt"])
def test_a_lost_file_never_means_a_silent_restart(folder, reference, name):  # noqa: F811
    for step in steps_of(folder):
        (folder / "checkpoints" / str(step) / name).unlink(missing_ok=True)
    try:
        status, said = go(toy(), folder)
    except UserError as e:
        assert "damaged" in str(e)
    else:
        assert status == 0 and "Resuming from step 10" in said
        assert same(folder, reference)


@pytest.mark.parametrize("pattern", ["state/array_metadatas/*", "state/manifest.ocdbt", "state/d/*"])
def test_damage_is_one_sentence(folder, reference, pattern, capfd, caplog):  # noqa: F811
    """Without the hundreds of lines that the reading of all the other arrays leaves on stderr."""
    for path in (folder / "checkpoints" / "10").glob(pattern):
        path.write_bytes(b"")
    status, said = go(toy(), folder)
    assert status == 0 and "Resuming from step 8" in said
    assert len([line for line in said.splitlines() if "damaged" in line]) == 2  # which, and where it is now
    gc.collect()
    assert capfd.readouterr().err == "" and not [r for r in caplog.records if r.name == "asyncio"]
    assert same(folder, reference)


def test_a_file_in_the_place_of_a_checkpoint_is_named_and_nothing_is_overwritten(folder, reference):  # noqa: F811
    shutil.rmtree(folder / "checkpoints" / "10")
    (folder / "checkpoints" / "10").write_text("a file")
    (folder / "damaged-checkpoint-10").mkdir()
    (folder / "damaged-checkpoint-10" / "mine").write_text("kept")
    status, said = go(toy(), folder)
    assert status == 0 and "step 10" in said and "is damaged (it is not a folder)" in said
    assert (folder / "damaged-checkpoint-10" / "mine").read_text() == "kept"
    assert (folder / "damaged-checkpoint-10-1").read_text() == "a file"
    assert same(folder, reference)


def test_a_checkpoint_under_another_number(folder, reference):  # noqa: F811
    (folder / "checkpoints" / "8").rename(folder / "checkpoints" / "11")
    status, said = go(toy(), folder)
    assert status == 0 and "step 11" in said and "its manifest was changed" in said
    assert "Resuming from step 10" in said
    assert same(folder, reference)


def test_checkpoints_that_are_a_file(folder):
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints is a file, in the place of the folder"):
        go(toy(), folder)


# ------------------------------------------------------------------------------------- the rows that go with a state


def first_rows(lines: list[str]) -> list[str]:
    return lines[:5]


def without_a_middle_row(lines: list[str]) -> list[str]:
    return lines[:4] + lines[5:]


def another_digit(lines: list[str]) -> list[str]:
    digit = next(c for c in lines[3].rpartition('"loss": ')[2] if c in "12345678")
    head, _, tail = lines[3].rpartition('"loss": ')
    return [*lines[:3], f'{head}"loss": {tail.replace(digit, str(int(digit) + 1), 1)}', *lines[4:]]


def no_rows(lines: list[str]) -> list[str]:
    return []


@pytest.mark.parametrize("change, words", [
    (first_rows, r"8 of the 13 rows are gone"), (without_a_middle_row, r"1 of the 13 rows are gone"),
    (another_digit, r"its first 13 rows"), (no_rows, r"13 of the 13 rows are gone")])
def test_rows_that_were_changed_since_the_checkpoint(folder, reference, change, words):  # noqa: F811
    """Best and patience rest on them, so a run does not go on from other ones."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    changed = change(lines)
    assert changed != lines
    path.write_text("".join(changed))
    with pytest.raises(UserError, match=rf"metrics.jsonl was changed: {words}.*Restore it; or delete it"):
        go(toy(), folder)
    assert path.read_text() == "".join(changed) and steps_of(folder) == [4, 8, 10]  # nothing was touched
    path.write_text("".join(lines))
    assert go(toy(), folder)[0] == 0
    assert same(folder, reference)


def test_rows_after_the_checkpoint_are_computed_again(folder, reference):  # noqa: F811
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "split": "validation", "loss": 0.0}\n{"step": 11, "split": "train"}\n{"st')
    assert go(toy(), folder)[0] == 0
    assert same(folder, reference)


def test_a_row_that_was_appended_is_not_the_best(folder):
    """`eval --best` rests on the rows that belong to the checkpoints."""
    kept = Checkpoints(folder / "checkpoints")
    best = _best_step(folder, toy(), kept)
    other = next(step for step in (4, 8) if step != best)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": other, "split": "validation", "loss": -9.0}) + "\n")
    assert _best_step(folder, toy(), kept) == best
    kept.close()


def test_rows_that_are_gone(folder):
    (folder / "metrics.jsonl").unlink()
    status, said = go(toy(), folder)
    assert status == 0 and "The run folder is new: metrics, the best state and patience count from here." in said


def test_the_result_of_a_finished_run_is_what_was_written(reference, tmp_path):  # noqa: F811
    folder = Path(shutil.copytree(reference, tmp_path / "run"))
    good = finished(folder)
    assert good["steps"] == 12 and "digest" not in good
    path = folder / "result.json"
    text = path.read_text()
    for old, new in (('"stopped_early": false', '"stopped_early": true'), ('"steps": 12', '"steps": 13')):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(UserError, match="result.json is damaged .it was edited"):
            finished(folder)
    path.write_text(text)
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(another_digit(rows)))
    with pytest.raises(UserError, match="metrics.jsonl was changed"):
        finished(folder)
    (folder / "metrics.jsonl").write_text("".join([*rows, rows[-1]]))
    with pytest.raises(UserError, match="metrics.jsonl was changed: 1 row came after the run was finished"):
        finished(folder)
    path.unlink()  # the advice of the first sentence
    (folder / "metrics.jsonl").write_text("".join(rows))
    assert go(toy(), folder)[0] == 0 and finished(folder)["final"] == good["final"]


# ------------------------------------------------------------------------------------------- models, steps, devices


def test_a_checkpoint_of_another_model(interrupted):
    with pytest.raises(UserError, match=r"step 10 in .* is of another model: .*hidden/bias is \[8\] there and \[16\]"):
        restored(interrupted, toy(model=Perceptron(width=16)))
    with pytest.raises(UserError, match=r"model_state/stats/calls is missing there and \[\] here"):
        restored(interrupted, toy(model=Perceptron(counts=True)))


def test_a_step_that_is_not_there(interrupted):
    with pytest.raises(UserError, match=r"has no checkpoint of step 5; it has \[4, 8, 10\]"):
        restored(interrupted, toy(), 5)
    assert int(restored(interrupted, toy(), 4).step) == 4


def test_no_checkpoint_is_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", Checkpoint())
    assert checkpoints.restore(program_of(toy()).abstract) is None
    checkpoints.close()


@pytest.mark.parametrize("first, second", [(1, 8), (8, 1)])
def test_another_number_of_devices(tmp_path, reference, first, second):  # noqa: F811
    here, there = (toy(mesh=Mesh(data=n)) for n in (first, second))
    assert go(here, tmp_path / "run", 5, interrupt())[0] == 75
    before = final(tmp_path / "run", here)
    state = restored(tmp_path / "run", there)
    assert apart(state, before) == 0
    assert all(len(x.devices()) == second for x in jax.tree.leaves(state))
    assert go(there, tmp_path / "run")[0] == 0
    assert apart(final(tmp_path / "run", there), final(reference)) < 1e-5
    rows = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line)["loss"] for line in (reference / "metrics.jsonl").read_text().splitlines()]
    assert rows == pytest.approx(whole, abs=1e-5)


def test_the_state_may_be_donated_while_it_is_saved(tmp_path):
    experiment = replace(toy(), checkpoint=Checkpoint(keep=3))
    program: Program = program_of(experiment)
    checkpoints = Checkpoints(tmp_path / "checkpoints", experiment.checkpoint)
    state, saved = program.init(), []
    batch: Any = jax.tree.map(lambda s: jax.device_put(np.ones(s.shape, s.dtype), program.train_sharding), program.spec)
    for step in range(3):
        saved.append(jax.tree.map(np.array, jax.device_get(state)))
        checkpoints.save(step, state)
        state, _ = program.train(state, batch)  # overwrites its memory
    checkpoints.wait()
    assert checkpoints.steps() == [0, 1, 2]
    for step in range(3):
        assert apart(checkpoints.restore(program.abstract, step), saved[step]) == 0
    assert apart(saved[0], saved[2]) > 1e-3
    checkpoints.close()


def test_too_many_open_files_are_named(tmp_path):
    """Tensorstore says it after several paths, which would fill the line."""
    where = f"{tmp_path}/checkpoints/5.orbax-checkpoint-tmp/" * 4
    saves = Checkpoints(tmp_path / "checkpoints", Checkpoint())

    def save():
        raise ValueError(f"RESOURCE_EXHAUSTED: Error writing \"{where}\": Failed to open: \"{where}\": Too many open "
                         f"files [os_error_code='24']")

    with pytest.raises(UserError, match=r"checkpoints: Too many open files; raise the limit .*ulimit -n.*\. Earlier"):
        saves._guard(save)
    saves.close()
