"""Builds the Python environment once, chooses the accelerator, and starts `python -m lab "$@"` in it.

Standard library only, and run by path, so that it works before anything is installed. lab/environment does the work.

Variables: LAB_ACCELERATOR (cpu, cuda12, cuda13, tpu), LAB_EXTRAS (such as tensorboard,plan), LAB_ENVS (folder of
the environments), LAB_UV (a uv executable), PYTHON (the base Python), LAB_PYTHON or LAB_ENV=active (use an existing
environment, see lab/environment/existing.py).
"""

# ruff: noqa: E402
from __future__ import annotations

import _signal

if __name__ == "__main__":    # blocked until `lab.signals` handles them: none is lost or shows a traceback
    _signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGINT, _signal.SIGTERM, _signal.SIGUSR1, _signal.SIGUSR2,
                                                _signal.SIGXCPU, _signal.SIGHUP})

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from lab import signals
from lab.environment import existing
from lab.environment.accelerator import Choice, SetupError, choose_accelerator
from lab.environment.build import (
    BASE_PYTHON,
    EnvironmentPlan,
    asked_extras,
    ensure,
    environment_name,
    plan_environment,
    say,
)
from lab.environment.variables import built_environ, check_flags, process_environ

QUICK = "not (slow or processes or clusters or tpu_compile)"    # the marks of tests/conftest.py
LAUNCHERS = ("--slurm", "--hosts", "--tpu", "--sky")    # handled by lab/launch
# TensorFlow prepares data sets in a separate environment, so that the training environment stays free of it.
PREPARE = ("tensorflow-cpu>=2.20; sys_platform == 'linux' and platform_machine == 'x86_64'",
           "tensorflow>=2.20; sys_platform != 'linux' or platform_machine != 'x86_64'",
           "tensorflow-datasets>=4.9.9", "importlib_resources")


def describe(folder: Path, choice: Choice) -> str:
    """The output of `./launch.sh env`."""
    installed = folder.glob("lib/python*/site-packages/jax-*.dist-info")
    jax = next((path.stem.removeprefix("jax-") for path in installed), "unknown")
    return (f"environment  {folder}\naccelerator  {choice.accelerator} ({choice.reason})\n"
            f"python       {sys.version.split()[0]} ({BASE_PYTHON})\njax          {jax}")


def chosen_tests(words: list[str]) -> list[str]:
    """pytest's arguments: the quick tests, unless --all or what is named (a path, -k, -m) chooses others."""
    if "--all" in words:
        return [word for word in words if word != "--all"]
    named = any(not word.startswith("-") or word.startswith(("-k", "-m")) for word in words)
    return words if named else ["-m", QUICK, *words]


def to_onnx(words: list[str]) -> bool:
    """Whether `export` writes an ONNX file, which needs packages that nothing else does."""
    to = [b for a, b in zip(words, words[1:], strict=False) if a == "--to"]
    to += [word.removeprefix("--to=") for word in words if word.startswith("--to=")]
    return any(word == "onnx" or word.endswith(".onnx") for word in to)


def main(arguments: list[str]) -> None:
    """Finds or builds the environment, then executes the command in it (exec)."""
    verb, rest = (arguments or [""])[0], arguments[1:]
    if verb in ("tests", "ruff", "env", "prepare") or verb.partition("=")[0] in LAUNCHERS:
        signals.heed()
    if verb.partition("=")[0] in LAUNCHERS:    # remote launchers need no environment here
        from lab.launch import start

        sys.exit(start.main(arguments))
    if verb == "prepare":
        script = str(ROOT / "lab/data/prepare.py")
        if not rest or {"-h", "--help"} & set(rest):    # help needs no TensorFlow
            os.execv(BASE_PYTHON, [BASE_PYTHON, "-I", script, *rest])
        name = environment_name(["prepare"], *PREPARE)
        folder = ensure(
            EnvironmentPlan(name, list(PREPARE), "import tensorflow_datasets", "preparing data needs TensorFlow")
        )
        os.execv(folder / "bin/python", [str(folder / "bin/python"), "-I", script, *rest])

    choice = choose_accelerator(os.environ)
    if python := existing.find(os.environ):
        pyproject = ROOT / "pyproject.toml"
        found = existing.check(python, verb, pyproject, process_environ(os.environ, choice.accelerator))
        choice = existing.accelerator_there(choice, found, python)
        environ = process_environ(os.environ, choice.accelerator)
        shown = existing.describe(python, choice, found, pyproject)
    else:
        extras = [choice.accelerator, *(["test"] if verb in ("tests", "ruff") else []),
                  *asked_extras(os.environ, ["onnx"] if verb == "export" and to_onnx(rest) else [])]
        folder = ensure(plan_environment(extras, f"accelerator {choice.accelerator}: {choice.reason}"))
        python, shown = str(folder / "bin/python"), describe(folder, choice)
        environ = built_environ(os.environ, folder, choice.accelerator)
    if verb == "env":
        print(python if rest == ["--python"] else shown)
        return
    # -P keeps the current folder off sys.path, where a user's random.py would shadow a module.
    words = [python, "-P", "-m", "lab", *arguments]
    if verb == "tests":
        os.chdir(ROOT)    # so that paths such as tests/test_step.py mean the same from everywhere
        words = [python, "-P", "-m", "pytest", *chosen_tests(rest)]
    elif verb == "ruff":
        words = [python, "-P", "-m", "ruff", *rest]
    else:
        if os.environ.get("XLA_FLAGS"):
            check_flags(python, environ)
        signals.hold()    # until lab handles them
    os.execve(words[0], words, environ)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (SetupError, OSError) as error:
        say(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        say("stopped.")
        sys.exit(130)
