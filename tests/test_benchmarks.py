"""The comparison with PyTorch: the same mathematics on both sides, update by update; its options and its table."""

import dataclasses
import functools
import json

import jax
import numpy as np
import optax
import pytest

from lab.data.images.images import Images
from lab.data.messages.messages import Messages
from lab.data.messages.sources import TextFolder
from lab.data.pipeline import eval_batches, train_batch
from lab.data.tables.bundled import Sklearn
from lab.data.tables.tables import Table
from lab.data.word_tokenizer import Words
from lab.errors import UserError
from lab.experiment import Experiment
from lab.models.cnn import ConvNet
from lab.models.linear import Linear
from lab.models.rnn import LSTM
from lab.optim import SGD, Adam, AdamW, Cosine, Lion
from lab.tasks.regress import Regress
from lab.tasks.supervised import Classify
from lab.train.shapes import batch_spec, one_record
from lab.train.step import eval_params, init_state, make_eval_step, make_train_step
from tests.benchmarks import compare_torch, torch_job
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

UPDATES = 4
CLOSE = 1e-5  # relative


@pytest.fixture
def messages(tmp_path):
    for name, words in (("ham", "see you at lunch the meeting is at noon"), ("spam", "buy cheap pills win money now")):
        (tmp_path / "mail" / name).mkdir(parents=True)
        for i in range(20):
            text = " ".join((words.split() * 2)[i % 5:i % 5 + 1 + i % 9])  # of many lengths
            (tmp_path / "mail" / name / str(i)).write_text(f"{text} {i}")
    return Messages(TextFolder(str(tmp_path / "mail")), Words(50), length=8)


@pytest.fixture
def experiments(tiny, messages):
    """One of each kind; together every part of an update that the experiments under comparison have, but dropout."""
    optim = AdamW(lr=Cosine(1e-2, warmup=2), weight_decay=5.0, grad_clip_norm=0.05)
    rest = {"optim": optim, "steps": 8, "batch": 8, "seed": 3}
    digits = Images(Sklearn("digits"), shape=(8, 8, 1), mean=(0.3,), std=(0.37,))
    tumours, diabetes = Table(Sklearn("breast_cancer")), Table(Sklearn("diabetes"))
    small = {"vocab": 50, "width": 6, "hidden": 5, "classes": 2}
    return {
        "GPT": dataclasses.replace(tiny, optim=optim, grad_accum_steps=2),
        "GPT, no bias": dataclasses.replace(tiny, optim=optim, model=tiny.model.clone(bias=False, tied=False)),
        "ConvNet": Experiment(
            digits,
            ConvNet(channels=(4, 6), convs=(1, 2), dense=7, dropout=0.0, dense_dropout=0.0),
            Classify(),
            **rest | {"optim": dataclasses.replace(optim, ema=0.9)},
        ),
        "LSTM": Experiment(messages, LSTM(**small, pool="max"), Classify(), **rest),
        "LSTM, deep": Experiment(
            messages, LSTM(**small, depth=2), Classify(), **rest | {"optim": Adam(lr=1e-2, l2=0.3)}
        ),
        "LSTM, one way": Experiment(messages, LSTM(**small, bidirectional=False, pool="mean"), Classify(), **rest),
        "logistic": Experiment(
            tumours, Linear(classes=2), Classify(), **rest | {"optim": SGD(lr=Cosine(0.5), momentum=0.9, l2=0.3)}
        ),
        "linear": Experiment(
            diabetes, Linear(), Regress(), **rest | {"optim": SGD(lr=Cosine(0.1), grad_clip_norm=0.1)}
        ),
    }


def by_lab(experiment):
    """The loss before each update, the norm of the (averaged) parameters after the last, and the validation loss."""
    data = experiment.data.load()
    state = jax.jit(functools.partial(init_state, experiment))(one_record(batch_spec(experiment)))
    update, losses = jax.jit(make_train_step(experiment)), []
    for step in range(UPDATES):
        state, metrics = update(state, train_batch(data.train, step, experiment.batch, experiment.seed))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    evaluate = jax.jit(make_eval_step(experiment))
    parts = [evaluate(state, batch)["loss"] for batch in eval_batches(data.validation, 16, 40)]
    norm = optax.tree.norm(eval_params(experiment, state))
    return np.array([*losses, norm, sum(s for s, _ in parts) / sum(w for _, w in parts)])


def by_torch(job, ways):
    from tests.benchmarks.torch_train import Trainer

    trainer = Trainer(job, ways)
    losses = [float(trainer.update(step)) for step in range(UPDATES)]
    norm = sum(float(p.detach().square().sum()) for p in trainer.average or trainer.trained) ** 0.5
    return np.array([*losses, norm, trainer.validate(rows=7)])


KINDS = [("GPT", "attention"), ("GPT, no bias", ""), ("ConvNet", "layout"), ("LSTM", "texts"), ("LSTM, deep", "texts"),
         ("LSTM, one way", "texts"), ("logistic", ""), ("linear", "")]


@pytest.mark.parametrize(("name", "choice"), KINDS)
def test_both_sides_compute_the_same(name, choice, experiments, tmp_path):
    """Losses of four batches, three updates apart, and on the validation split; of every way."""
    pytest.importorskip("torch", reason="torch is what is compared with, and is not installed (LAB_EXTRAS=benchmark)")
    from tests.benchmarks.torch_models import WAYS, kind_of
    from tests.benchmarks.torch_train import OPTIMIZERS, Job

    experiment = dataclasses.replace(experiments[name], evaluate=dataclasses.replace(experiments[name].evaluate,
                                                                                     records=40))
    torch_job.write(experiment, tmp_path / "job", UPDATES, validation=True)
    job, want = Job(tmp_path / "job", "cpu"), by_lab(experiment)
    others = WAYS[kind_of(job.spec["model"])].get(choice, ())
    ways = [{"optimizer": kind} for kind in OPTIMIZERS] + [{choice: way} for way in others]
    assert len(others) == (2 if choice else 0)
    last = -1 if name == "ConvNet" else None  # torch's running variance is the unbiased one, lab's the biased
    for way in ways:
        np.testing.assert_allclose(by_torch(job, way)[:last], want[:last], rtol=CLOSE, err_msg=str(way))
    # Negative controls: rates, penalties, clipping, order of the data.
    job.rates = [rate * 1.05 for rate in job.rates]
    changed = [by_torch(job, {})]
    assert abs(changed[0][0] / want[0] - 1) < CLOSE  # the first loss is that before any update
    job = Job(tmp_path / "job", "cpu")
    optim = job.spec["optim"]
    for field, off in (("decay", 0.0), ("l2", 0.0), ("clip", None)):
        if optim[field] and not (field == "clip" and "b1" in optim):  # Adam hardly sees the size of the gradient
            job.spec["optim"] = {**optim, field: off}
            changed.append(by_torch(job, {}))
    job = Job(tmp_path / "job", "cpu")
    job.batches = {field: x.roll(1, 0) for field, x in job.batches.items()}
    changed.append(by_torch(job, {}))
    for found in changed:
        assert np.abs(found / want - 1)[:last].max() > 10 * CLOSE, (found, want)


def test_what_is_not_written_in_torch_is_refused(experiments):
    for change, match in (({"optim": Lion(lr=1e-3)}, "no Lion"), ({"task": Classify(label_smoothing=0.1)}, "smoothing"),
                          ({"model": experiments["GPT"].model}, "no Classify of GPT"),
                          ({"optim": AdamW(lr=1e-3, lr_multipliers=(("conv", 0.5),))}, "no lr_multipliers")):
        with pytest.raises(UserError, match=match):
            torch_job.check(dataclasses.replace(experiments["ConvNet"], **change))
    torch_job.check(experiments["ConvNet"])
    with pytest.raises(UserError, match="position rotary"):
        gpt = experiments["GPT"]
        torch_job.check(dataclasses.replace(gpt, model=gpt.model.clone(position="rotary")))


def test_every_experiment_under_comparison_can_be_compared():
    from lab.files import ROOT
    from lab.train.experiment_file import load

    for name in compare_torch.NAMES:
        module = load(ROOT / f"experiments/{name}.py")
        for experiment in (module.experiment, module.local):
            torch_job.check(experiment)
    torch_job.check(load(ROOT / "experiments/gpt_small.py").experiment)


def test_names_come_first_and_other_flags_are_the_experiments():
    names, options, flags = compare_torch.parsed(["gpt_char", "mnist_cnn", "--rounds", "2", "--full", "--data.x", "y",
                                                  "--batch", "3"])
    assert (names, options.rounds, flags) == (["gpt_char", "mnist_cnn"], 2, ["--full", "--data.x", "y", "--batch", "3"])
    names, options, _ = compare_torch.parsed(["--local", "--precision", "float32,bfloat16"])
    assert names == list(compare_torch.NAMES)
    assert list(compare_torch.plans(["a.py"], options)) == [("a", ["--precision", "float32"]),
                                                            ("a", ["--precision", "bfloat16"])]
    assert list(compare_torch.plans(["a"], compare_torch.parsed(["--local"])[1])) == [("a", [])]
    for wrong in (["--local", "--rounds", "0"], ["--local", "--forms", "eager,other"]):
        with pytest.raises(compare_torch.Stop):
            compare_torch.parsed(wrong)


def test_the_ratio_is_that_of_each_round_to_the_best_form():
    rounds = {"lab": [{"ms": 2.0}, {"ms": 8.0}, {"ms": 3.0}], "eager": [{"ms": 4.0}, {"ms": 8.0}, {"ms": 3.0}],
              "compiled": [{"ms": 9.0}, {"ms": 9.0}, {"ms": 1.0}]}
    assert compare_torch.ratios(rounds, "ms") == {"best": "eager", "ratio": 1.0, "ratios": [0.5, 1.0, 1.0]}


def test_a_python_without_torch_is_one_sentence(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(compare_torch.Stop, match="LAB_EXTRAS=benchmark ./launch.sh env --python"):
        compare_torch.check_torch(str(python))


def test_rounds_alternate_and_the_table_has_everything(monkeypatch, capsys, tmp_path):
    """The whole command with stand-ins for the processes: what is started, in which order, and what is printed."""
    started = []

    def run(command, environ=None):
        words = [str(word) for word in command]
        if "tests.benchmarks.torch_job" in words:
            folder = words[words.index("tests.benchmarks.torch_job") + 1]
            compare_torch.Path(folder).mkdir()
            (compare_torch.Path(folder) / "job.json").write_text('{"precision": "float32", "parameters": 7}')
            return ""
        if words[0].endswith("launch.sh"):
            started.append(words[1])
            return "a table\n" + json.dumps({"ms_per_step": 2.0, "compile_seconds": 1.5, "data_wait_ms": 0.25})
        started.append(words[-3] if "MALLOC_TOP_PAD_" in environ else "stock")
        return json.dumps({"ways": {"optimizer": "foreach"}, "ms": {"foreach": 4.0}} if words[-3] == "tune" else
                          {"ms_per_step": {"eager": 8.0, "compiled": 4.0}[words[-3]], "compile_seconds": 78.0})

    monkeypatch.setattr(compare_torch, "run", run)
    monkeypatch.setattr(compare_torch, "check_torch", lambda python: None)
    monkeypatch.setattr(compare_torch.variables, "process_environ",  # not only Linux has this test
                        lambda *_: {"MALLOC_TOP_PAD_": "1"})
    compare_torch.main(["gpt_char", "--local", "--rounds", "2", "--json", str(tmp_path / "found.json")])
    assert started == ["env", "tune", *["bench", "stock", "eager", "compiled"] * 2]
    out = capsys.readouterr().out
    (row,) = json.loads(out.splitlines()[-1])
    assert row == json.loads((tmp_path / "found.json").read_text())[0]
    assert (row["best"], row["ratio"], row["parameters"]) == ("compiled", 0.5, 7)
    for cell in ("gpt_char", "float32", "2 (2-2)", "8 (8-8)", "0.5 (0.5-0.5) of", "78.0", "0.25"):
        assert cell in out, cell
