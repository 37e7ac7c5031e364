"""Uses an existing environment instead of building one: `LAB_PYTHON=/path/to/python`, or `LAB_ENV=active` for the
activated one. For NVIDIA's JAX containers, Colab, TPU VM images, machines without a network.

Builds and changes nothing. Standard library only, see bootstrap.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path

from lab.environment.accelerator import PLATFORMS, Choice, SetupError

# Imported by every command. Other dependencies are imported on use, with an error if missing.
REQUIRED = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "tyro")
FOR_VERB = {"tests": ("pytest", "pytest-xdist"), "ruff": ("ruff",)}
BACKENDS = {"cuda13": "jax-cuda13-plugin", "cuda12": "jax-cuda12-plugin", "tpu": "libtpu"}
PROBE = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps([list(sys.version_info[:3]), found]))
"""


def find(environ: Mapping[str, str]) -> str | None:
    """The Python selected by the variables; None if they are not set.

    Raises:
      SetupError: that Python does not exist.
    """
    if named := environ.get("LAB_PYTHON"):
        if found := shutil.which(os.path.expanduser(named)):
            return os.path.abspath(found)
        raise SetupError(f"LAB_PYTHON={named} is not a program that can be run.")
    if (wish := environ.get("LAB_ENV", "")) not in ("", "active"):
        raise SetupError(f"LAB_ENV={wish} is not known: LAB_ENV=active uses the activated environment.")
    if not wish:
        return None
    folders = [environ[name] for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if environ.get(name)]
    places = [os.path.join(folder, "bin") for folder in folders] + [environ.get("PATH", os.defpath)]
    for name in ("python3", "python"):
        if found := shutil.which(name, path=os.pathsep.join(places)):
            return os.path.abspath(found)
    raise SetupError("LAB_ENV=active: no environment is active, and there is no python3 on PATH.")


def check(python: str, verb: str, pyproject: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Installed versions of the project's dependencies and JAX's backends.

    Raises:
      SetupError: lab does not support this Python, or a package that the command needs is missing or has a wrong
        version; the message has the command to install it.
    """
    project, ranges = tomllib.loads(pyproject.read_text("utf-8"))["project"], dependencies(pyproject)
    needed = [*REQUIRED, *FOR_VERB.get(verb, ())]
    words = [python, "-P", "-c", PROBE, *ranges, *needed, *BACKENDS.values()]
    done = subprocess.run(words, env=dict(environ), capture_output=True, text=True)
    if done.returncode:
        raise SetupError(
            f"{python} does not run as a Python of 3.11 or newer: {(done.stderr.strip() or 'no reason')[-200:]}"
        )
    version, found = json.loads(done.stdout)
    if not satisfies(".".join(map(str, version)), project["requires-python"]):
        raise SetupError(f"{python} is Python {'.'.join(map(str, version))}; lab needs {project['requires-python']}.")
    wrong = [name for name in needed if name not in found or not satisfies(found[name], ranges.get(name, ""))]
    if wrong:
        wanted = " ".join(f"'{name}{ranges.get(name, '')}'" for name in wrong)
        has = ", ".join(f"{name} {found[name]}" if name in found else f"no {name}" for name in wrong)
        raise SetupError(f"the environment of {python} has {has}. Install it there: {python} -m pip install {wanted}")
    return found


def dependencies(pyproject: Path) -> dict[str, str]:
    """The project's dependencies and their version ranges."""
    entries = tomllib.loads(pyproject.read_text("utf-8"))["project"]["dependencies"]
    return dict(re.match(r"([\w-]+)([^\s;]*)", entry).groups() for entry in entries)


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version is in a range such as ">=0.10,<0.13". Compares release numbers only."""
    def numbers(text: str) -> list[int]:
        return [int(n) for n in re.match(r"[\d.]*", text)[0].split(".") if n]

    for operator, bound in re.findall(r"(>=|<)\s*([\d.]+)", wanted):
        if (numbers(version) >= numbers(bound)) != (operator == ">="):
            return False
    return True


def accelerator_there(choice: Choice, found: Mapping[str, str], python: str) -> Choice:
    """The environment's build of JAX for the machine's accelerator (`choice`).

    Raises:
      SetupError: there is none, and JAX would fall back to the CPU.
    """
    platform = PLATFORMS[choice.accelerator]
    for accelerator, package in BACKENDS.items():
        if package in found and PLATFORMS[accelerator] == platform:
            return Choice(accelerator, f"{choice.reason}; {package} {found[package]} is installed")
    if platform == "cpu":
        return choice
    raise SetupError(f"this machine has an accelerator ({choice.reason}), and {python} no {choice.accelerator}. "
               f"Install it: {python} -m pip install 'jax[{choice.accelerator}]', or do without: LAB_ACCELERATOR=cpu.")


def describe(python: str, choice: Choice, found: Mapping[str, str], pyproject: Path) -> str:
    """The text that `./launch.sh env` prints."""
    backends = set(BACKENDS.values())
    versions = ", ".join(f"{name} {version}" for name, version in sorted(found.items()) if name not in backends)
    lines = [f"environment  {python} (nothing is built)", f"accelerator  {choice.accelerator} ({choice.reason})",
             f"packages     {versions}"]
    if missing := [name for name in dependencies(pyproject) if name not in found]:
        lines.append(f"not there    {', '.join(missing)} (a command that needs one of them says so)")
    return "\n".join(lines)
