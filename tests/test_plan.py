"""The FLOP counter in closed form, against the 6ND rule, and against XLA's own; what a plan says of an experiment."""

import functools
from dataclasses import dataclass, replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.experiment import Experiment
from lab.models.gpt import GPT
from lab.models.precision import project
from lab.models.splash import splash_attention
from lab.optim import AdamW, Constant
from lab.tasks.language import LanguageModel
from lab.train.cost import cost_of, count_flops, size_of


@dataclass(frozen=True)
class Tokens:
    """Shapes of a language model's data; there is nothing to read."""

    length: int

    def record_spec(self):
        return {"tokens": ((self.length + 1,), np.int32), "bytes": ((), np.int32)}

    def metadata(self):
        return {}

    def transform(self, batch, train):
        return batch


def experiment(model, length=8, batch=4, **settings):
    return Experiment(data=Tokens(length), model=model, task=LanguageModel(), optim=AdamW(lr=Constant(1e-3)), steps=1,
                      batch=batch, **settings)


def flops(f, *shapes):
    return count_flops(jax.make_jaxpr(f)(*(jnp.zeros(s) for s in shapes)))


def xla_flops(f, *shapes):
    costs = jax.jit(f).lower(*(jnp.zeros(s) for s in shapes)).compile().cost_analysis()
    return (costs[0] if isinstance(costs, list) else costs)["flops"]


# ---------------------------------------------------------------------------------------------------- count_flops

PRODUCT = 2 * 3 * 4 * 5
SQUARE = 2 * 4 * 4 * 4


def test_products():
    assert flops(jnp.dot, (3, 4), (4, 5)) == PRODUCT
    assert flops(jnp.dot, (4,), (4,)) == 2 * 4
    assert flops(jnp.matmul, (7, 3, 4), (7, 4, 5)) == 7 * PRODUCT
    assert flops(lambda a, b: jnp.einsum("bijk,bkjl->bil", a, b), (2, 3, 4, 5), (2, 5, 4, 6)) == 2 * 2 * 3 * 6 * 4 * 5
    assert flops(lambda a, b: jnp.dot(a, b) + jnp.dot(a, 2 * b), (3, 4), (4, 5)) == 2 * PRODUCT
    assert flops(lambda a: jnp.exp(a).sum(), (3, 4)) == 0
    assert flops(jax.jit(jnp.dot), (3, 4), (4, 5)) == PRODUCT
    assert flops(jax.vmap(jnp.dot), (7, 3, 4), (7, 4, 5)) == 7 * PRODUCT


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions(groups):
    """An output element is a product over the window and the input channels of its group."""
    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", feature_group_count=groups,
                                            dimension_numbers=("NHWC", "HWIO", "NHWC"))

    shapes = (2, 8, 8, 4), (3, 3, 4 // groups, 12)
    assert flops(conv, *shapes) == 2 * (2 * 4 * 4 * 12) * (3 * 3 * 4 // groups)
    transposed = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (2, 2), "SAME", feature_group_count=groups, dimension_numbers=("NCHW", "OIHW", "NCHW"))
    assert flops(transposed, (2, 4, 8, 8), (12, 4 // groups, 3, 3)) == flops(conv, *shapes)
    if groups > 1:  # negative control: the group's share of the channels, not all of them
        assert flops(conv, *shapes) != 2 * (2 * 4 * 4 * 12) * (3 * 3 * 4)


def test_the_backward_pass_of_a_convolution_takes_twice_the_forward_pass():
    """"VALID" and stride 1, where no padding is multiplied in the weights' gradient."""
    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    shapes = (2, 9, 9, 4), (3, 3, 4, 12)
    towards_weights = flops(lambda x, w: jax.vjp(lambda w: conv(x, w), w)[1](jnp.ones((2, 7, 7, 12))), *shapes)
    assert towards_weights == 2 * flops(conv, *shapes)  # the forward pass is in it


def chain(n, wrap=lambda f: f):
    """x @ w, n times in a scan."""
    def f(x, w):
        return jax.lax.scan(wrap(lambda x, _: (x @ w, None)), x, None, length=n)[0]

    return f


def test_a_scan_counts_as_often_as_it_runs_and_xla_counts_it_once():
    shapes = (4, 4), (4, 4)
    assert flops(chain(10), *shapes) == 10 * SQUARE

    def nested(x, w):
        return jax.lax.scan(lambda x, _: (chain(3)(x, w) @ w, None), x, None, length=5)[0]

    assert flops(nested, *shapes) == 5 * (3 + 1) * SQUARE
    unrolled = lambda x, w: x @ w @ w @ w @ w @ w @ w @ w @ w @ w @ w
    assert flops(unrolled, *shapes) == 10 * SQUARE
    assert xla_flops(unrolled, *shapes) == pytest.approx(10 * SQUARE, rel=0.05)
    assert xla_flops(chain(10), *shapes) < 2 * SQUARE  # negative control: why there is an own counter
    assert flops(jax.vmap(chain(10), in_axes=(0, None)), (6, 4, 4), (4, 4)) == 60 * SQUARE


def test_branches_loops_and_wrappers():
    x, w = (4, 4), (4, 4)
    cond = lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)
    assert flops(cond, x, w) == 2 * SQUARE  # the larger branch, not both, whichever comes first
    assert flops(lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w @ w), x, w) == 2 * SQUARE
    switch = lambda x, w: jax.lax.switch(1, [lambda: x, lambda: x @ w, lambda: x @ w @ w @ w])
    assert flops(lambda x, w, i: jax.lax.switch(i.astype(int), [lambda: x, lambda: x @ w @ w @ w]), x, w, ()) \
        == 3 * SQUARE
    assert flops(switch, x, w) in (SQUARE, 3 * SQUARE)  # a constant index may be resolved
    assert flops(lambda x, w: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x), x, w) == SQUARE
    assert flops(jax.checkpoint(lambda x, w: x @ w), x, w) == SQUARE
    again = jax.checkpoint(lambda x, w: jnp.sin(jnp.sin(x @ w) @ w))
    plain = lambda x, w: jnp.sin(jnp.sin(x @ w) @ w)
    backward = [flops(jax.grad(lambda x, w, f=f: f(x, w).sum(), (0, 1)), x, w) for f in (plain, again)]
    assert backward[0] == 6 * SQUARE and backward[1] > backward[0]  # recomputation is counted where it is traced
    logits = lambda x, w: project(x, w, None, jnp.float32)
    assert flops(logits, x, w) == SQUARE  # custom_vjp
    assert flops(jax.grad(lambda x, w: logits(x, w).sum(), (0, 1)), x, w) in (2 * SQUARE, 3 * SQUARE)
    assert flops(lambda x, w: jax.nn.relu(x @ w) @ w, x, w) == 2 * SQUARE  # custom_jvp beside products


# ---------------------------------------------------------------------------------------------------------- plans

# Unrolled: small; scanned: medium, which would take long to trace otherwise. The next test: they are equal.
@pytest.mark.parametrize("model,batch", [(GPT(vocab=50257), 2), (GPT(24, 1024, 16, vocab=50257, scan=True), 3)],
                         ids=["small", "medium"])
def test_gpt2_is_within_1_percent_of_the_rule(model, batch):
    """6 N D (Kaplan et al. 2020), N without the position table, which multiplies nothing, plus attention's products:
    2 products x 2 FLOPs x length x width, forward once and backward twice, for every token and block."""
    length = 1024
    plan = cost_of(experiment(model, length, batch))
    tokens, table = batch * length, model.context * model.width
    attention = 12 * model.depth * model.width * length * tokens
    rule = 6 * (plan.parameters - table) * tokens + attention
    assert plan.flops == pytest.approx(rule, rel=0.01)
    assert plan.parameters == {12: 124_439_808, 24: 354_823_168}[model.depth]
    assert abs(plan.flops / (rule - attention) - 1) > 0.05  # negative control: attention is in it
    exact = model.depth * 12 * model.width**2 + model.vocab * model.width  # matrices only: no biases, no norms
    assert plan.flops == 6 * exact * tokens + attention


def test_the_kernel_of_splash_attention():
    """The two products of attention, for every block; heads, rows and blocks are its grid."""
    shape = (2, 256, 4, 64)
    assert flops(functools.partial(splash_attention, causal=True), shape, shape, shape) == 4 * 2 * 4 * 256 * 256 * 64


TINY = GPT(depth=2, width=16, heads=2, vocab=11, context=8)


def test_scan_remat_and_microbatches_do_not_change_the_flops():
    plan = cost_of(experiment(TINY))
    for model in (replace_model(scan=True), replace_model(remat="blocks")):
        assert cost_of(experiment(model)).flops == plan.flops
    assert cost_of(experiment(TINY, grad_accum_steps=4)).flops == plan.flops
    assert cost_of(experiment(TINY, precision="bfloat16")).flops == plan.flops
    assert cost_of(replace(experiment(TINY), task=LanguageModel(chunk=4))).flops == plan.flops
    assert cost_of(experiment(TINY, batch=8)).flops == 2 * plan.flops  # negative controls
    assert cost_of(experiment(replace_model(depth=1))).flops < plan.flops


def replace_model(**fields):
    return TINY.clone(**fields)


def test_activations_shrink_with_remat_microbatches_and_bfloat16():
    """Of a model whose activations outweigh its parameters."""
    def kept(batch=16, fields=None, **settings):
        return cost_of(experiment(TINY.clone(**fields or {}), batch=batch, **settings)).activations

    all_of_it = kept(fields={"scan": True})
    assert kept(fields={"remat": "blocks"}) < 0.5 * kept()
    assert kept(fields={"scan": True, "remat": "blocks"}) < 0.5 * all_of_it
    half = kept(fields={"scan": True}, grad_accum_steps=2)
    assert half == kept(fields={"scan": True}, batch=8)
    assert half < 0.7 * all_of_it
    assert kept(fields={"scan": True}, precision="bfloat16") < 0.9 * all_of_it


class Two(nn.Module):
    """Two matrices, and a module with a number in its name."""

    @nn.compact
    def __call__(self, tokens, *, train):
        x = nn.Embed(11, 4, name="wte")(tokens)
        for i in range(3):
            x = nn.Dense(4, name=f"layer_{i}")(x)
        return nn.Dense(11, use_bias=False, name="head_norm")(x)


def test_modules():
    plan = cost_of(experiment(Two()))
    assert dict((name, rest) for name, *rest in plan.modules()) == {
        "wte": [44, 1], "layer_*": [60, 6], "head_norm": [44, 1]}
    assert sorted(plan.modules(2)) == [("head_norm/kernel", 44, 1), ("layer_*/bias", 12, 3),
                                       ("layer_*/kernel", 48, 3), ("wte/embedding", 44, 1)]
    for depth in (1, 2, 5):
        assert sum(size for _, size, _ in plan.modules(depth)) == plan.parameters == 148
    assert plan.flops == 6 * (3 * 16 + 44) * 4 * 8
    scanned, unrolled = (cost_of(experiment(replace_model(scan=s))).modules(1) for s in (True, False))
    assert sorted(size for _, size, _ in scanned) == sorted(size for _, size, _ in unrolled)
    assert {name for name, *_ in scanned} == {"wte", "wpe", "blocks", "final_norm"}
    assert {name for name, *_ in unrolled} == {"wte", "wpe", "block_*", "final_norm"}


def test_size_of():
    tree = {"a": jax.ShapeDtypeStruct((3, 5), jnp.float32), "b": [jnp.zeros((), jnp.int32), np.zeros(7, np.uint16)],
            "c": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16), "d": None}
    assert size_of(tree) == 60 + 4 + 14 + 12
    assert size_of({}) == 0
    plan = cost_of(experiment(TINY))
    assert size_of(plan.state.params) == 4 * plan.parameters
    assert size_of(plan.state.opt_state) >= 8 * plan.parameters  # AdamW's two moments


def test_a_plan_computes_nothing():
    """A model that would need 100 TB."""
    plan = cost_of(experiment(GPT(depth=2, width=1 << 20, heads=1 << 13, vocab=11, context=8, scan=True)))
    assert plan.parameters > 2 * 12 * (1 << 40)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(plan.state))
