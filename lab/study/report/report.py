"""Reports one study or several merged ones: report.html, report.md, results.csv and a table in the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab.errors import UserError, forgiving
from lab.files import make_folder, replace_file
from lab.study.report import pictures, stats
from lab.study.report.analysis import (
    Against,
    Section,
    against,
    axes,
    base_is_extra,
    block,
    effects,
    sections,
    step_seconds,
    whole,
)
from lab.study.report.groups import by_group
from lab.study.report.items import by_item
from lab.study.report.render import (
    Block,
    Heading,
    Picture,
    Table,
    Text,
    drawn,
    html,
    markdown,
    terminal,
    without_pictures,
)
from lab.study.report.results import ArmResults, Results, cells_csv, changed_code, merge, read_study
from lab.study.report.stacking import with_stack
from lab.train.console import human

METHODS = (
    "Runs are paired by seed: the same seed has the same batches and, where layers are shared, the same initial "
    "weights. Intervals hold 95 % for one comparison; t: Student's, of the paired differences; bootstrap: studentized, "
    f"{stats.RESAMPLES:,} resamples, fixed seed (infinite for 3 or fewer pairs). p: paired t test, two-sided; Holm: "
    "adjusted for all comparisons of its table. Welch: the same runs unpaired. Correlation: of the pairs; near 0, "
    "pairing gains nothing. d_z: mean over standard deviation of the paired differences, with Hedges' correction. "
    "d_av: mean difference over the average standard deviation of the two arms (Lakens 2013). P(better): predictive "
    "probability that the arm is better with one further seed. Seeds needed: for 80 % power at the strictest of Holm's "
    "levels. The best of many arms looks better than it is: confirm it with fresh seeds. FLOPs: matrix products and "
    "convolutions of a whole step, with those of the optimizer and those that are computed again.")
TIMES = ("ms/step: geometric mean, with a 95 % interval, over all runs of the compiled program that an arm uses. The "
         "runs were not timed in turns, and a machine's speed varies: do not compare arms by these figures.")
HALF = ("An interaction is half the difference between the effects of one factor at the two levels of the other (Box, "
        "Hunter & Hunter): at its higher level an effect is the main effect plus the interaction, at its lower level "
        "the main effect minus it.")


def report(folders: Sequence[Path], *, pool: bool = False, output: Path | None = None, quiet: bool = False) -> Path:
    """Reports one study, or several merged studies of the same base, from their files alone.

    Args:
      folders: study folders.
      pool: also compare cells whose device kind, versions or execution mode differ.
      output: where to write; by default the study's folder, or ./report-of-N-studies for several.
      quiet: print nothing.

    Returns:
      The folder with report.html, report.md, results.csv and pictures/.

    Raises:
      UserError: a study does not exist, a file is damaged, no cell has finished, or the studies cannot be merged.
    """
    if not folders:
        raise UserError("Say which study: ./launch.sh report studies/NAME-...")
    studies = [read_study(Path(folder)) for folder in folders]
    results = merge(studies) if len(studies) > 1 else studies[0]
    if not results.count()["done"]:
        raise UserError(f"No cell of {results.name} is finished yet ({accounting(results)}): there is nothing to "
                        f"report. Run the study again; it resumes.")
    output = output or (Path(folders[0]) if len(folders) == 1 else Path(f"report-of-{len(folders)}-studies"))
    make_folder(output)
    replace_file(output / "results.csv", cells_csv(results))
    blocks = with_stack(results, lambda found: build(found, pool))
    _write(output, without_pictures(blocks))  # first, so that no failing picture loses the tables
    make_folder(output / "pictures")
    for old in (output / "pictures").glob("*.png"):
        old.unlink(missing_ok=True)
    blocks = drawn(blocks)
    for item in blocks:
        if isinstance(item, Picture):
            with forgiving(f"The picture {item.name}"):  # report.html has it, too
                replace_file(output / "pictures" / f"{item.name}.png", item.png)
    with forgiving("The report with pictures"):
        _write(output, blocks)
    if not quiet:
        terminal(blocks)
        print(f"The whole report: {output / 'report.html'}, report.md, results.csv")
    return output


def _write(output: Path, blocks: Sequence[Block]) -> None:
    replace_file(output / "report.md", markdown(blocks))
    replace_file(output / "report.html", html(blocks))


def _forgiven(what: str, part: Callable[..., list[Block]], *args: Any) -> list[Block]:
    """The blocks of one part of the report; a warning in their place if it fails, so that the rest is reported."""
    with forgiving(what):
        return part(*args)
    return [Text(f"WARNING: {what} failed and is left out.")]


def accounting(results: Results, arm: str | None = None) -> str:
    """Text such as "planned 9 = 7 done + 1 diverged + 0 failed + 1 missing"; asserts that the counts add up."""
    n = results.count(arm)
    assert n["planned"] == n["done"] + n["diverged"] + n["failed"] + n["missing"], n
    running = sum(c.running for c in results.cells if arm in (None, c.arm))
    return (f"planned {n['planned']} = {n['done']} done + {n['diverged']} diverged + {n['failed']} failed + "
            f"{n['missing']} missing" + (f", {running} of them with a lease" if running else ""))


def build(results: Results, pool: bool) -> list[Block]:
    """The whole report as a list of blocks."""
    found = sections(results, pool)
    better = "lower" if results.mode == "min" else "higher"
    blocks: list[Block] = [
        Heading(f"Study {results.name}", 1),
        Text(f"{results.metric} of the {results.split} split ({better} is better), {len(results.arms)} arms, seeds "
             f"{', '.join(map(str, results.seeds))}, design {results.kind}. Cells: {accounting(results)}.")]
    if base_is_extra(results):
        blocks.append(Text(f"The arm {results.arms[0].name} has none of the combinations that were asked for: it was "
                           f"added, since all arms are compared with it."))
    if results.tuning_seeds:
        blocks.append(Text(f"Seeds used for tuning, in no figure below: {', '.join(map(str, results.tuning_seeds))}."))
    if not found:
        blocks.append(Text("All finished seeds were used for tuning: nothing can be concluded.", terminal=True))
    elif len(results.seeds) == 1:
        blocks.append(Text("One seed: nothing can be concluded about any difference. Run more (--seeds 5)."))
    blocks += _environments(results, found, pool) + _failures(results)
    for number, section in enumerate(found, 1):
        if len(found) > 1:
            blocks += [Heading(f"Environment {number} of {len(found)}", 2), Text(section.environment)]
        blocks += _section(results, section, f"{number}-" if len(found) > 1 else "")
    return [*blocks, Heading("How to read this", 2), Text(METHODS, terminal=False)]


def _environments(results: Results, found: Sequence[Section], pool: bool) -> list[Block]:
    done = [c for c in results.cells if c.status == "done"]
    names = list(dict.fromkeys(c.environment for c in done))
    blocks: list[Block] = []
    if files := changed_code(done):
        blocks.append(Text(f"WARNING: not all cells ran with the same code; {', '.join(files[:8])} changed in between. "
                           f"They are compared nevertheless."))
    if len(names) < 2:
        return [*blocks, *(Text(f"Environment: {name}.", terminal=False) for name in names)]
    text = ("they are pooled because you asked for it; pairs that mix them are left out, unpaired figures are not"
            if pool else "they are reported apart; --pool puts them together")
    rows = [[name, str(sum(c.environment == name for c in done))] for name in names]
    return [*blocks, Text(f"WARNING: the cells ran in {len(names)} environments that differ; {text}."),
            Table("Environments", ["environment", "cells"], rows, terminal=False)]


def _failures(results: Results) -> list[Block]:
    blocks: list[Block] = []
    total = results.count()
    if total["done"] < total["planned"]:
        rows = [[a.name, *map(str, results.count(a.name).values())] for a in results.arms]
        blocks.append(Table("Cells", ["arm", "planned", "done", "diverged", "failed", "missing"], rows))
        none = [(a.name, results.count(a.name)) for a in results.arms if not results.count(a.name)["done"]]
        blocks += [Text(f"{arm}: no run is finished ({n['diverged']} diverged, {n['failed']} failed, {n['missing']} "
                        f"missing): nothing to compare.") for arm, n in none]
        for cell in results.cells:
            if cell.error:
                blocks.append(Text(f"{cell.arm}, seed {cell.seed} {cell.status}: {cell.error}", terminal=False))
    return blocks + [Text(note) for note in results.notes]


# ------------------------------------------------------------------------------------------------------ section


def _section(results: Results, section: Section, prefix: str) -> list[Block]:
    show = _number(results, section)
    base = results.arms[0].name
    main = against(results, section, base)
    blocks: list[Block] = [_quality(results, section, main, show)]
    if not section.cells[base]:
        blocks.append(Text(f"No seed of {base} is finished in this environment: there is nothing to compare with."))
    references = [main] if section.cells[base] else []
    if (all_edits := whole(results)) and section.cells[all_edits]:
        references.append(against(results, section, all_edits))
    for found in references:
        blocks += _forgiven(f"The comparison with {found.reference}", _compared, results, found, show, prefix)
        blocks += _forgiven(f"The comparison by items with {found.reference}", by_item, results, section, found)
    blocks += _forgiven("The tables by group", by_group, results, section)
    blocks += _forgiven("The analysis of factors", _factors, results, section, show, prefix)
    blocks += _forgiven("The table of costs", _not_controlled, results, section)
    return blocks + _forgiven("The figure of learning curves", _curves, results, section, prefix)


def _number(results: Results, section: Section) -> Callable[[float], str]:
    """Formats metric values to a hundredth of the spread between runs. The spread is that of the half with smaller
    absolute values, because one run that nearly diverged would leave too few digits for the rest.
    """
    values = sorted((v for arm in results.arms for v in section.values(arm.name).values()), key=abs)
    half = values if len(values) < 4 else values[: -(-len(values) // 2)]
    spread = (float(np.std(half)) or float(np.std(values))) if len(values) > 1 else abs(values[0]) / 10
    digits = 4 if not spread > 0 else min(max(2 - math.floor(math.log10(spread)), 0), 10)

    def show(value: float) -> str:
        if not math.isfinite(value):
            return "" if math.isnan(value) else "∞" if value > 0 else "-∞"
        return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"

    return show


def _ends(ends: Sequence[float], show: Callable[[float], str]) -> str:
    return "" if any(map(math.isnan, ends)) else f"{show(ends[0])} to {show(ends[1])}"


def _p(p: float) -> str:
    return "" if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def _quality(results: Results, section: Section, main: Against, show: Callable[[float], str]) -> Table:
    rows = []
    for arm in (a for a in results.arms if section.cells[a.name]):
        values = np.array(list(section.values(arm.name).values()))
        mean, sd = map(float, stats.mean_sd(values))
        c = main.comparisons.get(arm.name)
        rows.append([arm.name, arm.difference, str(len(values)), show(mean), show(sd),
                     _ends([float(e) for e in stats.interval(values)], show),
                     show(c.difference) if c else "", _ends(c.t, show) if c else "", _p(c.holm) if c else ""])
    return Table(f"{results.metric} of each arm", ["arm", "change", "n", "mean", "sd", "95 %", "difference",
                                                   "95 % (t)", "p (Holm)"], rows,
                 wide=("change", "95 %"))


def _compared(results: Results, found: Against, show: Callable[[float], str], prefix: str) -> list[Block]:
    rows, words, left_out = [], [], []
    for arm, c in found.comparisons.items():
        difference, *welch, p = c.welch
        rows.append([arm, str(c.n), show(c.difference), show(c.sd), _ends(c.t, show), _ends(c.bootstrap, show), _p(c.p),
                     _p(c.holm), show(difference) + (f" ({_ends(welch, show)})" if _ends(welch, show) else ""), _p(p),
                     *("" if math.isnan(v) else f"{v:.2f}" for v in (c.correlation, c.d_z, c.d_av, c.better)),
                     f"{c.wins} of {c.n}"])
        lost = results.count(arm)["diverged"]
        survivors = f" (diverged runs, not in this: {lost})" if lost else ""
        words.append(f"{arm}: {stats.verdict(c, results.mode, found.reference)}{survivors}.")
        if found.excluded[arm]:
            left_out.append(f"Pairs left out of {arm} against {found.reference}: {'; '.join(found.excluded[arm])}.")
    if not found.comparisons:
        return []
    if max(c.n for c in found.comparisons.values()) < 2:
        words = ["No arm has two pairs of runs here: nothing can be concluded about any difference."]
    blocks: list[Block] = [Heading(f"Against {found.reference}", 3), *map(Text, words), Table(
        f"Each arm minus {found.reference}, paired by seed",
        ["arm", "pairs", "difference", "sd", "95 % (t)", "95 % (bootstrap)", "p", "p (Holm)", "Welch (95 %)",
         "p (Welch)", "correlation", "d_z", "d_av", "P(better)", "better in"], rows, terminal=False)]
    blocks += [Text(line, terminal=False) for line in left_out]
    if any(c.n for c in found.comparisons.values()):
        label = f"{results.metric}: difference to {found.reference}"
        draw = _drawing(pictures.forest, found.comparisons, label, results.mode)
        blocks.append(Picture(f"{prefix}effects-{_file(found.reference)}", draw,
                              f"Differences to {found.reference} with 95 % intervals: thick by Student's t, thin by "
                              f"the bootstrap (an arrow where it is far wider). Coloured: distinguishable after "
                              f"Holm's correction."))
    return blocks


def _drawing(figure: Callable[..., Any], *args: Any) -> Callable[[], bytes]:
    return lambda: pictures.png(figure(*args))


def _file(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def _factors(results: Results, section: Section, show: Callable[[float], str], prefix: str) -> list[Block]:
    blocks: list[Block] = []
    crossed = block(results, section)
    if crossed and crossed.seeds and set(map(len, crossed.levels.values())) == {2}:
        rows = [[name, meaning, str(c.n), show(c.difference), _ends(c.t, show), _ends(c.bootstrap, show), _p(c.p),
                 _p(c.holm)] for name, (c, meaning) in effects(crossed).items()]
        blocks.append(Table(f"Main effects and interactions, on the seeds that all arms finished "
                            f"({', '.join(map(str, crossed.seeds))})",
                            ["effect", "is", "n", "mean", "95 % (t)", "95 % (bootstrap)", "p", "p (Holm)"], rows,
                            wide=("is", "95 % (bootstrap)", "p")))
        blocks.append(Text(HALF))
    elif crossed and not crossed.seeds:
        blocks.append(Text("No seed is finished in all arms: main effects and interactions cannot be computed yet."))
    if crossed and crossed.seeds and max(map(len, crossed.levels.values())) <= 6:
        draw = _drawing(pictures.interactions, crossed.levels, crossed.values, results.metric)
        blocks.append(Picture(f"{prefix}interactions", draw,
                              "Means with 95 % intervals, each seed as a dash. Parallel lines: no interaction. The "
                              "intervals hold what the runs of a seed share; paired ones do not."))
    for axis in axes(results, section):
        blocks += [Text(f"{axis.factor}{f' ({line})' if line else ''}: {words}.") for line, words in axis.words.items()]
        blocks.append(Picture(
            f"{prefix}sweep-{_file(axis.factor)}",
            _drawing(pictures.sweep, axis.lines, axis.optima, axis.factor, results.metric),
            f"{results.metric} over {axis.factor}: means with 95 % intervals, each seed as a dash; dotted: optimum."))
    return blocks


def _not_controlled(results: Results, section: Section) -> list[Block]:
    """Costs of the arms, which are not matched. No ratio of times: it would mostly reflect the machine."""
    def cost(arm: ArmResults) -> list[float | None]:
        return [arm.parameters, arm.flops, arm.memory]

    base, rows = cost(results.arms[0]), []
    for arm in (a for a in results.arms if section.cells[a.name]):
        words = []
        for value, of_base, unit in zip(cost(arm), base, ("", "", "B"), strict=True):
            ratio = f" ({value / of_base - 1:+.1%})" if value is not None and of_base and arm != results.arms[0] else ""
            words.append("" if value is None else f"{human(value, 4)}{unit}{ratio}")
        mean, *ends = (1000 * v for v in step_seconds(section, arm.name))
        words.append("" if any(map(math.isnan, ends)) else f"{mean:.3g} ({ends[0]:.3g} to {ends[1]:.3g})")
        rows.append([arm.name, *words])
    return [Table("Cost (not matched)", ["arm", "parameters", "FLOPs/step", "memory", "ms/step (95 %)"], rows,
                  wide=("memory",)), Text(TIMES)]


def _curves(results: Results, section: Section, prefix: str) -> list[Block]:
    curves, scales = {}, {"step": {}}  # not over seconds: the arms were not timed in turns
    for arm in results.arms:
        cells = list(section.cells[arm.name].values())
        found = [c for c in (cell.curve(results.metric) for cell in cells) if c]
        if not found:
            continue
        curves[arm.name] = pictures.together(found)
        scales["step"][arm.name] = 1.0
        unit = next((name.removesuffix("_per_second") for name, value in cells[0].result.items()
                     if name.endswith("_per_second") and isinstance(value, int | float)), None)
        if unit:
            first = cells[0].result
            made = first[f"{unit}_per_second"] * first.get("seconds_per_step", math.nan)
            if math.isfinite(made):
                scales.setdefault(unit, {})[arm.name] = round(made)
        if arm.flops:
            scales.setdefault("FLOPs", {})[arm.name] = arm.flops
    if not curves:
        return []
    return [Picture(f"{prefix}curves", _drawing(pictures.learning_curves, curves, scales, results.metric),
                    f"{results.metric} while training: mean over the finished seeds, band from the lowest to the "
                    f"highest.")]
