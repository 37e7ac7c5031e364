"""DPO: trl's numbers; the reference is what the run began with, computed once; resuming, devices, microbatches."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import lab
from lab.adapt import LoRA
from lab.commands import evaluate as evaluate_command
from lab.data.dialogues import Preferences
from lab.data.pipeline import train_batch
from lab.data.tokenizers import Bytes
from lab.errors import UserError
from lab.experiment import Checkpoint, Evaluate, Experiment, Mesh
from lab.models.gpt import GPT
from lab.optim import AdamW, Constant
from lab.study.run.units import can_be_stacked
from lab.tasks.prefer import Prefer
from lab.train import reference
from lab.train.check import load_data
from lab.train.evaluation import predict
from lab.train.loop import Shared
from lab.train.program import Program
from lab.train.reference import with_reference
from lab.train.restore import open_run
from tests.data.test_preferences import pairs_of
from tests.test_loop import go, interrupt
from tests.test_lora import bits
from tests.test_step import apart, compiled_in_haste  # noqa: F401 (a fixture)

# Log-probabilities of six pairs (chosen, rejected; then those of the reference), and the loss of each by (beta,
# smoothing) that trl gives ("sigmoid", float64, torch 2.13, 2026-11-27): `DPOTrainer.dpo_loss` of trl 0.12.2, and
# `_compute_loss` of 1.16.0 the same digits without smoothing, which its "sigmoid" no longer has.
LOG_PROBS = np.array([[-29.856, -36.66, -22.424, -46.861], [-20.756, -21.543, -8.692, -15.941],
                      [-22.337, -33.521, -26.831, -21.131], [-12.5, -20.25, -12.5, -20.25],
                      [-0.5, -400.0, -300.0, -0.25], [-400.0, -0.5, -0.25, -300.0]])
TRL = {(0.1, 0.0): [1.921566243, 1.067560324, 0.1695866371, 0.6931471806, 4.285074263e-31, 69.925],
       (0.5, 0.0): [8.816648255, 3.269757107, 0.0002155952395, 0.6931471806, 1.444746878e-152, 349.625],
       (0.1, 0.2): [1.568906243, 0.9383203236, 0.5072666371, 0.6931471806, 13.985, 55.94]}
TRL_REWARDS = [[-0.7432, 1.0201], [-1.2064, -0.5602], [0.4494, -1.239], [0.0, 0.0], [29.95, -39.975], [-39.975, 29.95]]


def losses(task: Prefer, policy: Any, reference: Any) -> np.ndarray:
    """The loss of each pair."""
    each = jax.vmap(lambda p, r: task.score(p[None], r[None], jnp.ones(1))[0])
    return np.asarray(each(jnp.float32(policy), jnp.float32(reference)))


@pytest.mark.parametrize("beta, smoothing", TRL)
def test_the_loss_is_trls(beta, smoothing):
    task, (policy, ref) = Prefer(beta, smoothing), (LOG_PROBS[:, :2], LOG_PROBS[:, 2:])
    wanted = TRL[beta, smoothing]
    np.testing.assert_allclose(losses(task, policy, ref), wanted, rtol=2e-6, atol=1e-30)
    for wrong in (losses(task, ref, policy), losses(task, policy[:, ::-1], ref[:, ::-1]), losses(task, policy, 0 * ref),
                  losses(replace(task, beta=1.1 * beta), policy, ref)):  # negative controls
        assert np.abs(wrong - wanted)[:3].max() > 1e-2
    total, weight, metrics = task.score(jnp.float32(policy), jnp.float32(ref), jnp.ones(6))
    assert float(total) == pytest.approx(sum(wanted), rel=1e-6) and weight == 6
    assert ("objective" in metrics) == bool(smoothing)
    assert float(metrics["loss"][0]) == pytest.approx(sum(TRL[beta, 0.0]), rel=1e-6)
    if beta == 0.1:
        found = [float(metrics[f"{name}_reward"][0]) for name in ("chosen", "rejected")]
        np.testing.assert_allclose(found, np.sum(TRL_REWARDS, 0), rtol=1e-5)
    margins = np.subtract(*np.transpose(TRL_REWARDS)) * beta / 0.1
    assert float(metrics["margin"][0]) == pytest.approx(margins.sum(), rel=1e-5)
    assert metrics["accuracy"][0] == 2  # equal to the reference is not preferred
    assert float(metrics["kl_on_chosen"][0]) == pytest.approx((policy - ref)[:, 0].sum(), rel=1e-5)


def test_padding_has_no_weight():
    policy, ref = jnp.float32(LOG_PROBS[:, :2]), jnp.float32(LOG_PROBS[:, 2:])
    padded = Prefer().score(policy, ref, jnp.float32([1, 1, 1, 0, 0, 0]))
    assert apart(padded, Prefer().score(policy[:3], ref[:3], jnp.ones(3))) < 1e-6
    assert apart(padded, Prefer().score(policy, ref, jnp.ones(6))) > 1  # the negative control


def test_beta_may_be_traced():
    assert jax.jit(lambda beta: Prefer(beta, beta).score(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.ones(1))[0])(
        0.1) == pytest.approx(math.log(2), rel=1e-6)


# -------------------------------------------------------------------------------------------- log-probabilities


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("prefer")


def on(place: Path, **changes: Any) -> Experiment:
    """Four steps of 8 pairs, on one device."""
    source = pairs_of(place / "pairs.jsonl")
    return replace(Experiment(
        data=Preferences(source, Bytes(), length=32), task=Prefer(beta=0.5), steps=4, batch=8,
        model=GPT(depth=1, width=16, heads=2, vocab=256, context=32, position="rotary"), mesh=Mesh(data=1),
        optim=AdamW(lr=Constant(1e-2)), evaluate=Evaluate(every=2), checkpoint=Checkpoint(every=2)), **changes)


def test_log_probabilities_are_those_of_the_answers_tokens(place):
    experiment = on(place)
    data, (model, task) = experiment.data.load(), (experiment.model, experiment.task)
    batch = {**data.train[np.arange(3)], "weight": np.ones(3, np.float32)}
    variables = jax.jit(lambda batch: task.init(model, jax.random.key(0), batch))(batch)
    variables = jax.tree.map(lambda x: 4 * x, variables)  # so that tokens differ in probability
    log_probs = jax.jit(lambda batch: task.predict(model, variables, batch)["log_probs"])
    found = log_probs(batch)
    for i in range(3):
        for j in range(2):
            tokens, learn = batch["pair"][i, j], batch["learn"][i, j]
            logits = np.asarray(model.apply(variables, tokens[None, :-1], train=False)[0], np.float64)
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            own = sum(log_p[k, tokens[k + 1]] for k in np.flatnonzero(learn))
            assert own < -5 and found[i, j] == pytest.approx(own, rel=1e-5)
    changed = {**batch, "pair": np.where(np.arange(33) > 30, 7, batch["pair"])}  # behind the answers
    assert apart(log_probs(changed), found) < 1e-5
    shifted = {**batch, "learn": np.roll(batch["learn"], 1, axis=-1)}  # the negative control
    assert apart(log_probs(shifted), found) > 1e-1
    assert task.columns({"log_probs": np.array([[1.0, 2.0]])}, data) == {"chosen_log_prob": [1.0],
                                                                        "rejected_log_prob": [2.0]}


def test_chunks_give_the_same_gradient(place):
    experiment = on(place)
    batch = {**experiment.data.load().train[np.arange(4)], "weight": np.ones(4, np.float32)}
    params = Program(experiment).init().params

    def value_and_grad(task: Prefer) -> Any:
        return jax.jit(jax.value_and_grad(lambda params: task.loss(experiment.model, {"params": params}, batch, {},
                                                                   True)[0]))(params)

    whole = value_and_grad(experiment.task)
    assert apart(value_and_grad(replace(experiment.task, chunk=5)), whole) < 1e-5
    assert apart(value_and_grad(replace(experiment.task, beta=0.6)), whole) > 1e-3


# ------------------------------------------------------------------------------------------------- the reference


def trained(experiment: Experiment) -> tuple[Any, list[Any]]:
    """The parameters after some steps with a reference of random numbers, and the sums of the metrics."""
    data = experiment.data.load()
    records = data.train
    records.arrays["reference"] = np.random.default_rng(0).normal(-20, 3, (len(records), 2)).astype(np.float32)
    program, history = Program(experiment), []
    state = program.init()
    for step in range(3):
        state, values = program.train(state, program.batch(
            lambda call: train_batch(records, call, experiment.batch, 0, program.rows), step))
        history.append(jax.device_get(values))
    return jax.device_get(state.params), history


@pytest.fixture(scope="module")
def alone(place) -> Any:
    return trained(on(place))


@pytest.mark.parametrize("changes", [
    {"mesh": Mesh(data=8)}, {"mesh": Mesh(data=2, fsdp=4)}, {"mesh": Mesh(data=2), "grad_accum_steps": 4},
    {"grad_accum_steps": 4, "task": Prefer(beta=0.5, chunk=16)}, {"mesh": Mesh(data=4), "exact": True},
], ids=["8 devices", "fsdp", "2 devices, 4 microbatches", "4 microbatches, chunks", "exact"])
def test_it_is_the_same_on_devices_and_in_microbatches(place, alone, changes):
    params, history = trained(on(place, **changes))
    assert apart(params, alone[0]) < 2e-4 and apart(history[0], alone[1][0]) < 1e-3
    assert apart(history[1], alone[1][0]) > 1e-1  # another step


@pytest.fixture(scope="module")
def done(place) -> Path:
    """The folder of a run. Not to be written to."""
    assert go(on(place), place / "run")[0] == 0
    return place / "run"


@pytest.fixture(scope="module")
def shared(place) -> Shared:
    """Data and compiled program of the runs below, as the cells of a study share them."""
    experiment = on(place)
    data = load_data(experiment)
    yield Shared(data, Program(experiment, data.train))
    assert not data.train.arrays["reference"].any()  # of no run


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_begins_at_log_2_and_learns(place, done):
    first, *_, last = [row for row in rows(done) if row["split"] == "validation"]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["accuracy"] < 1
    assert abs(first["margin"]) < 1e-4 and abs(first["kl_on_chosen"]) < 1e-4
    training = next(row for row in rows(done) if row["split"] == "train")
    assert training["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert last["loss"] < first["loss"] - 0.05 and last["accuracy"] > 0.9


def test_the_reference_is_what_the_run_began_with(place, done):
    experiment = on(place)
    program, data = Program(experiment), experiment.data.load()
    with safe_open(done / reference.FILE, "np") as file:
        for split in ("train", "validation", "test"):
            wanted = predict(program, program.init(), getattr(data, split))["log_probs"]
            assert np.array_equal(file.get_tensor(f"{split}/reference"), wanted)
    later = predict(program, open_run(done)[2], data.train)["log_probs"]  # the negative control
    assert apart(later, predict(program, program.init(), data.train)["log_probs"]) > 1


def test_a_stopped_run_resumes_to_the_bit(place, done, shared, tmp_path):
    folder = tmp_path / "run"
    assert go(on(place), folder, 3, interrupt(), shared=shared)[0] == 75
    kept = (folder / reference.FILE).read_bytes()
    assert go(on(place), folder, shared=shared)[0] == 0
    assert (folder / "metrics.jsonl").read_bytes() == (done / "metrics.jsonl").read_bytes()
    assert bits(open_run(folder)[2]) == bits(open_run(done)[2])
    assert (folder / reference.FILE).read_bytes() == kept == (done / reference.FILE).read_bytes()


def test_records_on_the_device_have_the_reference(place, done, tmp_path):
    go(on(place, data_on_device="always", steps_per_call=2, evaluate=Evaluate(every=0)), tmp_path / "run")
    assert apart(open_run(tmp_path / "run")[2].params, open_run(done)[2].params) < 1e-4


def test_a_resumed_run_reads_the_file_or_computes_it_again(place, done, shared, tmp_path):
    folder = tmp_path / "run"
    assert go(on(place), folder, 2, interrupt(), shared=shared)[0] == 75
    (folder / reference.FILE).unlink()
    assert go(on(place), folder, shared=shared)[0] == 0
    assert rows(folder) == rows(done)
    assert go(on(place), tmp_path / "other", 2, interrupt(), shared=shared)[0] == 75  # the negative control
    path = tmp_path / "other" / reference.FILE
    with safe_open(path, "np") as file:
        names = list(file.keys())
        moved = {name: file.get_tensor(name) + np.float32(5) * np.arange(2, dtype=np.float32) for name in names}
        metadata = file.metadata()
    save_file(moved, path, metadata)
    assert go(on(place), tmp_path / "other", shared=shared)[0] == 0
    assert abs(rows(tmp_path / "other")[-1]["margin"] - rows(done)[-1]["margin"]) > 1


def test_eval_and_the_api_have_the_same_reference(place, done, tmp_path, capsys):
    last = [row for row in rows(done) if row["split"] == "validation"][-1]
    evaluate_command.evaluate(done, output=tmp_path)
    found = json.loads((tmp_path / "evaluation-validation-4.json").read_text())
    assert found == last
    opened = lab.open_run(done).batch(4)["reference"]
    with safe_open(done / reference.FILE, "np") as file:
        assert np.array_equal(opened, file.get_tensor("validation/reference")[:4])


def test_with_adapters_the_base_is_the_reference(place, tmp_path):
    experiment = on(place, adapt=LoRA(rank=2, targets="kernel"), optim=AdamW(lr=Constant(3e-2)))
    data = load_data(experiment)
    shared = Shared(data, Program(experiment, data.train))
    assert go(experiment, tmp_path / "whole", shared=shared)[0] == 0
    assert go(experiment, tmp_path / "run", 3, interrupt(), shared=shared)[0] == 75
    (tmp_path / "run" / reference.FILE).unlink()
    assert go(experiment, tmp_path / "run", shared=shared)[0] == 0
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    first, *_, last = [row for row in rows(tmp_path / "run") if row["split"] == "validation"]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and last["loss"] < 0.69
    program = Program(on(place))
    base = predict(program, program.init(), experiment.data.load().train)["log_probs"]
    with safe_open(tmp_path / "run" / reference.FILE, "np") as file:
        assert apart(file.get_tensor("train/reference"), base) < 1e-5


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("task, said", [
    (Prefer(beta=0.0), "--task.beta must be above 0, not 0.0"),
    (Prefer(label_smoothing=0.5), r"--task.label-smoothing must be in \[0, 0.5\), not 0.5"),
    (Prefer(chunk=0), "--task.chunk must be at least 1"),
])
def test_fields_out_of_range(task, said):
    with pytest.raises(UserError, match=said):
        task.validate()


def test_mistakes(place, done, tmp_path, monkeypatch):
    experiment = on(place)
    data = load_data(experiment)
    (tmp_path / reference.FILE).write_bytes((done / reference.FILE).read_bytes()[:-40])
    with pytest.raises(UserError, match="reference.safetensors is damaged .* delete it: it is computed again"):
        with_reference(experiment, None, data, tmp_path)
    data.test = object()
    with pytest.raises(UserError, match="Prefer needs records in memory .* the test split is a object"):
        with_reference(experiment, None, data, tmp_path)
    assert not can_be_stacked(experiment)
    monkeypatch.setattr(evaluate_command, "is_location", lambda name: True)
    monkeypatch.setattr(evaluate_command, "open_location", lambda *_, **__: (experiment, data, None, None))
    with pytest.raises(UserError, match="hf:a/b are weights without a run: evaluate a run folder"):
        evaluate_command.evaluate(Path("hf:a/b"))
