"""Studies on the command line: ``./launch.sh experiments/ablate_x.py`` and ``EXPERIMENT.py --vary FIELD=a,b``."""

from __future__ import annotations

import ast
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lab.configuration.values import digest
from lab.errors import UserError, forgiving, nearest
from lab.experiment import Experiment
from lab.study.design.arms import BASE, Design, Study, grid, one_at_a_time
from lab.study.run import leases
from lab.study.run.cells import Cell, cells_of, code_of, finished_folders
from lab.study.run.engine import Engine
from lab.study.run.grouping import groups
from lab.study.run.outcomes import likeliest, mean_seconds, metric_values
from lab.study.run.preflight import Arm, describe_estimate, estimate, guess, measure, preflight, table
from lab.study.run.shared import Bench
from lab.study.run.stacking import check_stack, write_predictions
from lab.study.run.units import ExecutionPlan
from lab.study.run.workers import CORE, cores
from lab.train.check import check_data
from lab.train.console import Screen
from lab.train.json_files import read_json, write_json
from lab.train.teacher import with_teacher


@dataclass(frozen=True)
class StudyOptions:
    """Options of a study, in addition to the flags of its base experiment."""

    vary: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """FIELD=VALUE,VALUE,... turns an experiment into a study; several --vary form a grid."""
    seeds: int | None = None
    """Number of seeds, from 0; by default the study's own, or 3."""
    design: Literal["grid", "one_at_a_time"] = "grid"
    """How several --vary are combined."""
    metric: str | None = None
    """Metric to compare by; by default the study's own, or that of --evaluate.metric."""
    mode: Literal["min", "max"] | None = None
    """Whether to minimize or maximize --metric."""
    split: Literal["validation", "test"] | None = None
    """Split on which the metric is measured."""
    only: str | None = None
    """Run only the cells of this arm."""
    execution: Literal["loop", "vmap", "cores"] | None = None
    """loop: cells one after another. vmap: cells that differ only in numbers as one program. cores: one cell per CPU
    core. By default the fastest."""
    accept: bool = False
    """Keep finished cells even if code or data changed since."""
    rerun: bool = False
    """Rerun failed cells, and finished cells whose code or data changed since."""
    studies: Path = Path("studies")
    """Folder of all studies; a cell finished in one study is reused in the others."""
    dry_run: bool = False
    """Check every arm, print the study's estimated cost and statistical power, and exit."""
    full: bool = False
    """Run the real experiments, even without an accelerator."""
    local: bool = False
    """Run the small local config, even with an accelerator."""


def make_study(written: Study | None, base: Experiment, options: StudyOptions) -> Study:
    """The study from a file or from --vary, with command-line options applied. Raises UserError."""
    if written is not None and options.vary:
        raise UserError("This file is a study already: leave out --vary, or add arms in the file.")
    if base.seed != (written.base.seed if written else 0):
        raise UserError("--seed: every arm of a study runs with several seeds; say how many with --seeds.")
    if options.seeds is not None and options.seeds < 1:
        raise UserError(f"--seeds must be at least 1, not {options.seeds}.")
    if options.accept and options.rerun:
        raise UserError("--accept and --rerun exclude each other.")
    if written is None:
        written = Study(base, vary(options.vary, options.design))
    overrides = {name: value for name in ("seeds", "metric", "mode", "split")
                 if (value := getattr(options, name)) is not None}
    if "metric" in overrides and options.metric != written.metric:
        overrides.setdefault("mode", None)
    return replace(written, base=base, **overrides)


def vary(words: Sequence[str], design: str) -> Design:
    """The design for --vary arguments such as ``FIELD=VALUE,VALUE,...``. Raises UserError."""
    values = {}
    for word in words:
        path, equals, text = word.partition("=")
        if not equals or not text:
            raise UserError(f"--vary {word}: write FIELD=VALUE,VALUE,..., for example optim.lr.peak=1e-3,3e-3.")
        if path.replace("-", "_") in values:
            raise UserError(f"--vary {path} is there twice: give all its values at once.")
        values[path.replace("-", "_")] = _values(text)
    return grid(values) if design == "grid" else one_at_a_time(values)


def _values(text: str) -> list[Any]:
    """Parses the text as Python values; if that fails, splits it at commas into values or plain words."""
    try:
        return list(ast.literal_eval(f"({text},)"))
    except (ValueError, SyntaxError):
        return [_value(part.strip()) for part in text.split(",")]


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def run_study(study: Study, options: StudyOptions, file: Path, args: Sequence[str]) -> int:
    """Checks a study, estimates its cost and runs it; returns the exit status. Repeating the command resumes the study,
    or reports it once finished. `args`: the command's arguments, for worker processes.

    0: every cell is finished, including diverged ones. 1: some failed. 75 / 130: stopped by a signal.

    Raises:
      UserError: see `preflight`, `Engine._check_code` and `read_cell`.
    """
    folder = options.studies / f"{file.stem}-{study.fingerprint()}"
    if CORE in os.environ:
        return _work(study, options, folder, file)
    return _run(study, options, folder, file, args)


def _run(study: Study, options: StudyOptions, folder: Path, file: Path, args: Sequence[str]) -> int:
    check_stack(study)
    arms = preflight(study)
    bench = Bench(sorted({arm.after for arm in arms if arm.after}))
    cells = _cells(arms, study, options.only, bench)
    with Screen() as screen:
        screen.info(f"Study folder: {folder}")
        if study.design.kind in ("grid", "one_at_a_time") and len(arms) > len(study.design.arms):
            screen.info(f"None of the {len(study.design.arms)} arms has the base's own values, so the base runs as one "
                       f"more arm: all others are compared with it.")
        if not options.dry_run:
            _describe(folder, study, arms, file, cells)
            found = groups({arm.name: arm.experiment for arm in arms})
            engine = Engine(folder, cells, {arm.name: arm for arm in arms}, found, screen, bench, file)
            taken = engine.settle(options.execution, options.accept, options.rerun)
            if taken:
                screen.info(f"{taken} cells are finished in other studies, and are not run again.")
            cells = engine.cells
        else:
            cells = likeliest(folder, cells, arms[0].experiment.steps_per_call)
        folders = finished_folders(folder, cells)
        _price(study, arms, cells, folders, None if options.dry_run else engine.plan, bench, screen)
        if options.dry_run:
            base = [cell for cell in cells if cell.arm == BASE]
            _say_power(study, metric_values(base, folders, study.metric, study.split), screen)
            return 0
        if status := engine.run_on_cores(args) if engine.plan.how == "cores" else engine.run():
            bench.close()
            if bench.compiling():  # may take minutes, and SIGKILL follows the stop signal soon
                sys.stdout.flush()
                os._exit(status)
            return status
        counts = engine.summary()
        screen.info(f"{len(cells)} cells planned = " + " + ".join(f"{n} {what}" for what, n in counts.items()) + ".")
        if counts["failed"]:
            screen.info("Each failed cell says why in its cell.json; --rerun runs them again.")
        if counts["done"]:
            _report(folder, study, cells, screen)
    return 1 if counts["failed"] else 0


def _work(study: Study, options: StudyOptions, folder: Path, file: Path) -> int:
    """Runs cells of a study that another process has prepared; returns the exit status."""
    planned = {arm["name"]: arm for arm in read_json(folder / "study.json")["arms"]}
    arms = [Arm(name, changes, with_teacher(experiment), planned[name]["parameters"], planned[name]["flops_per_step"],
                planned[name]["memory_bytes"], planned[name]["forked_after"], bool(planned[name]["fork"]))
            for name, (changes, experiment) in study.experiments().items()]
    bench = Bench(sorted({arm.after for arm in arms if arm.after}))
    cells = _cells(arms, study, options.only, bench)
    with Screen() as screen:
        engine = Engine(folder, cells, {arm.name: arm for arm in arms}, (), screen, bench, file)
        engine.follow()
        return engine.run()


def _cells(arms: Sequence[Arm], study: Study, only: str | None, bench: Bench) -> list[Cell]:
    """Cells of all arms, or of `only`, plus the base's if that arm forks from it."""
    wanted = [arm for arm in arms if only in (None, arm.name)]
    if not wanted:
        names = [arm.name for arm in arms]
        others = f" There are {', '.join(names)}."
        raise UserError(f"There is no arm {only}.{nearest(only, names, others)}")
    if any(arm.stated for arm in wanted) and arms[0] not in wanted:
        wanted = [arms[0], *wanted]
    found = []
    for arm in wanted:
        data = bench.data(arm.experiment)
        check_data(arm.experiment, data)
        if study.split == "test" and data.test is None:
            raise UserError(f"Arm {arm.name}: its data has no test split; compare by --split validation.")
        found += cells_of(arm, arms[0], study.seeds, data.fingerprint, code_of(arm.experiment))
    return found


def _describe(folder: Path, study: Study, arms: Sequence[Arm], file: Path, cells: Sequence[Cell]) -> None:
    """Writes study.json once; its content is the same for all processes."""
    (folder / "leases").mkdir(parents=True, exist_ok=True)
    lease = leases.claim(folder / "leases", "study")
    if lease is None:
        return  # another process is writing the same content
    try:
        if not (folder / "study.json").exists():
            write_json(folder / "study.json", {
                "name": file.stem, **study.describe(), "arms": [arm.to_json() for arm in arms], "file": str(file),
                "code": digest(sorted({digest(dict(cell.code)) for cell in cells}))})
    finally:
        lease.release()


def _price(
    study: Study,
    arms: list[Arm],
    cells: Sequence[Cell],
    folders: Mapping[str, Path],
    plan: ExecutionPlan | None,
    bench: Bench,
    screen: Screen,
) -> None:
    """Prints the table of arms and the study's estimated duration."""
    left = {arm.name: sum(c.arm == arm.name and c.name not in folders for c in cells)
            for arm in arms}
    screen.console.print(table(study, arms, left))
    at_once = max(len(cores()), 1) if plan and plan.how == "cores" else 1
    known = {arm: seconds / at_once for arm, seconds in mean_seconds(cells, folders).items()}
    timing = None
    if plan and plan.seconds:
        timing = guess(arms[0], bench.data(arms[0].experiment), plan.seconds[plan.mode])
    elif any(n and name not in known for name, n in left.items()):
        screen.progress("Timing the base ...")
        prepared = bench.prepared(arms[0].experiment)
        timing = measure(arms[0], prepared.data, prepared.program)
    screen.info(describe_estimate(estimate(arms, left, known, timing), sum(left.values())))


def _say_power(study: Study, base: Mapping[int, float], screen: Screen) -> None:
    """Prints the seeds needed to detect a gap, from the base's finished cells (`base`: seed -> metric)."""
    values = list(base.values())
    if len(values) < 2:
        screen.info("Power: unknown until the base has finished with two seeds.")
        return
    from lab.study.report import stats

    mean, sd = (float(x) for x in stats.mean_sd(values))
    screen.info(f"Power: the base has {study.metric} {mean:.4g} with a standard deviation of {sd:.2g} over "
               f"{len(values)} seeds. For 80 % power at 5 %, if the runs of one seed did not correlate (where they do, "
               f"fewer are enough):")
    for share in (0.5, 1.0, 2.0, 3.0):
        needed = stats.seeds_needed(share * sd, stats.difference_sd(sd))
        screen.info(f"  a gap of {share * sd:.2g} ({share:g} standard deviations) needs "
                   f"{needed if needed is not None else 'too many'} seeds")


def _report(folder: Path, study: Study, cells: Sequence[Cell], screen: Screen) -> None:
    from lab.study.report.report import report

    while not (lease := leases.claim(folder / "leases", "report")):
        time.sleep(0.5)  # another process is writing the same report
    try:
        with forgiving("The predictions of the stack"):
            write_predictions(folder, study, cells)
        with forgiving("The report"):  # not fatal: cells are finished, and ./launch.sh report can redo it
            report([folder])
    finally:
        lease.release()
