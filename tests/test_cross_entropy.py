"""Cross-entropy over a vocabulary against SciPy and closed forms, and what it compiles to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp, softmax

from lab.tasks import cross_entropy as module
from lab.tasks.cross_entropy import cross_entropy

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 4, (3, 5, 17)).astype(np.float32)
TARGETS = RNG.integers(0, 17, (3, 5)).astype(np.int32)
BY_NLL, BY_Z = RNG.normal(size=(2, 3, 5)).astype(np.float32)


@pytest.fixture(autouse=True, params=["two passes", "one pass"])
def passes(request, monkeypatch):
    """Both ways to reduce the logits, on this platform; the second is what GPUs do."""
    if request.param == "one pass":
        monkeypatch.setattr(module, "_two_passes", module._one_pass)
    jax.clear_caches()
    return request.param


def test_gpus_read_the_logits_once(passes):
    """One reduction of three results instead of three reductions; one more checks the targets' bounds."""
    def reductions(platform):
        lowered = jax.jit(cross_entropy).trace(LOGITS, TARGETS).lower(lowering_platforms=(platform,))
        return lowered.as_text().count("stablehlo.reduce(")

    assert reductions("cuda") == 2
    assert reductions("cpu") == (2 if passes == "one pass" else 4)


def objective(logits):
    nll, log_z, _ = cross_entropy(logits, TARGETS)
    return (BY_NLL * nll + BY_Z * log_z).sum()


def gradient(one_hot_share=1.0):
    """Of `objective`, in float64."""
    p, one_hot = softmax(LOGITS.astype(np.float64), -1), np.eye(17)[TARGETS]
    return BY_NLL[..., None] * (p - one_hot_share * one_hot) + BY_Z[..., None] * p


def test_values():
    nll, log_z, right = jax.jit(cross_entropy)(LOGITS, TARGETS)
    exact = log_softmax(LOGITS.astype(np.float64), -1)
    np.testing.assert_allclose(nll, -np.take_along_axis(exact, TARGETS[..., None], -1)[..., 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(log_z, logsumexp(LOGITS.astype(np.float64), -1), rtol=1e-6)
    assert right.tolist() == (LOGITS.argmax(-1) == TARGETS).tolist()
    every = jax.vmap(lambda t: cross_entropy(LOGITS, jnp.full((3, 5), t))[2])(jnp.arange(17))
    assert every.argmax(0).tolist() == LOGITS.argmax(-1).tolist() and (every.sum(0) == 1).all()


def test_of_equal_logits_the_first_counts():
    """As numpy.argmax has it; an untrained head says 0 everywhere, and must not look perfect."""
    logits = np.zeros((4, 6), np.float32)
    logits[3, [2, 4]] = 1
    targets = np.array([0, 1, 5, 2])
    assert cross_entropy(logits, targets)[2].tolist() == [1, 0, 0, 1]
    assert cross_entropy(logits, np.array([0, 1, 5, 4]))[2].tolist() == [1, 0, 0, 0]


def test_extreme_logits():
    """Neither overflow nor a wrong minus infinity; what is not a number stays so, and is nobody's right guess."""
    logits = np.array([[1e4, -1e4, 0], [-np.inf, 2, -np.inf], [np.nan, 1, 1], [3e38, 3e38, 3e38]], np.float32)
    nll, log_z, right = cross_entropy(logits, np.array([0, 1, 1, 0]))
    assert nll[:2].tolist() == [0, 0] and log_z[:2].tolist() == [1e4, 2] and np.isnan(nll[2])
    assert np.isfinite(nll[3]) and right.tolist() == [1, 1, 0, 1]


def test_gradient_in_both_modes():
    for differentiate in (jax.grad, jax.jacfwd):
        found = np.asarray(jax.jit(differentiate(objective))(LOGITS))
        assert np.abs(found - gradient()).max() < 1e-6
        assert np.abs(found - gradient(0.9)).max() > 1e-3  # negative control
    assert not np.asarray(jax.grad(lambda x: cross_entropy(x, TARGETS)[2].sum())(LOGITS)).any()


def test_what_a_row_has_in_common_costs_no_digits():
    """A large offset leaves softmax - one-hot as exact as it is without."""
    offset = (LOGITS + 1000).astype(np.float32)
    exact = softmax(offset.astype(np.float64), -1) - np.eye(17)[TARGETS]
    found = jax.grad(lambda x: cross_entropy(x, TARGETS)[0].sum())(offset)
    assert np.abs(found - exact).max() < 1e-6
    rounded = np.exp(offset - logsumexp(offset, -1, keepdims=True).astype(np.float32)) - np.eye(17)[TARGETS]
    assert np.abs(rounded - exact).max() > 1e-5  # negative control


def written_out(logits):
    """What it replaces."""
    nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, TARGETS[..., None], -1)[..., 0]
    return nll.sum(), (jnp.argmax(logits, -1) == TARGETS).sum()


def ours(logits):
    nll, _, right = cross_entropy(logits, TARGETS)
    return nll.sum(), right.sum()


@pytest.mark.parametrize("f", [ours, written_out])
def test_neither_scatter_nor_argmax(f):
    """GPUs read and write all logits once more for either, and CPUs are slow at both."""
    text = jax.jit(jax.grad(f, has_aux=True)).lower(LOGITS).as_text()
    slow = "stablehlo.scatter" in text, "@argmax" in text
    assert slow == (f is written_out,) * 2  # the other one is the negative control
