"""Schedules in closed form; optimizers against NumPy and torch, each with a negative control; masks, groups, EMA."""

import dataclasses
import functools
import re
from dataclasses import replace
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro

from lab.errors import UserError
from lab.optim import (
    SGD,
    Adafactor,
    Adam,
    AdamW,
    Constant,
    Cosine,
    InverseSqrt,
    LinearDecay,
    Lion,
    Muon,
    Optimizer,
    ScheduleFreeAdamW,
    WarmupStableDecay,
)
from lab.optim.matrices import Matrix
from lab.optim.matrices import matrices as found_matrices

HIDDEN = Matrix((), (0,), (1,), head=False)
MATRICES = {"kernel": HIDDEN, "dense/kernel": HIDDEN, "out/kernel": HIDDEN}
UPDATES = 20
RATE = LinearDecay(0.02, warmup=5, end=0.1)
SHAPES = {"dense/kernel": (6, 5), "dense/bias": (5,), "norm/scale": (6,), "wte/embedding": (7, 6), "out/kernel": (5, 8)}
DECAYED = {"dense/kernel", "out/kernel"}
START = {path: np.random.default_rng([1, i]).normal(size=s) for i, (path, s) in enumerate(SHAPES.items())}
NOISE = {path: np.random.default_rng([2, i]).normal(size=(UPDATES, *s)) for i, (path, s) in enumerate(SHAPES.items())}


def gradient(path, t, w):
    """Varied over updates (two orders of magnitude) and a function of the parameter: works for NumPy, torch and JAX."""
    return NOISE[path][t] * 10 ** np.sin(t) + 0.3 * w


def nest(flat):
    """{"a/b": x} -> {"a": {"b": x}}, as float32."""
    tree = {}
    for path, x in flat.items():
        module, name = path.split("/")
        tree.setdefault(module, {})[name] = jnp.asarray(x, jnp.float32)
    return tree


def flat(tree):
    return {f"{m}/{n}": np.asarray(x, np.float64) for m, sub in tree.items() for n, x in sub.items()}


def compiled(tx):
    """(parameters, state, gradients) -> (parameters, state), and the initial state."""

    @jax.jit
    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return update, jax.jit(tx.init)


@functools.cache
def runs(optimizer):
    """Parameters and those to evaluate with (flat, float64), after UPDATES updates with the gradients above."""
    update, init = compiled(optimizer.build(UPDATES, MATRICES))
    params = nest(START)
    state = init(params)
    for t in range(UPDATES):
        grads = nest({path: gradient(path, t, w) for path, w in flat(params).items()})
        params, state = update(params, state, grads)
    return flat(params), flat(optimizer.eval_params(state, params))


def run(optimizer):
    return runs(optimizer)[0]


def gap(found, wanted):
    """Greatest difference as a fraction of how far the parameters moved."""
    return max(np.abs(found[p] - wanted[p]).max() / np.abs(wanted[p] - START[p]).max() for p in START)


# --- references in NumPy, float64: step(state, g, t) -> direction ---------------------------------------------------


def np_sgd(momentum=0.0, nesterov=False):
    def step(s, g, t, w):
        s["m"] = g + momentum * s.get("m", 0)
        return g + momentum * s["m"] if nesterov else s["m"]
    return step


def np_adam(b1, b2, eps=1e-8):
    def step(s, g, t, w):
        s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
        s["v"] = b2 * s.get("v", 0) + (1 - b2) * g * g
        return s["m"] / (1 - b1 ** (t + 1)) / (np.sqrt(s["v"] / (1 - b2 ** (t + 1))) + eps)
    return step


def np_lion(b1, b2):
    def step(s, g, t, w):
        m = s.get("m", 0)
        s["m"] = b2 * m + (1 - b2) * g
        return np.sign(b1 * m + (1 - b1) * g)
    return step


def np_adafactor(factored_from, exponent=0.8, threshold=1.0, relative=True):
    def step(s, g, t, w):
        b = 1 - (t + 1.0) ** -exponent
        s["v"] = b * s.get("v", 0) + (1 - b) * g * g
        v = s["v"]
        if g.ndim == 2 and min(g.shape) >= factored_from:  # Shazeer & Stern 2018, equation 4: R C / mean
            v = v.mean(1, keepdims=True) * v.mean(0, keepdims=True) / v.mean()
        u = g / np.sqrt(v)
        u /= max(1, np.sqrt(np.mean(u**2)) / threshold)
        return u * max(np.sqrt(np.mean(w**2)), 1e-3) if relative else u
    return step


def newton_schulz(x):
    x = x / np.linalg.norm(x)
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x


def np_muon(momentum=0.95, rms=0.2, adam_b2=0.95):
    adam = np_adam(0.9, adam_b2)

    def step(s, g, t, w, path):
        if path not in DECAYED:
            return adam(s, g, t, w)
        s["m"] = momentum * s.get("m", 0) + (1 - momentum) * g
        ahead = momentum * s["m"] / (1 - momentum ** (t + 2)) + (1 - momentum) * g / (1 - momentum ** (t + 1))
        return newton_schulz(ahead) * rms * np.sqrt(max(g.shape))
    return step


def reference(step, weight_decay=0.0, decayed=DECAYED, coupled=0.0):
    rate, result = RATE.build(UPDATES), {}
    for path, w in START.items():
        state = {}
        for t in range(UPDATES):
            g = gradient(path, t, w) + coupled * w * (path in decayed)
            u = step(state, g, t, w, path) if step.__code__.co_argcount == 5 else step(state, g, t, w)
            w = w - float(rate(t)) * (u + weight_decay * w * (path in decayed))
        result[path] = w
    return result


CASES = {  # name: (optimizer, reference, a wrong optimizer that the same comparison must catch)
    "gradient descent": (SGD(RATE), reference(np_sgd()), SGD(replace(RATE, end=0.12))),
    "momentum": (SGD(RATE, momentum=0.9), reference(np_sgd(0.9)), SGD(RATE, momentum=0.9, nesterov=True)),
    "nesterov": (SGD(RATE, momentum=0.9, nesterov=True), reference(np_sgd(0.9, True)), SGD(RATE, momentum=0.9)),
    "sgd with l2": (SGD(RATE, momentum=0.9, l2=0.1), reference(np_sgd(0.9), coupled=0.1),
                    SGD(RATE, momentum=0.9, weight_decay=0.1)),
    "sgd with decay": (SGD(RATE, momentum=0.9, weight_decay=0.1), reference(np_sgd(0.9), 0.1),
                       SGD(RATE, momentum=0.9, l2=0.1)),
    "adam": (Adam(RATE), reference(np_adam(0.9, 0.999)), Adam(RATE, b2=0.99)),
    "adam with l2": (Adam(RATE, l2=0.1), reference(np_adam(0.9, 0.999), coupled=0.1), Adam(RATE, weight_decay=0.1)),
    "adamw": (AdamW(RATE), reference(np_adam(0.9, 0.95), 0.1), Adam(RATE, b2=0.95, l2=0.1)),
    "adamw's mask": (AdamW(RATE), reference(np_adam(0.9, 0.95), 0.1), AdamW(RATE, no_decay="dense")),
    "adamw, other mask": (AdamW(RATE, no_decay="out"),
                          reference(np_adam(0.9, 0.95), 0.1, {"dense/kernel"}), AdamW(RATE)),
    "lion": (Lion(RATE), reference(np_lion(0.9, 0.99), 0.3), Lion(RATE, b2=0.95)),
    "adafactor": (Adafactor(RATE), reference(np_adafactor(128)), Adafactor(RATE, factored_from=5)),
    "adafactor, factored": (Adafactor(RATE, factored_from=6, weight_decay=0.1), reference(np_adafactor(6), 0.1),
                            Adafactor(RATE, factored_from=6, weight_decay=0.1, relative=False)),
    "adafactor, absolute": (Adafactor(RATE, relative=False, threshold=0.5),
                            reference(np_adafactor(128, threshold=0.5, relative=False)),
                            Adafactor(RATE, relative=False)),
    "muon": (Muon(RATE), reference(np_muon(), 0.1), Muon(RATE, momentum=0.9)),
    "muon's adam": (Muon(RATE, b2=0.99), reference(np_muon(adam_b2=0.99), 0.1), Muon(RATE)),
}


@pytest.mark.parametrize("name", CASES)
def test_numpy(name):
    optimizer, wanted, wrong = CASES[name]
    optimizer.validate(UPDATES)
    assert gap(run(optimizer), wanted) < 2e-5
    assert gap(run(wrong), wanted) > 2e-3


TORCH = {  # name: (torch class, its arguments, optimizer, wrong optimizer); no parameter is masked
    "SGD": ("SGD", {}, SGD(0.02), SGD(0.0201)),
    "momentum": ("SGD", {"momentum": 0.9}, SGD(0.02, momentum=0.9), SGD(0.02, momentum=0.89)),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}, SGD(0.02, momentum=0.9, nesterov=True),
                 SGD(0.02, momentum=0.9)),
    "Adam": ("Adam", {"betas": (0.9, 0.999)}, Adam(0.02), Adam(0.02, b1=0.89)),
    "AdamW": ("AdamW", {"betas": (0.9, 0.95), "weight_decay": 0.1}, AdamW(0.02), Adam(0.02, b2=0.95, l2=0.1)),
}


@pytest.mark.parametrize("name", TORCH)
def test_torch(name):
    torch = pytest.importorskip("torch", reason="torch is not installed: the NumPy references remain")
    kind, arguments, optimizer, wrong = TORCH[name]
    wanted = {}
    for path, w in START.items():
        w = torch.nn.Parameter(torch.tensor(w))
        # Torch's AdamW has no mask: the same values at what is masked here come from a decay of 0.
        options = arguments if path in DECAYED else {k: v for k, v in arguments.items() if k != "weight_decay"}
        options = {"weight_decay": 0.0, **options}
        theirs = getattr(torch.optim, kind)([w], lr=0.02, **options)
        for t in range(UPDATES):
            w.grad = torch.as_tensor(gradient(path, t, w.detach().numpy()))
            theirs.step()
        wanted[path] = w.detach().numpy()
    assert gap(run(optimizer), wanted) < 2e-5
    assert gap(run(wrong), wanted) > 2e-3


def np_schedule_free(b1, b2, decay, shift=0):
    """Defazio et al. 2024, algorithm 1, with weights max lr^2 as in their code. Returns (y, x)."""
    rate, ys, xs = RATE.build(UPDATES), {}, {}
    for path, w in START.items():
        x = y = z = w
        v = total = top = 0.0
        for t in range(UPDATES):
            g = gradient(path, t, y)
            v = b2 * v + (1 - b2) * g * g
            u = g / (np.sqrt(v / (1 - b2 ** (t + 1))) + 1e-8)
            z = z - float(rate(t)) * (u + decay * y * (path in DECAYED))
            top = max(top, float(rate(t + shift)))
            total += top**2
            x = x + top**2 / total * (z - x)
            y = b1 * x + (1 - b1) * z
        ys[path], xs[path] = y, x
    return ys, xs


def test_schedule_free():
    optimizer = ScheduleFreeAdamW(RATE)
    y, x = np_schedule_free(0.9, 0.999, 0.1)
    assert gap(run(optimizer), y) < 5e-5 and gap(runs(optimizer)[1], x) < 5e-5
    assert gap(run(optimizer), x) > 2e-3  # the parameters are not their average
    assert gap(run(replace(optimizer, b1=0.85)), y) > 2e-3
    assert gap(run(optimizer), np_schedule_free(0.9, 0.999, 0.1, shift=1)[0]) > 2e-3  # optax's own off-by-one weights


# --- Muon -----------------------------------------------------------------------------------------------------------


def step_of(optimizer, params, grads, matrices=MATRICES):
    """The first update; compiled, because the suite would otherwise spend a minute on single operations."""
    tx = optimizer.build(10, matrices)
    return jax.device_get(jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])(grads, params))


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (48, 12)])
def test_muon_orthogonal_with_equal_rms(shape):
    u, _, vh = np.linalg.svd(np.random.default_rng(0).normal(size=shape), full_matrices=False)
    g = u * np.geomspace(0.1, 10, min(shape)) @ vh
    params, grads = {"kernel": jnp.zeros(shape)}, {"kernel": jnp.asarray(g, jnp.float32)}
    step = np.asarray(step_of(Muon(1.0, weight_decay=0.0, rms=0.25), params, grads)["kernel"], np.float64)
    singular = np.linalg.svd(step, compute_uv=False) / (0.25 * np.sqrt(max(shape)))
    assert singular.min() > 0.6 and singular.max() < 1.3  # those of the gradient span a factor of 100
    assert 0.7 < np.sqrt(np.mean(step**2)) / 0.25 < 1.2
    np.testing.assert_allclose(step, -0.25 * np.sqrt(max(shape)) * newton_schulz(g), atol=2e-5)


def test_muon_takes_stacks_and_heads_as_matrices():
    rng = np.random.default_rng(0)
    def draw(*shape):
        return np.asarray(rng.normal(size=shape), np.float32)
    grads = {"blocks": {"up": {"kernel": draw(3, 6, 8), "bias": draw(3, 8)},
                        "query": {"kernel": draw(3, 6, 2, 4), "bias": draw(3, 2, 4)},
                        "out": {"kernel": draw(3, 2, 4, 6)}},
             "conv": {"kernel": draw(3, 3, 2, 4)}, "head": draw(6, 9), "wte": {"embedding": draw(9, 6)}}
    muon = Muon(1.0, weight_decay=0.0)

    def one(g):
        return np.asarray(step_of(muon, {"kernel": g}, {"kernel": g})["kernel"])

    matrices = {"blocks/up/kernel": Matrix((0,), (1,), (2,), False),
                "blocks/query/kernel": Matrix((0,), (1,), (2, 3), False),
                "blocks/out/kernel": Matrix((0,), (1, 2), (3,), False),
                "conv/kernel": Matrix((), (0, 1, 2), (3,), False), "head": Matrix((), (0,), (1,), True)}
    steps = step_of(muon, grads, grads, matrices)
    blocks, found = grads["blocks"], steps["blocks"]
    for i in range(3):
        for name, matrix in (("up", (6, 8)), ("query", (6, 8)), ("out", (8, 6))):
            wanted = one(blocks[name]["kernel"][i].reshape(matrix))
            np.testing.assert_allclose(found[name]["kernel"][i].reshape(matrix), wanted, atol=1e-5)
    wanted = one(grads["conv"]["kernel"].reshape(18, 4)).reshape(3, 3, 2, 4)
    np.testing.assert_allclose(steps["conv"]["kernel"], wanted, atol=1e-5)
    for g, step in ((blocks["up"]["bias"], found["up"]["bias"]), (blocks["query"]["bias"], found["query"]["bias"]),
                    (grads["head"], steps["head"]), (grads["wte"]["embedding"], steps["wte"]["embedding"])):
        np.testing.assert_allclose(step, -np.sign(g), atol=1e-5)  # Adam's first step
    unstacked = matrices | {"blocks/up/kernel": Matrix((), (0, 1), (2,), False)}
    wrong = step_of(muon, grads, grads, unstacked)["blocks"]["up"]["kernel"]
    assert np.abs(wrong - found["up"]["kernel"]).max() > 0.01
    other = step_of(replace(muon, adam="^conv"), grads, grads, matrices)
    np.testing.assert_allclose(other["conv"]["kernel"], -np.sign(grads["conv"]["kernel"]), atol=1e-5)
    slow = step_of(replace(muon, adam_lr=0.5), grads, grads, matrices)
    np.testing.assert_allclose(slow["head"], steps["head"] / 2, atol=1e-6)
    np.testing.assert_allclose(slow["conv"]["kernel"], steps["conv"]["kernel"], atol=1e-6)
    with pytest.raises(UserError, match="no hidden matrix"):
        muon.build(5, {"head": matrices["head"]}).init({"head": jnp.ones((2, 2))})


# --- schedules ------------------------------------------------------------------------------------------------------


def test_schedules_in_closed_form():
    N, W = 100, 10
    def cosine(t):
        return 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * t))
    closed = {  # after warm-up, as a function of the number of completed updates
        Constant(2.0, W): lambda c: 1.0,
        LinearDecay(2.0, W, 0.1): lambda c: 1 - 0.9 * (c - 9) / 90,
        Cosine(2.0, W, 0.1): lambda c: cosine((c - 9) / 90),
        InverseSqrt(2.0, W): lambda c: np.sqrt(10 / (c + 1)),
        WarmupStableDecay(2.0, W, 20, 0.1): lambda c: 1.0 if c <= 79 else 1 - 0.9 * (c - 79) / 20,
    }
    ends = [2.0, 0.2, 0.2, 2 * np.sqrt(0.1), 0.2]
    for (schedule, shape), end in zip(closed.items(), ends, strict=True):
        schedule.validate(N)
        rate = jax.jit(schedule.build(N))
        wanted = [2 * (c + 1) / W if c < W else 2 * shape(c) for c in range(N)]
        np.testing.assert_allclose(rate(np.arange(N)), wanted, rtol=2e-6)
        np.testing.assert_allclose([rate(0), rate(W - 1), rate(N - 1), rate(N + 50)][:3], [0.2, 2.0, end], rtol=1e-6)
        assert np.argmax(rate(np.arange(N))) == W - 1
        if not isinstance(schedule, InverseSqrt):
            np.testing.assert_allclose(rate(N + 50), end, rtol=1e-6)  # stays where it ended


@pytest.mark.parametrize("schedule", [Constant(2.0), LinearDecay(2.0), Cosine(2.0), WarmupStableDecay(2.0, 0, 1),
                                      InverseSqrt(2.0, 1)])
def test_schedules_at_their_edges(schedule):
    for steps in (2, 3, 50):
        assert schedule.build(steps)(0) == 2.0  # no warm-up: the peak at once
    assert np.isfinite(schedule.build(1)(0))
    np.testing.assert_allclose(replace(schedule, warmup=1).build(50)(np.arange(50)), schedule.build(50)(np.arange(50)))


def test_the_rate_is_the_rate_used():
    optimizer = SGD(Cosine(0.5, warmup=3))
    tx, w, rate = optimizer.build(8), {"w": jnp.zeros(())}, optimizer.rate(8)
    state = tx.init(w)
    for count in range(8):
        updates, state = tx.update({"w": jnp.ones(())}, state, w)
        assert -updates["w"] == rate(count)
    assert optimizer.lr == Cosine(0.5, 3) and SGD(0.5).lr == Constant(0.5)


# --- traced numbers -------------------------------------------------------------------------------------------------

ALL = {
    "sgd": SGD(0.1, momentum=0.9, nesterov=True), "adam": Adam(0.1), "adamw": AdamW(0.1), "lion": Lion(0.1),
    "adafactor": Adafactor(0.1, momentum=0.5), "muon": Muon(0.1), "schedule-free": ScheduleFreeAdamW(0.1),
}
NUMBERS = {  # every number that may be traced, and what it is multiplied by
    "decay": 0.1, "clip": 3.0, "l1": 0.01, "l2": 0.02, "ema": 0.9, "momentum": 0.8, "b1": 0.85, "b2": 0.9, "eps": 1e-3,
    "threshold": 0.7, "exponent": 0.7, "rms": 0.3, "adam_lr": 0.6,
}


def numbered(optimizer, peak, x):
    """All numbers of an optimizer set from two scalars."""
    fields = {f.name for f in dataclasses.fields(optimizer)}
    values = {name: scale * x for name, scale in NUMBERS.items() if name in fields}
    if isinstance(optimizer, ScheduleFreeAdamW):
        del values["ema"]
    return replace(optimizer, lr=Cosine(peak, 2, 0.3 * x), lr_multipliers=(("dense", 0.5 * x),), **values)


def trained(optimizer):
    tx, params = optimizer.build(6, MATRICES), nest(START)

    def update(carry, noise):
        params, state = carry
        updates, state = tx.update(jax.tree.map(lambda n, w: n + 0.3 * w, noise, params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(update, (params, tx.init(params)), jax.tree.map(lambda n: n[:6], nest(NOISE)))
    return optimizer.eval_params(state, params)


@pytest.mark.parametrize("name", ALL)
def test_traced_numbers_equal_separate_runs(name):
    peaks, xs = np.array([0.01, 0.05]), np.array([0.5, 1.0])
    together = jax.jit(jax.vmap(lambda peak, x: trained(numbered(ALL[name], peak, x))))(peaks, xs)
    apart = flat(jax.jit(lambda: trained(numbered(ALL[name], 0.01, 0.5)))())
    first, second = (flat(jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], together)) for i in range(2))
    assert gap(first, apart) < 1e-4
    assert gap(second, apart) > 1e-2


def test_traced_zero_stays_and_does_nothing():
    with_zero = jax.jit(lambda z: trained(AdamW(0.1, weight_decay=z, l1=z, l2=z, lr_multipliers=(("out", z),))))(
        jnp.float32(0)
    )
    without = trained(AdamW(0.1, weight_decay=0.0))
    np.testing.assert_allclose(with_zero["dense"]["kernel"], without["dense"]["kernel"], rtol=1e-5)
    np.testing.assert_array_equal(with_zero["out"]["kernel"], nest(START)["out"]["kernel"])


# --- masks, groups, clipping, penalties -----------------------------------------------------------------------------


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(4, name="up")(nn.LayerNorm(name="norm")(x))
        return nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x), None


class Stack(nn.Module):
    scan: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(5, 4, name="wte")(x)
        if self.scan:
            over = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x = over(name="blocks")(x)[0]
        else:
            for i in range(3):
                x = Layer(name=f"block_{i}")(x)[0]
        return nn.Dense(2, name="last")(x)


def matrices(model):
    class Plain:
        init = staticmethod(lambda model, key, batch: model.init(key, batch["inputs"]))
        transform = staticmethod(lambda batch, train: batch)

    batch = {"inputs": np.zeros((1, 2), int), "index": np.zeros(1, int)}
    return found_matrices(SimpleNamespace(model=model, task=Plain, data=Plain), batch)


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_masks_and_updates_are_the_same_under_scan():
    def init(scan):
        return jax.jit(Stack(scan).init)(jax.random.key(0), jnp.zeros((1, 2), int))["params"]

    unrolled = jax.device_get(init(False))
    blocks = [unrolled[f"block_{i}"] for i in range(3)]
    stacked = {name: unrolled[name] for name in ("wte", "last")}
    stacked["blocks"] = jax.tree.map(lambda *x: np.stack(x), *blocks)
    made = jax.eval_shape(lambda: init(True))  # what `nn.scan` really makes
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, made)
    once, thrice = (matrices(model) for model in (Stack(False), Stack(True)))
    decays = paths(AdamW(0.1).decays(stacked, thrice))
    assert {p for p, on in decays.items() if on} == set(thrice) == {p for p in decays if p.endswith("kernel")}
    assert stacked["blocks"]["norm"]["scale"].ndim == 2 and not decays["blocks/norm/scale"]
    assert once["block_0/attention/query/kernel"] == Matrix((), (0,), (1, 2), False)
    assert thrice["blocks/attention/query/kernel"] == Matrix((0,), (1,), (2, 3), False)
    assert once["block_1/attention/out/kernel"] == Matrix((), (0, 1), (2,), False)

    for optimizer in (AdamW(0.1, weight_decay=0.5), Muon(0.1, weight_decay=0.5), Lion(0.1)):
        trees = ((params, jax.tree.map(lambda x: np.cos(7 * x), params)) for params in (stacked, unrolled))
        scanned, rolled = (step_of(optimizer, params, grads, found)
                           for (params, grads), found in zip(trees, (thrice, once), strict=True))
        for i in range(3):
            layer = jax.tree.map(lambda x, i=i: x[i], scanned["blocks"])
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), layer, rolled[f"block_{i}"])


def test_penalties_are_gradients():
    params, grads = nest(START), nest({p: n[0] for p, n in NOISE.items()})

    def penalty(p, paths=DECAYED):
        w = [p[m][n] for m, n in (path.split("/") for path in paths)]
        return sum(0.3 * jnp.abs(x).sum() + 0.2 / 2 * jnp.square(x).sum() for x in w)

    def wanted(*a):
        return jax.tree.map(lambda g, r: -(g + r), grads, jax.grad(penalty)(params, *a))

    step = step_of(SGD(1.0, l1=0.3, l2=0.2), params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), step, wanted())
    assert not np.allclose(step["wte"]["embedding"], wanted(START)["wte"]["embedding"])


def test_clip_by_global_norm():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0, 4.0])}
    np.testing.assert_allclose(step_of(SGD(1.0, grad_clip_norm=1.0), params, grads)["b"], [0, -0.8], rtol=1e-6)
    np.testing.assert_allclose(step_of(SGD(1.0, grad_clip_norm=6.0), params, grads)["b"], [0, -4.0], rtol=1e-6)
    frozen = step_of(SGD(1.0, grad_clip_norm=4.0, lr_multipliers=(("a", 0.0),)), params, grads)  # |b| alone is 4
    np.testing.assert_allclose(frozen["b"], [0, -4.0], rtol=1e-6)
    assert not np.isfinite(
        step_of(SGD(1.0, grad_clip_norm=1.0), params, {**grads, "a": jnp.full(2, jnp.nan)})["b"]
    ).any()


@pytest.mark.parametrize("name", ALL)
def test_groups(name):
    optimizer = replace(
        ALL[name], weight_decay=0.1, lr_multipliers=(("dense", 0.25), ("^out/", 0.0), ("dense|wte", 3.0))
    )

    def first(o):
        return step_of(o, nest(START), nest({p: n[0] for p, n in NOISE.items()}))
    found, plain = first(optimizer), first(replace(optimizer, lr_multipliers=()))
    for module, multiplier in (("dense", 0.25), ("wte", 3.0), ("norm", 1.0)):
        jax.tree.map(lambda a, b, m=multiplier: np.testing.assert_allclose(a, m * b, rtol=1e-3, atol=1e-5),
                     found[module], plain[module])
    assert np.abs(plain["out"]["kernel"]).min() > 0  # the control of the next lines
    for params in runs(optimizer):
        np.testing.assert_array_equal(params["out/kernel"], np.float32(START["out/kernel"]))


def test_groups_that_fit_nothing():
    for groups, message in (((("atention", 0.5),), r"'atention' matches no parameter\. Some paths: dense/bias, "),
                            ((("dense", 0.5), ("dense/bias", 2.0)), "that an earlier group has not taken"),
                            ((("", 0.0),), "freezes every parameter")):
        with pytest.raises(UserError, match=message):
            AdamW(0.1, lr_multipliers=groups).build(5).init(nest(START))


# --- EMA, state -----------------------------------------------------------------------------------------------------


def test_ema():
    optimizer = SGD(RATE, momentum=0.9, ema=0.8)
    params, (update, init) = nest(START), compiled(optimizer.build(UPDATES, MATRICES))
    state, mean = init(params), START["dense/kernel"]
    np.testing.assert_array_equal(optimizer.eval_params(state, params)["dense"]["kernel"], params["dense"]["kernel"])
    plain = START["dense/kernel"]
    for t in range(UPDATES):
        grads = nest({p: gradient(p, t, w) for p, w in flat(params).items()})
        params, state = update(params, state, grads)
        d = min(0.8, (1 + t) / (10 + t))
        mean = d * mean + (1 - d) * flat(params)["dense/kernel"]
        plain = 0.8 * plain + 0.2 * flat(params)["dense/kernel"]
    np.testing.assert_allclose(optimizer.eval_params(state, params)["dense"]["kernel"], mean, rtol=1e-5, atol=1e-6)
    assert np.abs(mean - plain).max() > 1e-3 and np.abs(mean - flat(params)["dense/kernel"]).max() > 1e-3
    assert gap(run(optimizer), run(replace(optimizer, ema=None))) < 1e-6  # it only looks
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    state = init(half)
    assert state.ema["dense"]["kernel"].dtype == jnp.float32
    assert optimizer.eval_params(state, half)["dense"]["kernel"].dtype == jnp.bfloat16
    assert SGD(0.1).eval_params(SGD(0.1).build(1).init(params), params) is params


@pytest.mark.parametrize("name", ALL)
def test_state(name):
    """Paths for sharding rules, `eval_shape`, a structure that stays, donation of parameters and state."""
    optimizer = ALL[name] if name == "schedule-free" else replace(ALL[name], ema=0.9)
    optimizer = replace(optimizer, grad_clip_norm=1.0, l2=0.1, lr_multipliers=(("norm", 0.0),))
    tx, params = optimizer.build(5, MATRICES), nest(START)
    shapes = jax.eval_shape(tx.init, params)
    held = [path for path in START if not path.startswith("norm") or optimizer.ema is not None]
    for path, leaf in paths(shapes).items():
        assert leaf.ndim == 0 or path.endswith("ns_coeffs") or any(path.endswith(f"/{p}") for p in held), path
    for path in held:
        assert any(found.endswith(f"/{path}") for found in paths(shapes)), path
    update, init = compiled(tx)
    state = init(params)
    assert kinds(state) == kinds(shapes)
    # Donated buffers must be distinct: neither z nor the moving average may be the parameters themselves.
    after, state = jax.jit(update, donate_argnums=(0, 1))(params, state, nest(START))
    assert kinds(state) == kinds(shapes) and jax.tree.structure(state) == jax.tree.structure(shapes)
    assert np.isfinite(after["dense"]["kernel"]).all()


def kinds(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype.name), tree)


@pytest.mark.parametrize("name", ["muon", "schedule-free"])
def test_orbax_round_trip(name, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    optimizer = replace(ALL[name], lr_multipliers=(("norm", 0.0),))
    optimizer = optimizer if name == "schedule-free" else replace(optimizer, ema=0.9)
    tx, params = optimizer.build(5, MATRICES), nest(START)
    _, state = tx.update(params, tx.init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    optimizer.eval_params(back, params)


# --- validation, convergence, command line --------------------------------------------------------------------------

WRONG = [
    (SGD(-0.1), r"lr\.peak is -0\.1, but must be 0 or more"),
    (SGD(float("nan")), r"lr\.peak"),
    (SGD(float("inf")), r"lr\.peak"),
    (SGD(Constant(0.1, -1)), r"lr\.warmup"),
    (SGD(Constant(0.1, 101)), "101 steps, more than the run's 100"),
    (SGD(LinearDecay(0.1, 100)), "none of the run's 100"),
    (SGD(Cosine(0.1, 100)), "none of the run's 100"),
    (SGD(Cosine(0.1, 1, 1.5)), r"lr\.end is 1\.5"),
    (SGD(LinearDecay(0.1, 1, -0.1)), r"lr\.end"),
    (SGD(InverseSqrt(0.1)), r"lr\.warmup is 0"),
    (SGD(WarmupStableDecay(0.1, 5)), r"lr\.decay is 0"),
    (SGD(WarmupStableDecay(0.1, 50, 51)), "exceed the run's 100"),
    (SGD(0.1, grad_clip_norm=0.0), "grad_clip_norm is 0, but must be above 0, or None"),
    (SGD(0.1, weight_decay=-1.0), "decay"),
    (SGD(0.1, l1=-1.0), "l1"),
    (SGD(0.1, l2=-1.0), "l2"),
    (SGD(0.1, ema=1.0), "ema is 1"),
    (SGD(0.1, ema=0.0), "ema"),
    (SGD(0.1, lr_multipliers=(("(", 1.0),)), r"lr_multipliers: '\(' is not a regular expression"),
    (SGD(0.1, lr_multipliers=(("a", -1.0),)), r"lr_multipliers \('a'\) is -1"),
    (SGD(0.1, no_decay="["), "no_decay"),
    (SGD(0.1, momentum=1.0), "momentum is 1"),
    (SGD(0.1, nesterov=True), "nesterov needs optim.momentum"),
    (Adam(0.1, b1=1.0), r"b1 is 1, but must be in \[0, 1\)"),
    (Adam(0.1, b2=-0.1), "b2"),
    (Adam(0.1, eps=0.0), "eps"),
    (Lion(0.1, b2=2.0), "b2"),
    (Adafactor(0.1, exponent=0.0), "exponent"),
    (Adafactor(0.1, threshold=0.0), "threshold"),
    (Adafactor(0.1, factored_from=0), "factored_from"),
    (Muon(0.1, rms=0.0), "rms"),
    (Muon(0.1, adam_lr=0.0), "adam_lr"),
    (Muon(0.1, adam="("), "adam"),
    (Muon(0.1, momentum=1.0), "momentum"),
    (ScheduleFreeAdamW(0.1, b1=0.0), r"b1 is 0, but must be in \(0, 1\)"),
    (ScheduleFreeAdamW(0.1, ema=0.9), "already averages"),
]


@pytest.mark.parametrize(("optimizer", "message"), WRONG)
def test_validate(optimizer, message):
    with pytest.raises(UserError, match=message):
        optimizer.validate(100)


def test_validate_lets_good_and_traced_values_pass():
    for optimizer in [*ALL.values(), SGD(Constant(0.1, 100)), SGD(WarmupStableDecay(0.1, 50, 50)), SGD(0.0)]:
        optimizer.validate(100)
    with pytest.raises(UserError, match="steps is 0"):
        SGD(0.1).validate(0)
    jax.jit(
        lambda x: AdamW(Cosine(x, 1, x), weight_decay=x, b1=x, grad_clip_norm=x, lr_multipliers=(("a", x),)).validate(5)
    )(-9.0)


@pytest.mark.parametrize("name", ALL)
def test_convergence(name):
    rng = np.random.default_rng(0)
    x, target = jnp.asarray(rng.normal(size=(32, 6)), jnp.float32), jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    def loss(p):
        return jnp.mean((x @ p["kernel"] + p["bias"] - x @ target - 1.0) ** 2)
    optimizer = replace(ALL[name], lr=LinearDecay({"sgd": 0.02, "adafactor": 0.3}.get(name, 0.1), 10), weight_decay=0.0)
    tx, params = optimizer.build(200, MATRICES), {"kernel": jnp.zeros((6, 4)), "bias": jnp.full(4, 0.1)}

    def update(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (end, state), _ = jax.lax.scan(update, (params, tx.init(params)), None, 200)
    assert loss(optimizer.eval_params(state, end)) < 1e-2 * loss(params)


def parse(default, *arguments):
    return tyro.cli(type(default), default=default, args=arguments, config=(tyro.conf.AvoidSubcommands,))


def test_command_line():
    default = AdamW(Cosine(6e-4, warmup=10), grad_clip_norm=1.0)
    assert parse(default) == default
    flags = (
        "--lr.peak",
        "3",
        "--weight-decay",
        "0.2",
        "--grad-clip-norm",
        "None",
        "--lr-multipliers",
        "wte",
        "0.5",
        "wpe",
        "0",
    )
    found = parse(default, *flags)
    assert found == AdamW(
        Cosine(3.0, 10), weight_decay=0.2, grad_clip_norm=None, lr_multipliers=(("wte", 0.5), ("wpe", 0.0))
    )
    assert parse(SGD(0.1), "--lr.peak", "0.2", "--ema", "0.9") == SGD(0.2, ema=0.9)
    for optimizer in ALL.values():
        assert parse(replace(optimizer, lr=WarmupStableDecay(0.1, 1, 2)), "--lr.decay", "5").lr.decay == 5

    @dataclasses.dataclass(frozen=True)
    class Experiment:
        optim: Optimizer

    assert parse(Experiment(default), "--optim.b2", "0.9").optim == replace(default, b2=0.9)


def test_every_flag_is_documented(capsys):
    @dataclasses.dataclass(frozen=True)
    class Mute(SGD):
        model_state: float = 1.0

    for optimizer in (*ALL.values(), Mute(0.1)):
        with pytest.raises(SystemExit):
            parse(replace(optimizer, lr=WarmupStableDecay(0.1, 1, 2)), "--help")
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        bare = re.findall(r"--\S+ \S+ \(default", text)  # a flag and its type, then at once the default
        assert bool(bare) == isinstance(optimizer, Mute), bare
