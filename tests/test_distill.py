"""Distillation: Hinton's loss by a NumPy loop, for classes, tokens and masked tokens; the teacher stays outside of the
state; resuming, devices, microbatches, studies; other and missing teachers."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.commands import evaluate as evaluate_command
from lab.configuration.rebuild import from_json
from lab.configuration.values import override, to_json
from lab.data.dataset import Data, Dataset
from lab.data.pipeline import Arrays, train_batch
from lab.errors import UserError
from lab.experiment import Checkpoint, Evaluate, Experiment, Mesh
from lab.models.bert import BERT
from lab.models.gpt import GPT
from lab.models.linear import MLP, Ensemble
from lab.models.members import Members
from lab.optim import SGD, AdamW
from lab.study.run.grouping import groups
from lab.study.run.units import can_be_stacked
from lab.tasks.distill import Distill, compared
from lab.tasks.language import LanguageModel
from lab.tasks.masked import MaskedLM
from lab.tasks.regress import Regress
from lab.tasks.supervised import Classify
from lab.train.cost import cost_of
from lab.train.evaluation import predict
from lab.train.json_files import write_json
from lab.train.program import Program
from lab.train.restore import open_run
from lab.train.step import eval_variables
from lab.train.teacher import check_teacher, with_teacher
from tests.test_loop import go, interrupt
from tests.test_lora import bits
from tests.test_step import apart, compiled_in_haste  # noqa: F401 (a fixture)


@dataclass(frozen=True)
class Blobs(Data):
    """Points in 5 dimensions, of the kinds a, b and c."""

    names: tuple[str, ...] = ("a", "b", "c")

    def load(self) -> Dataset:
        random = np.random.default_rng(0)
        y = np.arange(60, dtype=np.int32) % len(self.names)
        x = (random.normal(size=(len(self.names), 5))[y] + 0.7 * random.normal(size=(60, 5))).astype(np.float32)
        train, validation = (Arrays({"inputs": x[part], "targets": y[part]}) for part in (slice(44), slice(44, 60)))
        return Dataset(train, validation, classes=self.names)


def base(**changes: Any) -> Experiment:
    """Six steps of 8 points, on one device."""
    return replace(Experiment(
        data=Blobs(), model=MLP(classes=3, depth=1, width=4), task=Classify(), optim=AdamW(lr=0.05), steps=6, batch=8,
        evaluate=Evaluate(every=3), checkpoint=Checkpoint(every=3), mesh=Mesh(data=1)), **changes)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """The run folder of a wider network."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    experiment = base(model=MLP(classes=3, depth=1, width=16), steps=20, evaluate=Evaluate(every=0),
                      optim=AdamW(lr=0.05, ema=0.9))
    assert go(experiment, folder)[0] == 0
    return folder


def student(teacher: Path, **changes: Any) -> Experiment:
    return base(task=Distill(Classify(), str(teacher), temperature=2.0, weight=0.7), **changes)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_loop(ours: Any, theirs: Any, targets: Any, weights: Any, T: float, weight: float) -> tuple[float, float, float]:
    """(sum of Hinton's losses, sum of KLs, number of agreements), one record or token after another, in float64."""
    total, kl, same = 0.0, 0.0, 0.0
    rows = [np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1]) for x in (ours, theirs)]
    for q, p, y, w in zip(*rows, np.ravel(targets), np.ravel(weights), strict=True):
        soft_p, soft_q = softmax(p / T), softmax(q / T)
        one = sum(soft_p * (np.log(soft_p) - np.log(soft_q)))
        total += w * (weight * T**2 * one - (1 - weight) * np.log(softmax(q)[y]))
        kl, same = kl + w * one, same + w * (q.argmax() == p.argmax())
    return total, kl, same


# ----------------------------------------------------------------------------------------------------- the loss


def test_the_divergence_is_numpys():
    random = np.random.default_rng(0)
    ours, theirs = 4 * random.normal(size=(2, 9, 5)).astype(np.float32)
    weights, targets = random.choice([0, 0.5, 1], 9).astype(np.float32), random.integers(0, 5, 9)
    for T in (1.0, 4.0):
        _, kl, same = by_loop(ours, theirs, targets, weights, T, 0.0)
        found = [float(x) for x in compared(jnp.asarray(ours), jnp.asarray(theirs), weights, T)]
        np.testing.assert_allclose(found, (kl, same), rtol=1e-5)
        turned = compared(jnp.asarray(theirs), jnp.asarray(ours), weights, T)  # the negative control: KL(q || p)
        assert abs(float(turned[0]) - kl) > 1e-2
    assert abs(float(compared(jnp.asarray(ours), jnp.asarray(ours), weights, 3.0)[0])) < 1e-6


def test_an_ensemble_teaches_its_mean_and_each_member_learns():
    random = np.random.default_rng(1)
    ours, theirs = random.normal(size=(2, 4, 3, 5)).astype(np.float32)  # 3 members
    mean = np.log(softmax(theirs.astype(np.float64) / 2).mean(1)) * 2
    wanted = sum(by_loop(ours[:, m], mean, np.zeros(4, int), np.ones(4), 2.0, 0.0)[1] for m in range(3))
    found = compared(Members(jnp.asarray(ours)), Members(jnp.asarray(theirs)), jnp.ones(4), 2.0)[0]
    assert float(found) == pytest.approx(wanted, rel=1e-5)
    one = compared(jnp.asarray(ours[:, 0]), Members(jnp.asarray(theirs)), jnp.ones(4), 2.0)[0]
    assert float(one) == pytest.approx(by_loop(ours[:, 0], mean, np.zeros(4, int), np.ones(4), 2.0, 0.0)[1], rel=1e-5)


def drawn(model: nn.Module, inputs: Any) -> Any:
    """Variables that are nowhere zero: a fresh output layer is, and then all logits are."""
    random = np.random.default_rng(len(str(model)))
    return jax.tree.map(lambda x: x + np.float32(random.normal(0, 0.5, x.shape)),
                        jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(inputs))


def outputs(model: nn.Module, variables: Any, inputs: Any, **named: Any) -> Any:
    return jax.jit(lambda variables: model.apply(variables, inputs, train=False, **named))(variables)


def losses(task: Distill, model: nn.Module, variables: Any, batch: Any, train: bool = True) -> Any:
    return jax.jit(lambda variables: task.loss(model, variables, batch, {}, train)[:3])(variables)


def test_classification_is_hintons_loss():
    random = np.random.default_rng(2)
    batch = {"inputs": np.float32(random.normal(size=(7, 5))), "targets": np.int32(random.integers(0, 3, 7)),
             "weight": np.float32([1, 1, 1, 1, 1, 0, 0])}
    small, large = MLP(classes=3, depth=1, width=4), MLP(classes=3, depth=2, width=9)
    own, theirs = (drawn(m, batch["inputs"]) for m in (small, large))
    logits = [outputs(m, v, batch["inputs"]) for m, v in ((small, own), (large, theirs))]
    task = Distill(Classify(), "T", temperature=3.0, weight=0.6).taught_by(large, theirs)
    total, kl, same = by_loop(*logits, batch["targets"], batch["weight"], 3.0, 0.6)
    found, weight, metrics = losses(task, small, own, batch)
    assert float(found) == pytest.approx(total, rel=1e-5) and weight == 5
    assert float(metrics["objective"][0]) == pytest.approx(total, rel=1e-5)
    assert float(metrics["distillation"][0]) == pytest.approx(kl, rel=1e-5)
    assert kl > 0.1 and [float(x) for x in metrics["agreement"]] == [same, 5]
    plain = losses(replace(task, taught=None), small, own, batch, train=False)
    assert float(metrics["loss"][0]) == pytest.approx(float(plain[0]), rel=1e-6)  # the true targets' alone
    alone = losses(replace(task, weight=0.0), small, own, batch)
    assert float(alone[0]) == pytest.approx(float(plain[0]), rel=1e-6)
    teachers = Classify().loss(large, theirs, batch, {}, False)[2]
    assert all(apart(metrics[f"teacher_{n}"], teachers[n]) < 1e-5 for n in ("loss", "accuracy"))
    ensemble = Ensemble(large, members=2)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), theirs["params"])
    twice = losses(task.taught_by(ensemble, {"params": {"member": stacked}}), small, own, batch)  # of equal members
    assert float(twice[0]) == pytest.approx(total, rel=1e-5)
    wrong = losses(replace(task, temperature=2.0), small, own, batch)[0]  # the negative control
    assert abs(float(wrong) - total) > 1e-3
    with pytest.raises(UserError, match="has no teacher yet"):
        losses(replace(task, taught=None), small, own, batch)


@pytest.mark.parametrize("chunk", [None, 3])
def test_language_models_learn_every_token_that_counts(chunk):
    random = np.random.default_rng(3)
    batch = {"tokens": random.integers(0, 11, (4, 9)), "learn": random.integers(0, 2, (4, 8)).astype(np.float32),
             "weight": np.float32([1, 1, 1, 0]), "bytes": np.full(4, 8, np.float32)}
    sizes = {"heads": 2, "vocab": 11, "context": 8}
    small, large = GPT(depth=1, width=8, **sizes), GPT(depth=2, width=16, **sizes)
    inputs = batch["tokens"][:, :-1]
    own, theirs = (drawn(m, inputs) for m in (small, large))
    logits = [outputs(m, v, inputs) for m, v in ((small, own), (large, theirs))]
    weights = batch["learn"] * batch["weight"][:, None]
    total, kl, same = by_loop(*logits, batch["tokens"][:, 1:], weights, 2.0, 0.5)
    task = Distill(LanguageModel(chunk=chunk), "T", temperature=2.0).taught_by(large, theirs)
    found, weight, metrics = losses(task, small, own, batch)
    assert float(found) == pytest.approx(total, rel=1e-5) and weight == weights.sum()
    assert float(metrics["distillation"][0]) == pytest.approx(kl, rel=1e-5)
    assert float(metrics["agreement"][0]) == pytest.approx(same)
    if chunk:
        def gradient(task: Distill) -> Any:
            return jax.jit(jax.grad(lambda v: task.loss(small, v, batch, {}, True)[0]))(own)

        whole = gradient(replace(task, task=LanguageModel()))
        assert apart(gradient(task), whole) < 1e-4 and apart(gradient(replace(task, weight=0.4)), whole) > 1e-2


def test_masked_language_models_learn_the_hidden_tokens():
    random = np.random.default_rng(4)
    batch = {"inputs": random.integers(1, 11, (3, 10)), "mask": np.ones((3, 10), np.int32), "weight": np.ones(3),
             "key": jax.random.split(jax.random.key(5), 3)}
    sizes = {"heads": 2, "vocab": 12, "context": 10, "dropout": 0.0}
    small, large = BERT(depth=1, width=8, **sizes), BERT(depth=1, width=16, **sizes)
    own, theirs = (drawn(m, batch["inputs"]) for m in (small, large))
    inner = MaskedLM(rate=0.3)
    inputs, chosen, weights = inner.hidden(small, batch)
    logits = [outputs(m, v, inputs, select=chosen, mask=batch["mask"]) for m, v in ((small, own), (large, theirs))]
    targets = np.take_along_axis(batch["inputs"], np.asarray(chosen), 1)
    total, kl, _ = by_loop(*logits, targets, weights, 2.0, 0.5)
    found, weight, metrics = losses(Distill(inner, "T", 2.0).taught_by(large, theirs), small, own, batch)
    assert float(found) == pytest.approx(total, rel=1e-5) and weight == 9 and kl > 0.1
    assert float(metrics["distillation"][0]) == pytest.approx(kl, rel=1e-4)


# ----------------------------------------------------------------------------------------------------- the teacher


@pytest.fixture(scope="module")
def done(teacher, tmp_path_factory) -> Path:
    """The folder of a run. Not to be written to."""
    folder = tmp_path_factory.mktemp("distill") / "run"
    assert go(student(teacher), folder)[0] == 0
    return folder


def rows(folder: Path, split: str = "validation") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["split"] == split]


def test_the_teacher_is_outside_of_state_and_checkpoints(teacher, done):
    experiment = with_teacher(student(teacher))
    program, plain = Program(experiment), Program(base())
    assert str(program.abstract) == str(plain.abstract)
    own = open_run(done, experiment=student(teacher))[2]
    assert str(jax.tree.map(jnp.shape, own)) == str(jax.tree.map(jnp.shape, plain.init()))
    theirs = open_run(teacher)
    wanted = eval_variables(theirs[0], theirs[2])
    assert bits(experiment.task.taught.variables) == bits(jax.device_get(wanted))  # averaged
    assert bits(wanted) != bits({"params": theirs[2].params})
    assert to_json(experiment) == to_json(student(teacher)) and from_json(to_json(experiment)) == experiment
    assert experiment.fingerprint() == student(teacher).fingerprint()
    about = json.loads((done / "teacher.json").read_text())
    assert about["from"] == str(teacher) and about["step"] == 20 and len(about["digest"]) == 64
    final = rows(done)[-1]
    assert final["teacher_accuracy"] > 0.8 and final["agreement"] > rows(done)[0]["agreement"]
    assert {"loss", "objective", "distillation", "accuracy", "f1"} <= final.keys()


def test_flops_have_one_forward_pass_of_the_teacher(teacher):
    plain, taught = cost_of(base()).flops, cost_of(with_teacher(student(teacher))).flops
    forward = 8 * 2 * (5 * 16 + 16 * 3)
    assert taught - forward in (plain, plain - 8 * 2 * 5 * 4)  # the first layer has no gradient of its inputs


def test_a_stopped_run_resumes_to_the_bit(teacher, done, tmp_path):
    assert go(student(teacher), tmp_path / "run", 2, interrupt())[0] == 75
    about, aside = tmp_path / "run/teacher.json", teacher.rename(tmp_path / "aside")
    with pytest.raises(UserError, match="The teacher .* is not there"):
        go(student(teacher), tmp_path / "run")
    aside.rename(teacher)
    written = about.read_text()
    about.write_text(written.replace(json.loads(written)["digest"], "another"))
    with pytest.raises(UserError, match="is not the one with which the run in .* began"):
        go(student(teacher), tmp_path / "run")
    about.write_text(written)
    assert go(student(teacher), tmp_path / "run")[0] == 0
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (done / "metrics.jsonl").read_bytes()
    whole, resumed = (open_run(folder, experiment=student(teacher))[2] for folder in (done, tmp_path / "run"))
    assert bits(whole) == bits(resumed)


def trained(experiment: Experiment) -> tuple[Any, Any]:
    """The parameters after 3 steps, and the sums of the metrics of the last."""
    program, records = Program(with_teacher(experiment)), experiment.data.load().train
    state = program.init()
    for step in range(3):
        state, values = program.train(state, program.batch(lambda call: train_batch(records, call, 8, 0), step))
    return jax.device_get(state.params), jax.device_get(values)


@pytest.fixture(scope="module")
def alone(teacher) -> Any:
    return trained(student(teacher, optim=SGD(0.1)))


@pytest.mark.parametrize("changes", [{"mesh": Mesh(data=8)}, {"mesh": Mesh(data=2, fsdp=4)}, {"grad_accum_steps": 4},
                                     {"mesh": Mesh(data=8), "parallel": "pmap"}, {"mesh": Mesh(data=4), "exact": True}],
                         ids=["8 devices", "fsdp", "microbatches", "pmap", "exact"])
def test_it_is_the_same_on_devices_and_in_microbatches(teacher, alone, changes):
    assert apart(trained(student(teacher, optim=SGD(0.1), **changes)), alone) < 1e-5


def test_the_teacher_changes_the_result(teacher, alone):
    """The negative control."""
    experiment = student(teacher, optim=SGD(0.1))
    assert apart(trained(override(experiment, {"task.weight": 0.5}))[0], alone[0]) > 1e-3


def test_temperature_and_weight_are_numbers_of_one_program(teacher):
    experiment = with_teacher(student(teacher))
    arms = {f"{T} {w}": override(experiment, {"task.temperature": T, "task.weight": w}) for T in (1.0, 4.0)
            for w in (0.0, 0.5, 1.0)}
    (group,) = groups(arms)
    assert set(group.numbers) == {"task.temperature", "task.weight"} and not can_be_stacked(experiment)
    program = Program(experiment, numbers=group.numbers)
    other = program.like(arms["4.0 1.0"])
    batch = program.batch(lambda call: {**experiment.data.load().train[np.arange(8)], "weight": np.ones(8, np.float32),
                                        "index": np.arange(8, dtype=np.int32)}, 0)
    found = [jax.device_get(p.train(p.init(), batch)[1]) for p in (program, other)]
    alone = Program(arms["4.0 1.0"])
    wanted = jax.device_get(alone.train(alone.init(), batch)[1])
    assert apart(found[1], wanted) < 1e-5 and apart(found[0], wanted) > 1e-2


def test_predictions_need_no_teacher_and_evaluation_says_what_is_missing(teacher, done, tmp_path, caplog):
    last = rows(done)[-1]
    evaluate_command.evaluate(done, output=tmp_path / "out")
    assert json.loads((tmp_path / "out/evaluation-validation-6.json").read_text()) == last
    aside = teacher.rename(tmp_path / "aside")
    evaluate_command.evaluate(done, output=tmp_path / "out")
    found = json.loads((tmp_path / "out/evaluation-validation-6.json").read_text())
    assert found == {name: x for name, x in last.items() if name in found} and "loss" in found
    assert "agreement" not in found and "metrics of the distillation are left out" in caplog.text
    _, program, state = open_run(done)
    assert set(predict(program, state, Blobs().load().validation)["prediction"]) <= {0, 1, 2}
    aside.rename(teacher)


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("changes, said", [
    ({"temperature": 0.0}, "--task.temperature must be above 0, not 0.0"),
    ({"weight": 1.5}, r"--task.weight must be in \[0, 1\], not 1.5"), ({"weight": -0.1}, "--task.weight must be"),
    ({"task": Classify(label_smoothing=2.0)}, "--task.task.label-smoothing"),
    ({"task": Regress()}, "Distill is for tasks whose model gives logits .*, not for Regress"),
])
def test_fields_out_of_range(changes, said):
    with pytest.raises(UserError, match=said):
        replace(Distill(), **changes).validate()


def test_teachers_that_do_not_fit(teacher, tmp_path):
    def refused(experiment: Experiment, said: str) -> None:
        with pytest.raises(UserError, match=said):
            with_teacher(experiment)

    refused(base(task=Distill()), "needs a teacher")
    refused(student(tmp_path / "none"), "none is not there. ./launch.sh EXPERIMENT --run-dir .*none trains it")
    shutil.copytree(teacher, tmp_path / "unfinished")
    (tmp_path / "unfinished/result.json").unlink()
    refused(student(tmp_path / "unfinished"), "is not finished: type its command again, or name one of its checkpoints")
    found = with_teacher(student(tmp_path / "unfinished/checkpoints/20"))
    assert bits(found.task.taught.variables) == bits(with_teacher(student(teacher)).task.taught.variables)
    four = student(teacher, data=Blobs(("a", "b", "c", "d")), model=MLP(classes=4, depth=1, width=4))
    refused(four, "The teacher .* has 3 classes and the model 4")
    assert with_teacher(plain := base()) is plain  # a task without a teacher


@pytest.mark.parametrize("chunk", [None, 3])
def test_another_vocabulary_is_refused(chunk):
    batch = {"tokens": np.zeros((2, 9), np.int32), "weight": np.ones(2), "bytes": np.ones(2)}
    small, large = (GPT(depth=1, width=8, heads=2, vocab=vocab, context=8) for vocab in (11, 12))
    own, theirs = (jax.eval_shape(lambda m=m: m.init(jax.random.key(0), batch["tokens"][:, :-1], train=False))
                   for m in (small, large))
    task = Distill(LanguageModel(chunk=chunk), "gpt2")
    with pytest.raises(UserError, match="The teacher gpt2 has 12 ids in its vocabulary and the model 11"):
        jax.eval_shape(lambda v, t: task.taught_by(large, t).loss(small, v, batch, {}, True), own, theirs)


def test_other_classes_and_tokenizers_are_refused(teacher, tmp_path):
    """Numbers fit, names do not."""
    shutil.copytree(teacher, tmp_path / "teacher")
    write_json(tmp_path / "teacher/fitted.json", {"saved": {"classes": ["a", "c", "b"]}})
    experiment = with_teacher(student(tmp_path / "teacher"))
    with pytest.raises(UserError, match="knows the classes a, c, b, and the data has a, b, c"):
        check_teacher(experiment, experiment.data.load(), tmp_path)
    write_json(tmp_path / "teacher/fitted.json", {"saved": {"classes": ["a", "b", "c"]}})
    experiment = with_teacher(student(tmp_path / "teacher"))
    check_teacher(experiment, experiment.data.load(), tmp_path)
    (tmp_path / "teacher/tokenizer.json").write_text("{}")
    data = experiment.data.load()
    data.tokenizer_state = "another"
    with pytest.raises(UserError, match="The tokenizer of .* is another one"):
        check_teacher(experiment, data, tmp_path)
