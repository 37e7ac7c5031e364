"""Bagging: the weights of bootstrap samples, members that learn theirs, and the out-of-bag estimate."""

import json
from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from scipy import stats

from lab.data.dataset import Data, Dataset
from lab.data.pipeline import Arrays, train_batches
from lab.errors import UserError
from lab.experiment import Checkpoint, Evaluate, Experiment, Mesh
from lab.models.linear import MLP, Ensemble, Linear
from lab.models.members import WEIGHT, bootstrap
from lab.optim import Adam, Constant
from lab.private import DPSGD
from lab.study.run.units import can_be_stacked
from lab.tasks.distill import Distill
from lab.tasks.regress import Regress
from lab.tasks.supervised import Classify
from lab.train.out_of_bag import bags, out_of_bag
from lab.train.program import Program
from lab.train.shapes import abstract_state
from lab.train.step import make_loss, prepare
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

M = 3


@dataclass(frozen=True)
class Noisy(Data):
    """Points in 6 dimensions, of 3 classes that overlap."""

    def load(self) -> Dataset:
        """96 to learn from, 24 for validation."""
        draw = np.random.default_rng(0)
        y = draw.integers(0, 3, 120).astype(np.int32)
        x = (draw.normal(size=(120, 6)) + np.eye(6)[y]).astype(np.float32)
        return Dataset(Arrays({"inputs": x[:96], "targets": y[:96]}), Arrays({"inputs": x[96:], "targets": y[96:]}),
                       classes=("a", "b", "c"))


BAGGED = Experiment(
    data=Noisy(), model=Ensemble(MLP(classes=3, width=32, depth=1), M, bootstrap=True), task=Classify(),
    optim=Adam(lr=Constant(1e-2)), steps=120, batch=24, steps_per_call=40, evaluate=Evaluate(every=0),
    checkpoint=Checkpoint(every=0), mesh=Mesh(1))


def test_weights_are_poisson_and_belong_to_seed_member_and_record():
    index = np.arange(20_000)
    draw = jax.jit(lambda seed, index: bootstrap(BAGGED.model, seed, index)[WEIGHT])
    weight = np.asarray(draw(0, index))
    expected = stats.poisson.pmf(np.arange(7), 1.0)
    for own in weight.T:
        seen = np.bincount(own.astype(int), minlength=7)[:7]
        assert stats.chisquare([*seen, len(own) - seen.sum()], [*(20_000 * expected),
                                                                 20_000 * (1 - expected.sum())]).pvalue > 1e-3
    assert np.abs(np.corrcoef(weight.T) - np.eye(M)).max() < 0.03
    more = jax.jit(lambda i: bootstrap(BAGGED.model.clone(members=5), 0, i)[WEIGHT])(index[[7, 3, 9]])
    np.testing.assert_array_equal(more[:, :M], weight[[7, 3, 9]])  # other members, order and batch
    assert (np.asarray(draw(1, index)) != weight).mean() > 0.5  # negative control: another seed


def test_each_member_learns_as_alone_from_its_own_sample():
    """The gradient of member m is that of one model whose records have the weights of m."""
    batch = {**Noisy().load().train[np.arange(24)], "weight": np.ones(24, np.float32),
             "index": np.arange(24, dtype=np.int32)}
    plain = replace(BAGGED, model=BAGGED.model.clone(bootstrap=False))
    draw = np.random.default_rng(1)
    params = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), abstract_state(BAGGED).params)

    def gradient(experiment, params, rows):
        return jax.grad(make_loss(experiment), has_aux=True)(params, {}, rows, 0, 0)

    @jax.jit
    def all_ways(params):
        rows = prepare(BAGGED, batch, True, 5)
        assert WEIGHT not in prepare(plain, batch, True, 5) and WEIGHT not in prepare(BAGGED, batch, False)
        single = replace(BAGGED, model=BAGGED.model.member)
        alone = jax.vmap(lambda params, weight: gradient(single, params, {**batch, "weight": weight})[0], (0, 1))(
            params["member"], rows[WEIGHT])
        together, (total, *_) = gradient(BAGGED, params, rows)
        return together["member"], total, gradient(plain, params, batch)[0]["member"], alone

    together, total, even, alone = all_ways(params)
    assert total == 24  # the expected number of records, not the sum of their weights
    gap, control = (jax.tree.map(lambda a, b: np.abs(a - b).max((1, 2) if a.ndim == 3 else 1), tree, alone)
                    for tree in (together, even))
    assert max(x.max() for x in jax.tree.leaves(gap)) < 1e-4 and min(x.min() for x in jax.tree.leaves(control)) > 0.1


def test_the_out_of_bag_estimate_and_eight_devices():
    """Against NumPy; and all numbers are those of one device."""
    data = BAGGED.data.load()
    programs = [Program(replace(BAGGED, mesh=Mesh(n))) for n in (1, 8)]
    one = programs[0].init()
    eight = jax.device_put(jax.device_get(one), programs[1].shardings)
    for call in range(3):
        batch = train_batches(data.train, call, 40, 24, 0)
        one, eight = (program.train(state, program.batch(lambda _, batch=batch: batch, call))[0]
                      for program, state in zip(programs, (one, eight), strict=True))
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert out_of_bag(programs[1], eight, data.train, lambda: True) is None
    found = out_of_bag(programs[1], eight, data.train, lambda: False)

    x, y = data.train.arrays["inputs"], data.train.arrays["targets"]
    hidden, head = ({name: np.asarray(v, np.float64) for name, v in one.params["member"][layer].items()}
                    for layer in ("dense_0", "head"))
    inner = np.maximum(np.einsum("BD,MDF->BMF", x, hidden["kernel"]) + hidden["bias"], 0)
    logits = np.einsum("BMF,MFC->BMC", inner, head["kernel"]) + head["bias"]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    weight = np.asarray(bootstrap(BAGGED.model, 0, np.arange(96))[WEIGHT])

    def scored(out):
        there = out.any(1)
        mean = (p * out[..., None]).sum(1)[there] / out.sum(1)[there][:, None]
        true = y[there]
        return there.sum(), (mean.argmax(-1) == true).mean(), -np.log(mean[np.arange(len(true)), true]).mean()

    n, accuracy, loss = scored(weight == 0)
    assert 60 < n < 96 and found["records"] == n and found["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    assert scored(weight >= 0)[2] < loss - 0.2  # negative control: members that learned the records


def test_what_has_no_bootstrap_and_no_estimate():
    plain = replace(BAGGED, model=BAGGED.model.clone(bootstrap=False))
    assert "bootstrap" not in json.dumps(plain.identity()) and plain.fingerprint() != BAGGED.fingerprint()
    assert bags(BAGGED) and not bags(plain) and not bags(replace(BAGGED, model=BAGGED.model.member))
    assert not bags(replace(BAGGED, private=DPSGD(noise_multiplier=1.0)))  # it is of training records
    assert can_be_stacked(plain) and not can_be_stacked(BAGGED)
    Ensemble(Linear(3), bootstrap=True).validate()  # each learns another sample
    for task in (Distill(Classify()), Regress()):
        with pytest.raises(UserError, match="no weights of records for each member: --model.no-bootstrap"):
            task.init(BAGGED.model, jax.random.key(0), {"inputs": np.zeros((1, 4), np.float32)})
    Regress().init(plain.model, jax.random.key(0), {"inputs": np.zeros((1, 4), np.float32)})
