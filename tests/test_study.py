"""Studies: designs, what preflight refuses, cells that run exactly once, whoever is killed, and pairing."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from lab.configuration.values import override
from lab.data.pipeline import train_batch
from lab.errors import UserError
from lab.experiment import Mesh
from lab.optim import SGD, Cosine, Muon
from lab.parallel.sharding import path_of
from lab.study.design.arms import Study, factorial, grid, leave_one_out, one_at_a_time
from lab.study.run import leases
from lab.study.run.cells import code_of
from lab.study.run.preflight import preflight
from lab.train import loop
from lab.train.cost import optimizer_flops
from lab.train.experiment_file import load
from lab.train.program import Program
from lab.train.shapes import abstract_state
from lab.train.source_code import changed
from tests.conftest import ROOT
from tests.studies import told_to_stop
from tests.test_cli import EXPERIMENT, WORDS, finish, start, wait_for
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

RMS, ROTARY = {"model.norm": "rmsnorm"}, {"model.position": "rotary"}
STUDIES = [p for p in sorted((ROOT / "experiments").glob("*.py")) if "\nstudy = " in p.read_text()]
FILE = '''"""A linear classifier: nothing compiles faster."""

from lab.data.tables.bundled import Sklearn
from lab.data.tables.tables import Table
from lab.experiment import Checkpoint, Evaluate, Experiment, Mesh
from lab.models.linear import Linear
from lab.optim import SGD, Cosine
from lab.tasks.supervised import Classify

experiment = Experiment(
    data=Table(Sklearn("breast_cancer")), model=Linear(classes=2), task=Classify(), mesh=Mesh(data=1),
    optim=SGD(lr=Cosine(1e-2, warmup=0)), steps=4, batch=16, evaluate=Evaluate(every=2), checkpoint=Checkpoint(every=2))
'''
STUDY = FILE + '''
from lab.study.design.arms import Study
study = local = Study(experiment, {"high": {"optim.lr.peak": 3e-2}, "higher": {"optim.lr.peak": 9e-2}}, seeds=3)
del experiment
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with two experiments, small.py and text.py, and a study."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "corpus.txt").write_text("".join(WORDS[(i * 7) % 40:] for i in range(600))[:30_000])
    for name, text in (("small.py", FILE), ("ablate.py", STUDY),
                       ("text.py", EXPERIMENT.format(corpus=str(folder / "corpus.txt")))):
        (folder / name).write_text(text)
    return folder


def cells(folder: Path) -> dict[tuple[str, int], dict]:
    """(arm, seed) -> cell.json, of the one study in a folder of studies."""
    return {(p.parent.parent.name, int(p.parent.name)): json.loads(p.read_text())
            for p in folder.glob("*/cells/*/*/cell.json")}


def ran(out: str) -> list[str]:
    """The cells that a command says it ran: "base seed 0"."""
    return re.findall(r"^(\S+ seed \d+): (?:done|diverged|failed)", out, re.M)


# ---------------------------------------------------------------------------------------------------- designs


def test_an_override_goes_into_dataclasses_and_modules(tiny):
    changed_one = override(tiny, {"optim.lr.peak": 3e-4, "model.norm": "rmsnorm", "evaluate.every": 2})
    assert (changed_one.optim.lr.peak, changed_one.model.norm, changed_one.evaluate.every) == (3e-4, "rmsnorm", 2)
    assert (tiny.optim.lr.peak, tiny.model.norm) == (1e-2, "layernorm")  # values: the base stays as it is
    other = override(tiny, {"optim": SGD(lr=Cosine(0.1)), "optim.momentum": 1})
    assert other.optim == SGD(lr=Cosine(0.1), momentum=1.0) and isinstance(other.optim.momentum, float)


def test_designs(tiny):
    both = grid({"optim.lr.peak": (1e-2, 3e-2), "model.norm": ("layernorm", "rmsnorm")})
    found = Study(tiny, both, seeds=2).experiments()
    assert {name: dict(changes) for name, (changes, _) in found.items()} == {
        "base": {}, "peak=0.01,norm=rmsnorm": RMS, "peak=0.03,norm=layernorm": {"optim.lr.peak": 3e-2},
        "peak=0.03,norm=rmsnorm": {"optim.lr.peak": 3e-2} | RMS}
    alone = one_at_a_time({"optim.lr.peak": (1e-2, 3e-2), "model.norm": ("rmsnorm",)})
    assert list(Study(tiny, alone).experiments()) == ["base", "peak=0.03", "norm=rmsnorm"]
    edits = {"rms": RMS, "rotary": ROTARY, "qk": {"model.qk_norm": True}}
    assert leave_one_out(edits).arms["all-rms"] == ROTARY | {"model.qk_norm": True}
    assert list(leave_one_out(edits).arms) == ["all", "all-rms", "all-rotary", "all-qk"]
    assert len(factorial(edits).arms) == 7 and factorial(edits).arms["rms+rotary"] == RMS | ROTARY
    objects = grid({"optim": (SGD(lr=Cosine(0.1)), SGD(lr=Cosine(0.2)))})
    assert list(objects.arms) == ["optim=SGD", "optim=SGD.2"]


def test_the_fingerprint_is_of_what_is_compared(tiny):
    study = Study(tiny, {"rms": RMS}, seeds=2)
    assert study.fingerprint() == replace(study, base=replace(tiny, log=replace(tiny.log, every=2))).fingerprint()
    others = (replace(study, seeds=3), replace(study, arms={"rms": RMS, "rotary": ROTARY}),
              replace(study, base=replace(tiny, batch=16)))
    assert len({s.fingerprint() for s in (study, *others)}) == 4


@pytest.mark.parametrize(("arms", "options", "message"), [
    ({"a": {"model.nrom": "rmsnorm"}}, {}, "Arm a: the experiment has no field model.nrom. Perhaps you meant model"),
    ({"a": {"seed": 1}}, {}, "Arm a: the seed is an axis of every study"),
    ({"a": {"model.norm": "batchnorm"}}, {}, "Arm a: --model.norm must be 'layernorm', 'rmsnorm', not 'batchnorm'"),
    ({"a": {"model.heads": 3}}, {}, "Arm a: --model.width 16 is not divisible by --model.heads 3"),
    ({"a": {"optim.lr_multipliers": (("nothing", 0.1),)}}, {}, "Arm a: .*matches no parameter"),
    ({"a": {"model.norm": "layernorm"}}, {}, r"Arm a is equal to the base: its changes \(model.norm=layernorm\)"),
    ({"a": {"checkpoint.every": 4}}, {}, "Arm a is equal to the base"),  # how a run is carried out is no difference
    ({"a": RMS, "b": RMS}, {}, "The arms a and b are the same experiment"),
    ({}, {}, "no arm besides the base"),
    ({"base": RMS}, {}, "No arm may be called 'base'"),
    ({"../a": RMS}, {}, "becomes a folder"),
    ({"a": RMS}, {"metric": "perplexty", "mode": "min"}, "does not produce the metric 'perplexty'.*meant perplexity"),
    ({"a": RMS}, {"metric": "perplexity"}, "Say whether a small or a large perplexity is good"),
    ({"a": {"evaluate.metric": "auc"}}, {}, "Arm a does not produce the metric 'auc'"),
    ({"a": RMS}, {"seeds": ()}, "needs seeds"),
    ({"a": RMS}, {"seeds": (1, 1)}, "each of them once"),
    ({"a": RMS}, {"seeds": 2, "tuning_seeds": (5,)}, r"tuning seeds \[5\]"),
])
def test_preflight_says_what_is_wrong(tiny, arms, options, message):
    with pytest.raises(UserError, match=message):
        preflight(Study(tiny, arms, **options))


def test_a_model_that_cannot_be_traced_is_named(tiny, monkeypatch):
    def loss(self, model, *args, **kwargs):
        return {"rmsnorm": None}[model.norm]

    monkeypatch.setattr(type(tiny.task), "loss", loss)
    with pytest.raises(UserError, match="Arm base cannot be built: KeyError: 'layernorm'"):
        preflight(Study(tiny, {"rms": RMS}))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: leave_one_out({"rms": RMS}), "at least two edits"),
    (lambda: factorial({"a": RMS, "b": RMS}), "several edits change model.norm"),
    (lambda: grid({"model.norm": "rmsnorm"}), "needs a list of values"),
])
def test_designs_say_what_is_wrong(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_preflight_prices_every_arm(tiny):
    base, wide = preflight(Study(tiny, {"wide": {"model.hidden_multiple": 8}}))
    assert base.name == "base" and wide.changes == {"model.hidden_multiple": 8}
    assert wide.parameters - base.parameters == 2 * (2 * 16 * 64 + 64)  # two blocks, up and down, and up's bias
    assert wide.flops > base.flops and wide.memory > base.memory


def test_the_products_of_an_optimizer_are_counted(tiny):
    """Muon's five Newton-Schulz iterations of every hidden matrix; AdamW has no products."""
    base, muon, sgd = preflight(Study(tiny, {"muon": {"optim": Muon(lr=tiny.optim.lr)},
                                             "sgd": {"optim": SGD(lr=tiny.optim.lr)}}))
    alone = optimizer_flops(muon.experiment, abstract_state(muon.experiment))
    assert base.flops == sgd.flops and muon.flops - base.flops == alone
    # Five times three products for each of a block's four matrices of attention (16 x 16) and two of its MLP (16 x 64).
    square, wide = 2 * 16**3 * 3, 2 * (16 * 64 * 16 + 16**3 + 16 * 16 * 64)
    assert alone == 2 * 5 * (4 * square + 2 * wide)
    assert optimizer_flops(base.experiment, abstract_state(base.experiment)) == 0


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_shipped_studies_are_sound(path):
    module = load(path)
    assert f"./launch.sh experiments/{path.name}" in module.__doc__ and module.__doc__.partition("\n")[0].endswith(".")
    try:
        arms = len(module.study.experiments())
    except UserError as e:  # groups are read from a file that its users bring
        assert "Cannot read adult.csv" in str(e)
        arms = len(module.study.arms) + 1
    assert len(preflight(module.local)) == arms or module.local.design != module.study.design
    assert min(len(module.study.seeds), len(module.local.seeds)) >= 3


# ---------------------------------------------------------------------------------------------------- pairing


def test_same_seed_same_batches_and_same_shared_initial_weights(tiny):
    """What two arms have in common begins equal, though another part of the model changed."""
    (_, base), (_, other) = Study(tiny, {"both": RMS | ROTARY | {"model.qk_norm": True}}).experiments().values()
    data = tiny.data.load()

    def start_of(experiment):
        params = Program(experiment).init().params
        return {path_of(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(params)}

    def batch_of(experiment):
        return train_batch(data.train, 3, batch=experiment.batch, seed=experiment.seed)["index"]

    a, b, c = start_of(base), start_of(other), start_of(replace(other, seed=1))
    shared = {path for path in a.keys() & b.keys() if a[path].ndim > 1}
    assert len(shared) == 1 + 2 * 6 and len(a) != len(b)  # token table; query, key, value, out, up, down of two blocks
    for path in shared:
        assert np.array_equal(a[path], b[path]), path
        assert not np.array_equal(b[path], c[path]), path  # another seed begins elsewhere
    assert np.array_equal(batch_of(base), batch_of(other))
    assert not np.array_equal(batch_of(base), batch_of(replace(base, seed=1)))


def test_a_reseeded_program_is_that_of_the_other_seed(tiny):
    """One compiled program for all seeds of an arm gives the bits that a program of its own gives."""
    data = tiny.data.load()

    def loss(program):
        read = train_batch(data.train, 0, batch=8, seed=program.experiment.seed)
        state, values = program.train(program.init(), program.batch(lambda call: read, 0))
        return float(values["loss"][0]), np.asarray(state.params["wte"]["embedding"])

    dropped = replace(tiny, model=tiny.model.clone(depth=1, dropout=0.5), mesh=Mesh(data=1))
    first = Program(dropped, data.train)
    zero, one = loss(first), loss(first.like(replace(dropped, seed=1)))
    own = loss(Program(replace(dropped, seed=1), data.train))
    assert one[0] == own[0] and np.array_equal(one[1], own[1])
    assert zero[0] != one[0] and loss(first)[0] == zero[0]
    assert first.like(replace(dropped, seed=1)).compiled is first.compiled


# ------------------------------------------------------------------------------------------------------- code


def test_code_is_that_of_the_experiments_own_parts(tiny):
    found = code_of(tiny)
    assert {
        "lab/models/gpt.py",
        "lab/models/layers.py",
        "lab/optim/optimizers.py",
        "lab/train/step.py",
        "jax",
    } <= found.keys()
    assert not {"lab/models/vit.py", "lab/study/run/engine.py", "lab/train/console.py"} & found.keys()
    assert changed(found, found | {"lab/optim/optimizers.py": "other"}) == ["lab/optim/optimizers.py"]


# ----------------------------------------------------------------------------------------------------- leases


def compete(folder: Path, barrier, names: list[str], won) -> None:
    held = []
    for name in names:
        barrier.wait()
        if lease := leases.claim(folder, name):
            won.put(name)
            held.append(lease)
    barrier.wait()


def test_of_many_who_claim_at_once_one_wins(tmp_path):
    """Both a lease that nobody had, and one whose holder is dead."""
    names, number = [f"cell-{i}" for i in range(20)], 3
    for name in names[::2]:
        (tmp_path / f"{name}.json").write_text(json.dumps(leases.process_identity() | {"started": "before"}))
    context = multiprocessing.get_context("forkserver")
    barrier, won = context.Barrier(number), context.Queue()
    workers = [context.Process(target=compete, args=(tmp_path, barrier, names, won)) for _ in range(number)]
    for worker in workers:
        worker.start()
    winners = Counter(won.get(timeout=60) for _ in names)
    for worker in workers:
        worker.join()
    assert set(winners) == set(names) and won.empty()


def test_whose_lease_is_stale(tmp_path):
    def held(**other):
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / "a-0.json").write_text(json.dumps(leases.process_identity() | other))
        return tmp_path / "a-0.json"

    held()
    assert leases.claim(tmp_path, "a-0") is None and leases.busy(tmp_path, "a-0")  # we live
    held(started="1")  # another process had our number
    lease = leases.claim(tmp_path, "a-0")
    assert lease.path.name == "a-0.json.1" and leases.claim(tmp_path, "a-0") is None
    lease.release()
    assert not list(tmp_path.iterdir())
    held(machine="elsewhere")
    assert leases.claim(tmp_path, "a-0") is None  # another machine, heard of just now
    old = time.time() - 2 * leases.STALE_SECONDS
    os.utime(held(machine="elsewhere"), (old, old))
    leases.claim(tmp_path, "a-0").release()


def test_a_lost_lease_ends_the_process(tmp_path):
    code = (f"import time; from pathlib import Path; from lab.study.run import leases; leases.BEAT_SECONDS = 0.1;"
            f"lease = leases.claim(Path({str(tmp_path)!r}), 'a-0'); (Path({str(tmp_path)!r}) / 'a-0.json.1').touch();"
            f"time.sleep(60)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == leases.EXIT_LOST and "was taken over by another process" in done.stderr


# ---------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def first(place) -> Path:
    """The folder of studies after `small.py --vary optim.lr.peak=1e-2,1e30 --seeds 2`: the second arm diverges."""
    from lab.__main__ import main

    before = os.getcwd()
    os.chdir(place)
    try:
        assert main(["small.py", "--vary", "optim.lr.peak=1e-2,1e30", "--seeds", "2", "--studies", "first"]) == 0
    finally:
        os.chdir(before)
    return place / "first"


@pytest.fixture
def copied(first, place, tmp_path) -> list[str]:
    """The command of `first`, on a copy of its folder."""
    shutil.copytree(first, tmp_path / "copy")
    return ["small.py", "--vary", "optim.lr.peak=1e-2,1e30", "--seeds", "2", "--studies", str(tmp_path / "copy")]


def cell_of(command: list[str], arm: str, seed: int) -> Path:
    """The folder of one cell of the copied study."""
    return next(Path(command[-1]).glob(f"*/cells/{arm}/{seed}"))


def test_a_study_and_its_files(first):
    found = cells(first)
    assert {key: cell["status"] for key, cell in found.items()} == {
        ("base", 0): "done", ("base", 1): "done", ("peak=1e+30", 0): "diverged", ("peak=1e+30", 1): "diverged"}
    study = next(first.glob("*/study.json"))
    said = json.loads(study.read_text())
    assert [arm["name"] for arm in said["arms"]] == ["base", "peak=1e+30"] and said["seeds"] == [0, 1]
    assert said["arms"][1]["changes"] == {"optim.lr.peak": 1e30} and said["design"]["kind"] == "grid"
    run = study.parent / "cells/base/1"
    assert json.loads((run / "experiment.json").read_text())["experiment"]["seed"] == 1
    assert json.loads((run / "result.json").read_text())["steps"] == 4
    assert (study.parent / "cells/peak=1e+30/0/diverged.json").exists()
    assert not list((study.parent / "leases").iterdir())
    cells_now = {cell["fingerprint"] for cell in found.values()}
    assert len(cells_now) == 4


def test_finished_cells_never_run_again(copied, typed):
    """The same command runs nothing; a study with a seed and an arm more runs only what is new."""
    first = Path(copied[-1])
    status, out, _ = typed(*copied)
    assert status == 0 and not ran(out) and "Every cell is already complete." in out
    assert "4 cells planned = 2 done + 2 diverged + 0 failed." in out
    status, out, _ = typed("small.py", "--vary", "optim.lr.peak=1e-2,2e-2,1e30", "--seeds", "3", "--studies", first,
                           "--only", "base")
    assert status == 0 and ran(out) == ["base seed 2"] and "2 cells are finished in other studies" in out
    linked = [p.parent for p in first.glob("*/cells/base/*/cell.json") if "linked" in json.loads(p.read_text())]
    assert sorted(p.name for p in linked) == ["0", "1"]
    assert (linked[0] / "metrics.jsonl").stat().st_nlink == 2  # the same file, not a copy


def test_dry_run_says_what_could_be_seen_and_runs_nothing(first, typed, place):
    status, out, _ = typed("small.py", "--vary", "optim.lr.peak=1e-2,5e-2", "--seeds", "4", "--studies", "first",
                           "--dry-run")
    assert status == 0 and not ran(out) and re.search(r"[56] cells to run: about \d:\d\d", out)  # 2 or 3 are elsewhere
    assert re.search(r"Power: the base has loss .* over [23] seeds", out) and "standard deviations) needs" in out
    assert "the base runs as one more arm" not in out
    status, out, _ = typed("small.py", "--vary", "optim.lr.peak=3e-2,5e-2", "--vary", "batch=8,32", "--dry-run",
                           "--studies", "never")
    assert status == 0 and "None of the 4 arms has the base's own values, so the base runs as one more arm" in out
    assert "15 cells to run" in out and "5 arms x 3 seeds" in out
    status, out, _ = typed("ablate.py", "--studies", "never", "--dry-run")
    assert status == 0 and "9 cells to run: about" in out and not (place / "never").exists()
    assert "Power: unknown until the base has finished with two seeds." in out


def test_an_arm_that_fails_is_counted_and_can_run_again(typed, copied, monkeypatch):
    folder = cell_of(copied, "base", 1)
    shutil.rmtree(folder)

    def broken(*args, **kwargs):
        raise UserError("There is no more memory.")

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train", broken)
        status, out, _ = typed(*copied)
    assert status == 1 and "4 cells planned = 1 done + 2 diverged + 1 failed." in out
    assert json.loads((folder / "cell.json").read_text())["error"] == "There is no more memory."
    assert ran(typed(*copied)[1]) == []
    status, out, _ = typed(*copied, "--rerun")
    assert status == 0 and ran(out) == ["base seed 1"]


def test_a_full_disk_ends_the_study_and_nothing_is_lost(mistake, typed, copied, monkeypatch):
    """Other cells would fail, too: none is written down as failed, and the same command goes on."""
    for seed in (0, 1):
        shutil.rmtree(cell_of(copied, "base", seed))
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        assert "is full: a checkpoint needs" in mistake(*copied)
    assert not list(Path(copied[-1]).glob("*/cells/base/*/cell.json"))
    assert ran(typed(*copied)[1]) == ["base seed 0", "base seed 1"]


def test_changed_code_is_named(typed, mistake, copied):
    path = cell_of(copied, "base", 0) / "cell.json"
    cell = json.loads(path.read_text())
    cell["code"]["lab/optim/optimizers.py"], cell["fingerprint"] = "other", "of other code"
    path.write_text(json.dumps(cell))
    assert mistake(*copied) == (
        "error: lab/optim/optimizers.py changed since 1 finished cell of this study ran. --accept takes "
        "them as they are, --rerun runs them again.\n"
    )
    assert "exclude each other" in mistake(*copied, "--accept", "--rerun")
    status, out, _ = typed(*copied, "--accept")
    assert status == 0 and not ran(out)
    status, out, _ = typed(*copied, "--rerun")
    assert status == 0 and ran(out) == ["base seed 0"]


def test_a_damaged_cell_is_named_and_runs_alone_again(typed, mistake, copied):
    folder = cell_of(copied, "base", 0)
    for name, content in (("cell.json", '{"arm": "ba'), ("cell.json", "{}"), ("result.json", None)):
        whole = (folder / name).read_text()
        (folder / name).write_text(content) if content else (folder / name).unlink()
        assert f"The cell {folder} is damaged. Delete that folder and type the same command" in mistake(*copied)
        (folder / name).write_text(whole)
    shutil.rmtree(folder)
    assert ran(typed(*copied)[1]) == ["base seed 0"]


def test_what_another_code_left_unfinished_begins_again(typed, copied):
    """A half-done cell goes on with the same code; with other code nothing of it is used."""
    folder = cell_of(copied, "base", 0)
    for code, starts in ((None, 2), ("other", 1)):
        for name in ("cell.json", "result.json"):
            (folder / name).unlink()
        begun = json.loads((folder / "begun.json").read_text())
        (folder / "begun.json").write_text(json.dumps(begun | ({"fingerprint": code} if code else {})))
        assert ran(typed(*copied)[1]) == ["base seed 0"]
        assert len(list(folder.glob("environment*.json"))) == starts
        assert (json.loads((folder / "cell.json").read_text())["seconds"] is None) == (starts == 2)
    for damaged in ("[1]", "{"):  # of a cell that is not finished: it begins anew
        (folder / "cell.json").unlink()
        (folder / "begun.json").write_text(damaged)
        assert ran(typed(*copied)[1]) == ["base seed 0"] and len(list(folder.glob("environment*.json"))) == 1


@pytest.mark.parametrize(("args", "message"), [
    (("--vary", "optim.lr.peek=1"), "no field optim.lr.peek. Perhaps you meant optim.lr.peak"),
    (("--vary", "optim.lr.peak"), "write FIELD=VALUE"),
    (("--vary", "optim.lr.peak=1e-2"), "no arm besides the base"),
    (("--vary", "optim.lr.peak=3e-2", "--seeds", "0"), "--seeds must be at least 1"),
    (("--vary", "optim.lr.peak=3e-2", "--vary", "optim.lr.peak=1"), "is there twice"),
    (("--vary", "optim.lr.peak=3e-2", "--seed", "3"), "say how many with --seeds"),
    (("--vary", "optim.lr.peak=3e-2", "--only", "peek=0.03"), "no arm peek=0.03. Perhaps you meant peak=0.03"),
    (("--vary", "data=1,2"), "Arm data=1: data is Table(...), which 1 cannot replace. Vary one of its fields, such as"),
    (("--vary", "model=None"), "model is Linear(...), which None cannot replace"),
    (("--vary", "optim=sgd,adam"), "optim is SGD(...), which 'sgd' cannot replace"),
    (("--vary", "evaluate=5"), "evaluate is Evaluate(...), which 5 cannot replace. Vary one of its fields"),
    (("--vary", f"batch={2**63}"), f"Arm batch={2**63}: --batch {2**63} is too large: at most {2**31 - 1}"),
    (("--vary", "optim.lr.peak=1e999"), "Arm peak=inf: --optim.lr.peak is inf: it must be a finite number"),
    (("--vary", "batch=8", "--seeds", str(2**31)), "at most 10,000 seeds, not 2,147,483,648"),
])
def test_mistakes_on_the_command_line(mistake, args, message):
    assert message in mistake("small.py", *args, "--studies", "none")


def test_other_mistakes_on_the_command_line(mistake):
    assert "its data has no test split" in mistake("text.py", "--vary", "optim.lr.peak=3e-2", "--split", "test")
    assert "leave out --vary" in mistake("ablate.py", "--vary", "optim.lr.peak=1")


# --------------------------------------------------------------------------------------------------- processes


def test_told_to_stop_and_going_on(typed, place, monkeypatch):
    told_to_stop(monkeypatch, "step      3/4")
    command = ("small.py", "--vary", "optim.lr.peak=1e-2,3e-2", "--seeds", "1", "--studies", "stopped")
    status, out, _ = typed(*command)
    assert status == 75 and "2 cells are left. Run the same command to resume." in out and not ran(out)
    assert not list((place / "stopped").glob("*/leases/*"))
    status, out, _ = typed(*command)
    assert status == 0 and ran(out) == ["base seed 0", "peak=0.03 seed 0"]
    rows = next((place / "stopped").glob("*/cells/base/0/metrics.jsonl")).read_text()
    assert [row["step"] for row in map(json.loads, rows.splitlines()) if row["split"] == "train"] == [1, 2, 3, 4]
    assert cells(place / "stopped")["base", 0]["seconds"] is None  # of two processes


def test_two_processes_share_a_folder_and_one_is_killed(place):
    """kill -9 in mid-study: the other takes over at once; no cell runs twice, and none is lost."""
    folder = place / "shared"

    def finished():
        return len(list(folder.glob("*/cells/*/*/cell.json")))

    def working():
        return {json.loads(p.read_text() or "{}").get("pid") for p in folder.glob("*/leases/*-*")}

    one, two = (start(place, "ablate.py", "--studies", "shared", "--steps", "100",
                      "--checkpoint.every", "25") for _ in range(2))
    assert wait_for(two, lambda: finished() >= 1 and {one.pid, two.pid} <= working())
    one.kill()
    outputs = [finish(one)[1]]
    status, out, err = finish(two)
    assert status == 0 and "9 cells planned = 9 done + 0 diverged + 0 failed." in out, err
    said = Counter(ran(outputs[0]) + ran(out))
    assert max(said.values()) == 1 and len(said) >= 8 and ran(out)  # the killed one may have lost its last line
    found = cells(folder)
    assert {key: cell["status"] for key, cell in found.items()} == {
        (arm, seed): "done" for arm in ("base", "high", "higher") for seed in range(3)}
    starts = Counter()
    for arm, seed in found:
        run = next(folder.glob(f"*/cells/{arm}/{seed}"))
        starts[len(list(run.glob("environment*.json")))] += 1
        rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 101))
    assert starts[1] >= 8 and starts[1] + starts[2] == 9  # at most the killed one's cell was begun by two processes
    assert not list(folder.glob("*/leases/*"))  # also of the killed one
