"""The loss in chunks of positions: the same sums and gradients as all at once, and no array as large as all logits."""

import functools
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.errors import UserError
from lab.experiment import Mesh
from lab.models.gpt import GPT
from lab.models.rnn import LSTM
from lab.planning import hlo
from lab.tasks.chunks import over_chunks
from lab.tasks.language import LanguageModel
from lab.train.program import Program
from lab.train.step import cast
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

B, L, V = 4, 12, 20
RNG = np.random.default_rng(0)
BATCH = {"tokens": RNG.integers(0, V, (B, L + 1)).astype(np.int32), "bytes": np.array([20, 30, 25, 31], np.int32),
         "weight": np.array([1, 1, 0, 1], np.float32)}
SMALL = GPT(depth=1, width=16, heads=2, vocab=V, context=16, bias=False)  # without biases, as a key's has no gradient


@functools.cache
def params_of(model):
    """Initial values five times as large, so that the logits are not all alike."""
    return jax.tree.map(lambda x: 5 * x, model.init(jax.random.key(0), BATCH["tokens"][:1, :-1], train=False)["params"])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _computed(model, precision, chunk, params, smoothing, z_loss):
    """(objective, (weight, metrics)) and the gradient of every parameter, with traced numbers."""
    def loss(params):
        task = LanguageModel(chunk=chunk, label_smoothing=smoothing, z_loss=z_loss)
        objective, weight, metrics, _ = task.loss(model, {"params": cast(params, precision)}, BATCH, {}, True)
        return 3 * objective, (weight, metrics)

    return jax.value_and_grad(loss, has_aux=True)(params)


def apart(a, b):
    """The largest difference of two trees' arrays, as a share of the array's largest number."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max() / (np.abs(x).max() + 1e-6)), a, b)))


@pytest.mark.parametrize(("changes", "chunk", "precision"), [
    ({}, 4, "float32"), ({}, 5, "float32"), ({"tied": False, "softcap": 4.0}, 100, "float32"),
    ({"softcap": 4.0}, 3, "bfloat16"),
], ids=["divides", "remainder", "untied-softcap-all", "bfloat16"])
def test_values_gradients_and_metrics_are_those_of_the_whole(changes, chunk, precision):
    model = SMALL.clone(**changes)
    whole, parts, other = (_computed(model, precision, c, params_of(model), e, 0.01)
                           for c, e in ((None, 0.1), (chunk, 0.1), (chunk, 0.3)))
    limit = 5e-6 if precision == "float32" else 2e-2
    assert apart(whole, parts) < limit
    assert apart(whole, other) > 2 * limit  # negative control


def test_plain_cross_entropy_and_evaluation():
    """Without smoothing and z-loss, also where nothing is differentiated."""
    variables = {"params": params_of(SMALL)}
    whole, parts = (jax.jit(lambda v, c=c: LanguageModel(chunk=c).loss(SMALL, v, BATCH, {}, False)[:3])(variables)
                    for c in (None, 5))
    assert apart(whole, parts) < 2e-6 and set(parts[2]) == {"loss", "accuracy", "bits_per_byte"}
    assert float(parts[1]) == 3 * L


def test_under_vmap():
    """As in a study, which maps over arms: parameters and numbers."""
    def value(chunk, params, smoothing):
        task = LanguageModel(chunk=chunk, label_smoothing=smoothing)
        return jax.value_and_grad(lambda p: task.loss(SMALL, {"params": p}, BATCH, {}, True)[0])(params)

    two = jax.tree.map(lambda x: jnp.stack([x, 1.5 * x]), params_of(SMALL))
    whole, parts = (jax.jit(jax.vmap(functools.partial(value, c)))(two, jnp.array([0.1, 0.3])) for c in (None, 5))
    assert apart(whole, parts) < 5e-6


def test_the_head_is_multiplied_once():
    """Three products with the kernel's size: logits, and the derivatives towards both operands."""
    def sums(x, kernel, given, numbers):
        return jnp.square(x @ kernel).sum(), ()

    def products(f):
        text = jax.jit(jax.grad(f, argnums=(0, 1))).lower(jnp.ones((2, 12, 8)), jnp.ones((8, 64))).as_text()
        return text.count("stablehlo.dot_general")

    assert products(lambda x, k: over_chunks(sums, 4, x, k, (), ())[0]) == 3
    recomputed = jax.checkpoint(lambda x, k: sums(x, k, (), ())[0])
    assert products(lambda x, k: recomputed(x, k) * jnp.sin(k[0, 0])) == 4  # negative control: the usual way


# ------------------------------------------------------------------------------------------- in the compiled update


def numbers_in(compiled):
    """Numbers in the largest array of a compiled program."""
    program = hlo.HloModule(compiled.as_text())
    shapes = (i.shape for c in program.computations.values() for i in c.instructions.values())
    return max(math.prod(map(int, dims.split(","))) for shape in shapes for dims in re.findall(r"\[([\d,]+)\]", shape))


@pytest.mark.parametrize("mesh", [Mesh(1), Mesh(2, 2, 2)], ids=["alone", "divided"])
def test_no_array_holds_all_logits(tiny, mesh):
    def largest(chunk):
        model = tiny.model.clone(depth=1, vocab=1024)
        return numbers_in(Program(replace(tiny, mesh=mesh, batch=64, model=model, task=LanguageModel(chunk=chunk))
                                  ).lower().compile())

    logits = 64 * tiny.data.length * 1024 // (mesh.data * mesh.fsdp * mesh.tensor)
    assert largest(None) >= logits  # negative control
    assert largest(2) <= logits // 4


def test_a_divided_update_is_that_of_one_device(tiny):
    def losses(program, updates=3):
        state, found = program.init(), []
        for step in range(updates):
            tokens = np.random.default_rng(step).integers(0, 256, (8, 17)).astype(np.int32)
            rows = {"tokens": tokens, "bytes": np.full(8, 16, np.int32), "weight": np.ones(8, np.float32),
                    "index": np.arange(8, dtype=np.int32)}
            state, metrics = program.train(state, program.batch(lambda _, rows=rows: rows, step))
            found.append(float(metrics["loss"][0] / metrics["loss"][1]))
        return np.array(found)

    small = replace(tiny, model=tiny.model.clone(depth=1), mesh=Mesh(1))
    one, divided = Program(small), Program(replace(small, mesh=Mesh(1, 2, 2, 2), task=LanguageModel(chunk=4)))
    alone = losses(one)
    assert np.abs(losses(divided) - alone).max() < 1e-5
    assert np.abs(losses(one.like(replace(small, seed=1))) - alone).max() > 1e-4  # negative control


def test_mistakes_are_said():
    with pytest.raises(UserError, match=r"--task\.chunk must be at least 1, or None, not 0"):
        LanguageModel(chunk=0).validate()
    with pytest.raises(UserError, match="LSTM has none"):
        LanguageModel(chunk=8).init(LSTM(classes=2, vocab=V), jax.random.key(0), BATCH)
