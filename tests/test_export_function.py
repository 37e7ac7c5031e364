"""A run as a file of jax.export: runs without lab, on any batch size and length, and says what the run says."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

import lab
from lab.api import Run
from lab.data.images.images import Images
from lab.data.images.sources import ImageFolder
from lab.data.messages.messages import Messages
from lab.data.tables.bundled import Sklearn
from lab.data.tables.csv_files import Csv
from lab.data.tables.tables import Table
from lab.data.text.sources import TextFiles
from lab.data.text.text import Text
from lab.data.tokenizers import BPE, Bytes
from lab.errors import UserError
from lab.experiment import Checkpoint, Evaluate, Experiment, Mesh
from lab.exported import stablehlo
from lab.exported.function import difference, example, of_run, of_weights, without_backends
from lab.models.bert import BERT
from lab.models.cnn import ConvNet
from lab.models.efficientnet import EfficientNet
from lab.models.gan import GAN
from lab.models.gpt import GPT
from lab.models.linear import MLP, Ensemble, Linear
from lab.models.rnn import LSTM
from lab.optim import SGD, Adam, Constant
from lab.tasks.adversarial import Adversarial
from lab.tasks.language import LanguageModel
from lab.tasks.regress import Regress
from lab.tasks.supervised import Classify
from tests.test_generate import random_params
from tests.test_predict import messages
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

USUAL = dict(steps=2, batch=8, evaluate=Evaluate(every=0), checkpoint=Checkpoint(every=0), mesh=Mesh(data=1))
SMALL = dict(depth=1, width=8, heads=2, context=24)
NAMES = ("images", "letters", "sentences", "prices")


def pictures(root: Path) -> Path:
    """20 noisy images of each of two classes."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).save(root / name / f"{i}.png")
    return root


def experiments(folder: Path) -> dict[str, Experiment]:
    """One run of each kind, of two steps; the learning rate is large, so that no output is zero."""
    pictures(folder / "faces")
    messages(folder / "messages.csv")
    (folder / "corpus.txt").write_text("a text of a few words and some more " * 60)
    images = Images(ImageFolder(str(folder / "faces")), shape=(8, 8, 3), mean=(0.4,), std=(0.3,), resize=True, border=1,
                    validation=8)
    said = Csv(str(folder / "messages.csv"), "kind", text="text")
    sgd = SGD(lr=Constant(0.5))
    return {
        "images": Experiment(images, ConvNet(channels=(4,), convs=(1,), classes=2), Classify(), sgd, **USUAL),
        "letters": Experiment(Text(TextFiles(str(folder / "corpus.txt")), BPE(270), 8),
                              GPT(vocab=270, **SMALL), LanguageModel(samples=0), sgd, **USUAL),
        "sentences": Experiment(Messages(said, Bytes(), length=20, validation=0.3),
                                BERT(vocab=257, classes=2, dropout=0.0, **SMALL), Classify(), sgd, **USUAL),
        "prices": Experiment(Table(Sklearn("diabetes")), Linear(), Regress(), sgd, **USUAL),
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The runs, and their exported files: of half of them with the weights beside."""
    from lab.__main__ import main

    folder, before = tmp_path_factory.mktemp("exported"), os.getcwd()
    os.chdir(folder)
    try:
        jax.config.update("jax_disable_most_optimizations", True)  # half the time to compile
        for name, experiment in experiments(folder).items():
            lab.fit(experiment, folder / name, quiet=True)
        jax.config.update("jax_disable_most_optimizations", False)
        for i, name in enumerate(NAMES):
            assert main(["export", name, "--to", "stablehlo", f"{name}.stablehlo", "--weights",
                         ("inside", "beside")[i % 2]]) == 0
    finally:
        os.chdir(before)
    return folder


def records(place: Path, name: str, count: int = 5) -> tuple[dict, dict, Run]:
    """(records as the data has them, the same as the model sees them, the run)."""
    run = lab.open_run(place / name)
    return dict(run.data.validation[np.arange(count)]), run.batch(count), run


def bare(folder: Path, *words: str | Path) -> subprocess.CompletedProcess:
    """A process that has neither lab nor this checkout, in an empty folder."""
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    folder.mkdir(exist_ok=True)
    return subprocess.run([sys.executable, "-P", *words], cwd=folder, env=environ, capture_output=True, text=True)


BARE = """
import importlib.util, sys, numpy as np
assert importlib.util.find_spec("lab") is None and importlib.util.find_spec("tests") is None
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    load = importlib.import_module(f"load_{name}").load
    outputs = load(f"{sys.argv[1]}/{name}.stablehlo")(**np.load(f"{name}.npz"))
    np.savez(f"{name}_out.npz", **{key: np.asarray(x) for key, x in outputs.items()})
assert not [module for module in sys.modules if module.split(".")[0] in ("lab", "flax", "optax", "safetensors")]
"""


def test_a_bare_jax_computes_what_the_run_computes(place, tmp_path):
    folder, wanted = tmp_path / "elsewhere", {}
    folder.mkdir()
    for name in NAMES:
        raw, batch, run = records(place, name)
        if name == "letters":
            raw, wanted[name] = {"tokens": raw["tokens"][:, :-1]}, {"logits": run.apply(batch["tokens"][:, :-1])}
        else:
            more = {"mask": batch["mask"]} if "mask" in batch else {}
            output = run.apply(batch["inputs"], **more)
            wanted[name] = answers(name, np.asarray(output), run)
        np.savez(folder / f"{name}.npz", **{key: raw[key] for key in ("inputs", "mask", "tokens") if key in raw})
    moved = tmp_path / "moved"  # the files belong together, wherever they are
    shutil.copytree(place, moved, ignore=lambda at, names: [n for n in names if Path(at, n).is_dir()])
    done = bare(folder, "-c", BARE, moved, *NAMES)
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        found = dict(np.load(folder / f"{name}_out.npz"))
        assert found.keys() == wanted[name].keys()
        assert difference(found, wanted[name]) < 1e-6, name
        spoilt = {key: x + 1e-5 * np.abs(x).max() for key, x in found.items()}
        assert difference(spoilt, wanted[name]) > 1e-6  # the comparison sees a small error
    assert images_matter(folder, wanted["images"]) > 1e-3


def answers(name: str, output: np.ndarray, run: Run) -> dict[str, np.ndarray]:
    """What the file's outputs should be, in NumPy."""
    if name == "prices":
        return {"prediction": output.astype(np.float64) * run.data.target.scale + run.data.target.mean}
    each = np.exp(output - output.max(-1, keepdims=True))
    return {"logits": output, "probabilities": each / each.sum(-1, keepdims=True)}


def images_matter(folder: Path, wanted: dict) -> float:
    """How much the records differ: outputs that are all equal would prove nothing."""
    return float(np.ptp(wanted["logits"], axis=0).max())


def test_any_batch_size_and_length_up_to_the_context(place):
    run, path = lab.open_run(place / "letters"), place / "letters.stablehlo"
    sys.path.insert(0, str(place))
    try:
        import load_letters
    finally:
        sys.path.remove(str(place))
    model, rng = load_letters.load(path), np.random.default_rng(0)
    for shape in ((1, 1), (2, 24), (7, 5)):
        tokens = rng.integers(0, 270, shape)
        assert difference(model(tokens=tokens), {"logits": run.apply(tokens)}) < 1e-6
    with pytest.raises(ValueError, match="more tokens than 24"):
        model(tokens=np.zeros((1, 25), int))


def test_what_stands_beside_the_file(place):
    about = {name: json.loads((place / f"{name}.json").read_text()) for name in NAMES}
    images = about["images"]
    assert images["inputs"] == {"inputs": {"shape": ["B", 10, 10, 3], "dtype": "uint8"}}
    assert images["outputs"]["logits"]["shape"] == ["B", 2] and images["classes"] == ["cat", "dog"]
    assert images["preprocessing"]["inside"]["mean"] == [0.4] and images["platforms"] == ["cpu", "cuda", "tpu"]
    assert images["step"] == 2 and images["weights"] == "inside" and images["versions"]["jax"] == jax.__version__
    letters = about["letters"]
    assert letters["outputs"]["logits"]["shape"] == ["B", "L", 270] and letters["longest"] == 24
    assert letters["weights"] == "letters.safetensors" and letters["preprocessing"]["text"]["tokenizer"] == "BPE"
    from tokenizers import Tokenizer

    text, run = "a text of words", lab.open_run(place / "letters")
    ids = Tokenizer.from_file(str(place / letters["preprocessing"]["text"]["tokenizer_file"])).encode(text).ids
    assert ids == run.data.encode(text).tolist()
    said = about["sentences"]["preprocessing"]["text"]
    assert [b + said["ids_moved_by"] for b in text.encode()] == lab.open_run(place / "sentences").data.encode(
        text).tolist()
    assert len(about["prices"]["preprocessing"]["columns"]) == 10
    assert about["prices"]["preprocessing"]["target"] == "target"
    assert (place / "load_images.py").read_text() == stablehlo.LOADER.read_text()


def test_the_loader_is_short():
    code = [line for line in stablehlo.LOADER.read_text().splitlines() if line.strip() and '"""' not in line]
    assert len(code) <= 28
    assert not [line for line in code if re.match(r"(import|from) (lab|tests|flax)\b", line)]


def test_a_gpu_here_chooses_no_kernel_of_its_own(monkeypatch):
    """On a GPU, "auto" is cuDNN for bfloat16: the file must run on CPUs and TPUs, too."""
    model = GPT(vocab=32, depth=1, width=16, heads=2, context=128)
    variables = jax.tree.map(lambda x: x.astype("bfloat16"), random_params(model))
    function = of_weights(model, {"params": variables})
    chosen = []
    monkeypatch.setattr("lab.models.layers.platform", lambda: "gpu")
    monkeypatch.setattr("lab.models.attention.cudnn_attention", lambda q, *_, **how: chosen.append(q.dtype) or q)
    given = {"tokens": jax.ShapeDtypeStruct((2, 128), np.int32)}
    jax.eval_shape(function.call, function.variables, given)
    assert not chosen
    jax.eval_shape(function.given, function.variables, given)
    assert chosen  # what training would choose
    del chosen[:]
    assert stablehlo.exported(function, True).platforms == ("cpu", "cuda", "tpu") and not chosen
    assert without_backends(Ensemble(MLP(classes=2), 2)).member.classes == 2
    assert without_backends(Ensemble(BERT(classes=2), 2)).member.attention == "einsum"


def test_a_gan_is_its_generator(tmp_path):
    data = Images(ImageFolder(str(pictures(tmp_path / "faces"))), shape=(8, 8, 3), resize=True)
    model = GAN(latent=4, width=4, shape=(8, 8, 3))
    start = jax.jit(functools.partial(model.init, train=False))
    variables = start(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    experiment = Experiment(data, model, Adversarial(), Adam(lr=Constant(1e-3)), **USUAL)
    function = of_run(experiment, None, variables)
    latents = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    images = model.apply(variables, latents, False, method="generate")
    assert difference(stablehlo.exported(function, False).call({}, {"latents": latents}), {"images": images}) < 1e-6


def test_an_ensemble_has_all_logits_and_the_mean_of_the_probabilities(tmp_path):
    data = Images(ImageFolder(str(pictures(tmp_path / "faces"))), shape=(8, 8, 3), resize=True)
    model = Ensemble(MLP(classes=2, depth=1, width=4), 3)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    variables = model.init(jax.random.key(0), images / np.float32(255), train=False)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), variables)
    function = of_run(Experiment(data, model, Classify(), Adam(lr=Constant(1e-3)), **USUAL), None, variables)
    found = stablehlo.exported(function, True).call(flatten_dict(variables, sep="/"), {"inputs": images})
    logits = model.apply(variables, data.transform({"inputs": images}, False)["inputs"], train=False).values
    assert found["logits"].shape == (5, 3, 2)
    assert difference(found, {"logits": logits, "probabilities": jax.nn.softmax(logits).mean(1)}) < 1e-6


def test_mistakes(place, tmp_path, monkeypatch, capsys):
    from lab.__main__ import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "there.json").write_text("{}")
    images = str(place / "images")
    said = {
        ("--to", "stablehlo"): "needs a file", ("--to", "stablehlo", "--best"): "needs a file",
        ("--to", "stablehlo", "there.stablehlo"): "there.json is there already",
        ("--to", "stablehlo", "no/where.stablehlo"): "no folder no",
        ("--to", "stablehlo", "file/x.stablehlo"): "no folder file",
        ("--to", "stablehlo", "x.json"): "such as x.stablehlo", ("--to", "stablehlo", "x"): "such as x.stablehlo",
        ("--to", "stablehlo", "x.stablehlo", "--adapter"): "--adapter",
        ("--to", "stablehlo", "x.stablehlo", "--step", "77"): "77",
        ("--to", "x.onnx", "--weights", "beside"): "FILE.data",
    }
    for words, sentence in said.items():
        assert main(["export", images, *words]) == 2, words
        error = capsys.readouterr().err
        assert re.search(sentence, error), (words, error)
        assert error.count("\n") == 1 and "Traceback" not in error
    assert main(["export", "nowhere", "--to", "stablehlo", "x.stablehlo"]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"file", "there.json"}


def test_a_failure_leaves_nothing(place, tmp_path, monkeypatch, capsys):
    from lab.__main__ import main

    def fails(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("lab.exported.metadata.written", fails)
        assert main(["export", str(place / "letters"), "--to", "stablehlo", str(tmp_path / "x.stablehlo")]) == 2
    assert "No space left" in capsys.readouterr().err and not list(tmp_path.iterdir())
    with monkeypatch.context() as wrong:  # a file whose outputs are not the model's
        wrong.setattr("lab.exported.stablehlo.TOLERANCE", {"float32": -1.0, "bfloat16": -1.0})
        assert main(["export", str(place / "letters"), "--to", "stablehlo", str(tmp_path / "x.stablehlo")]) == 2
    assert "differ from the model's" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_model_that_needs_its_batch_size_is_a_sentence():
    from flax import linen as nn

    class Odd(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            return images * int(images.shape[0])

    function = of_weights(Odd(), {"params": {"a": np.ones(1, np.float32)}}, (2, 2, 1))
    with pytest.raises(UserError, match="any batch size"):
        stablehlo.exported(function, False)


def test_an_lstm_reads_any_length():
    model = LSTM(vocab=50, width=4, hidden=4, classes=2)
    function = of_weights(model, {"params": random_params(model)})
    found = stablehlo.exported(function, True)
    for batch, length in ((1, 1), (4, 9)):
        given = example(function, batch, length)
        logits = model.apply(function.variables, given["inputs"], mask=given["mask"], train=False)
        found_here = found.call(flatten_dict(function.variables, sep="/"), given)
        assert difference(found_here, {"logits": logits}) < 1e-6
        assert difference(found_here, {"logits": logits[:, ::-1]}) > 1e-3


def test_an_efficientnet_reads_any_number_of_images():
    model = EfficientNet(width_multiple=0.25, stages=((1, 3, 1, 16, 1), (4, 5, 2, 24, 2)), classes=10)
    variables = model.init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32), train=False)
    rng = np.random.default_rng(0)  # the output layer begins with zeros
    variables = jax.tree.map(lambda x: x + 0.1 * rng.random(x.shape, np.float32), variables)
    function = of_weights(model, variables, (16, 16, 3))
    found = stablehlo.exported(function, True)
    for batch in (1, 3):
        given = example(function, batch, 0)
        logits = model.apply(function.variables, given["inputs"], train=False)
        found_here = found.call(flatten_dict(function.variables, sep="/"), given)
        assert difference(found_here, {"logits": logits}) < 1e-5
        assert difference(found_here, {"logits": logits[:, ::-1]}) > 1e-3


def test_examples_fit_the_model():
    function = of_weights(BERT(vocab=50, classes=2, **SMALL), {"params": {}})
    given = example(function, 4, 99)
    assert given["inputs"].shape == (4, 24) and given["inputs"].max() < 50
    assert given["mask"][:, 0].all() and given["mask"].dtype == np.uint8
