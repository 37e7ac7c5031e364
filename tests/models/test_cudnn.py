"""Attention by cuDNN: the same numbers as einsum attention, and every model lowered for a GPU that is not here."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.errors import UserError
from lab.models.attention import einsum_attention
from lab.models.bert import BERT
from lab.models.clip import CLIP
from lab.models.cudnn import cudnn_attention
from lab.models.gpt import GPT
from lab.models.layers import Transformer
from lab.models.vit import ViT
from lab.train.experiment_file import load
from lab.train.shapes import batch_spec
from lab.train.step import init_state, make_eval_step, make_predict_step, make_train_step
from tests.test_experiments import EXPERIMENTS, ready, shrunk

L, K = 8, 8
MASKS = {"right": np.arange(L) < np.array([[3], [L], [1]]), "left": np.arange(L) >= np.array([[3], [0], [L - 1]]),
         "holes": np.random.default_rng(1).random((3, L)) < 0.6, "empty": np.arange(L) < np.array([[3], [0], [L]]),
         "none": None}


def value_and_gradients(attend, groups, mask, length):
    """Of a random function of the outputs at real tokens; those of padding have no meaning."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(3, length, n, K)), jnp.float32) for n in (2, groups, groups))
    real = np.ones((3, length)) if mask is None else mask
    weights = jnp.asarray(rng.normal(size=q.shape) * real[..., None, None], jnp.float32)
    return jax.tree.leaves(jax.value_and_grad(lambda *x: (attend(*x) * weights).sum(), argnums=(0, 1, 2))(q, k, v))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("length", [L, L - 1], ids=["even", "odd"])
def test_what_cudnn_is_given_is_einsum_attention(length, padding, causal, groups):
    """JAX's own attention stands in for cuDNN: it takes the same lengths of rows."""
    mask = None if MASKS[padding] is None else MASKS[padding][:, :length]
    visible = np.tril(np.ones((1, length, length), bool)) if causal else np.ones((1, length, length), bool)
    seen = visible if mask is None else visible & mask[:, None]
    ours = value_and_gradients(functools.partial(
        cudnn_attention, mask_BS=None if mask is None else jnp.asarray(mask, jnp.uint8), causal=causal,
        implementation="xla"), groups, mask, length)
    plain = value_and_gradients(functools.partial(einsum_attention, visible=jnp.asarray(seen)), groups, mask, length)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    if mask is not None:  # negative control: without the mask
        other = value_and_gradients(functools.partial(cudnn_attention, mask_BS=None, causal=causal,
                                                      implementation="xla"), groups, mask, length)
        moved = np.abs(ours[2] - other[2]).max()  # the keys' gradient
        assert moved > 1e-2 or (causal and padding in ("right", "empty")), moved  # no real query sees padding


# -------------------------------------------------------------------------------------- lowered for an absent GPU

@pytest.fixture
def for_a_gpu(monkeypatch):
    """Models are traced for a GPU. JAX asks for cuDNN's version first, which its package for CPUs does not know."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    for module in ("precision", "layers"):
        monkeypatch.setattr(f"lab.models.{module}.platform", lambda: "gpu")


def lowered(function, *args):
    """The text of a function of (abstract) arrays, lowered for one GPU."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("length", [16, 33])
@pytest.mark.parametrize("model", [
    GPT(vocab=64, context=33), BERT(vocab=64, context=33, dropout=0.0), ViT(patch=4, classes=10),
    BERT(vocab=64, context=33, dropout=0.0, classes=3, position="rotary", kv_heads=1, remat="blocks", scan=True),
], ids=lambda model: type(model).__name__)
def test_every_transformer_is_lowered_for_a_gpu(for_a_gpu, model, length, padded):
    model = model.clone(depth=1, width=32, heads=2)
    if isinstance(model, ViT):  # its class token makes 17 of 16 patches
        if padded:
            pytest.skip("images have no padding")
        inputs, more = jax.ShapeDtypeStruct((4, 16, 4 * (length // 4), 3), jnp.bfloat16), {}
    else:
        inputs = jax.ShapeDtypeStruct((4, length), jnp.int32)
        more = {"mask": jax.ShapeDtypeStruct((4, length), jnp.uint8)} if padded else {}
    params = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), inputs)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)

    def loss(params, inputs, more):
        return model.apply(params, inputs, train=True, **more).sum()

    text = lowered(jax.grad(loss), params, inputs, more)
    assert "__cudnn$fmhaSoftmax(" in text and "__cudnn$fmhaSoftmaxBackward(" in text
    # Padding is said as lengths of rows; a bias would cost the memory of all scores, and its gradient.
    odd = length % 2 or isinstance(model, ViT)
    assert ("PADDING" in text) == (padded or bool(odd and not isinstance(model, GPT)))
    assert "ScaleBias" not in text
    # Negative control: what was passed before has no query axis, and JAX refuses it.
    q = jax.ShapeDtypeStruct((4, 16, 2, 16), jnp.bfloat16)
    with pytest.raises(ValueError, match="same seq length"):
        lowered(lambda q, mask: jax.nn.dot_product_attention(q, q, q, mask=mask, implementation="cudnn"), q,
                jax.ShapeDtypeStruct((4, 1, 1, 16), bool))


@pytest.mark.parametrize("form", ["experiment", "local"])
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_every_experiment_is_lowered_for_a_gpu(for_a_gpu, path, form):
    """In bfloat16, two blocks deep: training, evaluation and prediction."""
    experiment = getattr(load(path), form)
    if transformer := isinstance(experiment.model, Transformer | CLIP):
        experiment = shrunk(experiment)
    elif form == "local":
        return  # without attention its operations are those of the other form
    experiment = replace(experiment, precision="bfloat16", batch=8, grad_accum_steps=1)
    try:
        experiment = ready(experiment)
        batch = batch_spec(experiment)
    except UserError as e:
        pytest.skip(f"its data is not here: {e}")
    state = jax.eval_shape(functools.partial(init_state, experiment), batch)
    for make in (make_train_step, make_eval_step, make_predict_step):
        try:
            text = lowered(make(experiment), state, batch)
        except UserError as e:
            assert make is make_predict_step and "makes no predictions" in str(e)
            continue
        drops = make is make_train_step and getattr(experiment.model, "dropout", 0)
        packed = "documents" in batch  # einsum keeps them apart
        assert ("__cudnn$fmhaSoftmax(" in text) == bool(transformer and not drops and not packed), make
