"""Builds a Python environment once, in the folder `.venvs/<extras>-py311-<hash>`. Standard library only.

The hash covers everything that determines the contents. A folder with an `ok` file never changes, so running jobs are
safe; an edited pyproject.toml gets a new folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from lab import signals
from lab.environment.accelerator import CACHE, PLATFORMS, SetupError, digest

ROOT = Path(__file__).resolve().parents[2]
BASE_PYTHON = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
# Imported at the end of a build, to test the environment and to write bytecode. With PYTHONDONTWRITEBYTECODE set, as in
# many containers, every start would otherwise take 3 s longer.
WARM_UP = "import jax, flax.linen, optax, orbax.checkpoint, tensorflow_datasets, tyro, rich.console, matplotlib.pyplot"


def say(text: str) -> None:
    """Prints a line to stderr, since stdout belongs to the command."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


class EnvironmentPlan(NamedTuple):
    """An environment's name and contents, for uv."""

    name: str
    packages: list[str]
    warm_up: str
    reason: str


def plan_environment(extras: list[str], reason: str) -> EnvironmentPlan:
    """Plans an environment with the project's dependencies and these extras (the accelerator first)."""
    pyproject, constraints = ROOT / "pyproject.toml", ROOT / "constraints.txt"
    packages = ["-r", str(pyproject), "-c", str(constraints)]
    for extra in extras:
        packages += ["--extra", extra]
    name = environment_name(extras, pyproject.read_bytes(), constraints.read_bytes())
    return EnvironmentPlan(name, packages, WARM_UP, reason)


def environment_name(labels: list[str], *contents: str | bytes) -> str:
    """A folder name with a hash of everything that determines an environment."""
    # Includes the base Python's path, since the environment's `python` links to it.
    machine = getattr(sys.implementation, "_multiarch", sys.platform) + os.uname().machine
    key = digest(*contents, sys.version, BASE_PYTHON, machine)
    version = f"py{sys.version_info.major}{sys.version_info.minor}"
    return "-".join([*labels, version, key])


def asked_extras(environ: Mapping[str, str], needed: Sequence[str] = ()) -> list[str]:
    """The extras in LAB_EXTRAS, checked against pyproject.toml, and those that the command needs."""
    names = sorted({*re.findall(r"[^,\s]+", environ.get("LAB_EXTRAS", "")), *needed})
    if names:
        import tomllib  # saves 10 ms on most starts

        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        known = sorted(set(project["optional-dependencies"]) - set(PLATFORMS))
        for name in names:
            if name not in known:
                raise SetupError(f"LAB_EXTRAS names {name}, which is not one of {', '.join(known)}.")
    return names


def stores() -> list[Path]:
    """Candidate folders for environments, best first."""
    if named := os.environ.get("LAB_ENVS"):
        return [Path(named).absolute()]
    return [ROOT / ".venvs", CACHE / "venvs"]


def finished(folder: Path) -> bool:
    """Whether an environment was built completely and its Python still exists."""
    # `python` is a symbolic link: it dangles if the base Python was removed.
    return (folder / "ok").exists() and (folder / "bin/python").exists()


def ensure(plan: EnvironmentPlan) -> Path:
    """The folder of this environment; builds it if needed."""
    for store in stores():
        if finished(store / plan.name):    # the usual case needs no lock and no uv
            return store / plan.name
    signals.heed()
    for store in stores():
        try:
            store.mkdir(parents=True, exist_ok=True)
            lock = open(store / "lock", "a", encoding="utf-8")    # noqa: SIM115 (closed by the `with` below)
        except OSError:
            continue
        with lock:
            if store != stores()[0]:
                say(f"{stores()[0]} cannot be written; environments go to {store} instead.")
            wait_for(lock)
            if not finished(store / plan.name):    # another process may have built it meanwhile
                build(store / plan.name, plan, lock.fileno())
        return store / plan.name
    raise SetupError(
        f"cannot write to {' or '.join(map(str, stores()))}; set LAB_ENVS to a folder for the environments."
    )


def wait_for(lock: IO[str]) -> None:
    """Takes the lock. The kernel releases it if its holder dies."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another process is building an environment; waiting for it.")
        fcntl.flock(lock, fcntl.LOCK_EX)


def build(folder: Path, plan: EnvironmentPlan, lock: int) -> None:
    """Builds an environment in `folder`; writing `ok` marks it finished."""
    say(f"{plan.reason}; building the environment {folder.name} (once) ...")
    began = time.monotonic()
    uv, environ = find_uv(folder.parent, lock), uv_environ()
    try:
        # Remove what a killed build left. Delete `ok` first, in case the removal is interrupted too.
        (folder / "ok").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        command([uv, "venv", "--python", BASE_PYTHON, str(folder)], environ, lock)
        python = str(folder / "bin/python")
        command([uv, "pip", "install", "--python", python, *plan.packages], environ, lock)
        environ = {**environ, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": ""}
        command([python, "-I", "-c", plan.warm_up], environ, lock, "it does not start")
        (folder / "ok").write_text(f"{plan.reason}\n", "utf-8")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if not os.environ.get("PYTHON"):    # a Python set for one call must not become the default
        (folder.parent / "python").write_text(f"{BASE_PYTHON}\n", "utf-8")
    say(f"environment built in {time.monotonic() - began:.1f} s.")


NEEDS_NETWORK = ("it needs a package registry, once; where there is no network, point LAB_ENVS to a folder with "
                 "environments built on a machine of this kind")


def command(arguments: list[str], environ: Mapping[str, str], lock: int, trouble: str = NEEDS_NETWORK) -> None:
    """Runs one build command; shows downloads on a terminal, and on failure raises with its last lines.

    The command inherits the lock: if this process is killed, the orphan holds the lock until it ends.
    """
    last: deque[str] = deque(maxlen=6)
    terminal = sys.stderr.isatty()
    try:
        process = subprocess.Popen(
            arguments, env=environ, cwd=ROOT, pass_fds=[lock], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace")
    except OSError as error:
        raise SetupError(f"cannot run {arguments[0]} ({error.strerror}).") from None
    with process:
        try:
            for line in process.stderr:
                if "Retrying" not in line:
                    last.append(line.rstrip())
                if terminal and "ownload" in line:
                    print(f"\r\033[K  {line.strip()[:70]}", end="", file=sys.stderr, flush=True)
        except BaseException:
            process.kill()    # it must not write to a folder being removed
            raise
    if terminal:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    if process.returncode:
        if any("No space left" in line or "os error 28" in line for line in last):
            trouble = "the disk is full; free some space, or point LAB_ENVS to a folder on another one"
        lines = "\n".join(f"    {line}" for line in last)
        raise SetupError(f"could not build the environment: {trouble}. {Path(arguments[0]).name} said:\n{lines}")


def find_uv(store: Path, lock: int) -> str:
    """LAB_UV, a recent uv on PATH, or one that pip installs into the store."""
    if named := os.environ.get("LAB_UV"):
        return named
    if found := shutil.which("uv"):
        with contextlib.suppress(OSError):    # a pyenv shim may exist but fail
            version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
            numbers = re.match(r"uv (\d+)\.(\d+)", version)
            if numbers and (int(numbers[1]), int(numbers[2])) >= (0, 8):
                return found
    folder = store / "uv"
    if not (folder / "ok").exists():
        shutil.rmtree(folder, ignore_errors=True)
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv>=0.8"]
        if subprocess.run([BASE_PYTHON, "-c", "import pip"], capture_output=True).returncode == 0:
            # --target needs no virtual environment and no write access to this Python.
            command([BASE_PYTHON, *install, "--target", str(folder)], os.environ, lock)
        elif subprocess.run([BASE_PYTHON, "-c", "import ensurepip"], capture_output=True).returncode == 0:
            command([BASE_PYTHON, "-m", "venv", str(folder)], os.environ, lock)
            command([str(folder / "bin/python"), *install], os.environ, lock)
        else:
            raise SetupError(f"{BASE_PYTHON} has neither pip nor venv; install python3-venv or uv, or set LAB_UV.")
        (folder / "ok").touch()
    return str(folder / "bin/uv")


def uv_environ() -> dict[str, str]:
    """Variables for uv. Passes on pip's package indexes, because uv does not read pip's settings."""
    misleading = {"VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHONHOME"}    # they point to another environment
    environ = {name: value for name, value in os.environ.items() if name not in misleading}
    environ.setdefault("UV_SYSTEM_CERTS", "1")    # accept a company proxy's certificates
    environ.setdefault("UV_PYTHON_DOWNLOADS", "never")
    pip = pip_settings()
    for setting, variable, separator in (
            ("index-url", "UV_DEFAULT_INDEX", " "), ("extra-index-url", "UV_INDEX", " "),
            ("find-links", "UV_FIND_LINKS", ","), ("trusted-host", "UV_INSECURE_HOST", " "),
            ("cert", "SSL_CERT_FILE", " ")):
        if value := separator.join(pip.get(setting, "").split()):
            environ.setdefault(variable, value)
    if "extra-index-url" in pip:    # as pip does; uv stops at the first index by default
        environ.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    return environ


def pip_settings() -> dict[str, str]:
    """pip's settings: those from its files (`pip config list`), overridden by PIP_* variables."""
    listing = subprocess.run([BASE_PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    settings = {}
    for section in ("global", "install"):    # in pip's order: the later section wins
        for name, value in re.findall(rf"^{section}\.([\w-]+)='(.*)'$", listing, re.MULTILINE):
            settings[name] = value.replace("\\n", " ")
    for name, value in os.environ.items():
        if name.startswith("PIP_"):
            settings[name[4:].lower().replace("_", "-")] = value
    return settings
