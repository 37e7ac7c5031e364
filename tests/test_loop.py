
"""The loop: exactly N updates, evaluations, early stopping, divergence, resuming bit for bit, folders, full disks."""

import dataclasses
import functools
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from lab.data import pipeline
from lab.data.pipeline import train_batch, train_indices
from lab.errors import UserError
from lab.experiment import Checkpoint, Evaluate, Experiment, Log, Mesh
from lab.optim import SGD, Constant
from lab.signals import HEARD
from lab.train import ending, loop, run_copy
from lab.train.checkpoint import Checkpoints
from lab.train.console import Screen
from lab.train.description import finished
from lab.train.metrics import read_rows
from lab.train.program import Program
from lab.train.progress import describe_result
from lab.train.run_folder import checkpoint_folder
from lab.train.step import State, init_state
from tests.test_step import Points, apart, compiled_in_haste, toy  # noqa: F401 (a fixture)


class Quiet(Screen):
    """Prints nothing, remembers the lines, and does `action` when the metrics of update number `at` have arrived."""

    def __init__(self, at: int = 0, action: Callable[[], None] = lambda: None):
        super().__init__(quiet=True)
        self.lines, self.at, self.action, self.updates = [], at, action, 0

    def info(self, line: str) -> None:
        self.lines.append(line)

    def progress(self, line: str) -> None:
        if line.startswith("step"):
            self.updates += 1
            if self.updates == self.at:
                self.action()


def go(experiment: Experiment, folder: Path, at: int = 0, action: Callable[[], None] = lambda: None,
       **options: Any) -> tuple:
    """Trains; returns (exit status, everything said)."""
    with Quiet(at, action) as screen:
        return loop.train(experiment, folder, screen, **options), "\n".join(screen.lines)


@functools.cache
def _program(experiment: Experiment) -> Program:
    program = Program(experiment)
    init = jax.jit(functools.partial(init_state, experiment), out_shardings=program.shardings)
    zeros = jax.tree.map(lambda s: np.zeros((1, *s.shape[1:]), s.dtype), program.spec)
    program.init = lambda given=None: init(zeros)
    program.train_records = Points().load().train
    return program


def program_of(experiment: Experiment, train: Any = None) -> Program:
    """The same compiled program for all runs that compute the same updates."""
    return _program(replace(experiment, evaluate=Evaluate(), checkpoint=Checkpoint(), log=Log()))


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Programs are shared, and no picture is drawn (0.5 s a run; one test below draws them)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Program", program_of)
        patch.setattr(ending.plots, "curves", lambda rows, folder, metric: [])
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory, quick) -> Path:
    """The folder of an undisturbed run. Not to be written to."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert go(toy(), folder)[0] == 0
    return folder


def restored(folder: Path, experiment: Experiment, step: int | None = None) -> State:
    """A state of a run, by default the newest good one, where the experiment wants it."""
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        return checkpoints.restore(program_of(experiment).abstract, step)
    finally:
        checkpoints.close()


def final(folder: Path, experiment: Experiment | None = None) -> State:
    """The newest state of a run, on the host."""
    return jax.device_get(restored(folder, experiment or toy()))


def steps_of(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder / "metrics.jsonl") if row["split"] == split]


def same(folder: Path, reference: Path, experiment: Experiment | None = None) -> bool:
    """Are the metrics the same bytes and the final weights the same bits?"""
    metrics = [(f / "metrics.jsonl").read_bytes() for f in (folder, reference)]
    return metrics[0] == metrics[1] and apart(final(folder, experiment), final(reference)) == 0


def interrupt(number: int = signal.SIGTERM) -> Callable[[], None]:
    return lambda: signal.raise_signal(number)


# --------------------------------------------------------------------------------------------- updates and order


def test_exactly_n_updates(reference):
    state = final(reference)
    assert state.step == 12
    counts = {int(x) for x in jax.tree.leaves(state.opt_state) if x.dtype == np.int32}
    assert counts == {12}  # the optimizer agrees
    assert [row["step"] for row in rows_of(reference, "train")] == list(range(1, 13))
    assert [row["step"] for row in rows_of(reference, "validation")] == [0, 4, 8, 12]
    order = [(row["step"], row["split"]) for row in read_rows(reference / "metrics.jsonl")]
    assert order == sorted(order)  # "train" of a step comes before its "validation"
    assert steps_of(reference) == [4, 8, 12]
    assert rows_of(reference, "validation")[-1]["loss"] < rows_of(reference, "validation")[0]["loss"] - 0.5


def test_rows_are_the_programs_numbers(reference):
    program, data = program_of(toy()), Points().load()
    state = program.init()
    for row in rows_of(reference, "train"):
        state, values = program.train(state, program.batch(functools.partial(
            train_batch, data.train, batch=8, seed=0), row["step"] - 1))
        means = loop.metrics.means(values)
        assert {name: row[name] for name in means} == means
    assert apart(state, final(reference)) == 0


@pytest.mark.parametrize("every, steps", [(5, [0, 5, 10, 12]), (0, [0, 12]), (6, [0, 6, 12])])
def test_when_it_is_evaluated(tmp_path, every, steps):
    go(toy(evaluate=Evaluate(every=every)), tmp_path / "run")
    assert [row["step"] for row in rows_of(tmp_path / "run", "validation")] == steps


def test_batches_come_in_the_order_of_the_pipeline(tmp_path, monkeypatch):
    seen, table = [], Points().load().train.columns["x"]

    def watched(*args: Any, **kwargs: Any) -> Any:
        batch = train_batch(*args, **kwargs)
        seen.append([int(np.flatnonzero((table == x).all(1))[0]) for x in batch["x"]])
        return batch

    monkeypatch.setattr(pipeline, "train_batch", watched)
    go(toy(), tmp_path / "run")
    assert seen == [train_indices(step, 8, 44, seed=0).tolist() for step in range(12)]
    stream = sum(seen, [])
    first, second = stream[:44], stream[44:88]
    assert sorted(first) == sorted(second) == list(range(44))  # each record once in an epoch
    assert first != second and first != list(range(44))
    assert seen[0] != train_indices(0, 8, 44, seed=1).tolist()


def test_several_updates_a_dispatch(tmp_path, reference):
    experiment = toy(steps_per_call=4)
    assert go(experiment, tmp_path / "a")[0] == 0
    rows, single = (read_rows(f / "metrics.jsonl") for f in (tmp_path / "a", reference))
    assert [(r["step"], r["split"]) for r in rows] == [(r["step"], r["split"]) for r in single]
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in single], abs=1e-5)
    assert go(experiment, tmp_path / "b", 1, interrupt())[0] == 75
    assert go(experiment, tmp_path / "b")[0] == 0
    assert (tmp_path / "b" / "metrics.jsonl").read_bytes() == (tmp_path / "a" / "metrics.jsonl").read_bytes()


def test_how_a_run_is_carried_out_does_not_show_in_its_metrics(tmp_path, reference):
    experiment = toy(checkpoint=Checkpoint(every=3, keep=1, permanent=5, best=False), mesh=Mesh(data=1))
    go(experiment, tmp_path / "run")
    assert same(tmp_path / "run", reference)
    assert steps_of(tmp_path / "run") == [5, 10, 12]
    go(toy(seed=1), tmp_path / "other")  # negative control
    assert not same(tmp_path / "other", reference)


def test_log_every(tmp_path, reference):
    go(toy(log=Log(every=5)), tmp_path / "run")
    assert rows_of(tmp_path / "run", "train") == [r for r in rows_of(reference, "train") if r["step"] % 5 == 0]
    assert rows_of(tmp_path / "run", "validation") == rows_of(reference, "validation")


def test_part_of_the_validation_split(tmp_path, reference):
    go(toy(evaluate=Evaluate(every=0, records=5)), tmp_path / "run")
    columns = Points().load().validation.columns
    start = jax.device_get(program_of(toy()).init())

    def loss(chosen: np.ndarray) -> float:
        logits = toy().model.apply({"params": start.params}, columns["x"][chosen], train=False)
        return float(-jax.nn.log_softmax(logits)[np.arange(len(chosen)), columns["y"][chosen]].mean())

    found = rows_of(tmp_path / "run", "validation")[0]["loss"]
    assert found == pytest.approx(loss(np.arange(5) * 13 // 5), abs=1e-5)
    assert abs(found - loss(np.arange(13))) > 1e-3
    assert rows_of(reference, "validation")[0]["loss"] == pytest.approx(loss(np.arange(13)), abs=1e-5)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra tensorboard is not installed")
    go(toy(steps=4), tmp_path / "run", tensorboard=True)
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"train/loss" in content and b"validation/loss" in content and b"train/learning_rate" in content


# ------------------------------------------------------------------------------------- early stopping, the best


class Fake:
    """A program whose validation loss is written down, by step."""

    def __init__(self, losses: dict[int, float]):
        self.losses = losses

    def __call__(self, experiment: Experiment, train: Any) -> Any:
        program = program_of(experiment)
        names = ("abstract", "batch", "compute", "eval_batch", "eval_rows", "experiment", "init", "mesh", "rows",
                 "stacked", "train", "train_records")
        own = {name: getattr(program, name) for name in names}
        own["compile_seconds"] = program.compile_seconds

        def evaluate(state: State, batches: Any, stop: Any = None) -> tuple[dict, dict]:
            return {"loss": self.losses[int(state.step)]}, {}

        return SimpleNamespace(**own, evaluate=evaluate)


def test_early_stopping(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Program", Fake({0: 5, 2: 3, 4: 4, 6: 2, 8: 2, 10: 2.5, 12: 1}))
    patient = toy(evaluate=Evaluate(every=2, patience=2))
    assert go(patient, tmp_path / "run")[0] == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["steps"], result["stopped_early"], result["best"]["step"]) == (10, True, 6)
    assert steps_of(tmp_path / "run") == [2, 4, 6, 8, 10]  # also the state it stopped with
    # Stopped before the result was written, or in the middle: the same end.
    (tmp_path / "run" / "result.json").unlink()
    rows = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert go(patient, tmp_path / "run")[0] == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 10
    assert go(patient, tmp_path / "b", 7, interrupt())[0] == 75
    assert go(patient, tmp_path / "b")[0] == 0
    assert (tmp_path / "b" / "metrics.jsonl").read_bytes() == (tmp_path / "run" / "metrics.jsonl").read_bytes() == rows
    go(toy(evaluate=Evaluate(every=2, patience=3)), tmp_path / "c")  # more patience, and it is not stopped
    assert json.loads((tmp_path / "c" / "result.json").read_text())["steps"] == 12


def test_which_checkpoints_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Program", Fake({0: 5, 3: 1, 6: 2, 9: 2, 12: 2}))
    experiment = toy(evaluate=Evaluate(every=3), checkpoint=Checkpoint(every=2, keep=1, permanent=4))
    go(experiment, tmp_path / "a")
    assert steps_of(tmp_path / "a") == [3, 4, 8, 12]  # the best, the permanent ones, the latest
    go(replace(experiment, checkpoint=Checkpoint(every=2, keep=3, best=False)), tmp_path / "b")
    assert steps_of(tmp_path / "b") == [8, 10, 12]
    go(replace(experiment, checkpoint=Checkpoint(every=0, keep=1, best=False)), tmp_path / "c")
    assert steps_of(tmp_path / "c") == [12]
    upwards = replace(experiment.evaluate, mode="max")
    go(replace(experiment, evaluate=upwards, checkpoint=Checkpoint(every=2, keep=1)), tmp_path / "d")
    assert json.loads((tmp_path / "d" / "result.json").read_text())["best"]["step"] == 0
    assert steps_of(tmp_path / "d") == [12]


def test_a_metric_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match="--evaluate.metric lost .*accuracy, loss, error"):
        go(toy(evaluate=Evaluate(metric="lost")), tmp_path / "run")


# -------------------------------------------------------------------------------------------------- not a number


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch, reference):
    def poisoned(records: Any, step: int, **kwargs: Any) -> Any:
        batch = train_batch(records, step, **kwargs)
        return batch | {"x": batch["x"] * np.float32(np.nan if step == 4 else 1)}

    monkeypatch.setattr(pipeline, "train_batch", poisoned)
    experiment, folder = toy(checkpoint=Checkpoint(every=1, keep=20)), tmp_path / "run"
    status, said = go(experiment, folder)
    assert status == 1
    assert "Step 5: the loss is nan" in said and "the checkpoint after step 4 is kept" in said
    report = json.loads((folder / "diverged.json").read_text())
    assert report["step"] == 5
    assert report["batch_indices"] == train_indices(4, 8, 44, seed=0).tolist()
    assert [row["step"] for row in report["last_rows"] if row["split"] == "train"] == [1, 2, 3, 4]
    assert "nan" in report["metrics"]["loss"] and {"gradient_norm", "parameter_norm"} <= set(report["metrics"])
    assert steps_of(folder) == [1, 2, 3, 4]  # none of the state that is no number
    assert not (folder / "result.json").exists()
    assert np.isfinite(np.concatenate([np.ravel(x) for x in jax.tree.leaves(final(folder))])).all()
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Program", program_of)
        patch.setattr(ending.plots, "curves", lambda rows, folder, metric: [])
        assert go(experiment, folder)[0] == 0  # with the cause gone, it goes on from the good state
    assert same(folder, reference)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_no_state_that_overflowed_is_saved(tmp_path):
    experiment = toy(optim=SGD(lr=Constant(1e39)), checkpoint=Checkpoint(every=1, keep=20), evaluate=Evaluate(every=0))
    status, said = go(experiment, tmp_path / "run")
    assert status == 1 and "Step" in said
    for step in steps_of(tmp_path / "run"):
        state = restored(tmp_path / "run", experiment, step)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state)), step


# ------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("at", [1, 4, 7, 11])
def test_interrupted_by_a_signal(tmp_path, reference, at):
    status, said = go(toy(), tmp_path / "run", at, interrupt())
    assert status == 75 and "SIGTERM: saved after step" in said and "Run the same command to resume" in said
    assert not (tmp_path / "run" / "result.json").exists()
    status, said = go(toy(), tmp_path / "run")
    assert status == 0 and "Resuming from step" in said
    assert same(tmp_path / "run", reference)


def test_interrupted_from_the_keyboard_during_the_first_update_and_again(tmp_path, reference):
    statuses = [go(toy(), tmp_path / "run", 1, interrupt(signal.SIGINT))[0]]
    while statuses[-1] != 0 and len(statuses) < 20:
        statuses.append(go(toy(), tmp_path / "run", 2, interrupt(signal.SIGINT))[0])
    assert statuses[0] == 130 and statuses[-1] == 0 and len(statuses) > 3
    assert same(tmp_path / "run", reference)


def test_signal_handlers_are_given_back(tmp_path):
    before = [signal.getsignal(s) for s in HEARD]
    go(toy(), tmp_path / "run", 1, interrupt())
    assert [signal.getsignal(s) for s in HEARD] == before


def test_a_second_signal_finds_the_handlers_of_whoever_called(tmp_path):
    """lab as a library: Ctrl-C twice is an ordinary KeyboardInterrupt in a notebook."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            go(toy(), tmp_path / "run", 2, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("at", [3, 6])
def test_crashed(tmp_path, reference, at):
    def crash() -> None:
        raise RuntimeError("the machine is on fire")

    with pytest.raises(RuntimeError, match="fire"):
        go(toy(), tmp_path / "run", at, crash)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) >= at
    status, said = go(toy(), tmp_path / "run")
    assert status == 0 and ("Resuming from step 4" in said) == (at == 6)
    assert same(tmp_path / "run", reference)


def test_killed_before_the_result_was_written(tmp_path, reference):
    shutil.copytree(reference, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    status, said = go(toy(), tmp_path / "run")
    assert status == 0 and "Finished after 12 steps" in said
    assert same(tmp_path / "run", reference)
    assert finished(tmp_path / "run")["final"] == finished(reference)["final"]


def test_the_result_is_written_before_the_pictures(tmp_path, monkeypatch):
    real, at_result = ending.write_result, []

    def watched(folder: Path, *rest: Any) -> None:
        at_result.append((steps_of(folder), len(read_rows(folder / "metrics.jsonl")), (folder / "plots").exists()))
        real(folder, *rest)

    monkeypatch.undo()  # nothing is faked here but the writer
    monkeypatch.setattr(ending, "write_result", watched)
    from matplotlib.figure import Figure

    pictures: list[Path] = []
    monkeypatch.setattr(ending.plots, "curves",
                        lambda rows, folder, metric: pictures.append(folder) or [_draw(Figure, folder)])
    status, said = go(toy(), tmp_path / "run")
    assert status == 0 and "Pictures: plots/loss.png" in said and "arning" not in said
    assert at_result == [([4, 8, 12], 12 + 4, False)]
    assert finished(tmp_path / "run")["steps"] == 12
    described = describe_result(finished(tmp_path / "run"))
    assert "Finished after 12 steps" in described and "waiting for data" in described


@pytest.mark.parametrize("error", [ValueError("Key backend: 'module://x' is not a valid value\nand more"),
                                   MemoryError(), OSError(27, "File too large", "loss.png"),
                                   UnicodeEncodeError("latin-1", "\u2713", 0, 1, "ordinal not in range")])
def test_what_follows_the_last_update_cannot_lose_the_run(tmp_path, monkeypatch, reference, error):
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(ending.plots, "curves", fail)
    monkeypatch.setattr(type(toy().task), "artifacts", fail)
    status, said = go(toy(), tmp_path / "run")
    assert status == 0 and "Finished after 12 steps" in said
    warnings = [line for line in said.splitlines() if line.startswith("Warning: ")]
    assert [line.partition(" failed: ")[0].partition(" (")[0] for line in warnings] == [
        "Warning: The pictures of the run", "Warning: The report of the run"]
    assert all(type(error).__name__ in line for line in warnings)
    assert finished(tmp_path / "run")["final"] == finished(reference)["final"]
    assert same(tmp_path / "run", reference)


def test_a_mistake_before_the_result_is_no_warning(tmp_path, monkeypatch):
    """The negative control: only what follows the numbers is forgiven."""
    def fail(*args: Any) -> None:
        raise ValueError("wrong")

    monkeypatch.setattr(ending, "write_result", fail)
    with pytest.raises(ValueError, match="wrong"):
        go(toy(), tmp_path / "run")


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75),
                                            (signal.SIGUSR1, 75)])
def test_a_signal_while_pictures_are_drawn(tmp_path, monkeypatch, reference, number, status):
    monkeypatch.setattr(ending.plots, "curves", lambda *args: signal.raise_signal(number))
    monkeypatch.setattr(type(toy().task), "artifacts", lambda *args: pytest.fail("the run was told to stop"))
    found, said = go(toy(), tmp_path / "run")
    assert found == status and "the run is finished; ./launch.sh evaluate" in said and "Finished after 12" in said
    assert finished(tmp_path / "run")["final"] == finished(reference)["final"]


def test_a_signal_while_the_report_is_written_leaves_nothing_out(tmp_path, monkeypatch):
    monkeypatch.setattr(type(toy().task), "artifacts", lambda *args: [str(signal.raise_signal(signal.SIGTERM))])
    status, said = go(toy(), tmp_path / "run")
    assert status == 75 and said.splitlines()[-1] == "SIGTERM: the run is finished."


def _draw(figure: Any, folder: Path) -> Path:
    folder.mkdir()
    figure(figsize=(1, 1), dpi=20).savefig(folder / "loss.png")
    return folder / "loss.png"


def test_waiting_for_data_is_measured(tmp_path, monkeypatch, reference):
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.15)
        return train_batch(*args, **kwargs)

    usual = finished(reference)
    assert 0 <= usual["data_wait_seconds"] < usual["training_seconds"]
    monkeypatch.setattr(pipeline, "train_batch", slow)
    go(toy(evaluate=Evaluate(every=0), checkpoint=Checkpoint(every=0)), tmp_path / "run")
    slowed = finished(tmp_path / "run")
    assert slowed["data_wait_seconds"] > 0.3 and slowed["data_wait_seconds"] > 3 * usual["data_wait_seconds"]


# ------------------------------------------------------------------------------------------------ folders, disks


def test_a_folder_of_another_experiment(tmp_path, reference):
    before = (reference / "experiment.json").read_bytes()
    with pytest.raises(UserError, match=r"is the run of another experiment: .*batch is 8 there and 4 here.*--run-dir"):
        go(toy(batch=4), reference)
    with pytest.raises(UserError, match=r"optim.lr.peak is 0.05 there and 0.1 here"):
        go(replace(toy(), optim=replace(toy().optim, lr=Constant(0.1))), reference)
    assert (reference / "experiment.json").read_bytes() == before


def test_other_data_in_the_same_run(tmp_path, monkeypatch, reference):
    load = Points.load
    monkeypatch.setattr(Points, "load", lambda self: SimpleNamespace(**vars(load(self)) | {"fingerprint": "new"}))
    with pytest.raises(UserError, match="data changed since .* began .*points 44 0 then, new now"):
        go(toy(), reference)


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is not empty and is not a run folder"):
        go(toy(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(UserError, match=f"run folder {folder} cannot be written"):
            go(toy(), folder)
    assert (tmp_path / "file").read_text() == ""


def test_an_edited_description_is_not_the_run(tmp_path):
    go(toy(), tmp_path / "run", 5, interrupt())
    path = tmp_path / "run" / "experiment.json"
    value = json.loads(path.read_text())
    value["experiment"]["steps"] = 24  # with the fingerprint left as it is
    path.write_text(json.dumps(value))
    for experiment in (toy(), toy(steps=24)):
        with pytest.raises(UserError, match="experiment.json was edited since the run began"):
            go(experiment, tmp_path / "run")
    del value["digest"]
    value["experiment"]["steps"], value["fingerprint"] = 12, "0" * 12  # as older versions wrote it
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match="another experiment: .*fingerprint.* 0+, .*[0-9a-f]{12}"):
        go(toy(), tmp_path / "run")


@pytest.mark.parametrize("name", ["experiment.json", "metrics.jsonl"])
def test_a_damaged_file_of_the_run_is_named(tmp_path, name):
    go(toy(), tmp_path / "run", 5, interrupt())
    path = tmp_path / "run" / name
    path.write_text(path.read_text()[:100] + "\n\0\0\n")
    with pytest.raises(UserError, match=name):
        go(toy(), tmp_path / "run")


def test_a_full_disk_is_said_before_it_is_written_to(tmp_path, monkeypatch, reference):
    calls = []

    def usage(path: Any) -> SimpleNamespace:
        calls.append(path)
        return SimpleNamespace(free=10**9 if len(calls) == 1 else 100)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(UserError, match="is full: .*needs .* free.* same command"):
        go(toy(), tmp_path / "run")
    assert steps_of(tmp_path / "run") == [4]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    assert go(toy(), tmp_path / "run")[0] == 0
    assert same(tmp_path / "run", reference)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 160 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=160k", "tmpfs", folder], capture_output=True)
    if not done or done.returncode:
        pytest.skip("a file system of a given size can be mounted by root only")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_really_fills_up(small_disk, reference):
    experiment = toy(checkpoint=Checkpoint(every=1, keep=20))
    with pytest.raises(UserError, match="full|No space left|could not be written|cannot be written"):
        go(experiment, small_disk / "run")
    assert 1 <= len(steps_of(small_disk / "run")) < 12
    subprocess.run(["mount", "-o", "remount,size=32m", small_disk], check=True)
    assert go(experiment, small_disk / "run")[0] == 0
    assert same(small_disk / "run", reference)


def test_the_folder_says_what_was_run(reference):
    described = json.loads((reference / "experiment.json").read_text())
    assert described["fingerprint"] == toy().fingerprint()
    assert described["experiment"]["model"] == {"class": "tests.test_step.Perceptron", "width": 8, "dropout": 0.0,
                                                "counts": False}
    environment = json.loads((reference / "environment.json").read_text())
    assert environment["versions"]["jax"] == jax.__version__ and environment["platform"] == "cpu"
    assert {f.name for f in dataclasses.fields(Experiment)} <= set(described["experiment"])


def test_checkpoints_elsewhere(tmp_path):
    """They are found again without being told where they are."""
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    stop = functools.partial(signal.raise_signal, signal.SIGTERM)
    assert go(toy(), folder, 2, stop, checkpoints=str(elsewhere))[0] == 75
    assert checkpoint_folder(folder) == elsewhere
    status, said = go(toy(), folder)
    assert status == 0 and "Resuming from step" in said
    assert (elsewhere / "12").is_dir() and not (folder / "checkpoints").exists()


@pytest.mark.parametrize("copy", [True, False])
def test_a_lost_run_folder_goes_on_from_checkpoints_elsewhere(tmp_path, reference, copy):
    """As on a new machine: the updates from there on are the same, and so is the end. Its rows are in the copy that
    stands beside the checkpoints."""
    elsewhere = str(tmp_path / "elsewhere")
    assert go(toy(), tmp_path / "lost", 6, interrupt(), checkpoints=elsewhere)[0] == 75
    last = max(int(p.name) for p in Path(elsewhere).iterdir() if p.name.isdigit())
    shutil.rmtree(tmp_path / "lost")
    if not copy:
        shutil.rmtree(tmp_path / "elsewhere" / "run")
    status, said = go(toy(), tmp_path / "new", checkpoints=elsewhere)
    assert status == 0 and f"Resuming from step {last}" in said and ("The run folder is new" in said) != copy
    assert 0 < last < 12 and last % 4, "not where it is evaluated anyway"
    assert read_rows(tmp_path / "new/metrics.jsonl") == [r for r in read_rows(reference / "metrics.jsonl")
                                                         if copy or r["step"] > last]
    kept = tmp_path / "elsewhere" / "run"
    for name in ("metrics.jsonl", "result.json", "experiment.json"):
        assert (kept / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    assert not (kept / "lock").exists() and len(list(kept.glob("environment*.json"))) == 1 + copy
    assert finished(tmp_path / "new")["final"] == finished(reference)["final"]
    with pytest.raises(UserError, match="another experiment: batch .*8 .*4 "):
        go(toy(batch=4), tmp_path / "other", checkpoints=elsewhere)
    shutil.rmtree(tmp_path / "new")  # lost after its end, too: only the last evaluation is done again
    assert go(toy(), tmp_path / "new", checkpoints=elsewhere)[0] == 0
    assert finished(tmp_path / "new")["final"] == finished(reference)["final"]


def test_a_copy_that_fails_does_not_fail_the_run(tmp_path, monkeypatch, caplog):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with run_copy.copied(tmp_path, tmp_path / "elsewhere"):
        (tmp_path / "metrics.jsonl").write_text("{}")
    assert "The copy of the run folder in" in caplog.text and "No space left" in caplog.text
