"""The command line: ``./launch.sh COMMAND ...`` ends up here, inside the environment that lab/bootstrap.py built."""

from __future__ import annotations

from lab import signals

if __name__ == "__main__":
    signals.listen()  # before anything slow is imported

import ast
import difflib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lab.backend import start_jax
from lab.errors import UserError, explain
from lab.files import expand_home

if TYPE_CHECKING:  # imports of JAX (3 s) stay in the commands that need it
    from lab.distributed import Processes
    from lab.experiment import Experiment
    from lab.study.design import Study

ROOT = Path(__file__).resolve().parent.parent


def experiments() -> dict[str, str]:
    """File name -> first line of its docstring, without importing anything."""
    found = {}
    for path in sorted((ROOT / "experiments").glob("*.py")):
        try:
            doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        except SyntaxError as e:
            doc = f"(line {e.lineno}: {e.msg})"
        found[f"experiments/{path.name}"] = doc.partition("\n")[0]
    return found


def overview() -> str:
    """What can be typed."""
    rows = [("EXPERIMENT.py [--flags]", "train it, or go on; --help lists every knob, --dry-run only plans"),
            ("EXPERIMENT.py --vary FIELD=a,b", "a study: arms x seeds, then a report; files ablate_* and sweep_*, too"),
            *[(f"{name} ...", summary) for name, (_, summary) in COMMANDS.items()],
            ("--processes N EXPERIMENT.py ...", "train with N processes on this machine (2x4: with 4 devices each)"),
            ("tests [pytest arguments]", "run the tests"),
            ("prepare NAME [--data-dir D]", "download and prepare a TensorFlow Dataset"),
            ("env", "print the environment's folder, accelerator and versions"),
            ("--slurm|--hosts|--tpu|--sky ...", "start any of this elsewhere; ./launch.sh --slurm --help lists all")]
    width = max(len(name) for name, _ in rows + list(experiments().items())) + 2
    lines = ["lab: a functional research codebase in JAX", "", "usage: ./launch.sh ..."]
    lines += [f"  {name:<{width}}{what}" for name, what in rows]
    lines += ["", "experiments (with no accelerator their small local twin runs; --full forces the real one):"]
    return "\n".join(lines + [f"  {name:<{width}}{what}" for name, what in experiments().items()])


def find_experiment(name: str) -> Path:
    """The file of an experiment: as typed, or in the repository. Raises UserError with the nearest name."""
    for path in (Path(name), ROOT / name, ROOT / "experiments" / Path(name).name):
        if path.is_file():
            return path.resolve()
    near = difflib.get_close_matches(f"experiments/{Path(name).name}", experiments(), n=1, cutoff=0.75)
    raise UserError(f"There is no experiment {name}." + (f" Perhaps you meant {near[0]}." if near else
                                                         f" There are {', '.join(experiments())}."))


def check_words(args: Sequence[str]) -> None:
    """Raises UserError for a word that is no text: it could be neither shown nor written to a file."""
    for word in args:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(f"{ascii(word)[:120]} is not UTF-8. Rename the file or folder, or type the text again in a "
                            f"terminal that writes UTF-8.") from None


def check_run_dir(run_dir: str | None) -> None:
    """Raises UserError where the run folder would be a bucket."""
    if "://" in (run_dir or ""):
        raise UserError("--run-dir is a folder on the machine of process 0; checkpoints may go to a bucket: "
                        "--checkpoint-dir gs://...")


def choose_twin(module: Any, args: Sequence[str]) -> tuple[Experiment | Study, str]:
    """The experiment or study of a file, or its `local` twin; and one line that says which and why."""
    local = getattr(module, "local", None)
    real = module.study if hasattr(module, "study") else module.experiment
    if hasattr(module, "study") and local is not None and not hasattr(local, "arms"):
        raise UserError("Where a file has a `study`, its `local` must be a Study, too: its twin.")
    if "--full" in args and "--local" in args:
        raise UserError("--full and --local exclude each other.")
    if "--full" in args or local is None:
        return real, ""
    if "--local" in args:
        return local, "Running the local twin (--local)."
    platform = os.environ.get("LAB_PLATFORM") or start_jax()
    if platform == "cpu":
        return local, "No accelerator found: running the local twin (--full forces the real experiment)."
    return real, ""


def parse(path: Path, args: Sequence[str], options: type, module: Any = None) -> tuple[Experiment, Any, Path]:
    """The experiment with its overrides, or the base of a study; and the other options of the command.

    `module`: the file, if it is loaded already.
    """
    import tyro

    from lab.experiment import check_types, load

    module = module or load(path)
    default, line = choose_twin(module, args)
    default = getattr(default, "base", default)
    check_types(default)  # tyro would say less
    if line:
        print(line, flush=True)
    flat = tyro.conf.arg(name="")
    command_type = make_dataclass("Command", [("experiment", Annotated[type(default), flat]),
                                              ("options", Annotated[options, flat])])
    with warnings.catch_warnings(action="ignore"):  # a field of the wrong type is said by validate() below
        command = tyro.cli(command_type, args=list(args), default=command_type(default, options()),
                           prog=f"./launch.sh {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}",
                           description=module.__doc__, config=(tyro.conf.AvoidSubcommands,))
    for flag, value in unchanged(args, default, command.experiment):
        print(f"Note: {flag} was {value} already; it changes nothing.", flush=True)
    command.experiment.validate()
    study = hasattr(module, "study") or hasattr(command.options, "vary")  # whose arms may have other tokenizers
    return command.experiment if study else command.experiment.filled(), command.options, path


def unchanged(args: Sequence[str], before: Any, after: Any) -> list[tuple[str, Any]]:
    """The overrides that change nothing: (flag, value)."""
    found = []
    for flag in (a.split("=")[0] for a in args if a.startswith("--")):
        path = flag[2:].replace("-", "_")
        head, dot, last = path.rpartition(".")
        a, b = _at(before, path), _at(after, path)
        if a is _Missing and last.startswith("no_"):  # --model.no-bias
            a, b = _at(before, head + dot + last[3:]), _at(after, head + dot + last[3:])
        if a is not _Missing and a == b:
            found.append((flag, b))
    return found


def _at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = getattr(value, name, _Missing)
    return value


class _Missing:
    """Stands for an attribute that is not there."""


@dataclass(frozen=True)
class TrainOptions:
    """Options of this command, beside the experiment's own."""

    run_dir: str | None = None
    """Folder of the run; by default runs/<experiment>-<fingerprint>."""
    checkpoint_dir: str | None = None
    """Folder or bucket (gs://BUCKET/RUN, LAB_EXTRAS=bucket) for checkpoints; by default they are in the run folder.
    With a bucket, machines need not share a disk: the run folder is process 0's."""
    accept: bool = False
    """Go on with a run, or take its result as it is, though code or data changed since it began."""
    rerun: bool = False
    """Delete a run whose code or data changed since it began, and run it again."""
    tensorboard: bool = False
    """Also write TensorBoard event files to tensorboard/ in the run folder (needs LAB_EXTRAS=tensorboard)."""
    dry_run: bool = False
    """Print what the run would cost, and stop."""
    full: bool = False
    """Run the real experiment, also without an accelerator."""
    local: bool = False
    """Run the small local twin, also with an accelerator."""


def train(args: Sequence[str], processes: Processes) -> int:
    """EXPERIMENT.py [--flags]"""
    from lab.experiment import load

    path = find_experiment(args[0])
    module = load(path)
    if hasattr(module, "study") or any(a.partition("=")[0] == "--vary" for a in args):
        return study(path, module, args[1:], processes)
    experiment, options, path = parse(path, args[1:], TrainOptions, module)
    check_run_dir(options.run_dir)
    if options.accept and options.rerun:
        raise UserError("--accept and --rerun exclude each other.")
    on_change = "accept" if options.accept else "rerun" if options.rerun else "refuse"
    start_jax()
    if options.dry_run:
        from lab.dry_run import show

        show(experiment)
        return 0
    from lab import loop
    from lab.console import Screen
    from lab.run_folder import finished, run_again

    folder = Path(options.run_dir or f"runs/{path.stem}-{experiment.fingerprint()}")
    compare(processes, experiment, options, folder, path)
    result = processes.share(finished(folder) if processes.first else None)
    with Screen(quiet=not processes.first) as screen:
        screen.say(f"Run folder: {folder}")
        if result is not None and not processes.share(processes.first and run_again(folder, experiment, on_change)):
            screen.say("This run is finished already. Delete its folder, or change the seed, to run it again.")
            screen.say(loop.describe_result(result))
            return 0
        return loop.train(experiment, folder, screen, path, tensorboard=options.tensorboard, processes=processes,
                          checkpoints=options.checkpoint_dir, on_change=on_change)


def study(path: Path, module: Any, args: Sequence[str], processes: Processes) -> int:
    """STUDY.py, or EXPERIMENT.py --vary FIELD=a,b"""
    from lab.study.command import StudyOptions, make_study, run_study

    base, options, _ = parse(path, args, StudyOptions, module)
    written = choose_twin(module, args)[0] if hasattr(module, "study") else None
    checked = make_study(written, base, options)
    if processes.count > 1:
        raise UserError("A study runs in one process at a time. Start the same command several times instead: they "
                        "share the cells among themselves, also on several machines with one disk.")
    start_jax()
    return run_study(checked, options, path, [str(path), *args])


def compare(processes: Processes, experiment: Experiment, options: TrainOptions, folder: Path, file: Path) -> None:
    """Returns when all processes have come here with the same experiment, run folder and code.

    Raises:
      UserError: this process has something else than process 0.
    """
    if processes.count > 1:
        from lab.distributed import code_version
        from lab.experiment import flat, to_json

        flags = {f"--{name}": value for name, value in flat(to_json(experiment)).items()}
        processes.check_same(flags, "Start all processes with the same flags.")
        folders = {"--run-dir": str(folder), "--checkpoint-dir": options.checkpoint_dir}
        processes.check_same(folders, "Start all processes with the same flags.")
        processes.check_same(code_version(file), "Bring all machines to the same code and packages.")


def evaluate(args: Sequence[str]) -> int:
    """RUN [--step N]"""
    from lab.commands import evaluate

    return _function("eval", evaluate, args)


def sample(args: Sequence[str]) -> int:
    """RUN --prompt TEXT"""
    from lab.commands import sample

    return _function("sample", sample, args)


def predict(args: Sequence[str]) -> int:
    """RUN --input FILE"""
    from lab.commands import predict

    return _function("predict", predict, args)


def bench(args: Sequence[str]) -> int:
    """EXPERIMENT.py"""
    if not args:
        raise UserError("Say which experiment to measure: ./launch.sh bench experiments/gpt_small.py")
    from lab.bench import BenchOptions, measure
    from lab.console import Screen

    flags = ["--updates" + a.removeprefix("--steps") if a.partition("=")[0] == "--steps" else a for a in args[1:]]
    experiment, options, _ = parse(find_experiment(args[0]), flags, BenchOptions)
    start_jax()
    if options.updates < 1:
        raise UserError(f"--updates must be at least 1, not {options.updates}.")
    with Screen():
        measure(experiment, options)
    return 0


def plan(args: Sequence[str]) -> int:
    """EXPERIMENT.py --on v5e-256"""
    from lab import topologies

    if not args or args[0].startswith("-"):
        raise UserError("Say what to plan: ./launch.sh plan experiments/gpt_small.py --on v5e-8")
    where = next((b for a, b in zip(args, [*args[1:], ""], strict=True) if a == "--on"), "")
    where = next((a.removeprefix("--on=") for a in args if a.startswith("--on=")), where)
    if not where and not {"-h", "--help"} & set(args):
        raise UserError(f"Say where it would run: --on NAME, which is one of {topologies.names()}.")
    os.environ.update(topologies.environment(topologies.find(where or "cpu:1")))  # before JAX starts
    from lab.plan_command import PlanOptions, show

    real = args if {"--full", "--local"} & set(args) else [*args, "--full"]
    experiment, options, _ = parse(find_experiment(args[0]), real[1:], PlanOptions)
    show(experiment, options)
    return 0


def report(args: Sequence[str]) -> int:
    """FOLDER... [--pool]"""
    import tyro

    from lab.study.report import report

    tyro.cli(report, args=list(args), prog="./launch.sh report",
             config=(tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalRequiredArgs))
    return 0


def _function(name: str, function: Callable[..., None], args: Sequence[str]) -> int:
    import tyro

    from lab.console import Screen

    @functools.wraps(function)  # tyro reads its arguments and their documentation
    def checked(*values: Any, **named: Any) -> None:
        start_jax()
        with Screen(stderr=True):
            function(*values, **named)

    tyro.cli(checked, args=list(args), prog=f"./launch.sh {name}", config=(tyro.conf.FlagCreatePairsOff,))
    return 0


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "sample": (sample, "RUN --prompt TEXT: continue a text with a trained model"),
    "eval": (evaluate, "RUN: evaluate a checkpoint and write the full report of its task"),
    "predict": (predict, "RUN --input FILE: predictions for new records, as CSV"),
    "report": (report, "STUDY_FOLDER...: statistics and pictures of studies again, or of several together"),
    "plan": (plan, "EXPERIMENT.py --on v5e-256: compile for a machine that is not here; memory, bound on time"),
    "bench": (bench, "EXPERIMENT.py: measure compilation, update, its parts, throughput, memory"),
}


def run(args: Sequence[str], processes: Processes) -> int:
    """Runs a command; returns the exit status."""
    check_words(args)
    args = expand_home(args)
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if args[0].endswith(".py"):
        return train(args, processes)
    if args[0] in COMMANDS:
        return COMMANDS[args[0]][0](args[1:])
    names = [*COMMANDS, "tests", "prepare", "env", *experiments()]
    near = difflib.get_close_matches(args[0], names, n=1) or [n for n in names if args[0] in n][:1]
    raise UserError(f"There is no command {args[0]!r}." + (f" Perhaps you meant {near[0]}." if near else
                                                           " ./launch.sh --help lists them."))


def main(args: Sequence[str]) -> int:
    """Runs a command; returns the exit status: 2 for what a person can fix, said in a sentence or two.

    With several processes all of them end when one does, with its status, and process 0 says why.
    """
    from lab.distributed import ALONE, start

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax and TFDS think aloud, and raise what matters
    processes = ALONE
    try:
        if "--processes" in args:
            from lab.local import start_processes

            return start_processes(args)
        if args and (args[0].endswith(".py") or args[0] == "bench"):
            processes = start()
        status = run(args, processes)
        processes.close()
        return status
    except BaseException as e:
        explained = explain(e)
        if explained is None:
            processes.leave_by(e)
            raise
        status, sentence = explained
    if sentence and processes.first:  # process 0 says what it hears from the others
        print(f"error: {sentence}", file=sys.stderr)
    processes.leave(status, sentence)
    return status


if __name__ == "__main__":
    from lab.study.workers import pin

    pin()
    sys.exit(signals.done(main(sys.argv[1:])))
