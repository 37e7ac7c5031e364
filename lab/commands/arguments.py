"""Parses a command line into an experiment and the command's options: file, real or local config, overrides."""

from __future__ import annotations

import ast
import functools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lab.errors import UserError, nearest
from lab.files import ROOT
from lab.parallel.backend import start_jax

if TYPE_CHECKING:  # imports of JAX (3 s) stay in the commands that need it
    from lab.experiment import Experiment
    from lab.study.design.arms import Study


def experiments() -> dict[str, str]:
    """File name -> first line of its docstring. Imports no experiment."""
    found = {}
    for path in sorted((ROOT / "experiments").glob("*.py")):
        try:
            doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        except SyntaxError as e:
            doc = f"(line {e.lineno}: {e.msg})"
        found[f"experiments/{path.name}"] = doc.partition("\n")[0]
    return found


def with_example(args: Sequence[str]) -> Sequence[str]:
    """The arguments, after an experiment whose --help is shown if they begin with it and name none."""
    return ["experiments/gpt_small.py", *args] if {"-h", "--help"} & set(args[:1]) else args


def find_experiment(name: str) -> Path:
    """The file of an experiment, relative to the current folder or the repository. Raises UserError with the nearest
    name."""
    for path in (Path(name), ROOT / name, ROOT / "experiments" / Path(name).name):
        if path.is_file():
            return path.resolve()
    others = nearest(f"experiments/{Path(name).name}", experiments(), f" There are {', '.join(experiments())}.", 0.75)
    raise UserError(f"There is no experiment {name}.{others}")


def check_run_dir(run_dir: str | None) -> None:
    """Raises UserError if the run folder is a bucket."""
    if "://" in (run_dir or ""):
        raise UserError("--run-dir is a folder on the machine of process 0; checkpoints may go to a bucket: "
                        "--checkpoint-dir gs://...")


def choose_config(module: Any, args: Sequence[str]) -> tuple[Experiment | Study, str]:
    """The experiment or study of a file, or its `local` config; and a line that tells which and why."""
    local = getattr(module, "local", None)
    real = module.study if hasattr(module, "study") else module.experiment
    if hasattr(module, "study") and local is not None and not hasattr(local, "arms"):
        raise UserError("Where a file has a `study`, its `local` must be a Study, too.")
    if "--full" in args and "--local" in args:
        raise UserError("--full and --local exclude each other.")
    if "--full" in args or local is None:
        return real, ""
    if "--local" in args:
        return local, "Running the local config (--local)."
    platform = os.environ.get("LAB_PLATFORM") or start_jax()
    if platform == "cpu":
        return local, "No accelerator found: running the local config (--full forces the real experiment)."
    return real, ""


def parse(path: Path, args: Sequence[str], options: type, module: Any = None,
          verb: str = "") -> tuple[Experiment, Any, Path]:
    """The experiment with overrides (or the base experiment of a study), the command's options, and the file.

    `module`: the file's module, if already loaded. `verb`: the word before the file on the command line.
    """
    import tyro

    from lab.configuration.field_types import check_types
    from lab.train.experiment_file import load

    module = module or load(path)
    default, line = choose_config(module, args)
    default = getattr(default, "base", default)
    check_types(default)  # clearer messages than tyro's
    if line:
        print(line, flush=True)
    flat = tyro.conf.arg(name="")
    command_type = make_dataclass("Command", [("experiment", Annotated[type(default), flat]),
                                              ("options", Annotated[options, flat])])
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    with warnings.catch_warnings(action="ignore"):  # validate() reports fields of the wrong type
        command = tyro.cli(command_type, args=list(args), default=command_type(default, options()),
                           prog=" ".join(["./launch.sh", *filter(None, [verb]), str(shown)]),
                           description=module.__doc__, config=(tyro.conf.AvoidSubcommands,))
    for flag, value in unchanged(args, default, command.experiment):
        print(f"Note: {flag} is already {value}: no effect.", flush=True)
    command.experiment.validate()
    study = hasattr(module, "study") or hasattr(command.options, "vary")  # the arms may have other tokenizers
    return command.experiment if study else command.experiment.filled(), command.options, path


def unchanged(args: Sequence[str], before: Any, after: Any) -> list[tuple[str, Any]]:
    """The overrides that have no effect: (flag, value)."""
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
    """Sentinel for a missing attribute."""


def call(name: str, function: Callable[..., int | None], args: Sequence[str]) -> int:
    """Runs `function` as the command `name`: its parameters are the flags, its docstring is the help text. Returns the
    exit status: what it returns, or 0."""
    import tyro

    from lab.train.console import Screen

    @functools.wraps(function)  # tyro reads its signature and docstring
    def checked(*values: Any, **named: Any) -> int | None:
        start_jax()
        with Screen(stderr=True):
            return function(*values, **named)

    return tyro.cli(checked, args=list(args), prog=f"./launch.sh {name}", config=(tyro.conf.FlagCreatePairsOff,)) or 0
