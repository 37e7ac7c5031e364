"""Integer weights: the numbers against NumPy, the folder in every command, and the mistakes of a person."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import lab
from lab.compress import folder
from lab.compress.model import Incoming, reading, reads
from lab.compress.quantized import Quantized, bytes_of, is_quantized, quantized, rounded_up
from lab.configuration.values import to_json
from lab.data.tables import Sklearn, Table
from lab.experiment import Checkpoint, Evaluate, Experiment, Mesh
from lab.models.cnn import ConvNet
from lab.models.gpt import GPT
from lab.models.linear import MLP
from lab.models.rnn import LSTM
from lab.optim import SGD, Constant
from lab.tasks.supervised import Classify
from tests.conftest import ROOT
from tests.test_sample_weights import tiny as llama  # noqa: F401 (a fixture)
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("compiled_in_haste")
SHAPES = {"dense": ((128, 5), (-2,)), "stacked": ((2, 64, 3), (-2,)), "conv": ((2, 2, 32, 4), (-4, -3, -2)),
          "embedding": ((7, 64), (-1,))}


def drawn(shape, seed=0):
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def by_hand(x, inputs, group, largest):
    """Symmetric rounding of the inputs of each output, `group` at a time (None: all), in float64."""
    moved = np.moveaxis(x, inputs, range(len(inputs)))
    rows = moved.reshape(-1, int(np.prod(moved.shape[len(inputs):]))).astype(np.float64)
    out = np.empty_like(rows)
    for column in range(rows.shape[1]):
        for start in range(0, len(rows), group or len(rows)):
            part = rows[start:start + (group or len(rows)), column]
            scale = float(rounded_up(np.float32(np.abs(part).max() / largest)))
            out[start:start + len(part), column] = np.round(part / scale) * scale
    return np.moveaxis(out.reshape(moved.shape), range(len(inputs)), inputs)


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize(("kind", "group", "largest", "bits"), [("int8", None, 127, 8), ("int4", 64, 7, 4)])
def test_the_numbers_are_those_of_symmetric_rounding(case, kind, group, largest, bits):
    shape, inputs = SHAPES[case]
    x = drawn(shape)
    q = quantized(x, inputs, kind)
    wanted = by_hand(x, inputs, group, largest)
    np.testing.assert_allclose(np.asarray(jax.jit(lambda q: q.array)(q)), wanted, atol=1e-6)
    assert np.abs(by_hand(x, inputs, group, largest - 1) - wanted).max() > 1e-3  # negative control
    assert q.shape == shape and q.values.nbytes * 8 == x.size * bits


def test_scales_are_bfloat16_numbers_and_cover_the_largest_weight():
    x = np.abs(drawn(1000)) * 10.0 ** np.arange(-20, 20).repeat(25)
    up = rounded_up(x)
    assert (up >= x).all() and (up <= x * (1 + 2**-7)).all()
    np.testing.assert_array_equal(up, up.astype(jnp.bfloat16).astype(np.float32))
    assert rounded_up(np.zeros(1, np.float32)) == 1
    q = quantized(drawn((64, 8)), (-2,), "int8")
    half = dataclasses.replace(q, scale=q.scale.astype(jnp.bfloat16))
    np.testing.assert_array_equal(half.array, jnp.asarray(q.array).astype(jnp.bfloat16))


IDS = jnp.arange(16).reshape(2, 8)
IMAGES = jnp.asarray(drawn((2, 8, 8, 1)))
GPT2 = GPT(depth=2, width=16, heads=2, vocab=32, context=8)
MODELS = {"gpt": (GPT2, IDS), "scanned": (GPT2.clone(scan=True), IDS),
          "cnn": (ConvNet(channels=(4, 8), convs=(1, 1)), IMAGES), "lstm": (LSTM(vocab=32, classes=3), IDS)}


def rounded(model, inputs, **changes):
    """(variables, the same with integer kernels)."""
    variables = model.init(jax.random.key(0), inputs, train=False)
    flat = {path: drawn(x.shape, i) * 0.3 if path.endswith("kernel") else np.asarray(x)  # heads begin at zero
            for i, (path, x) in enumerate(flatten_dict(variables, sep="/").items())}
    variables = unflatten_dict(flat, sep="/")
    kernels = {path: quantized(np.asarray(x), range(1 - x.ndim + path.count("blocks/") - 1, -1), "int8")
               for path, x in flat.items() if path.endswith(("kernel", "_input", "_recurrent"))}
    kernels = {path: dataclasses.replace(x, **{name: change(path) for name, change in changes.items()})
               for path, x in kernels.items()}
    return variables, unflatten_dict(flat | kernels, sep="/")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_reads_integers_as_the_arrays_they_stand_for(name):
    model, inputs = MODELS[name]
    _, integers = rounded(model, inputs)
    arrays = jax.tree.map(lambda x: x.array if is_quantized(x) else x, integers, is_leaf=is_quantized)
    apply = jax.jit(lambda v: reading(model).apply(v, inputs, train=False))
    wanted = jax.jit(lambda v: model.apply(v, inputs, train=False))(arrays)
    np.testing.assert_allclose(apply(integers), wanted, rtol=1e-5, atol=1e-6)
    changed = jax.tree.map(lambda x: dataclasses.replace(x, values=np.roll(x.values, 1)) if is_quantized(x) else x,
                           integers, is_leaf=is_quantized)
    assert np.abs(apply(changed) - wanted).max() > 1e-4  # negative control


def test_a_reading_model_is_the_same_experiment_and_the_same_program():
    assert reading(GPT2) == reading(reading(GPT2)) and hash(reading(GPT2)) == hash(reading(GPT2))
    assert isinstance(reading(GPT2), GPT) and to_json(reading(GPT2)) == to_json(GPT2)
    assert reads(reading(GPT2).clone(context=4)) and not reads(GPT2)


def integer_layer(x, q, scale, bias):
    """A dense layer in int64."""
    whole = np.clip(np.rint(x / scale), -127, 127).astype(np.int64)
    return (whole @ q.values.astype(np.int64)) * (np.float64(scale) * q.scale[0]) + bias


@pytest.mark.parametrize("static", [False, True])
def test_integer_products_of_a_dense_layer(static):
    x, model = drawn((16, 64)) * 3, MLP(depth=1, width=8, classes=3)
    variables, integers = rounded(model, x, products=lambda path: "dense_0" in path,
                                  incoming=lambda path: np.float32(0.05) if static else None)
    integers["params"]["head"]["kernel"] = np.eye(8, 3, dtype=np.float32)  # so that the output is the hidden layer
    scale = np.float32(0.05) if static else np.float32(np.abs(x).max() / np.float32(127))
    q = integers["params"]["dense_0"]["kernel"]
    found = jax.jit(lambda v: reading(model).apply(v, x, train=False))(integers)
    wanted = np.maximum(integer_layer(x, q, scale, 0.0), 0)[:, :3]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(np.maximum(x @ np.asarray(q.array), 0)[:, :3] - wanted).max() > 1e-3  # negative control: only weights


@pytest.mark.parametrize("name", ["scanned", "cnn"])
def test_integer_products_inside_a_scan_and_a_convolution(name):
    """Beside a model whose inputs are rounded, but multiplied as floats."""
    model, inputs = MODELS[name]
    incoming = Incoming()
    variables, plain = rounded(model, inputs)
    with incoming.seen():
        jax.block_until_ready(jax.jit(lambda v: model.apply(v, inputs, train=False))(variables))
    jax.effects_barrier()
    assert incoming.layers == incoming.largest.keys() == {
        path for path in flatten_dict(variables["params"], sep="/") if path.endswith("kernel")}
    assert all(x > 0 for x in incoming.largest.values())
    depth = (2,) if name == "scanned" else ()
    scales = {path: np.full(depth, x / 127, np.float32) for path, x in incoming.largest.items()}
    _, integers = rounded(model, inputs, products=lambda path: True,
                          incoming=lambda path: scales[path.removeprefix("params/")])

    def as_floats(call, args, kwargs, context):
        path = "/".join((*context.module.path, "kernel"))
        if context.method_name != "__call__" or path not in incoming.largest:
            return call(*args, **kwargs)
        scale = np.float32(incoming.largest[path] / 127)
        return call(jnp.clip(jnp.rint(args[0] / scale), -127, 127) * scale, *args[1:], **kwargs)

    found = reading(model).apply(integers, inputs, train=False)
    only_weights = reading(model).apply(plain, inputs, train=False)
    with nn.intercept_methods(as_floats):
        wanted = reading(model).apply(plain, inputs, train=False)
    largest = np.abs(wanted).max()
    assert np.abs(found - wanted).max() < 1e-4 * largest
    assert np.abs(only_weights - wanted).max() > 1e-3 * largest  # negative control


def test_a_folder_reads_back_and_notices_damage(tmp_path):
    q = dataclasses.replace(quantized(drawn((64, 8)), (-2,), "int4"), incoming=np.float32(2))
    scalar = np.float32(2.66)  # CLIP's scale
    folder.write(tmp_path, {"params/a/kernel": q, "params/b": drawn(3), "params/c": scalar}, {"step": 7})
    found = folder.read(tmp_path)
    assert found.about == {"step": 7} and found.arrays["params/c"].shape == ()
    again = found.arrays["params/a/kernel"]
    assert isinstance(again, Quantized) and again.shape == (64, 8) and again.incoming == 2
    np.testing.assert_array_equal(again.array, q.array)
    content = bytearray((tmp_path / folder.ARRAYS).read_bytes())
    content[-1] ^= 1
    (tmp_path / folder.ARRAYS).write_bytes(content)
    with pytest.raises(lab.errors.UserError, match="damaged .its sha256 is another one"):
        folder.read(tmp_path)


# ------------------------------------------------------------------------------------------------- the command line

USUAL = dict(steps=60, batch=8, evaluate=Evaluate(every=0), checkpoint=Checkpoint(every=0), mesh=Mesh(data=1))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with two runs, digits and text, and some folders of integer weights."""
    here = tmp_path_factory.mktemp("quantize")
    digits = Experiment(Table(Sklearn("digits")), MLP(classes=10, depth=2, width=64), Classify(), SGD(Constant(0.1)),
                        **USUAL)
    lab.fit(digits, here / "digits", quiet=True)
    (here / "text.txt").write_text((ROOT / "LICENSE").read_text()[:6000])
    (here / "letters.py").write_text(f'''"""Letters."""
from lab.data.text import Text, TextFiles
from lab.data.tokenizers import Bytes
from lab.experiment import Checkpoint, Evaluate, Experiment, Mesh
from lab.models.gpt import GPT
from lab.optim import SGD, Constant
from lab.tasks.language import LanguageModel
experiment = Experiment(Text(TextFiles({str(here / "text.txt")!r}), Bytes(), 16), GPT(depth=1, width=64, heads=2,
    vocab=256, context=16), LanguageModel(samples=0), SGD(Constant(0.1)), steps=20, batch=8,
    evaluate=Evaluate(every=0), checkpoint=Checkpoint(every=0), mesh=Mesh(data=1))
''')
    return here


@pytest.fixture(scope="module")
def letters(place) -> Path:
    assert lab.__main__.main([str(place / "letters.py"), "--run-dir", str(place / "letters")]) == 0
    return place / "letters"


def test_a_classifier_in_evaluate_predict_and_python(place, typed):
    status, out, err = typed("quantize", "digits", "--weights", "int8", "--heads", "--activations", "int8",
                             "--calibrate", "2")
    assert status == 0, err
    assert "digits-int8-activations: 3 matrices, 98" in out and "3 of them multiply integers" in out, out
    made = place / "digits-int8-activations"
    table = json.loads((made / "comparison.json").read_text())
    original, small = table["original"], table["quantized"]
    assert 3.5 < original["memory_bytes"] / small["memory_bytes"] < 4
    assert (made / folder.ARRAYS).stat().st_size == small["disk_bytes"]
    assert small["metrics"]["accuracy"] > 0.8 and abs(small["metrics"]["loss"] / original["metrics"]["loss"] - 1) < 0.02
    assert 0 < table["kl"] < 1e-3 and 0 <= table["changed"] < 0.03
    for name in ("MB in memory", "ms per batch", "accuracy", "KL to the original", "changed answers"):
        assert name in out
    slower = small["ms_per_batch"] > original["ms_per_batch"]
    assert ("x slower" in out) == slower and ("x faster" in out) == (not slower)
    status, out, err = typed("evaluate", made.name)
    assert status == 0 and f"{small['metrics']['loss']:.6f}" in out and "changed since" not in err, (out, err)
    assert typed("predict", made.name, "--split", "validation", "--output", "a.csv")[0] == 0
    assert (place / "a.csv").read_text().startswith("record,prediction,p_0")
    run = lab.open_run(made)
    assert is_quantized(run.params["dense_0"]["kernel"])
    logits = run.apply(run.batch(8)["inputs"])
    np.testing.assert_array_equal(np.argmax(logits, -1).shape, (8,))


def test_a_language_model_in_sample_chat_and_evaluate(letters, typed, monkeypatch):
    import io

    made = typed("quantize", "letters", "--weights", "int4", "--embeddings", "--keep", "up/kernel", "--to", "four")
    assert made[0] == 0, made
    table = json.loads(Path("four/comparison.json").read_text())
    assert {"ms_per_token", "ms_per_batch"} <= table["quantized"].keys()
    assert "bits_per_byte" in table["original"]["metrics"]
    stored = folder.read(Path("four")).arrays
    integers = {path for path, x in stored.items() if is_quantized(x)}
    assert "params/wte/embedding" in integers and "params/wpe/embedding" not in integers
    assert "params/block_0/ffn/up/kernel" not in integers and "params/block_0/ffn/down/kernel" in integers
    assert bytes_of(stored["params/wte/embedding"]) == 256 * (32 + 4)
    status, out, _ = typed("sample", "four", "--prompt", "the", "--new-tokens", "5")
    assert status == 0 and out.startswith("the")
    assert "bits_per_byte" in typed("evaluate", "four", "--text", "text.txt")[1]
    monkeypatch.setattr("sys.stdin", io.StringIO("the\n"))
    assert typed("chat", "four", "--new-tokens", "4", "--greedy")[0] == 0


@pytest.fixture
def weights(place, llama):  # noqa: F811
    """A random Llama in Hugging Face's form, with a smaller context, and an experiment for it."""
    there = place / "llama"
    if not there.exists():
        shutil.copytree(llama[0], there)
        config = json.loads((there / "config.json").read_text()) | {"max_position_embeddings": 64}
        (there / "config.json").write_text(json.dumps(config))
        own = (place / "text.txt")
        (place / "on_text.py").write_text(f'''"""Text."""
from lab.data.hugging_face import HuggingFaceTokenizer
from lab.data.text import Text, TextFiles
from lab.experiment import Experiment, Mesh
from lab.optim import SGD, Constant
from lab.tasks.language import LanguageModel
from lab.weights import model_of
LLAMA = {str(there)!r}
experiment = Experiment(Text(TextFiles({str(own)!r}), HuggingFaceTokenizer(LLAMA), 16), model_of(LLAMA),
    LanguageModel(samples=0), SGD(Constant(0.1)), steps=1, batch=8, mesh=Mesh(data=1))
''')
    return there


def test_pretrained_weights_in_sample_and_evaluate(weights, typed):
    status, out, err = typed("quantize", "llama", "--weights", "int8", "--experiment", "on_text.py")
    assert status == 0, err
    table = json.loads(Path("llama-int8/comparison.json").read_text())
    one, other = (table[form]["metrics"]["bits_per_byte"] for form in ("original", "quantized"))
    assert abs(other / one - 1) < 0.02
    status, out, _ = typed("sample", "llama-int8", "--prompt", "a", "--new-tokens", "4", "--greedy")
    assert status == 0 and out == typed("sample", "llama", "--prompt", "a", "--new-tokens", "4", "--greedy")[1]
    status, out, err = typed("evaluate", "llama-int8", "--experiment", "on_text.py", "--output", "here")
    assert f"{table['quantized']['metrics']['loss']:.6f}" in out, (out, err)
    config = json.loads(Path("llama-int8/config.json").read_text()) | {"vocab_size": 7}
    shutil.copytree("llama-int8", "other")
    Path("other/config.json").write_text(json.dumps(config))
    assert "does not fit its own config" in typed("sample", "other", "--prompt", "a")[2]


def test_served(weights, letters, place):
    """As chat, evaluate and sample open it: the engine gets integers."""
    pytest.importorskip("starlette", reason="LAB_EXTRAS=serve")
    from lab.commands.serve_models import Options, service_of

    made = letters.parent / "served"
    if not made.exists():
        assert lab.__main__.main(["quantize", str(letters), "--weights", "int8", "--to", str(made)]) == 0
    service = service_of(str(made), Options("it", 1, 16, 4, 60.0), None, False, None)
    kinds = {type(x) for x in jax.tree.leaves(service.engine.slots.params, is_leaf=is_quantized)}
    assert Quantized in kinds


def test_mistakes(place, letters, mistake, monkeypatch):
    if not (place / "eight").exists():
        assert lab.__main__.main(["quantize", str(place / "digits"), "--weights", "int8", "--to",
                                  str(place / "eight")]) == 0
    assert "quantised again: name what they were made from" in mistake("quantize", "eight", "--weights", "int4")
    assert "--step are for run folders" in mistake("evaluate", "eight", "--step", "3")
    assert "cannot be exported" in mistake("export", "eight", "--to", "x")
    assert "is there already" in mistake("quantize", "digits", "--weights", "int8", "--to", "eight")
    assert "matches no parameter" in mistake("quantize", "digits", "--weights", "int8", "--keep", "nothing")
    assert "has no matrix to round" in mistake("quantize", "digits", "--weights", "int8", "--keep", ".")
    assert "needs --weights int8" in mistake("quantize", "digits", "--weights", "int4", "--activations", "int8")
    assert "--calibrate needs --activations" in mistake("quantize", "digits", "--weights", "int8", "--calibrate", "2")
    assert "must be at least 1" in mistake("quantize", "digits", "--weights", "int8", "--records", "0")
    assert "is not a run folder" in mistake("quantize", "nowhere", "--weights", "int8")
    (place / "digits" / "result.json").rename(place / "kept.json")
    try:
        assert "is not finished" in mistake("quantize", "digits", "--weights", "int8")
    finally:
        (place / "kept.json").rename(place / "digits" / "result.json")
    (place / "again.py").write_text((place / "letters.py").read_text().replace(
        "steps=20", f"init_from=Pretrained({str(place / 'eight')!r}), steps=20").replace(
        "from lab.models.gpt", "from lab.pretrained import Pretrained\nfrom lab.models.gpt"))
    assert "cannot be trained" in mistake("again.py")


def test_an_axis_that_64_does_not_divide():
    with pytest.raises(lab.errors.UserError, match=r"stem/kernel \(3, 3, 1, 8\) has 9 inputs, which groups of 64"):
        quantized(drawn((3, 3, 1, 8)), (-4, -3, -2), "int4", "stem/kernel")


def test_an_unknown_choice_names_those_that_there_are(typed, place):
    status, out, err = typed("quantize", "digits", "--weights", "int3")
    assert status == 2 and "int8" in out + err and "int4" in out + err


def test_a_gan_is_refused(mistake, monkeypatch):
    from lab.commands import evaluate
    from lab.tasks.adversarial import Adversarial

    gan = SimpleNamespace(task=Adversarial())
    monkeypatch.setattr(evaluate, "opened", lambda *args: (gan, None, None, None, None))
    assert "digits is a GAN" in mistake("quantize", "digits", "--weights", "int8")
