"""ONNX files of six families of models, beside JAX, by onnxruntime:

    LAB_EXTRAS=onnx ./launch.sh tests tests/test_export_onnx.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax2onnx", reason="LAB_EXTRAS=onnx")
pytest.importorskip("onnxruntime", reason="LAB_EXTRAS=onnx")

from lab.errors import UserError
from lab.exported import onnx
from lab.exported.function import of_weights
from lab.models.bert import BERT
from lab.models.cnn import ConvNet
from lab.models.efficientnet import EfficientNet
from lab.models.gpt import GPT
from lab.models.rnn import LSTM
from lab.models.vit import ViT

SMALL = dict(depth=2, width=32, heads=2)
MODELS = {
    "cnn": (ConvNet(channels=(8, 16), convs=(1, 1), classes=10), (12, 12, 1)),
    "efficientnet": (EfficientNet(width_multiple=0.25, stages=((1, 3, 1, 16, 1), (4, 5, 2, 24, 2)), classes=10),
                     (16, 16, 3)),
    "vit": (ViT(patch=4, classes=10, **SMALL), (8, 8, 3)),
    "bert": (BERT(vocab=100, context=64, classes=3, **SMALL), ()),
    "lstm": (LSTM(vocab=100, width=16, hidden=16, classes=3), ()),
    "gpt": (GPT(vocab=100, context=64, **SMALL), ()),
    "llama": (GPT(vocab=100, context=64, position="rotary", norm="rmsnorm", mlp="swiglu", kv_heads=1, **SMALL), ()),
}


def function_of(name: str):
    """The function of a model with random weights: outputs of zero-initialised heads would prove nothing."""
    model, images = MODELS[name]
    given = jnp.zeros((1, *images)) if images else jnp.zeros((1, 8), jnp.int32)
    variables = model.init(jax.random.key(0), given, train=False)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape).astype(np.float32), variables)
    return of_weights(model, variables, images)


@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_computes_what_jax_computes(name, tmp_path):
    function, path = function_of(name), tmp_path / f"{name}.onnx"
    try:
        function, worst = onnx.write_onnx(function, path, name)
    except UserError as e:
        if "no attribute 'ClosedJaxpr'" in str(e) and jax.__version_info__ >= (0, 12):
            pytest.skip("jax2onnx 0.17.1 asks jax 0.12 for a name that it no longer has")
        raise
    print(f"{name}: {worst:.1e}")
    assert worst < 1e-4
    assert ("L" in str(function.inputs)) == (name == "lstm")
    changed = function._replace(call=lambda variables, given: {
        key: x * 1.001 for key, x in function.call(variables, given).items()})
    with pytest.raises(UserError, match="differ"):  # the check sees one part in a thousand
        onnx.check(path, changed)


def test_a_run_is_exported(tmp_path, monkeypatch, capsys):
    from lab.__main__ import main
    from tests.test_cli import furnished

    monkeypatch.chdir(furnished(tmp_path))
    assert main(["small.py", "--run-dir", "run"]) == 0
    capsys.readouterr()
    assert main(["export", "run", "--to", "onnx", "small.onnx"]) == 0
    said = capsys.readouterr().out
    assert "largest difference of onnxruntime" in said and "logits float32 (B, " in said
    assert {path.name for path in tmp_path.glob("small.*")} >= {"small.onnx", "small.json"}


def test_what_jax2onnx_does_not_know_is_a_sentence(tmp_path):
    function = function_of("cnn")
    odd = function._replace(call=lambda variables, given: {"x": jnp.linalg.eigh(given["inputs"][..., 0])[0]})
    with pytest.raises(UserError, match="jax2onnx cannot convert"):
        onnx.write_onnx(odd, tmp_path / "x.onnx", "x")
