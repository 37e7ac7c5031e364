"""What a run is given beside its seed: parameters of another run, word vectors, resident records, a key per record."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lab.data.messages.messages import Messages
from lab.data.pipeline import Arrays, eval_batches, reader, train_batch
from lab.data.tables.csv_files import Csv
from lab.data.word_tokenizer import Words
from lab.errors import UserError
from lab.experiment import Checkpoint, Evaluate, Experiment, Log, Mesh
from lab.optim import SGD, AdamW, Constant, ScheduleFreeAdamW
from lab.pretrained import Pretrained, WordVectors
from lab.tasks.supervised import Classify
from lab.train import beginning, ending, loop, restore
from lab.train.frozen import frozen_statistics
from lab.train.metrics import means, read_rows
from lab.train.program import Program
from lab.train.records_on_device import OnlyNumbered, fits
from lab.train.restore import initial_arrays, leaves, open_run
from lab.train.shapes import abstract_state
from lab.train.step import State, eval_variables, key_for, make_train_step, prepare
from tests.test_loop import go, interrupt
from tests.test_step import Kinds, Points, apart, compiled_in_haste, toy  # noqa: F401 (a fixture)

# ------------------------------------------------------------------------------------------------ toy ingredients


class Normed(nn.Module):
    """x (B, 6) -> logits (B, kinds), with running statistics in "batch_stats"; `second` adds a layer that is new."""

    width: int = 8
    kinds: int = 4
    second: bool = False

    def validate(self) -> None:
        """Nothing can be wrong."""

    def check(self, facts: Mapping[str, int]) -> None:
        """Fits any data."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        x = nn.Dense(self.width, name="hidden")(x)
        x = nn.tanh(nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x))
        x = nn.tanh(nn.Dense(self.width, name="second")(x)) if self.second else x
        return nn.Dense(self.kinds, name="out")(x)


class Held(Points):
    """Points held in memory as arrays, which may stay on the devices."""

    def load(self) -> SimpleNamespace:
        data = super().load()
        return SimpleNamespace(**vars(data) | {"train": Arrays(data.train.columns)})


@dataclass(frozen=True)
class Noisy(Held):
    """Held points; the transform moves each by a random number of its own, in training and in evaluation."""

    def transform(self, batch: dict[str, Any], train: bool) -> dict[str, Any]:
        traces.append(train)
        return batch | {"x": batch["x"] + 0.3 * jax.vmap(lambda key: jax.random.normal(key, (6,)))(batch["key"])}


@dataclass(frozen=True)
class Jittered(Kinds):
    """A task with randomness of its own: it moves each point by what the record's key says."""

    def loss(self, model: nn.Module, variables: Any, batch: Mapping[str, jax.Array], rngs: Any, train: bool) -> Any:
        moved = batch["x"] + 0.3 * jax.vmap(lambda key: jax.random.normal(key, (6,)))(batch["key"])
        return super().loss(model, variables, {**batch, "x": moved}, rngs, train)


traces: list[bool] = []  # of Noisy.transform


class Bag(nn.Module):
    """Token ids (B, L) -> logits (B, 2): the mean of word vectors, and an output layer."""

    vocab: int = 32
    width: int = 3

    def validate(self) -> None:
        """Nothing can be wrong."""

    def check(self, facts: Mapping[str, int]) -> None:
        """Fits any data of up to `vocab` words."""

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool, mask: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocab, self.width, name="embedding")(tokens) * mask[..., None]
        return nn.Dense(2, name="classify")(x.sum(1) / mask.sum(1, keepdims=True))


@functools.cache
def _program(experiment: Experiment) -> Program:
    return Program(experiment, experiment.data.load().train)


def program_of(experiment: Experiment, train: Any = None) -> Program:
    """One program, compiled once, for all runs that compute the same updates."""
    return _program(replace(experiment, evaluate=Evaluate(), checkpoint=Checkpoint(), log=Log(),
                            init_from=Pretrained(freeze=experiment.init_from.freeze)))


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Programs are shared, and no picture is drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Program", program_of)
        patch.setattr(restore, "Program", program_of)
        patch.setattr(ending.plots, "curves", lambda rows, folder, metric: [])
        patch.setattr(Classify, "artifacts", lambda task, outcome: [])
        yield


def bits(tree: Any) -> dict[str, bytes]:
    return {path: np.asarray(x).tobytes() for path, x in leaves(tree).items()}


# ------------------------------------------------------------------------------------------- parameters of a run

SOURCE = toy(model=Normed(), optim=AdamW(lr=Constant(0.05), ema=0.9), steps=8, evaluate=Evaluate(every=4))
TUNED = replace(SOURCE, checkpoint=Checkpoint(every=2, keep=10))
PARAMETERS = ["hidden/bias", "hidden/kernel", "norm/bias", "norm/scale", "out/bias", "out/kernel"]
STATISTICS = ["batch_stats/norm/mean", "batch_stats/norm/var"]
PLAIN = toy(data=Held(), data_on_device="never")


@pytest.fixture(scope="module")
def source(tmp_path_factory, quick) -> Path:
    """The folder of a run with averaged parameters. Not to be written to."""
    folder = tmp_path_factory.mktemp("source") / "run"
    assert go(SOURCE, folder)[0] == 0
    return folder


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory, quick) -> Path:
    """The folder of a run without any of what is tested here. Not to be written to."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    assert go(PLAIN, folder)[0] == 0
    return folder


@functools.cache
def state_of(run: Path, step: int | None = None) -> State:
    """The state of a run that is over, on the host."""
    return jax.device_get(open_run(run, step)[2])


def load(init_from: Any, experiment: Experiment = SOURCE, data: Any = None) -> tuple[dict, dict]:
    """(arrays, report) for this experiment."""
    init_from.validate()
    return initial_arrays(init_from, program_of(experiment).abstract, data or SimpleNamespace())


def test_parameters_come_averaged_and_the_optimizer_starts_afresh(source):
    given, report = load(Pretrained(str(source)), TUNED)
    there, here = state_of(source), jax.device_get(program_of(TUNED).init(given))
    assert bits(here.params) == bits(there.opt_state.ema)
    assert apart(here.params, there.params) > 1e-3  # the negative control: these are not the last ones
    assert bits(here.model_state) == bits(there.opt_state.model_state)  # statistics go with the weights: averaged, too
    assert apart(here.model_state, there.model_state) > 1e-3
    fresh = jax.device_get(program_of(TUNED).init())
    assert apart(here.model_state, fresh.model_state) > 1e-2 and apart(here.params, fresh.params) > 1e-2
    assert here.step == 0 and there.step == 8
    assert bits(here.opt_state.ema) == bits(here.params)
    assert bits(here.opt_state._replace(ema=None, model_state=None)) == bits(
        fresh.opt_state._replace(ema=None, model_state=None)
    )
    assert sum(int(np.count_nonzero(x)) for x in jax.tree.leaves(there.opt_state.inner)) > 50  # it had moments
    assert report == {"from": str(source), "step": 8, "fingerprint": SOURCE.fingerprint(), "random": [],
                      "loaded": PARAMETERS + STATISTICS, "not taken": []}


def test_without_an_average_the_parameters_themselves_come(plain_run):
    given, report = load(Pretrained(str(plain_run)), PLAIN)
    assert {path: x.tobytes() for path, x in given.items()} == bits(state_of(plain_run).params)
    assert report["step"] == 12


def test_one_of_the_checkpoints(source):
    given, report = load(Pretrained(f"{source}/checkpoints/4"))
    assert report["step"] == 4 and report["from"] == str(source)
    ema = bits(state_of(source, 4).opt_state.ema)
    assert {path: np.asarray(x).tobytes() for path, x in given.items() if path in ema} == ema
    assert ema != bits(state_of(source).opt_state.ema)
    with pytest.raises(UserError, match=r"has no checkpoint of step 5; it has \[4, 8\]"):
        load(Pretrained(f"{source}/checkpoints/5"))


@pytest.mark.parametrize("rules, loaded", [
    ({"exclude": ("^out/",)}, PARAMETERS[:4] + STATISTICS),
    ({"exclude": ("bias$", "^batch_stats/")}, ["hidden/kernel", "norm/scale", "out/kernel"]),
    ({"include": ("hidden", "^out")}, ["hidden/bias", "hidden/kernel", "out/bias", "out/kernel"]),
    ({"include": ("kernel", "mean"), "exclude": ("out",)}, ["hidden/kernel", "batch_stats/norm/mean"])])
def test_include_and_exclude(source, rules, loaded):
    given, report = load(Pretrained(str(source), **rules))
    left = [path for path in PARAMETERS + STATISTICS if path not in loaded]
    assert (report["loaded"], report["random"], report["not taken"]) == (loaded, left, left)
    there = bits(state_of(source).opt_state.ema) | bits(state_of(source).opt_state.model_state)
    assert {path: x.tobytes() for path, x in given.items()} == {path: there[path] for path in loaded}


def test_another_output_layer_and_a_layer_that_is_new(source):
    other = replace(SOURCE, model=Normed(kinds=5, second=True))
    given, report = load(Pretrained(str(source), exclude=("^out/",)), other)
    assert report["loaded"] == PARAMETERS[:4] + STATISTICS
    assert report["random"] == ["out/bias", "out/kernel", "second/bias", "second/kernel"]
    assert report["not taken"] == ["out/bias", "out/kernel"]
    state = program_of(other).init(given)
    assert state.params["out"]["kernel"].shape == (8, 5)
    assert bits(state.params["hidden"]) == bits(state_of(source).opt_state.ema["hidden"])


@pytest.mark.parametrize("change, words", [
    ({"model": Normed(kinds=5)}, r"out/bias is \(4,\) in .*run and \(5,\) here. .*--init-from.exclude out/bias"),
    ({"model": Normed(width=9)}, r"hidden/bias is \(8,\) in .*run and \(9,\) here")])
def test_other_shapes_are_named(source, change, words):
    with pytest.raises(UserError, match=words):
        load(Pretrained(str(source)), replace(SOURCE, **change))


def test_what_cannot_be_loaded(source, tmp_path):
    with pytest.raises(UserError, match="nowhere is not a run folder"):
        load(Pretrained(str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"Nothing in .* fits: it has hidden/bias, .*rules: include \('\^zzz',\)"):
        load(Pretrained(str(source), include=("^zzz",)))
    for name in ("include", "exclude", "freeze"):
        with pytest.raises(UserError, match=rf"--init-from.{name}: '\(' is not a regular expression"):
            replace(SOURCE, init_from=Pretrained(**{name: ("(",)})).validate()
    unsaved = tmp_path / "unsaved"
    unsaved.mkdir()
    (unsaved / "experiment.json").write_text((source / "experiment.json").read_text())
    with pytest.raises(UserError, match="unsaved has no checkpoint yet"):
        load(Pretrained(str(unsaved)))


def test_another_tokenizer(source, tmp_path):
    (tmp_path / "experiment.json").write_text((source / "experiment.json").read_text())
    (tmp_path / "checkpoints").symlink_to(source / "checkpoints")
    (tmp_path / "tokenizer.json").write_text('{"kind": "Words"}')
    with pytest.raises(UserError, match=r"The tokenizer of .* is another one.*tokenizer=Saved\('"):
        load(Pretrained(str(tmp_path)), data=SimpleNamespace(tokenizer_state='{"kind": "Bytes"}'))
    for data in (SimpleNamespace(tokenizer_state='{"kind": "Words"}'), SimpleNamespace()):
        assert load(Pretrained(str(tmp_path)), data=data)[1]["step"] == 8


# ---------------------------------------------------------------------------------------- runs that begin with one


@pytest.fixture(scope="module")
def tuned(source, tmp_path_factory) -> tuple[Path, str]:
    """(the folder of a fine-tuning run with a frozen layer, what was said). Not to be written to."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    status, said = go(frozen(source), folder)
    assert status == 0
    return folder, said


def frozen(source: Path, *rules: str) -> Experiment:
    return replace(TUNED, init_from=Pretrained(str(source), exclude=("^out/",), freeze=rules or ("^hidden/",)))


def test_a_run_begins_where_the_other_ended(source, tmp_path):
    go(replace(TUNED, checkpoint=Checkpoint(every=0), init_from=Pretrained(str(source))), tmp_path / "run")
    first = read_rows(tmp_path / "run" / "metrics.jsonl")[0]
    last = read_rows(source / "metrics.jsonl")[-1]
    assert (first["split"], first["step"], last["split"], last["step"]) == ("validation", 0, "validation", 8)
    assert {**first, "step": 8} == last  # to the last bit, also through the averaged parameters and the statistics
    assert read_rows(source / "metrics.jsonl")[0]["loss"] > last["loss"] + 0.3


def test_frozen_parameters_stay_and_the_others_change(source, tuned, tmp_path):
    ema, end = state_of(source).opt_state.ema, state_of(tuned[0])
    assert bits(end.params["hidden"]) == bits(ema["hidden"]) == bits(end.opt_state.ema["hidden"])
    for name in ("norm", "out"):
        for path, x in leaves(end.params[name]).items():
            assert apart(x, leaves(ema[name])[path]) > 1e-3, (name, path)
    assert (
        apart(end.model_state, state_of(source).model_state) > 1e-3
    )  # the norm is not frozen, so its statistics are not
    assert sum(x.size for x in jax.tree.leaves(end.opt_state.inner)) < 2 * sum(
        x.size for x in jax.tree.leaves(end.params))  # no moments for what is frozen
    free = replace(frozen(source), init_from=replace(frozen(source).init_from, freeze=()))
    go(free, tmp_path / "free")  # the negative control
    assert apart(state_of(tmp_path / "free").params["hidden"], ema["hidden"]) > 1e-3


def test_frozen_parameters_that_began_at_random(tmp_path):
    """With them the statistics of a frozen norm, in the state and in the average."""
    experiment = replace(SOURCE, init_from=Pretrained(freeze=("hidden/kernel", "^norm/")))
    assert go(experiment, tmp_path / "run")[0] == 0
    begin, end = program_of(experiment).init(), state_of(tmp_path / "run")
    for params in (end.params, experiment.optim.eval_params(end.opt_state, end.params)):
        changed = {path for path, x in bits(params).items() if x != bits(begin.params)[path]}
        assert changed == {"hidden/bias", "out/bias", "out/kernel"}
    assert bits(begin.model_state) == bits(end.model_state) == bits(end.opt_state.model_state)
    given = load(Pretrained(str(tmp_path / "run")))[0]
    average, last = leaves(params), leaves(end.params)
    assert apart([given[p] for p in PARAMETERS], [average[p] for p in PARAMETERS]) < 1e-6  # for another run
    assert apart([last[p] for p in PARAMETERS], [average[p] for p in PARAMETERS]) > 1e-3
    assert json.loads((tmp_path / "run" / "pretrained.json").read_text()) == {
        "frozen": ["hidden/kernel", "norm/bias", "norm/scale"]}


def test_a_frozen_norm_computes_as_in_evaluation(source):
    """Its output depends on no other record of the batch; a trained one's does."""
    variables = {"params": state_of(source).params, **state_of(source).model_state}
    x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)

    def first(rules, x):
        with frozen_statistics(frozen(source, *rules).optimizer):
            return SOURCE.model.apply(variables, x, train=True, mutable=["batch_stats"])[0][0]

    np.testing.assert_array_equal(first(["^norm/"], x), first(["^norm/"], np.concatenate([x[:1], 9 * x[1:]])))
    for rules in (["^hidden/"], ["^norm/scale"]):
        assert apart(first(rules, x), first(rules, np.concatenate([x[:1], 9 * x[1:]]))) > 1e-3


def test_averaged_weights_come_with_averaged_statistics(source):
    """By hand from the statistics of every update, with the weights' own decay."""
    program, mean = program_of(SOURCE), None
    state = program.init()
    for step in range(4):
        state, _ = program.train(state, program.batch(reader(program), step))
        d, mean = min(SOURCE.optim.ema, (1 + step) / (10 + step)), mean or jax.device_get(program.init().model_state)
        mean = jax.tree.map(lambda m, x, d=d: d * m + (1 - d) * np.asarray(x), mean, state.model_state)
    used = {k: v for k, v in eval_variables(SOURCE, state).items() if k != "params"}
    assert apart(used, mean) < 1e-6 < 1e-3 < apart(used, state.model_state)
    with pytest.raises(UserError, match="schedule-free AdamW .*batch statistics"):
        abstract_state(replace(SOURCE, optim=ScheduleFreeAdamW(lr=Constant(0.05))))


def test_what_is_said_and_written(source, tuned):
    assert json.loads((tuned[0] / "pretrained.json").read_text()) == {
        "from": str(source), "step": 8, "fingerprint": SOURCE.fingerprint(), "loaded": PARAMETERS[:4] + STATISTICS,
        "random": ["out/bias", "out/kernel"], "not taken": ["out/bias", "out/kernel"],
        "frozen": ["hidden/bias", "hidden/kernel"]}
    assert (f"Parameters from {source}: 6 loaded (hidden/bias, hidden/kernel, norm/bias and 3 more); at random: "
            "out/bias, out/kernel; not taken: out/bias, out/kernel.") in tuned[1]
    assert "Frozen: hidden/bias, hidden/kernel. The whole list is in" in tuned[1]
    assert not (source / "pretrained.json").exists()  # a run that begins at random says nothing


def test_resuming_does_not_need_the_other_run(source, tuned, tmp_path, monkeypatch):
    moved = tmp_path / "source"
    moved.symlink_to(source)
    experiment = frozen(moved)
    assert go(experiment, tmp_path / "run", 3, interrupt())[0] == 75
    moved.unlink()
    monkeypatch.setattr(beginning, "initial_arrays", lambda *args: pytest.fail("it was read again"))
    status, said = go(experiment, tmp_path / "run")
    assert status == 0 and "Resuming from step" in said and "Parameters from" not in said
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tuned[0] / "metrics.jsonl").read_bytes()
    assert bits(state_of(tmp_path / "run")) == bits(state_of(tuned[0]))
    assert json.loads((tmp_path / "run" / "pretrained.json").read_text())["from"] == str(moved)


def test_crashed_before_the_first_checkpoint(source, tuned, tmp_path):
    def crash() -> None:
        raise RuntimeError("fire")

    moved = tmp_path / "source"
    moved.symlink_to(source)
    experiment = replace(frozen(moved), checkpoint=Checkpoint(every=0, best=False))
    with pytest.raises(RuntimeError, match="fire"):
        go(experiment, tmp_path / "run", 3, crash)
    moved.unlink()
    with pytest.raises(UserError, match="not a run folder"):  # never at random instead
        go(experiment, tmp_path / "run")
    moved.symlink_to(source)
    status, said = go(experiment, tmp_path / "run")
    assert status == 0 and "starting again from step 0" in said and "Parameters from" in said
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tuned[0] / "metrics.jsonl").read_bytes()


def test_freeze_rules_that_cannot_be(source, tmp_path):
    with pytest.raises(UserError, match="init_from.freeze: '\\^zzz' matches no parameter"):
        go(frozen(source, "^zzz"), tmp_path / "a")
    with pytest.raises(UserError, match="freezes every parameter: nothing would be trained"):
        go(frozen(source, ".*"), tmp_path / "b")


# --------------------------------------------------------------------------------------------------- word vectors

TEXTS = ["red green blue", "red blue sky", "green red red", "old café door", "old chair door", "door old old"]


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> tuple[Experiment, Any]:
    """(an experiment on short messages, its data): words in the order of their frequency."""
    path = tmp_path_factory.mktemp("words") / "messages.csv"
    lines = [f"{text},{'thing' if 'old' in text else 'colour'}" for text in TEXTS for _ in range(3)]
    path.write_text("text,kind\n" + "\n".join(f"{line.replace(',', f' {i},')}" for i, line in enumerate(lines)) + "\n")
    experiment = Experiment(
        data=Messages(Csv(str(path), target="kind", text="text"), Words(30), length=5, validation=0.2),
        model=Bag(), task=Classify(),
        optim=AdamW(lr=Constant(0.05)), steps=3, batch=4, evaluate=Evaluate(every=0), checkpoint=Checkpoint(every=0),
        mesh=Mesh(data=1))
    return experiment, experiment.data.load()


@pytest.fixture
def vectors(colours, tmp_path) -> Callable[..., tuple]:
    """vectors(content, **fields): (arrays, report) of a file of word vectors with this content."""
    def load_file(content: str | bytes, **fields: Any) -> tuple[dict, dict]:
        path = tmp_path / "vectors.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load(WordVectors(str(path), **fields), *colours)

    return load_file


GLOVE = "the 9 9 9\nred 0.5 -1 2e-3\ncafé 1 2 3\nof 8 8 8\n. . . 7 7 7\nold -4 5 6\n"
VECTORS = {"red": [0.5, -1, 2e-3], "café": [1, 2, 3], "old": [-4, 5, 6]}


def test_rows_of_a_glove_file(colours, vectors):
    words = colours[1].vocabulary
    given, report = vectors(GLOVE)
    (path, rows), = given.items()
    assert path == "embedding/embedding" and rows.shape == (32, 3) and rows.dtype == np.float32
    for word, vector in VECTORS.items():
        assert np.array_equal(rows[words.index(word)], np.float32(vector))
        assert np.array_equal(colours[1].encode(word), [words.index(word)])  # the place that a text looks it up in
    others = np.delete(rows, [words.index(word) for word in VECTORS], axis=0)
    assert 0.05 < others.std() < 0.2 and np.abs(others).max() < 0.5 and len(np.unique(others)) == others.size
    assert np.array_equal(vectors(GLOVE)[0][path], rows)  # the same in every process
    abstract = leaves(program_of(colours[0]).abstract.params)
    assert report["loaded"] == [f"embedding/embedding: 3 of {len(words)} words"]
    assert report["random"] == [p for p in abstract if p != path] and len(report["random"]) == len(abstract) - 1
    assert report["from"].endswith("vectors.txt") and report["not taken"] == []


@pytest.mark.parametrize("content, words", [
    ("red 1 2 3\nold 1 2\n", "line 2: 2 numbers after 'old', and the embedding has 3"),
    ("red 1 2 3 4\n", "line 1: 4 numbers after 'red', and the embedding has 3"),
    ("the 1 2 3\nof 0.1 .5 2 3 4\n", "line 2: 5 numbers after 'of'"),
    ("400000 5\nred 1 2 3 4 5\n", "has vectors of 5 numbers, as its first line says, and the embedding has 3"),
    ("red 1 2 3\n400000 3\n", "line 2: 1 numbers after '400000'"),
    ("red 1 2 3\nold 1 nan 3\n", "line 2: the vector of 'old' contains 'nan'"),
    ("old 1 2 -inf\n", "line 1: the vector of 'old' contains '-inf'"), ("red 1e99 2 3\n", "line 1: .*contains '1e99'"),
    ("red 1 2 3\nold 1 two 3\n", "line 2 is not a word and 3 numbers .*'two'"),
    ("the 1 2 3\nof 1 2 3\n", r"has none of the \d+ words of this data"),
    ("", "has none of the"),
    (b"caf\xe9 1 2 3\n", "after line 0, is not UTF-8 text"),
    (b"red 1 2 3\n" * 5000 + b"caf\xe9 1 2 3\n", r"after line \d+, is not UTF-8 text")])
def test_files_that_are_no_word_vectors(vectors, content, words):
    with pytest.raises(UserError, match=r"vectors.txt(,)? " + words):
        vectors(content)


def test_the_header_of_word2vec_and_a_home_folder(colours, vectors, tmp_path, monkeypatch):
    plain, _ = vectors(GLOVE)
    headed, report = vectors("6 3\n" + GLOVE)
    assert np.array_equal(*(given["embedding/embedding"] for given in (plain, headed)))
    assert report["loaded"] == [f"embedding/embedding: 3 of {len(colours[1].vocabulary)} words"]
    monkeypatch.setenv("HOME", str(tmp_path))
    there, _ = load(WordVectors("~/vectors.txt"), *colours)
    assert np.array_equal(there["embedding/embedding"], plain["embedding/embedding"])
    with pytest.raises(UserError, match="Cannot read the word vectors ~nobody-here/vectors.txt"):
        load(WordVectors("~nobody-here/vectors.txt"), *colours)


def test_word_vectors_that_fit_nowhere(colours, vectors, tmp_path):
    with pytest.raises(UserError, match="--init-from.parameter tok/embedding: .*no such parameter"):
        vectors(GLOVE, parameter="tok/embedding")
    with pytest.raises(UserError,
                       match=r"--init-from.parameter classify/bias has shape \(2,\): it is not an embedding"):
        vectors(GLOVE, parameter="classify/bias")
    for place, why in ((tmp_path / "missing.txt", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=f"Cannot read the word vectors {place}: {why}"):
            load(WordVectors(str(place)), *colours)
    for data in (SimpleNamespace(), SimpleNamespace(vocabulary=[])):
        with pytest.raises(UserError, match=r"need data with a vocabulary of words: tokenizer=Words"):
            load(WordVectors("vectors.txt"), colours[0], data)
    with pytest.raises(UserError, match=r"--init-from.freeze: '\[' is not a regular expression"):
        replace(colours[0], init_from=WordVectors("x", freeze=("[",))).validate()


def test_frozen_word_vectors(colours, tmp_path):
    (tmp_path / "glove.txt").write_text(GLOVE)
    init_from = WordVectors(str(tmp_path / "glove.txt"), freeze=("^embedding/",))
    status, said = go(replace(colours[0], init_from=init_from), tmp_path / "kept")
    assert status == 0 and f"1 loaded (embedding/embedding: 3 of {len(colours[1].vocabulary)} words)" in said
    given, report = load(init_from, *colours)
    end = state_of(tmp_path / "kept").params
    assert bits(end["embedding"])["embedding"] == given["embedding/embedding"].tobytes()
    assert json.loads((tmp_path / "kept" / "pretrained.json").read_text()) == {**report,
                                                                             "frozen": ["embedding/embedding"]}
    go(replace(colours[0], init_from=replace(init_from, freeze=())), tmp_path / "tuned")  # the negative control
    row = colours[1].vocabulary.index("red")
    moved = state_of(tmp_path / "tuned").params["embedding"]["embedding"][row]
    assert 1e-3 < np.abs(moved - VECTORS["red"]).max() < 0.2


def test_a_run_on_texts_keeps_its_tokenizer(colours, tmp_path, vectors):
    go(replace(colours[0], init_from=Pretrained()), tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").read_text() == colours[1].tokenizer_state
    other = replace(colours[0].data, tokenizer=Words(8)).load()
    with pytest.raises(UserError, match="The tokenizer of .* is another one"):
        load(Pretrained(str(tmp_path / "run")), colours[0], other)
    assert len(load(Pretrained(str(tmp_path / "run")), *colours)[0]) == len(leaves(state_of(tmp_path / "run").params))


# ----------------------------------------------------------------------------------------------- resident records


def updated(program: Program, updates: int = 4) -> tuple[State, list]:
    """(state, metrics of every call) after some updates with the records of the program's data."""
    experiment, state, history = program.experiment, program.init(), []
    for call in range(updates // experiment.steps_per_call):
        state, values = program.train(state, program.batch(reader(program), call))
        history.append(jax.device_get(values))
    return jax.device_get(state), history


@functools.cache
def trained(experiment: Experiment) -> tuple[State, list]:
    """The same for an experiment."""
    return updated(program_of(experiment))


def held(**changes: Any) -> Experiment:
    return toy(data=Noisy(), batch=16, optim=SGD(lr=Constant(0.3)), **changes)


@pytest.mark.parametrize("changes", [{}, {"steps_per_call": 4, "grad_accum_steps": 2}], ids=["plain", "scanned"])
def test_resident_records_change_nothing(changes):
    never, always = (held(data_on_device=r, **changes) for r in ("never", "always"))
    assert bits(trained(always)) == bits(trained(never))
    program = program_of(always)
    batch = program.batch(reader(program), 0)
    assert set(batch) == {"weight", "index"}  # only numbers travel
    assert isinstance(program.train_records, OnlyNumbered) and program_of(never).resident is None


def test_resident_records_are_what_is_trained_on(monkeypatch):
    """The negative control: with the rows moved by one place, it is another run."""
    program = program_of(held(data_on_device="always"))
    before = trained(program.experiment)[0]
    monkeypatch.setattr(program, "resident", jax.tree.map(lambda x: np.roll(x, 1, axis=0), program.resident))
    assert apart(updated(program)[0].params, before.params) > 1e-3


def test_resident_records_on_eight_devices():
    one, eight = held(data_on_device="always"), held(data_on_device="always", mesh=Mesh(data=8))
    assert apart(trained(eight)[0], trained(one)[0]) < 1e-6
    assert all(len(x.sharding.device_set) == 8 for x in program_of(eight).resident.values())


def test_resident_records_compile_once():
    experiment = held(data_on_device="always")
    program, data = program_of(experiment), experiment.data.load()
    trained(experiment)
    state = program.init()
    program.evaluate(state, eval_batches(data.validation, 16))
    seen = len(traces)
    with jax.transfer_guard_host_to_device("disallow"):
        batches = [program.batch(functools.partial(train_batch, program.train_records, batch=16, seed=0), step)
                   for step in range(2)]
        for batch in batches:
            state, _ = program.train(state, batch)
    program.evaluate(state, eval_batches(data.validation, 16))  # which needs the records, not only their numbers
    assert len(traces) == seen and int(state.step) == 2 and program._evaluate._cache_size() == 1
    with pytest.raises((TypeError, ValueError)):  # the compiled program takes these numbers and nothing else
        program.train(state, program.batch(functools.partial(train_batch, data.train, batch=16, seed=0), 0))


def test_a_run_with_resident_records(plain_run, tmp_path):
    always = replace(PLAIN, data_on_device="always")
    assert always.fingerprint() == PLAIN.fingerprint()  # how, not what
    assert go(always, tmp_path / "run", 5, interrupt())[0] == 75
    assert go(always, tmp_path / "run")[0] == 0
    assert program_of(always).resident is not None and program_of(PLAIN).resident is None
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (plain_run / "metrics.jsonl").read_bytes()
    assert bits(state_of(tmp_path / "run")) == bits(state_of(plain_run))


def test_which_records_stay_on_the_devices(tmp_path, monkeypatch):
    table, arrays = Points().load().train, Held().load().train

    def kept(resident: str, records: Any) -> bool:
        return fits(toy(data_on_device=resident), records)

    with pytest.raises(UserError, match="--data-on-device always: .*piece by piece"):
        go(toy(data_on_device="always"), tmp_path / "run")
    assert not kept("auto", table) and not kept("never", arrays) and kept("always", arrays)
    assert not kept("auto", arrays)  # on a CPU there is nothing to gain
    size = sum(x.nbytes for x in arrays.arrays.values())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for limit, expected in ((4 * size + 4, True), (4 * size, False)):
        device = SimpleNamespace(memory_stats=lambda limit=limit: {"bytes_limit": limit})
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        assert kept("auto", arrays) == expected and not kept("auto", table)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(memory_stats=lambda: None)])
    assert not kept("auto", arrays)


# ------------------------------------------------------------------------------------------------- keys per record


@functools.partial(jax.jit, static_argnums=3)
def keys_at(seed: Any, index: Any, step: Any, train: bool) -> Any:
    experiment = toy(seed=seed)
    batch = prepare(experiment, {"index": index}, train, *([step] if train else []))
    return jax.random.key_data(batch["key"])


def keys(seed: int, index: list[int], step: int = 0, train: bool = True) -> dict[int, tuple]:
    found = keys_at(seed, np.array(index, np.int32), step, train)
    return {i: tuple(key) for i, key in zip(index, found.tolist(), strict=True)}


def test_a_record_has_the_same_key_in_every_batch():
    whole = keys(3, list(range(20)), step=7)
    assert len(set(whole.values())) == 20
    for index in ([4], [9, 2, 11, 0], list(range(19, -1, -1))):
        assert keys(3, index, step=7) == {i: whole[i] for i in index}
    by_hand = jax.random.fold_in(key_for(3, "records", 7), 11)
    assert whole[11] == tuple(jax.random.key_data(by_hand).tolist())
    for other in (keys(3, [0, 1, 2], step=8), keys(4, [0, 1, 2], step=7), keys(3, [0, 1, 2], train=False)):
        assert not set(other.values()) & set(whole.values())
    assert keys(3, [1], step=7) != keys(3, [1], step=1)


def test_evaluation_does_not_depend_on_the_step():
    program = program_of(held(task=Jittered()))
    validation, evaluate = program.experiment.data.load().validation, program._evaluate
    start = program.init()
    whole, = eval_batches(validation, 13)
    first, later = (evaluate(start._replace(step=jnp.int32(step)), whole, program.given) for step in (0, 7))
    assert bits(first) == bits(later)
    other = evaluate(start, whole, {"seed": np.uint32(1)})
    assert abs(other["loss"][0] - first["loss"][0]) > 1e-3  # there is noise, and the seed decides it
    parts = [float(evaluate(start, batch, program.given)["loss"][0]) for batch in eval_batches(validation, 4)]
    assert len(parts) == 4 and sum(parts) == pytest.approx(float(first["loss"][0]), rel=1e-6)  # also in other batches


def test_training_noise_is_that_of_step_and_record():
    experiment = toy(task=Jittered())
    batch = train_batch(Points().load().train, 0, batch=8, seed=0)
    start, update = program_of(experiment).init(), jax.jit(make_train_step(experiment))

    @jax.jit
    def by_hand(step: int) -> dict[str, tuple]:
        noise = [jax.random.normal(jax.random.fold_in(key_for(0, "records", step), i), (6,)) for i in batch["index"]]
        moved = {**batch, "x": batch["x"] + 0.3 * jnp.stack(noise)}
        return Kinds().loss(experiment.model, {"params": start.params}, moved, {}, True)[2]

    losses = {step: means(update(start._replace(step=jnp.int32(step)), batch)[1])["loss"] for step in (0, 5)}
    assert losses == pytest.approx({step: means(by_hand(step))["loss"] for step in losses}, abs=1e-6)
    assert abs(losses[0] - losses[5]) > 1e-3
    order = np.random.default_rng(0).permutation(8)
    turned = update(start, {name: x[order] for name, x in batch.items()})
    assert apart(turned[0].params, update(start, batch)[0].params) < 1e-5


def test_microbatches_and_devices_leave_the_noise_alone():
    noisy = held(task=Jittered())
    assert apart(trained(replace(noisy, grad_accum_steps=4, mesh=Mesh(data=4)))[0], trained(noisy)[0]) < 1e-6
    assert apart(trained(held(data_on_device="never"))[0], trained(noisy)[0]) > 1e-2  # the task did add noise


def test_the_given_arrays_are_named_by_path():
    """Guards `init_state`: a path in `given` replaces that array, and no other one."""
    given = {"hidden/bias": np.arange(8, dtype=np.float32), "batch_stats/norm/mean": np.full(8, 3, np.float32)}
    here, fresh = program_of(SOURCE).init(given), program_of(SOURCE).init()
    changed = {path for path, x in bits(here).items() if x != bits(fresh)[path]}
    assert changed == {"params/hidden/bias", "model_state/batch_stats/norm/mean", "opt_state/ema/hidden/bias",
                       "opt_state/model_state/batch_stats/norm/mean"}
    assert initial_arrays(Pretrained(), None, None) == ({}, {})
