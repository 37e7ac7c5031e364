"""Pruning: the schedule's closed form, NumPy loops, exact zeros in training and evaluation, resuming, devices."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from lab.configuration.rebuild import from_json
from lab.configuration.values import override, to_json
from lab.errors import UserError
from lab.experiment import Experiment, Mesh
from lab.optim import SGD, Adam, AdamW, Cosine, Lion, Muon, Prune, ScheduleFreeAdamW
from lab.optim.matrices import Matrix
from lab.optim.prune import largest
from lab.pretrained import Continue, Pretrained
from lab.study.design import Study
from lab.study.run.forks import acts_from, check_fork
from lab.study.run.grouping import groups
from lab.study.run.units import can_be_stacked
from lab.train.program import Program
from lab.train.restore import open_run
from lab.train.step import eval_params, init_state
from tests.test_loop import go, interrupt
from tests.test_lora import bits
from tests.test_step import apart, compiled_in_haste, reader, run, toy  # noqa: F401 (a fixture)

KERNELS = {"hidden/kernel", "out/kernel"}
ALL = {"hidden/kernel": 36, "out/kernel": 24}  # three quarters of each
PRUNE = Prune(AdamW(lr=Cosine(0.05)), sparsity=0.75, begin=2, end=9, every=3)


def kernels(params: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten_dict(params, sep="/").items()}


def zeros(params: Any) -> dict[str, int]:
    return {path: int((x == 0).sum()) for path, x in kernels(params).items() if path in KERNELS}


# ------------------------------------------------------------------------------------------------- the schedule


def test_the_schedule_is_zhu_and_guptas():
    prune = Prune(SGD(0.1), sparsity=0.8, begin=20, end=60)
    counts = np.arange(101)
    wanted = np.where(counts < 20, 0, 0.8 - 0.8 * (1 - np.minimum(counts - 20, 40) / 40.0) ** 3)
    found = np.asarray(jax.vmap(lambda count: prune.share(count, 100))(counts))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert found[20] == 0 and found[60] == found[100] == np.float32(0.8) and 0.35 < found[30] < 0.47
    linear = np.clip((counts - 20) / 40, 0, 1) * 0.8  # the negative control
    assert np.abs(found - linear).max() > 0.25
    assert Prune(SGD(0.1)).last(100) == 75 and Prune(SGD(0.1), begin=90).last(100) == 90
    at_once = Prune(SGD(0.1), sparsity=0.5, begin=3, end=3)
    assert [float(at_once.share(count, 9)) for count in (2, 3, 4)] == [0, 0.5, 0.5]


def test_what_is_removed_is_the_rounded_share_of_the_smallest():
    x = np.random.default_rng(0).normal(size=(7, 9)).astype(np.float32)
    for share in (0.0, 0.1, 0.5, 0.98, 0.999):
        kept = np.asarray(largest(jnp.abs(x), share, ()))
        removed = min(round(share * 63), 62)
        assert (~kept).sum() == removed
        assert not removed or np.abs(x)[~kept].max() < np.abs(x)[kept].min()
    each = np.asarray(largest(jnp.abs(x), 0.5, (0,)))  # every row by itself
    assert ((~each).sum(1) == 4).all() and np.array_equal(np.asarray(largest(jnp.abs(x.T), 0.5, (1,))), each.T)
    assert largest(jnp.zeros((3, 3)), 0.9, ()).all()  # equal sizes stay


# ------------------------------------------------------------------------------------------------- the optimizer


def test_steps_are_those_of_a_numpy_loop():
    random = np.random.default_rng(1)
    w, bias = random.normal(size=(6, 5)).astype(np.float32), np.ones(5, np.float32)
    grads = random.normal(size=(12, 6, 5)).astype(np.float32)
    tx = replace(PRUNE, optimizer=SGD(0.1, momentum=0.9, weight_decay=0.0)).build(12)
    params = {"dense": {"kernel": jnp.asarray(w), "bias": jnp.asarray(bias)}}
    state, step = tx.init(params), jax.jit(tx.update)
    mask, velocity, history = np.ones_like(w, bool), 0.0, []
    for t, g in enumerate(grads, 1):
        updates, state = step({"dense": {"kernel": g, "bias": np.ones(5, np.float32)}}, state, params)
        params = optax.apply_updates(params, updates)
        velocity = 0.9 * velocity + np.where(mask, g, 0)
        w = w - np.float32(0.1) * velocity
        if t in (2, 5, 8, 9):
            share = 0.75 * (1 - (1 - (t - 2) / 7) ** 3)
            order = np.argsort(np.abs(w * mask), axis=None)[:round(share * 30)]
            mask.flat[order] = False
        w = np.where(mask, w, 0).astype(np.float32)
        found = np.asarray(params["dense"]["kernel"])
        np.testing.assert_allclose(found, w, atol=1e-5)
        assert np.array_equal(found == 0, ~mask) and np.array_equal(state.masks["dense"]["kernel"], mask)
        history.append(int((~mask).sum()))
    assert history == [0, 0, 0, 0, 18, 18, 18, 22, 22, 22, 22, 22]
    assert not (np.asarray(params["dense"]["bias"]) == 0).any() and set(state.masks["dense"]) == {"kernel"}
    assert np.abs(w).max() > 0.1 and int(state.count) == 12


@pytest.mark.parametrize("inner", [Adam(lr=0.05), Lion(lr=0.02), Muon(lr=0.05), ScheduleFreeAdamW(lr=0.05),
                                   AdamW(lr=0.05, ema=0.9, grad_clip_norm=1.0, l2=0.01)],
                         ids=lambda inner: type(inner).__name__ + " ema" * bool(inner.ema))
def test_removed_weights_are_exactly_zero_in_training_and_evaluation(inner):
    experiment = toy(optim=replace(PRUNE, optimizer=inner))
    program, read = Program(experiment), reader(experiment)
    state, before = program.init(), dict.fromkeys(KERNELS, 0)
    for step in range(12):
        state, _ = program.train(state, program.batch(read, step))
        host = jax.device_get(state)
        masks, evaluated = kernels(host.opt_state.masks), kernels(eval_params(experiment, host))
        assert masks.keys() == KERNELS
        for path, mask in masks.items():
            assert (kernels(host.params)[path][~mask] == 0).all() and (evaluated[path][~mask] == 0).all()
            assert before[path] <= (~mask).sum()
            before[path] = (~mask).sum()
    for params in (host.params, eval_params(experiment, host)):
        assert zeros(params) == before == ALL
    dense = run(toy(optim=inner), 12)[0]  # the negative control
    assert sum(zeros(dense.params).values()) == 0


def test_without_sparsity_it_is_the_optimizer_inside():
    plain = run(toy(optim=PRUNE.optimizer), 6)[0]
    wrapped, other = (run(toy(optim=replace(PRUNE, sparsity=share)), 6)[0] for share in (0.0, 0.5))
    assert apart(wrapped.params, plain.params) < 1e-6 and apart(other.params, plain.params) > 1e-2
    assert bits(wrapped.opt_state.inner).keys() == bits(plain.opt_state).keys()


def test_channels_go_by_their_norm_with_their_bias_and_outputs_stay():
    experiment = toy(optim=replace(PRUNE, structure="channel", sparsity=0.5, begin=1, end=1,
                                   optimizer=SGD(1e-6)))
    start = Program(experiment).init()
    state, _ = run(experiment, 3)
    found, began = kernels(state.params), kernels(jax.device_get(start.params))
    norms = np.sqrt((began["hidden/kernel"] ** 2).sum(0))
    removed = np.isin(np.arange(8), np.argsort(norms)[:4])
    assert np.array_equal((found["hidden/kernel"] == 0).all(0), removed)
    assert np.array_equal((found["hidden/kernel"] == 0).any(0), removed)
    masks = kernels(state.opt_state.masks)
    assert masks.keys() == {"hidden/kernel", "hidden/bias"} and np.array_equal(masks["hidden/bias"], ~removed)
    assert (found["hidden/bias"][removed] == 0).all() and not (found["out/kernel"] == 0).any()
    single = kernels(run(replace(experiment, optim=replace(experiment.optim, structure="unstructured")), 3)[0].params)
    assert not (single["hidden/kernel"] == 0).all(0).any()  # the negative control: the same number, other places


def test_axes_of_channels_are_the_matrix_s():
    """Two stacked matrices (2, 3, 4 outputs), and outputs on the first axis."""
    x = np.random.default_rng(3).normal(size=(2, 3, 4)).astype(np.float32)
    matrices = {"blocks/kernel": Matrix((0,), (1,), (2,), False), "turned/kernel": Matrix((), (1,), (0,), False)}
    tx = Prune(SGD(0.0), sparsity=0.5, structure="channel", begin=1, end=1, include="kernel").build(2, matrices)
    params = {"blocks": {"kernel": jnp.asarray(x)}, "turned": {"kernel": jnp.asarray(x[0].T)}}
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for i in range(2):
        smallest = np.argsort(np.sqrt((x[i] ** 2).sum(0)))[:2]
        assert set(np.flatnonzero(~np.asarray(state.masks["blocks"]["kernel"])[i].all(0))) == set(smallest)
    smallest = np.argsort(np.sqrt((x[0] ** 2).sum(0)))[:2]
    assert set(np.flatnonzero(~np.asarray(state.masks["turned"]["kernel"]).any(1))) == set(smallest)
    pruned = optax.apply_updates(params, updates)
    assert (np.asarray(pruned["turned"]["kernel"])[smallest] == 0).all()


# ------------------------------------------------------------------------------------ runs, devices, other experiments


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Any:
    """The folder of a run. Not to be written to."""
    folder = tmp_path_factory.mktemp("prune") / "run"
    assert go(toy(optim=replace(PRUNE, optimizer=AdamW(lr=0.05, ema=0.9))), folder)[0] == 0
    return folder


def test_a_stopped_run_resumes_to_the_bit(done, tmp_path):
    experiment = toy(optim=replace(PRUNE, optimizer=AdamW(lr=0.05, ema=0.9)))
    assert go(experiment, tmp_path / "run", 5, interrupt())[0] == 75
    stopped = open_run(tmp_path / "run", experiment=experiment)[2]
    assert 0 < sum(zeros(stopped.params).values()) < 60  # in the middle of the schedule
    assert go(experiment, tmp_path / "run")[0] == 0
    whole, resumed = (open_run(folder, experiment=experiment)[2] for folder in (done, tmp_path / "run"))
    assert bits(resumed) == bits(whole) != bits(stopped)
    assert zeros(eval_params(experiment, whole)) == ALL
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (done / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("changes", [{"mesh": Mesh(data=8)}, {"mesh": Mesh(data=2, fsdp=4)},
                                     {"mesh": Mesh(data=2), "grad_accum_steps": 4}],
                         ids=["8 devices", "fsdp", "microbatches"])
def test_it_is_the_same_on_devices_and_in_microbatches(changes):
    experiment = toy(optim=replace(PRUNE, optimizer=SGD(0.05)))
    alone, spread = run(experiment, 12)[0], run(replace(experiment, **changes), 12)[0]
    assert apart(spread.params, alone.params) < 1e-5 and zeros(spread.params) == zeros(alone.params)
    assert apart(run(replace(experiment, seed=1), 12)[0].params, alone.params) > 1e-2  # the negative control


def test_masks_are_placed_as_their_parameters():
    experiment = toy(optim=PRUNE, mesh=Mesh(data=2, fsdp=4, rules=(("hidden/kernel", "-, fsdp"),)))
    shardings = Program(experiment).shardings
    assert shardings.opt_state.masks["hidden"]["kernel"].spec == shardings.params["hidden"]["kernel"].spec
    assert "fsdp" in shardings.params["hidden"]["kernel"].spec


def test_arms_of_other_sparsity_share_a_program():
    experiment = toy(optim=PRUNE)
    arms = {str(share): override(experiment, {"optim.sparsity": share}) for share in (0.0, 0.5, 0.9)}
    (group,) = groups(arms)
    assert group.numbers == ("optim.sparsity",) and can_be_stacked(experiment)
    assert acts_from(experiment, arms["0.5"]) == 0
    assert len(groups(arms | {"channel": override(experiment, {"optim.structure": "channel"})})) == 2
    with pytest.raises(UserError, match="cannot start from a state without masks"):
        check_fork(toy(), experiment, 4)


def test_json_freezing_and_flags_reach_the_optimizer_inside():
    experiment = toy(optim=PRUNE, init_from=Pretrained(freeze=("^hidden",)))
    assert from_json(to_json(PRUNE)) == PRUNE and experiment.optimizer.lr_multipliers == (("^hidden", 0.0),)
    state, start = run(experiment, 12)[0], Program(experiment).init()
    assert zeros(state.params) == {"hidden/kernel": 0, "out/kernel": 24}
    assert apart(state.params["hidden"], start.params["hidden"]) == 0
    changed = override(toy(optim=PRUNE), {"optim.optimizer.lr.peak": 0.1})
    assert changed.optim.lr.peak == 0.1 != PRUNE.lr.peak


def test_a_dense_run_is_continued_with_pruning(tmp_path):
    dense = toy(optim=AdamW(lr=0.05))
    assert go(dense, tmp_path / "dense")[0] == 0
    start = Continue(str(tmp_path / "dense"))
    experiment = toy(optim=Prune(dense.optim, sparsity=0.5, begin=14, end=18, every=1), steps=20, init_from=start)
    assert go(experiment, tmp_path / "run")[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 12
    state = open_run(tmp_path / "run", experiment=experiment)[2]
    assert int(state.opt_state.count) == 20 and zeros(state.params) == {"hidden/kernel": 24, "out/kernel": 16}


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("changes, said", [
    ({"sparsity": 1.0}, r"optim.sparsity .*\[0, 1\)"), ({"sparsity": -0.1}, r"optim.sparsity .*\[0, 1\)"),
    ({"begin": 9, "end": 3}, "optim.end is 3 steps, before optim.begin, 9"), ({"end": 99}, "more than the run's 12"),
    ({"begin": -1}, "begin"), ({"every": 0}, "every"), ({"include": "("}, "include"),
    ({"optimizer": SGD(-1.0)}, "lr.peak"),
])
def test_fields_out_of_range(changes, said):
    with pytest.raises(UserError, match=said):
        replace(PRUNE, **changes).validate(12)


@pytest.mark.parametrize("changes, said", [
    ({"include": "kernal"}, "optim.include: 'kernal' matches no parameter that is trained. Some paths: hidden/"),
    ({"include": "^out/", "structure": "channel"}, "matches no parameter that is a hidden, trained matrix"),
])
def test_a_rule_that_matches_nothing(changes, said):
    experiment: Experiment = toy(optim=replace(PRUNE, **changes))
    with pytest.raises(UserError, match=said):
        jax.eval_shape(lambda batch: init_state(experiment, batch), Program(toy()).spec)


def test_an_arm_is_checked():
    study = Study(toy(optim=PRUNE), {"all": {"optim.sparsity": 1.0}})
    with pytest.raises(UserError, match=r"Arm all: optim.sparsity"):
        study.experiments()
