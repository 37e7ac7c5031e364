"""Reports of studies, from folders made by hand: what they say, what they leave out, and every mistake."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lab.errors import UserError
from lab.study.report import pictures, stats
from lab.study.report.analysis import against, block, effects, sections, value_at
from lab.study.report.report import report
from lab.study.report.results import merge, read_study
from tests.conftest import ROOT
from tests.studies import make_cell, make_study, write

ARMS = {"rms": {"model.norm": "rmsnorm"}, "slow": {"optim.lr.peak": 1e-4}}
CROSS = {"rms": {"model.norm": "rmsnorm"}, "rotary": {"model.position": "rotary"},
         "both": {"model.norm": "rmsnorm", "model.position": "rotary"}}
FACTORS = {"model.norm": ["layernorm", "rmsnorm"], "model.position": ["learned", "rotary"]}


@pytest.fixture
def place(tmp_path):
    return tmp_path


@pytest.fixture(autouse=True)
def hasty(request, monkeypatch):
    """Figures are made but not rendered, which takes most of a report's time, unless a test asks for `drawn`."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(pictures, "png", lambda figure: b"")


@pytest.fixture
def drawn():
    """Pictures are rendered."""


@pytest.fixture
def study(place):
    """5 seeds of base, one arm that is better by 0.2, and one that differs by nothing but noise."""
    return make_study(place / "studies" / "norms-1", ARMS, {"rms": -0.2})


def made(folder, **options):
    """(report.md, report.html, rows of results.csv)"""
    out = report([folder] if not isinstance(folder, list) else folder, quiet=True, **options)
    with (out / "results.csv").open() as file:
        return (out / "report.md").read_text(), (out / "report.html").read_text(), list(csv.DictReader(file))


def rewrite(path, **changes):
    write(path, json.loads(path.read_text()) | changes)


# ------------------------------------------------------------------------------------------------------- whole


def test_the_figures_follow_from_results_csv(study):
    markdown, _, rows = made(study)
    values = {arm: {int(r["seed"]): float(r["loss"]) for r in rows if r["arm"] == arm} for arm in ("base", *ARMS)}
    assert all(len(v) == 5 for v in values.values())
    c = stats.adjust([stats.compare(values[a], values["base"], "min") for a in ARMS])
    assert f"rms: {stats.verdict(c[0], 'min')}" in markdown and "better than base by" in markdown
    assert f"slow: {stats.verdict(c[1], 'min')}" in markdown
    assert re.search(r"slow: not distinguishable .* you would need about \d+ seeds", markdown)
    row = next(line for line in markdown.splitlines() if line.startswith("| rms | 5 |"))
    shown = [part.strip() for part in row.split("|")[1:-1]]
    assert float(shown[2]) == pytest.approx(c[0].difference, abs=1e-3)
    assert [float(v) for v in shown[4].split(" to ")] == pytest.approx(c[0].t, abs=1e-3)
    numbers = [c[0].correlation, c[0].d_z, c[0].d_av, c[0].better]
    assert [float(v) for v in shown[10:14]] == pytest.approx(numbers, abs=0.005)
    assert "| correlation | d_z | d_av | P(better) |" in markdown and c[0].d_z != c[0].d_av
    assert shown[-1] == f"{c[0].wins} of 5"
    assert "model.norm=rmsnorm" in markdown and "planned 15 = 15 done + 0 diverged + 0 failed + 0 missing" in markdown


def test_what_is_not_controlled_stands_beside_the_quality(study):
    markdown, _, _ = made(study)
    assert "| rms | 10.1k (+1.0%) | 2.1G (+5.0%) | 5MB (+0.0%) | 250 (250 to 250) |" in markdown


def test_times_are_of_a_program_and_have_an_interval_and_no_ratio(study):
    """Cells of one program cannot differ by what they cost, only by when they ran."""
    seconds = {"base": 0.2, "rms": 0.3, "slow": 0.1}
    for arm, each in seconds.items():
        for seed in range(5):
            rewrite(study / f"cells/{arm}/{seed}/result.json", seconds_per_step=each * (1 + 0.1 * seed))

    def times():
        return dict(re.findall(r"^\| (\w+) \| 10.*MB.*\| ([^|]+) \|$", made(study)[0], re.M))

    assert len(set(times().values())) == 3  # without a plan each arm is a program of its own
    unit = [{"name": f"{arm}-{seed}", "cells": [f"{arm}-{seed}"], "numbers": [], "group": int(arm == "slow")}
            for arm in seconds for seed in range(5)]
    write(study / "plan.json", {"units": unit})
    shown = times()
    logs = np.log([each * (1 + 0.1 * seed) for each in (0.2, 0.3) for seed in range(5)])
    low, high = (1000 * np.exp(end) for end in stats.interval(logs))
    assert shown["base"] == shown["rms"] == f"{1000 * np.exp(logs.mean()):.3g} ({low:.3g} to {high:.3g})"
    assert shown["slow"] != shown["base"] and "%" not in "".join(shown.values())
    write(study / "plan.json", {"units": [{"name": "together-0", "cells": [u["name"] for u in unit], "numbers": [],
                                           "group": 0}]})
    markdown, page, _ = made(study)  # one time of all together has no spread, and so no figure
    assert "| rms | 10.1k (+1.0%) | 2.1G (+5.0%) | 5MB (+0.0%) |  |" in markdown
    assert "not timed in turns" in markdown and "not timed in turns" in page


def test_curves_are_over_counts_and_not_over_seconds(study, monkeypatch):
    """Seconds would show when the arms ran, as a cost of theirs."""
    drawn, draw = [], pictures.learning_curves
    monkeypatch.setattr(pictures, "learning_curves", lambda *args: drawn.append(args[1]) or draw(*args))
    made(study)
    assert [list(scales) for scales in drawn] == [["step", "tokens", "FLOPs"]]


def test_results_csv_has_all_metrics_whole_changes_and_folders(study):
    long = {
        "class": "lab.optim.muon.Muon",
        "lr": {"class": "lab.optim.schedules.Cosine", "peak": 1e-3},
        "note": "x" * 100,
    }
    arms = json.loads((study / "study.json").read_text())["arms"]
    arms[1]["changes"] = {"optim": long}
    rewrite(study / "study.json", arms=arms)
    row = {"step": 40, "split": "validation", "loss": 1.25, "accuracy": 0.5}
    rewrite(study / "cells/rms/2/result.json", final=row, best=row | {"step": 30})
    (study / "cells/slow/4/cell.json").unlink()
    rows = {(r["arm"], r["seed"]): r for r in made(study)[2]}
    found = rows["rms", "2"]
    assert json.loads(found["changes"]) == {"optim": long} and json.loads(rows["base", "0"]["changes"]) == {}
    assert [float(found[n]) for n in ("loss", "final.loss", "final.accuracy", "best.step", "test.loss")] == [
        1.25, 1.25, 0.5, 30, 9]
    assert rows["rms", "1"]["final.accuracy"] == "" and float(found["seconds_per_step"]) == 0.25
    assert found["folder"] == str(study / "cells/rms/2") and rows["slow", "4"]["status"] == "missing"


def test_html_needs_no_other_file_and_pictures_show_something(study, drawn):
    _, page, _ = made(study)
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 2 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert page.count("<table>") == page.count("</table>") == 3
    for name in ("curves", "effects-base"):
        assert np.asarray(Image.open(study / "pictures" / f"{name}.png").convert("L")).std() > 5


@pytest.mark.parametrize("fails", ["forest", "learning_curves", "png", "new_figure"])
def test_a_failing_picture_costs_the_picture(study, drawn, monkeypatch, caplog, fails):
    """As for runs: a warning with its name, and everything else is reported; so with a font that matplotlib lacks."""
    whole, page, rows = made(study)

    def fail(*_):
        raise RuntimeError("no glyph\nand more")

    monkeypatch.setattr(pictures, fails, fail)
    found, other, table = made(study)
    lost = {"forest": ["effects-base"], "learning_curves": ["curves"]}.get(fails, ["effects-base", "curves"])
    assert [r.message for r in caplog.records] == [
        f"warning: The picture {name} failed: RuntimeError: no glyph" for name in lost]
    assert table == rows and other.count("<table>") == page.count("<table>") and "rms: better than base" in found
    assert found.count("](pictures/") == whole.count("](pictures/") - len(lost) == other.count("<img ")
    assert not any((study / "pictures" / f"{name}.png").exists() for name in lost)  # an older one would mislead


def test_the_tables_are_written_before_the_pictures(study, drawn, monkeypatch):
    """The kernel's out-of-memory killer leaves no time for a warning."""
    def killed(*_):
        raise SystemExit(9)

    monkeypatch.setattr(pictures, "png", killed)
    with pytest.raises(SystemExit):
        made(study)
    assert "rms: better than base" in (study / "report.md").read_text() and (study / "results.csv").exists()
    assert "<table>" in (study / "report.html").read_text()


def test_a_failing_comparison_costs_itself_only(study, monkeypatch, caplog):
    from lab.study.report import report as module

    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(module, "axes", fail)
    markdown, page, _ = made(study)
    assert [r.message for r in caplog.records] == ["warning: The analysis of factors failed: ZeroDivisionError"]
    assert "WARNING: The analysis of factors failed" in markdown and "rms: better than base" in markdown
    assert "Cost (not matched)" in page and (study / "pictures/curves.png").exists()


def test_the_same_files_give_the_same_report(study, drawn):
    assert made(study) == made(study)


def test_terminal_shows_table_and_verdicts_without_cutting_them(study, typed):
    status, out, err = typed("report", study)
    assert (status, err) == (0, "")
    assert "rms: better than base by" in out.replace("\n", " ") and "…" not in out
    assert re.search(r"slow +5 ", out) and max(map(len, out.splitlines())) <= 80 + len(str(study))


def test_names_with_markup_stay_what_they_are(place, typed):
    folder = make_study(place / "s", {"[red]<b>|": {"model.width": 32}})
    out = typed("report", folder)[1]
    assert "[red]<b>|" in out
    markdown, page, _ = made(folder)
    assert "[red]&lt;b&gt;|" in page and "<b>" not in page and "| [red]&lt;b&gt;&#124; |" in markdown
    assert "<b>" not in markdown


@pytest.mark.parametrize("value", ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a\n\n<b>b</b>",
                                   "![x](http://there/x.png)", "[x](javascript:alert(1))", "[x]: http://there", "`a`"])
def test_no_value_becomes_html_or_a_link_in_the_markdown(tmp_path, value):
    """Markdown passes HTML on, and pictures of other machines tell those who opened the report."""
    folder = make_study(tmp_path / "s", {"rms": {"model.norm": value, value: "rmsnorm"}}, seeds=range(2), metric="loss")
    for cell in folder.glob("cells/base/0/cell.json"):
        write(cell, json.loads(cell.read_text()) | {"status": "failed", "error": value})
    markdown, page, _ = made(folder)
    for piece in ("<script", "<img src=x", "<b>", "](http://there", "](javascript", "]: http", "`"):
        assert piece not in markdown and (piece not in page or not piece.startswith("<")), piece
    assert "](pictures/" in markdown  # negative control: the report's own pictures are links


def test_no_device_is_needed(study):
    """In a process in which JAX has no platform to run on."""
    environment = os.environ | {"JAX_PLATFORMS": "none", "LAB_PLATFORM": "tpu", "PYTHONPATH": str(ROOT)}

    def python(*args):
        return subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True, cwd=study)

    assert python("-c", "import jax; jax.devices()").returncode
    done = python("-m", "lab", "report", str(study))
    assert done.returncode == 0 and "Study norms-1" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------- what is missing or excluded


def test_unfinished_cells_are_counted_and_their_pairs_named(study):
    shutil.rmtree(study / "cells/rms/0")
    write(study / "leases/rms-0.json", {})
    (study / "cells/rms/1/cell.json").unlink()
    diverged = make_cell(study, "base", 2, 1.5, status="diverged")
    rewrite(diverged / "cell.json", error="Step 7: the loss is nan")
    make_cell(study, "slow", 3, 1.5, status="failed")
    markdown, _, rows = made(study)
    assert "planned 15 = 11 done + 1 diverged + 1 failed + 2 missing, 1 of them with a lease" in markdown
    assert "| rms | 5 | 3 | 0 | 0 | 2 |" in markdown and "| slow | 5 | 4 | 0 | 1 | 0 |" in markdown
    assert "Pairs left out of rms against base: seed 0: rms missing; seed 1: rms missing; seed 2: base diverged." \
        in markdown
    assert "Pairs left out of slow against base: seed 2: base diverged; seed 3: slow failed." in markdown
    assert "base, seed 2 diverged: Step 7: the loss is nan" in markdown
    assert len(rows) == 15 and sum(r["loss"] == "" for r in rows) == 4


def test_an_arm_of_which_nothing_is_left_is_said_to_be_so(study):
    for seed in range(5):
        make_cell(study, "slow", seed, 1.5, status="diverged")
    markdown, _, _ = made(study)
    assert "slow: no run is finished (5 diverged, 0 failed, 0 missing)" in markdown
    assert "not distinguishable" not in markdown and "rms: better" in markdown


def test_a_value_that_is_no_number_is_a_divergence(study):
    row = {"step": 40, "split": "validation", "loss": math.nan}
    rewrite(study / "cells/rms/4/result.json", final=row)
    markdown, _, _ = made(study)
    assert "14 done + 1 diverged" in markdown and "counted as diverged: rms, seed 4" in markdown
    assert "(diverged runs, not in this: 1)" in markdown


def test_tuning_seeds_are_in_no_figure(study):
    for arm in ("base", "rms", "slow"):
        make_cell(study, arm, 4, 100.0)
    assert "| base | (base) | 5 | 21." in made(study)[0]
    rewrite(study / "study.json", tuning_seeds=[4])
    markdown, _, rows = made(study)
    assert re.search(r"\| base \| \(base\) \| 4 \| 1\.", markdown)
    assert "used for tuning, in no figure below: 4" in markdown
    assert [r["seed"] for r in rows if r["tuning"] == "True"] == ["4"] * 3
    rewrite(study / "study.json", tuning_seeds=list(range(5)))
    assert "All finished seeds were used for tuning: nothing can be concluded." in made(study)[0]


def test_one_seed_concludes_nothing(place):
    markdown, page, _ = made(make_study(place / "s", ARMS, {"rms": -0.5}, seeds=[3]))
    assert "One seed: nothing can be concluded" in markdown and "No arm has two pairs" in markdown
    assert "better than base" not in markdown and "better than base" not in page


def test_two_and_three_seeds(place):
    for n in (2, 3):
        markdown, _, _ = made(make_study(place / str(n), ARMS, {"rms": -0.5}, seeds=range(n)))
        assert "-∞ to ∞" in markdown and re.search("rms: (better|not distinguishable)", markdown)


def test_split_and_mode(study):
    """Negative control of both: the same files say something else."""
    rewrite(study / "study.json", mode="max")
    assert "rms: worse than base" in made(study)[0]
    rewrite(study / "study.json", split="test")
    assert "rms: identical to base in all 5 pairs" in made(study)[0]  # every test loss is 9


# -------------------------------------------------------------------------------------------- several environments


@pytest.mark.parametrize("other", [{"device": "NVIDIA H200"}, {"jax": "0.12.0"}, {"mode": "vmap"}])
def test_environments_that_differ_are_not_pooled(study, other):
    for arm in ("base", "rms"):
        for seed in (3, 4):
            make_cell(study, arm, seed, 1.4 + 0.01 * seed * len(arm), **other)
    make_cell(study, "slow", 4, 1.5, **other)
    markdown, _, _ = made(study)
    assert "WARNING: the cells ran in 2 environments that differ" in markdown and "Environment 2 of 2" in markdown
    assert next(iter(other.values())) in markdown
    apart = sections(read_study(study), pool=False)
    assert [len(s.cells["base"]) for s in apart] == [3, 2]
    assert "Pairs left out of rms against base: seed 3: rms ran in another environment, base ran in" in markdown
    pooled = sections(read_study(study), pool=True)
    assert [len(s.cells["base"]) for s in pooled] == [5]
    found = against(read_study(study), pooled[0], "base")
    assert found.comparisons["rms"].n == 5 and found.comparisons["slow"].n == 4
    assert found.excluded["slow"] == ["seed 3: the two ran in different environments"]
    assert "they are pooled because you asked for it" in made(study, pool=True)[0]


def test_settings_of_the_compiler_are_part_of_the_environment(study):
    rewrite(study / "cells/rms/1/environment.json", settings={"XLA_FLAGS": "--xla_fast", "LAB_X": "1"})
    assert "XLA_FLAGS=--xla_fast" in made(study)[0]
    rewrite(study / "cells/rms/1/environment.json", settings={"JAX_COMPILATION_CACHE_DIR": "/x", "LAB_X": "1"})
    assert "WARNING" not in made(study)[0]


def test_changed_code_is_a_warning(study):
    """Arms with different models have different files; only a file that both have and that differs is said."""
    for name, files in {
        "base": {"lab/train/step.py": "a"},
        "rms": {"lab/train/step.py": "a", "lab/models/gpt.py": "b"},
    }.items():
        for seed in range(5):
            rewrite(study / f"cells/{name}/{seed}/cell.json", code=files)
    assert "WARNING" not in made(study)[0]
    rewrite(study / "cells/rms/3/cell.json", code={"lab/train/step.py": "c"})
    assert "WARNING: not all cells ran with the same code; lab/train/step.py changed in between." in made(study)[0]


def test_an_environment_without_base(study):
    for seed in range(5):
        make_cell(study, "slow", seed, 1.5, mode="vmap")
    assert "No seed of base is finished in this environment" in made(study)[0]


# ------------------------------------------------------------------------------------------------------- merging


def test_two_halves_merged_are_the_whole(place):
    whole = make_study(place / "w" / "s", ARMS, {"rms": -0.2}, seeds=range(6))
    halves = [make_study(place / str(i) / "s", ARMS, {"rms": -0.2}, seeds=range(3 * i, 3 * i + 3)) for i in (0, 1)]
    assert made(halves, output=place / "out")[0] == made(whole)[0]
    assert made(halves[0])[0] != made(whole)[0]


def test_linked_and_repeated_cells_count_once(place, study):
    other = make_study(place / "studies" / "more-2", {"wide": {"model.width": 128}})
    for seed in range(5):
        shutil.rmtree(other / f"cells/base/{seed}")
        (other / f"cells/base/{seed}").symlink_to(study / f"cells/base/{seed}")
    merged = merge([read_study(study), read_study(other)])
    assert [a.name for a in merged.arms] == ["base", "rms", "slow", "wide"]
    assert merged.count() == {"planned": 20, "done": 20, "diverged": 0, "failed": 0, "missing": 0}
    assert sum(c.arm == "base" for c in merged.cells) == 5 and not merged.notes
    rewrite(make_cell(study, "rms", 0, 1.0) / "cell.json", fingerprint="other code")
    again = make_study(place / "studies" / "again-3", {"norm": ARMS["rms"]})  # the same arm by another name
    merged = merge([read_study(study), read_study(again)])
    assert merged.count()["done"] == 15
    assert [c.value for c in merged.cells if (c.arm, c.seed) == ("rms", 0)] == [1.0]
    assert "rms, seed 0 ran more than once: the run of the first folder is used." in merged.notes
    assert made([study, other], output=place / "out")[0].startswith("# Study norms-1 + more-2")


def test_one_name_for_two_arms(place, study):
    other = make_study(place / "studies" / "more-2", {"rms": {"model.width": 128}})
    names = [a.name for a in merge([read_study(study), read_study(other)]).arms]
    assert names[:3] == ["base", "rms", "slow"] and re.fullmatch(r"rms \(\d{6}\)", names[3])


def test_studies_that_do_not_fit_together(study, place, mistake):
    other = make_study(place / "studies" / "other-2", ARMS, metric="accuracy", split="validation")
    shutil.rmtree(other / "cells")
    assert "has metric accuracy, norms-1 has loss" in mistake("report", study, other)
    rewrite(other / "study.json", metric="loss")
    arms = json.loads((other / "study.json").read_text())["arms"]
    rewrite(other / "study.json", arms=[arms[0] | {"fingerprint": "else"}, *arms[1:]])
    assert "different bases" in mistake("report", study, other)


# ------------------------------------------------------------------------------------------------------- designs


def test_factorial_effects_and_interaction(place, typed):
    """The effects that were put in: norm -0.1, position 0, and an interaction of +0.2 / 2."""
    folder = make_study(place / "s", CROSS, {"rms": -0.2, "rotary": -0.1}, noise=0.005,
                        design={"kind": "factorial", "factors": FACTORS})
    markdown, _, _ = made(folder)
    results = read_study(folder)
    found = effects(block(results, sections(results, False)[0]))
    truth = {"model.norm": -0.05, "model.position": 0.05, "model.norm x model.position": 0.15}
    assert {name: c.difference for name, (c, _) in found.items()} == pytest.approx(truth, abs=0.01)
    for name, (c, _) in found.items():
        assert c.t[0] <= truth[name] <= c.t[1] and f"| {name} |" in markdown
    assert found["model.norm"][1] == "rmsnorm minus layernorm"
    assert found["model.norm x model.position"][1] == "half the difference of the effects"
    assert "An interaction is half the difference between the effects" in markdown
    assert "An interaction is half" in typed("report", folder)[1].replace("\n", " ")
    assert (folder / "pictures/interactions.png").exists()
    shutil.rmtree(folder / "cells/both")
    assert "main effects and interactions cannot be computed yet" in made(folder)[0]


def test_factorial_of_named_edits_and_a_grid_of_objects(place):
    factors = {"norm": {"model.norm": "rmsnorm"}, "position": {"model.position": "rotary"}}
    results = read_study(make_study(place / "s", CROSS, design={"kind": "factorial", "factors": factors}))
    found = block(results, sections(results, False)[0])
    assert found.levels == {"norm": ["no", "yes"], "position": ["no", "yes"]} and found.values.shape == (2, 2, 5)
    assert found.values[1, 0, 3] == [c.value for c in results.cells if (c.arm, c.seed) == ("rms", 3)][0]
    edit = {"model.norm": "rmsnorm", "model.width": 64}  # the base has this width: no arm lists it as a change
    factors["norm"] = edit
    rewrite(place / "s/study.json", design={"kind": "factorial", "factors": factors})
    assert (block(results := read_study(place / "s"), sections(results, False)[0]).values == found.values).all()
    values = [
        {"class": "lab.optim.schedules.Constant", "peak": 0.1},
        {"class": "lab.optim.schedules.LinearDecay", "peak": 0.1},
    ]
    arms = {f"{i}{norm}": {"optim.lr": v, "model.norm": norm} for i, v in enumerate(values) for norm in ("a", "b", "c")}
    design = {"kind": "grid", "factors": {"optim.lr": values, "model.norm": ["a", "b", "c"]}}
    folder = make_study(place / "g", arms, design=design)
    results = read_study(folder)
    assert block(results, sections(results, False)[0]).levels["optim.lr"] == [
        "Constant(peak=0.1)",
        "LinearDecay(peak=0.1)",
    ]
    assert "Main effects" not in made(folder)[0] and (folder / "pictures/interactions.png").exists()


@pytest.mark.parametrize("peaks, extra", [([1e-4, 3e-4], True), ([1e-3, 3e-4], False)])
def test_a_base_that_is_no_combination_is_announced(place, peaks, extra):
    norms = ["layernorm", "rmsnorm"]
    crossed = [(p, n) for p in peaks for n in norms if (p, n) != (1e-3, "layernorm")]
    arms = {f"{p}{n}": {"optim.lr.peak": p, "model.norm": n} for p, n in crossed}
    folder = make_study(place / "s", arms, design={"kind": "grid", "factors": {"optim.lr.peak": peaks,
                                                                              "model.norm": norms}})
    assert ("it was added, since all arms are compared with it" in made(folder)[0]) == extra
    rewrite(folder / "study.json", design={"kind": "list", "factors": {}})
    assert "it was added" not in made(folder)[0]


def test_the_value_of_a_field_inside_a_changed_object(place):
    lion = {"class": "lab.optim.lion.Lion", "lr": {"class": "lab.optim.schedules.Cosine", "peak": 3e-4}}
    results = read_study(make_study(place / "s", {"lion": {"optim": lion}, "both": {"optim": lion,
                                                                                 "optim.lr.peak": 1.0}}))
    found = [[value_at(results, arm, path) for arm in results.arms] for path in ("optim.lr.peak", "model.norm", "no.x")]
    assert found == [[1e-3, 3e-4, 1.0], ["layernorm"] * 3, [None] * 3]


def test_leave_one_out_is_compared_with_all_edits_too(place):
    arms = {"all": CROSS["both"], "without norm": CROSS["rotary"], "without rotary": CROSS["rms"]}
    folder = make_study(place / "s", arms, {"all": -0.3, "without norm": -0.2},
                        design={"kind": "leave_one_out", "factors": {}})
    markdown, _, _ = made(folder)
    assert "all: better than base" in markdown and "without norm: worse than all" in markdown
    assert "base: worse than all" in markdown
    rewrite(folder / "study.json", design={"kind": "list", "factors": {}})
    assert "than all" not in made(folder)[0]


@pytest.mark.parametrize("best, words", [(1e-3, "has its optimum at 0.00"), (1e-2, "at the edge of the sweep")])
def test_a_sweep_and_its_optimum(place, best, words):
    rates = [1e-4, 1e-3, 1e-2]
    effect = {f"lr{r:g}": 0.1 * (math.log10(r) - math.log10(best)) ** 2 for r in rates if r != 1e-3}
    arms = {f"lr{r:g}": {"optim.lr.peak": r} for r in rates if r != 1e-3}
    folder = make_study(place / "s", arms, effect | {"base": 0.1 * (3 + math.log10(best)) ** 2}, noise=0.001,
                        design={"kind": "grid", "factors": {"optim.lr.peak": rates}})
    markdown, _, _ = made(folder)
    assert f"optim.lr.peak: {best:g} is the best that was tried, for 5 of 5 seeds" in markdown and words in markdown
    assert (folder / "pictures/sweep-optim-lr-peak.png").exists()


def test_a_sweep_at_two_widths_has_two_lines(place):
    rates, widths = [1e-4, 1e-3, 1e-2], [64, 128]
    arms = {f"{r:g} {w}": {"optim.lr.peak": r, "model.width": w} for r in rates for w in widths if (r, w) != (1e-3, 64)}
    folder = make_study(place / "s", arms, design={"kind": "grid", "factors": {"optim.lr.peak": rates,
                                                                              "model.width": widths}})
    markdown, _, _ = made(folder)
    assert "optim.lr.peak (model.width=64):" in markdown and "optim.lr.peak (model.width=128):" in markdown
    assert not (folder / "pictures/sweep-model-width.png").exists()  # two widths are no axis


# ------------------------------------------------------------------------------------------------------ pictures


def test_curves_are_drawn_on_what_the_seeds_share():
    steps, values = pictures.together([[(0, 3.0), (10, 2.0), (20, 1.0)], [(0, 5.0), (10, 4.0)]])
    np.testing.assert_array_equal(steps, [0, 10])
    np.testing.assert_array_equal(values, [[3, 2], [5, 4]])
    figure = pictures.learning_curves({"base": (steps, values)}, {"step": {"base": 1}, "tokens": {"base": 100},
                                                                  "FLOPs": {}}, "loss")
    lines = [[line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes]
    assert lines == [[[[0, 4], [10, 3]]], [[[0, 4], [1000, 3]]], []]
    pictures.learning_curves({"base": (steps, values)}, {"tokens": {"base": 2**70}}, "loss")  # more than int64 holds


def test_forest_is_coloured_by_holm_not_by_the_single_interval():
    """p = 0.03 alone: with three such comparisons none is left."""
    base = dict(enumerate([1.0, 1.1, 0.9, 1.2, 1.05]))
    one = stats.compare({s: v - 0.05 + 0.03 * (-1) ** s for s, v in base.items()}, base, "min")
    assert 0.02 < one.p < 0.05

    def colours(comparisons):
        figure = pictures.forest({str(i): c for i, c in enumerate(comparisons)}, "loss", "min")
        return {line.get_color() for line in figure.axes[0].lines if line.get_marker() == "o"}

    assert colours(stats.adjust([one])) == {pictures.COLOURS[2]}
    assert colours(stats.adjust([one] * 3)) == {pictures.BASE}


# ------------------------------------------------------------------------------------------------------ mistakes


def test_no_folder(mistake, place, study):
    assert "Say which study" in mistake("report")
    assert "studies/nirms does not exist. There are studies/norms-1" in mistake("report", "studies/nirms")
    assert "is not a study folder: it has no study.json" in mistake("report", "studies/norms-1/cells/rms/0")


def test_nothing_finished(mistake, study):
    shutil.rmtree(study / "cells")
    assert "No cell of norms-1 is finished yet (planned 15 = 0 done" in mistake("report", study)


@pytest.mark.parametrize("name", ["cell.json", "result.json", "environment.json"])
def test_a_damaged_cell(mistake, study, name):
    path = study / "cells/rms/2" / name
    path.write_text(path.read_text()[:20])
    said = mistake("report", study)
    assert str(path) in said and "is damaged" in said and "Delete" in said and "run the study again" in said


def test_a_cell_that_lost_its_result_or_is_another_ones(mistake, study):
    (study / "cells/rms/2/result.json").rename(study / "cells/rms/2/x")
    assert "result.json is missing" in mistake("report", study)
    (study / "cells/rms/2/x").rename(study / "cells/rms/2/result.json")
    for wrong in ({"status": "perhaps"}, {"seed": 3}, {"arm": "base"}):
        before = (study / "cells/rms/2/cell.json").read_text()
        rewrite(study / "cells/rms/2/cell.json", **wrong)
        assert "is damaged" in mistake("report", study)
        (study / "cells/rms/2/cell.json").write_text(before)


def test_a_damaged_study(mistake, study):
    rewrite(study / "study.json", arms=[{"name": "base"}])
    assert "it lacks 'changes'" in mistake("report", study)
    (study / "study.json").write_text("[")
    assert "study.json is damaged" in mistake("report", study)


def test_a_metric_that_no_run_has(mistake, study):
    rewrite(study / "study.json", metric="accuracy")
    assert "has no accuracy of the validation split; it has loss." in mistake("report", study)
    rewrite(study / "study.json", metric="loss", split="holdout")
    assert "has no loss of the holdout split" in mistake("report", study)


def test_cells_of_an_arm_that_was_taken_out_are_noted(study):
    make_cell(study, "old", 0, 1.0)
    assert "1 finished cells belong to no planned arm and seed" in made(study)[0]


def test_report_function_raises_for_nothing():
    with pytest.raises(UserError, match="Say which study"):
        report([])
