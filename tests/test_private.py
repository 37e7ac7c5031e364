"""Differential privacy: the accountant, clipped gradients, the noise, Poisson batches, the budget, what is refused."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import integrate

import lab
from lab.data.images.images import Images
from lab.data.tables import Sklearn, Table
from lab.data.tokenizers import BPE, Bytes
from lab.errors import UserError
from lab.experiment import Checkpoint, Evaluate, Experiment, Mesh
from lab.models.cnn import ConvNet
from lab.models.gpt import GPT
from lab.models.linear import MLP, Linear
from lab.optim import SGD, Constant
from lab.private import DPSGD, accountant
from lab.private.sampling import drawn, fitted
from lab.tasks.language import LanguageModel
from lab.tasks.supervised import Classify
from lab.train.metrics import read_rows
from lab.train.program import Program
from lab.train.restore import leaves
from lab.train.shapes import abstract_state
from lab.train.step import init_state, make_loss, make_train_step, prepare
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

NET = ConvNet(channels=(4,), convs=(1,), batch_norm=False, dense=None, dropout=0.25, dense_dropout=0.0)
BASE = Experiment(data=Images(Sklearn("digits"), shape=(8, 8, 1), test=0.2, mean=(0.3,), std=(0.37,)), model=NET,
                  task=Classify(), optim=SGD(lr=Constant(0.5)), steps=4, batch=16,
                  private=DPSGD(noise_multiplier=0.5, clip_norm=0.3, delta=1e-4, records=1294, expected_batch=10),
                  evaluate=Evaluate(every=2, records=64), checkpoint=Checkpoint(every=2))
RUN = replace(BASE, private=replace(BASE.private, expected_batch=4))
QUIET = replace(BASE, private=replace(BASE.private, noise_multiplier=1e-30))


# ------------------------------------------------------------------------------------------------------ accountant

# (sampling rate, noise multiplier, steps) -> epsilon at delta 1e-5 by dp-accounting 0.6.0.
STORED = ((0.001, 0.6, 100, 2.233352941), (0.01, 0.6, 10000, 25.19850799), (0.01, 4.0, 1, 0.04505582571),
          (256 / 60000, 1.1, 10000, 2.161594828), (0.1, 1.1, 100, 6.620769482), (0.1, 4.0, 10000, 14.51030027),
          (1.0, 4.0, 100, 14.13222616))


def test_epsilon_is_that_of_dp_accounting():
    for rate, noise, steps, wanted in STORED:
        assert accountant.epsilon(rate, noise, steps, 1e-5) == pytest.approx(wanted, rel=1e-6)
        assert accountant.epsilon(rate, noise * 1.01, steps, 1e-5) != pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("rate", [0.001, 256 / 60000, 0.1, 1.0])
def test_epsilon_on_a_grid(rate):
    dp_accounting = pytest.importorskip("dp_accounting", reason="LAB_EXTRAS=privacy")
    from dp_accounting import rdp

    for noise in (0.7, 1.3, 4.0):
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
        for steps in (1, 3000):
            counter = rdp.RdpAccountant().compose(event, steps)
            assert accountant.epsilon(rate, noise, steps, 1e-6) == pytest.approx(counter.get_epsilon(1e-6), rel=1e-6)


def test_rdp_is_the_integral():
    """Of the definition; at fractional orders an upper bound of it."""
    def term(z, rate, noise, alpha):
        ratio = 1 - rate + rate * np.exp((2 * z - 1) / (2 * noise**2))
        return np.exp(-z * z / (2 * noise**2)) / (noise * np.sqrt(2 * np.pi)) * ratio**alpha

    for rate, noise in ((0.01, 0.8), (0.2, 2.0)):
        for alpha in (2, 5, 1.5, 3.5):
            value = sum(integrate.quad(term, i, i + 1, (rate, noise, alpha), epsabs=0)[0] for i in range(-15, 25))
            found = accountant.rdp(rate, noise)[np.flatnonzero(alpha == accountant.ORDERS)[0]]
            exact = np.log(value) / (alpha - 1)
            if alpha == int(alpha):
                assert found == pytest.approx(exact, rel=1e-6)
            else:
                assert exact <= found < 3 * exact


def test_noise_and_steps_for_a_target():
    noise = accountant.noise_for(2.0, 0.01, 1000, 1e-5)
    assert accountant.epsilon(0.01, noise, 1000, 1e-5) <= 2 < accountant.epsilon(0.01, noise - 2e-4, 1000, 1e-5)
    most = accountant.steps_within(2.0, 0.01, noise, 1e-5, 10**6)
    assert 1000 <= most < 1020
    assert accountant.epsilon(0.01, noise, most, 1e-5) <= 2 < accountant.epsilon(0.01, noise, most + 1, 1e-5)


# -------------------------------------------------------------------------------------------------------- sampling


def test_poisson_batches():
    """Each record is drawn with the same probability, independently, as a function of (seed, step)."""
    size, rate, steps = 200, 0.1, 3000
    counts, sizes = np.zeros(size), []
    for step in range(steps):
        indices, weight = drawn(step, rate, size, 60, seed=1)
        chosen = indices[weight > 0]
        assert len(set(chosen.tolist())) == len(chosen) and (indices[weight == 0] == 0).all()
        counts[chosen] += 1
        sizes.append(len(chosen))
    assert np.mean(sizes) == pytest.approx(20, abs=0.3) and np.var(sizes) == pytest.approx(18, rel=0.1)
    assert abs(counts - steps * rate).max() < 4.5 * np.sqrt(steps * rate * (1 - rate))
    again, other = drawn(7, rate, size, 60, seed=1), drawn(7, rate, size, 60, seed=2)
    assert (again[0] == drawn(7, rate, size, 60, seed=1)[0]).all() and (again[0] != other[0]).any()
    assert drawn(7, 1.0, size, 60, seed=1)[1].sum() == 60  # cut off


def test_room_for_a_batch():
    expected = accountant.largest_expected(1000, 100, 1e-6)
    assert accountant.overflow(1000, expected, 100) <= 1e-6 < accountant.overflow(1000, expected + 1, 100)
    assert accountant.largest_expected(50, 100, 1e-6) == 50  # every record has room


# ------------------------------------------------------------------------------------------------------- gradients


def one_step(experiment, batch, devices=1):
    """Parameters after a step on given rows."""
    program = Program(experiment, devices=jax.devices()[:devices])
    state = program.init(arrays(experiment))
    return jax.device_get(program.train(state, program.batch(lambda call: batch, 0))[0].params)


def arrays(experiment):
    """An output layer that is not zero, so that all parameters have gradients."""
    shape = leaves(abstract_state(experiment).params)["head/kernel"].shape
    return {"head/kernel": np.random.default_rng(0).normal(0, 0.3, shape).astype(np.float32)}


@pytest.fixture(scope="module")
def rows():
    """A batch of which 10 of 16 rows are drawn."""
    train = BASE.data.load().train
    index = np.arange(16) * 7
    return {**train[index], "index": index.astype(np.int32), "weight": (np.arange(16) % 3 > 0).astype(np.float32)}


def close(a, b, tolerance=1e-6):
    return all(np.allclose(x, y, rtol=0, atol=tolerance) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b),
                                                                         strict=True))


def test_clipped_sums_are_those_of_a_loop(rows):
    state = init_state(QUIET, rows, arrays(QUIET))
    batch = prepare(QUIET, rows, True, 0)
    loss = jax.jit(jax.grad(make_loss(QUIET), has_aux=True))
    total, cut = jax.tree.map(jnp.zeros_like, state.params), 0
    for i in np.flatnonzero(rows["weight"]):
        row = jax.tree.map(lambda x, i=i: x[i:i + 1], batch)
        grads, _ = loss(state.params, state.model_state, row, 0, row["index"][0])
        norm = float(optax.tree.norm(grads))
        cut += norm > 0.3
        total = jax.tree.map(lambda t, g, n=norm: t + g * min(1, 0.3 / n), total, grads)
    wanted = jax.tree.map(lambda p, g: p - 0.5 * g / 10, state.params, total)  # 10 records are expected
    found, metrics = jax.jit(make_train_step(QUIET))(state, rows)
    assert close(found.params, wanted) and cut == metrics["clipped"][0] > 3 and metrics["clipped"][1] == 10
    loose = replace(QUIET, private=replace(QUIET.private, clip_norm=1e6))  # negative control
    assert not close(jax.jit(make_train_step(loose))(state, rows)[0].params, wanted, 1e-3)


@pytest.mark.usefixtures("compiled_in_haste")
def test_devices_and_microbatches_do_not_change_the_update(rows):
    """Also with dropout: a record's mask follows from its number."""
    wanted = one_step(BASE, rows)
    for other in (one_step(BASE, rows, devices=8), one_step(replace(BASE, grad_accum_steps=4), rows),
                  one_step(replace(BASE, mesh=Mesh(data=2, fsdp=2)), rows, devices=4)):
        assert close(other, wanted)
    assert not close(one_step(QUIET, rows), wanted, 1e-3)


@pytest.mark.usefixtures("compiled_in_haste")
def test_noise_is_added_once(rows):
    """Its standard deviation is noise_multiplier * clip_norm in the sum; per device it would be sqrt(8) times that."""
    wide = replace(BASE, model=MLP(classes=10, width=80), optim=SGD(lr=Constant(1.0)))
    for devices in (1, 8):
        noisy = one_step(wide, rows, devices=devices)
        plain = one_step(replace(wide, private=QUIET.private), rows, devices=devices)
        noise = np.concatenate([(a - b).ravel() for a, b in zip(jax.tree.leaves(noisy), jax.tree.leaves(plain),
                                                               strict=True)])
        assert len(noise) > 5000 and noise.std() * 10 == pytest.approx(0.5 * 0.3, rel=0.05)
    kernels = [x.ravel()[:64] for path, x in leaves(jax.tree.map(np.subtract, noisy, plain)).items() if x.size > 64]
    assert abs(np.corrcoef(kernels)[0, 1]) < 0.4  # parameters have noise of their own
    other = one_step(replace(wide, seed=1), rows)
    assert not close(other, noisy, 1e-2)


# ------------------------------------------------------------------------------------------------------ whole runs


def test_a_run_says_what_it_spent_and_resumes(tmp_path):
    found = lab.fit(RUN, tmp_path / "run", quiet=True)
    rows = read_rows(found.folder / "metrics.jsonl")
    for row in rows:
        assert row["epsilon"] == pytest.approx(RUN.private.epsilon(row["step"]))
    assert rows[0]["step"] == 0 and rows[0]["epsilon"] == 0 < rows[-1]["epsilon"]
    result = json.loads((found.folder / "result.json").read_text())
    assert result["privacy"] == RUN.private.spent(4) and result["privacy"]["sampling_rate"] == 4 / 1294
    (found.folder / "result.json").unlink()
    shutil.rmtree(found.folder / "checkpoints" / "4")
    again = lab.fit(RUN, tmp_path / "run", quiet=True)
    assert read_rows(again.folder / "metrics.jsonl") == rows  # the same batches and noise, epsilon goes on


def test_the_budget_ends_a_run(tmp_path):
    spent = RUN.private.epsilon(3)
    tight = replace(RUN, private=replace(RUN.private, target_epsilon=spent * 1.0001), evaluate=Evaluate(every=0))
    found = lab.fit(tight, tmp_path / "run", quiet=True)
    result = json.loads((found.folder / "result.json").read_text())
    assert result["steps"] == 3 and result["stopped_early"] and result["privacy"]["epsilon"] == pytest.approx(spent)
    assert result["privacy"]["epsilon"] <= tight.private.target_epsilon < tight.private.epsilon(4)


def test_a_target_sets_the_noise():
    wanted = replace(BASE, steps=300, private=DPSGD(target_epsilon=3.0, delta=1e-4))
    found = wanted.filled().private
    assert found.records == 1294 and 1 <= found.expected_batch < 16
    assert 2.99 < found.epsilon(300) <= 3.0 and found.last_step(300, 1) == 300
    assert found.cut(wanted) <= 1e-3 * 1e-4
    assert wanted.filled().filled().private == found
    several = replace(found, sampling="shuffle", expected_batch=16, records=1280)
    assert several.releases(80) == 1 and several.releases(81) == 2 and several.rate == 1.0


TABLE = replace(BASE, data=Table(Sklearn("breast_cancer")), model=Linear(classes=2))


@pytest.mark.parametrize(("experiment", "said"), [
    (replace(BASE, private=DPSGD()), "needs --private.noise-multiplier"),
    (replace(BASE, private=DPSGD(noise_multiplier=-1.0)), "--private.noise-multiplier must be above 0"),
    (replace(BASE, private=DPSGD(noise_multiplier=1.0, delta=2.0)), "--private.delta"),
    (replace(BASE, private=DPSGD(noise_multiplier=1.0, delta=1e-3)), "below 1 / 1,294"),
    (replace(BASE, model=NET.clone(batch_norm=True)), "BatchNorm"),
    (replace(BASE, private=replace(BASE.private, records=5)), "--private.records is 5"),
    (replace(BASE, private=DPSGD(noise_multiplier=1.0, delta=1e-4, expected_batch=15)), "too often"),
    (replace(BASE, private=DPSGD(noise_multiplier=1.0, delta=1e-4, expected_batch=17)), "above --batch 16"),
    (replace(BASE, private=DPSGD(noise_multiplier=1.0, delta=1e-4, sampling="shuffle")), "must divide"),
    (replace(BASE, private=DPSGD(noise_multiplier=0.3, target_epsilon=0.01, delta=1e-4)), "The first step already"),
    (replace(TABLE, private=DPSGD(noise_multiplier=1.0, delta=1e-4)), "fits means, standard deviations"),
])
def test_what_is_refused(experiment, said, tmp_path):
    with pytest.raises(UserError, match=said):
        lab.fit(experiment, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_is_public_is_not_refused():
    from lab.train.check import load_data

    public = replace(TABLE, private=DPSGD(noise_multiplier=1.0, delta=1e-4, public=True)).filled()
    load_data(public)


def test_texts_whose_windows_move_are_refused(tmp_path):
    from lab.data.text import Text, TextFiles

    (tmp_path / "a.txt").write_text("some words to learn from " * 200)
    text = Experiment(Text(TextFiles(str(tmp_path / "a.txt")), Bytes(), length=8), GPT(depth=1, width=8, heads=1,
                      vocab=256, context=8), LanguageModel(samples=0), SGD(lr=Constant(0.1)), steps=2, batch=16,
                      private=DPSGD(noise_multiplier=1.0, delta=1e-4))
    with pytest.raises(UserError, match="the same in every epoch"):
        lab.fit(text, tmp_path / "run", quiet=True)
    assert fitted(replace(text.data, tokenizer=BPE(300))) == "a vocabulary" and fitted(text.data) == ""
