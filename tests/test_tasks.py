"""LanguageModel: losses and metrics against NumPy and torch, padding that counts for nothing, figures at the end."""

import gzip
import lzma
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.errors import UserError
from lab.tasks.base import EvalResult, apply
from lab.tasks.language import LanguageModel
from tests.conftest import computing

V, B, L = 11, 4, 5
RNG = np.random.default_rng(0)
TABLE = (RNG.normal(size=(V, V)) * 2).astype(np.float32)
TOKENS = RNG.integers(0, V, (B, L + 1)).astype(np.int32)
BATCH = {"tokens": TOKENS, "bytes": np.array([9, 12, 7, 5], np.int32), "weight": np.array([1, 1, 0, 1], np.float32)}
REAL = BATCH["weight"] > 0


class Bigram(nn.Module):
    """Logits are a row of a table."""

    @nn.compact
    def __call__(self, tokens, *, train):
        return self.param("table", nn.initializers.zeros, (V, V))[tokens]


def traced(task, batch=BATCH, table=TABLE):
    loss, weight, metrics, model_state = task.loss(
        Bigram(), {"params": {"table": jnp.asarray(table)}}, batch, {}, train=True
    )
    assert model_state == {}
    return loss, weight, metrics


compiled = jax.jit(traced, static_argnums=0)


def evaluate(task, batch=BATCH, table=TABLE):
    return compiled(task, batch, table)


def mean(metrics, name):
    return float(metrics[name][0] / metrics[name][1])


LOGITS = TABLE.astype(np.float64)[TOKENS[REAL, :-1]]
TARGETS = TOKENS[REAL, 1:]
LOG_Z = np.log(np.exp(LOGITS).sum(-1))
NLL = LOG_Z - np.take_along_axis(LOGITS, TARGETS[..., None], -1)[..., 0]


def test_cross_entropy_equals_numpy():
    loss, weight, metrics = evaluate(LanguageModel())
    assert float(weight) == 3 * L
    np.testing.assert_allclose(loss, NLL.sum(), rtol=1e-6)
    assert mean(metrics, "loss") == pytest.approx(NLL.mean(), rel=1e-6)
    assert mean(metrics, "accuracy") == pytest.approx((LOGITS.argmax(-1) == TARGETS).mean())
    assert 0 < mean(metrics, "accuracy") < 1
    assert "objective" not in metrics
    everything = evaluate(LanguageModel(), BATCH | {"weight": np.ones(B, np.float32)})[2]
    assert abs(mean(metrics, "loss") - mean(everything, "loss")) > 1e-3  # negative control: the padding counted
    shifted = LOG_Z - np.take_along_axis(LOGITS, TOKENS[REAL, :-1, None], -1)[..., 0]
    assert abs(mean(metrics, "loss") - shifted.mean()) > 1e-3  # negative control: the inputs as targets


def test_large_logits_do_not_overflow():
    loss, *_ = evaluate(LanguageModel(), table=TABLE * 1000)
    scaled = LOGITS * 1000
    want = (scaled.max(-1) - np.take_along_axis(scaled, TARGETS[..., None], -1)[..., 0]).sum()
    np.testing.assert_allclose(loss, want, rtol=1e-4)
    with np.errstate(over="ignore"):
        assert not np.isfinite(np.log(np.exp(np.float32(scaled)).sum(-1))).all()  # negative control: the plain formula


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_losses_and_gradients_equal_torch(smoothing):
    torch = pytest.importorskip("torch", reason="torch is the independent reference here, and is not installed")
    task = LanguageModel(label_smoothing=smoothing)
    loss, gradient = jax.value_and_grad(lambda table: evaluate(task, table=table)[0])(jnp.asarray(TABLE))
    table = torch.tensor(TABLE, requires_grad=True)
    inputs, targets = (torch.from_numpy(x.reshape(-1)).long() for x in (TOKENS[REAL, :-1], TARGETS))
    reference = lambda e: torch.nn.functional.cross_entropy(table[inputs], targets, label_smoothing=e, reduction="sum")
    want = reference(smoothing)
    want.backward()
    np.testing.assert_allclose(loss, want.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, table.grad.numpy(), atol=1e-5)
    assert abs(loss - reference(smoothing + 0.01).item()) > 1e-2  # negative control


def test_smoothing_leaves_the_plain_loss_alone():
    _, _, plain = evaluate(LanguageModel())
    loss, weight, smooth = evaluate(LanguageModel(label_smoothing=0.1))
    for name in ("loss", "accuracy", "bits_per_byte"):
        assert mean(smooth, name) == pytest.approx(mean(plain, name), rel=1e-6)
    assert mean(smooth, "objective") == pytest.approx(float(loss / weight))
    want = 0.9 * NLL + 0.1 * (LOG_Z - LOGITS.mean(-1))
    assert mean(smooth, "objective") == pytest.approx(want.mean(), rel=1e-6)
    assert abs(mean(smooth, "objective") - mean(smooth, "loss")) > 1e-2  # negative control


def test_z_loss_in_closed_form():
    loss, *_ = evaluate(LanguageModel(z_loss=0.05))
    np.testing.assert_allclose(loss, (NLL + 0.05 * LOG_Z**2).sum(), rtol=1e-6)
    both, *_ = evaluate(LanguageModel(label_smoothing=0.2, z_loss=0.05))
    np.testing.assert_allclose(both, (0.8 * NLL + 0.2 * (LOG_Z - LOGITS.mean(-1)) + 0.05 * LOG_Z**2).sum(), rtol=1e-6)
    assert abs(loss - (NLL + 0.05 * LOG_Z).sum()) > 0.1  # negative control: not squared
    shifted, *_ = evaluate(LanguageModel(), table=TABLE + 3)
    np.testing.assert_allclose(shifted, NLL.sum(), rtol=1e-5)  # cross-entropy does not see a common shift of logits,
    moved, *_ = evaluate(LanguageModel(z_loss=0.05), table=TABLE + 3)
    np.testing.assert_allclose(moved, (NLL + 0.05 * (LOG_Z + 3) ** 2).sum(), rtol=1e-6)  # which is why there is z-loss


def test_bits_per_byte():
    _, _, metrics = evaluate(LanguageModel())
    assert metrics["bits_per_byte"][1] == 9 + 12 + 5
    assert mean(metrics, "bits_per_byte") == pytest.approx(NLL.sum() / (math.log(2) * 26), rel=1e-6)
    uniform = evaluate(LanguageModel(), batch=BATCH | {"bytes": np.full(B, L)}, table=np.zeros((V, V), np.float32))[2]
    assert mean(uniform, "bits_per_byte") == pytest.approx(math.log2(V))  # one byte a token, V of them
    assert abs(mean(metrics, "bits_per_byte") - NLL.sum() / (math.log(2) * 33)) > 1e-2  # negative control: all bytes


def test_rows_without_weight_contribute_nothing():
    garbage = BATCH | {"tokens": TOKENS.copy(), "bytes": BATCH["bytes"].copy()}
    garbage["tokens"][2] = V - 1
    garbage["bytes"][2] = 10_000
    short = {name: x[REAL] for name, x in BATCH.items()}
    for task in (LanguageModel(), LanguageModel(label_smoothing=0.1, z_loss=0.1)):
        def everything(table, batch, task=task):
            loss, *rest = evaluate(task, batch, table)
            return loss, rest

        run = jax.jit(jax.value_and_grad(everything, has_aux=True))
        first, *others = (run(TABLE, batch) for batch in (BATCH, garbage, short))
        for other in others:
            for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        (counted, _), _ = run(TABLE, garbage | {"weight": np.ones(B, np.float32)})
        assert abs(counted - first[0][0]) > 0.1  # negative control


def test_a_batch_of_padding_is_zeros():
    loss, weight, metrics = evaluate(LanguageModel(), BATCH | {"weight": np.zeros(B, np.float32)})
    assert float(loss) == float(weight) == 0
    assert all(float(x) == 0 for x in jax.tree.leaves(metrics))


def test_sums_over_parts_are_the_sum():
    """Loss and metrics are sums, so a ragged batch may be cut anywhere; the mean of means is another number."""
    _, _, whole = evaluate(LanguageModel())
    parts = [evaluate(LanguageModel(), {name: x[rows] for name, x in BATCH.items()})[2]
             for rows in (slice(0, 1), slice(1, 4))]
    for name in whole:
        sums = [sum(float(p[name][i]) for p in parts) for i in (0, 1)]
        assert sums[0] / sums[1] == pytest.approx(mean(whole, name), rel=1e-6)
    assert abs(np.mean([mean(p, "loss") for p in parts]) - mean(whole, "loss")) > 1e-3  # negative control


def test_options_may_be_traced():
    values = jnp.array([0.0, 0.1, 0.3])
    many = jax.jit(jax.vmap(lambda e: traced(LanguageModel(label_smoothing=e, z_loss=e / 10))[0]))(values)
    for e, got in zip(values, many, strict=True):
        np.testing.assert_allclose(got, evaluate(LanguageModel(float(e), float(e) / 10))[0], rtol=1e-6)
    assert abs(many[0] - many[1]) > 0.1  # negative control
    jax.jit(lambda e: LanguageModel(label_smoothing=e).validate())(0.5)  # cannot be checked, so it is not


def test_init_takes_the_shape_of_a_batch():
    variables = LanguageModel().init(Bigram(), jax.random.key(0), BATCH)
    assert jax.tree.map(jnp.shape, variables) == {"params": {"table": (V, V)}}


def test_perplexity():
    _, _, metrics = evaluate(LanguageModel())
    summary = LanguageModel().summary({"loss": mean(metrics, "loss")}, {})
    assert summary == {"perplexity": pytest.approx(np.exp(NLL.mean()), rel=1e-6)}
    assert LanguageModel().summary({"loss": math.log(50)}, {})["perplexity"] == pytest.approx(50)
    per_row = np.exp(NLL.mean(1)).mean()
    assert abs(summary["perplexity"] - per_row) > 1e-2  # negative control: the mean of perplexities is something else


@pytest.mark.parametrize("value", [-0.1, 1.0, 2])
def test_smoothing_out_of_range(value):
    with pytest.raises(UserError) as e:
        LanguageModel(label_smoothing=value).validate()
    assert str(e.value) == f"--task.label-smoothing must be in [0, 1), not {value}."
    LanguageModel(label_smoothing=0.99).validate()


class Counting(nn.Module):
    """Has a mutable collection, as BatchNorm."""

    @nn.compact
    def __call__(self, x, *, train):
        seen = self.variable("batch_stats", "seen", jnp.zeros, ())
        if train:
            seen.value = seen.value + x.sum()
        return x


def test_mutable_collections_change_in_training_only():
    variables = {"params": {}, "batch_stats": {"seen": jnp.ones(())}}
    for train, want in ((True, 4.0), (False, 1.0)):
        out, model_state = apply(Counting(), variables, jnp.ones(3), rngs={}, train=train)
        assert float(model_state["batch_stats"]["seen"]) == want
        assert (out == 1).all()
    assert float(variables["batch_stats"]["seen"]) == 1.0  # pure


class Validation:
    """What artifacts reads of the data."""

    eot = None
    raw = b"the same line again\n" * 200

    class Records(dict):
        def __len__(self):
            return 3

        def __getitem__(self, rows):
            return {"tokens": np.tile(np.arange(8, dtype=np.int32), (len(rows), 1))}

    validation = Records()

    def encode(self, text):
        return [int(c) for c in text if c.isdigit()]

    def decode(self, ids):
        return "".join(str(int(i) % 10) for i in ids)

    def validation_bytes(self, limit):
        return self.raw[:limit]


class Constant:
    context = 12

    def apply(self, variables, tokens, **_):
        return jax.nn.one_hot(jnp.full(tokens.shape, 7), 10) * 1e4, {"cache": {"none": jnp.zeros(())}}


def test_artifacts_are_texts_and_a_comparison_with_compressors(tmp_path):
    data = Validation()
    outcome = EvalResult(Constant(), computing(Constant(), {"params": {}}), data, data.validation, "validation",
                      {"bits_per_byte": 1.25}, {}, dict, step=1, seed=0, folder=tmp_path)
    lines = LanguageModel(samples=2).artifacts(outcome)
    raw = Validation.raw
    for name, packed in (("gzip -9", gzip.compress(raw, 9)), ("xz -9", lzma.compress(raw, preset=9))):
        assert f"{name} {8 * len(packed) / len(raw):.3f}" in lines[0]
    assert "this model 1.250 on the records evaluated; gzip" in lines[0] and f"on {len(raw) / 1e3:,.0f} kB" in lines[0]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["0.txt", "1.txt"]
    text = (tmp_path / "samples" / "0.txt").read_text()
    assert text == f"--- prompt\n01\n--- continuation\n{'7' * 10}\n"
    assert lines[-1] == f"  | 01{'7' * 10}"


# ------------------------------------------------------------------------------------------- a padded vocabulary


class Scores(nn.Module):
    """Its parameters are its logits."""

    @nn.compact
    def __call__(self, tokens, *, train):
        scores = self.param("scores", nn.initializers.normal(), (1, 4, 12))
        return jnp.broadcast_to(scores, (*tokens.shape, 12))


def test_padding_of_the_vocabulary_gets_no_smoothing_mass():
    """9 of 12 ids are real. The gradient by hand; without the tokenizer's size (the control) padding is pushed up."""
    task, model = LanguageModel(label_smoothing=0.3), Scores()
    tokens = np.random.default_rng(0).integers(0, 9, (2, 5)).astype(np.int32)
    batch = {"tokens": tokens, "bytes": np.ones(2, np.int32), "weight": np.ones(2, np.float32)}
    scores = np.random.default_rng(1).normal(size=(1, 4, 12)).astype(np.float32)

    def gradient(**more):
        loss = lambda scores: task.loss(model, {"params": {"scores": scores}}, batch | more, {}, True)[0]
        return np.asarray(jax.grad(loss)(scores))[0]

    p = np.exp(scores[0]) / np.exp(scores[0]).sum(-1, keepdims=True)
    target = 0.7 * np.eye(12)[tokens[:, 1:]] + 0.3 * (np.arange(12) < 9) / 9
    np.testing.assert_allclose(gradient(vocab=np.full(2, 9)), (p - target).sum(0), atol=1e-5)
    assert np.abs(gradient() - (p - target).sum(0)).max() > 0.02
    assert (gradient(vocab=np.full(2, 9))[:, 9:] > 0).all()  # padding only ever loses
