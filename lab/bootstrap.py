"""Builds the Python environment once, chooses the accelerator, and starts `python -m lab "$@"` in it.

Standard library only, and run by path: it works before anything is installed. An environment is a folder
`.venvs/<extras>-py311-<hash>`, where the hash covers everything that decides its contents; it is never changed once
its `ok` file exists, so running jobs are safe and an edited pyproject.toml simply gets another folder.

Variables: LAB_ACCELERATOR (cpu, cuda12, cuda13, tpu), LAB_EXTRAS (such as tiktoken,tensorboard), LAB_ENVS (folder for
the environments), LAB_UV (a uv executable), PYTHON (the Python to build on), LAB_PYTHON or LAB_ENV=active (an
environment that is there already, see existing.py).
"""

# ruff: noqa: E402
from __future__ import annotations

import _signal

if __name__ == "__main__":    # held back until something hears them: no signal is lost, and none shows a traceback
    _signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGINT, _signal.SIGTERM, _signal.SIGUSR1, _signal.SIGHUP})

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from lab import existing, signals
from lab.accelerator import CACHE, PLATFORMS, Choice, Stop, choose_accelerator, digest

BASE_PYTHON = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
LAUNCHERS = ("--slurm", "--hosts", "--tpu", "--sky")    # handled by lab/launch
# Data sets are prepared with TensorFlow, in an environment of their own: it must never enter the one we train in.
PREPARE = ("tensorflow-cpu>=2.20; sys_platform == 'linux' and platform_machine == 'x86_64'",
           "tensorflow>=2.20; sys_platform != 'linux' or platform_machine != 'x86_64'",
           "tensorflow-datasets>=4.9.9", "importlib_resources")
# Imported once at the end of a build. It proves that the environment starts, and writes the bytecode of what is used:
# where PYTHONDONTWRITEBYTECODE is set, as in many containers, every start would otherwise take 3 s longer.
WARM_UP = "import jax, flax.linen, optax, orbax.checkpoint, tensorflow_datasets, tyro, rich.console, matplotlib.pyplot"


def say(text: str) -> None:
    """One line for a person, on stderr: stdout belongs to the command that follows."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


# --- the environment ---------------------------------------------------------------------------------------------

class Plan(NamedTuple):
    """What an environment is called and what uv is told to put into it."""

    name: str
    packages: list[str]
    warm_up: str
    reason: str


def plan_environment(extras: list[str], reason: str) -> Plan:
    """The environment with the project's dependencies and these extras (the accelerator first)."""
    pyproject, constraints = ROOT / "pyproject.toml", ROOT / "constraints.txt"
    packages = ["-r", str(pyproject), "-c", str(constraints)]
    for extra in extras:
        packages += ["--extra", extra]
    name = environment_name(extras, pyproject.read_bytes(), constraints.read_bytes())
    return Plan(name, packages, WARM_UP, reason)


def environment_name(labels: list[str], *contents: str | bytes) -> str:
    """A folder name that changes with everything that an environment is made of."""
    # The path of the base Python is part of the hash, since the environment's `python` is a link to it.
    machine = getattr(sys.implementation, "_multiarch", sys.platform) + os.uname().machine
    key = digest(*contents, sys.version, BASE_PYTHON, machine)
    version = f"py{sys.version_info.major}{sys.version_info.minor}"
    return "-".join([*labels, version, key])


def asked_extras(environ: Mapping[str, str]) -> list[str]:
    """The extras named in LAB_EXTRAS, checked against pyproject.toml."""
    names = sorted(set(re.findall(r"[^,\s]+", environ.get("LAB_EXTRAS", ""))))
    if names:
        import tomllib  # 10 ms that most starts need not pay

        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        known = sorted(set(project["optional-dependencies"]) - set(PLATFORMS))
        for name in names:
            if name not in known:
                raise Stop(f"LAB_EXTRAS names {name}, which is not one of {', '.join(known)}.")
    return names


def stores() -> list[Path]:
    """Folders that may hold environments, best first."""
    if named := os.environ.get("LAB_ENVS"):
        return [Path(named).absolute()]
    return [ROOT / ".venvs", CACHE / "venvs"]


def finished(folder: Path) -> bool:
    """Whether an environment was built to its end and its Python is still there."""
    # `python` is a link: it dangles when the Python it was built on has been removed.
    return (folder / "ok").exists() and (folder / "bin/python").exists()


def ensure(plan: Plan) -> Path:
    """The folder of this environment, which is built first if there is no finished one."""
    for store in stores():
        if finished(store / plan.name):    # the usual case: no lock, no uv, no message
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
            if not finished(store / plan.name):    # another process may have built it while this one waited
                build(store / plan.name, plan, lock.fileno())
        return store / plan.name
    raise Stop(f"cannot write to {' or '.join(map(str, stores()))}; set LAB_ENVS to a folder for the environments.")


def wait_for(lock: IO[str]) -> None:
    """Take the lock. The kernel drops it when its holder dies, whatever the cause."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another process is building an environment; waiting for it.")
        fcntl.flock(lock, fcntl.LOCK_EX)


def build(folder: Path, plan: Plan, lock: int) -> None:
    """Builds an environment in `folder`; it counts only once `ok` is in it."""
    say(f"{plan.reason}; building the environment {folder.name} (once) ...")
    began = time.monotonic()
    uv, environ = find_uv(folder.parent, lock), uv_environ()
    try:
        # What a killed build left. `ok` goes first, so that a removal that is itself killed cannot pass for finished.
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
    if not os.environ.get("PYTHON"):    # a Python named for one call does not become the default
        (folder.parent / "python").write_text(f"{BASE_PYTHON}\n", "utf-8")
    say(f"environment built in {time.monotonic() - began:.1f} s.")


NEEDS_NETWORK = ("it needs a package registry, once; where there is no network, point LAB_ENVS to a folder with "
                 "environments built on a machine of this kind")


def command(arguments: list[str], environ: Mapping[str, str], lock: int, trouble: str = NEEDS_NETWORK) -> None:
    """Run one build command; on a terminal its downloads are shown, on failure its last lines are the message.

    The command inherits the lock: if this process is killed, its orphan keeps others out until it has ended too.
    """
    last: deque[str] = deque(maxlen=6)
    terminal = sys.stderr.isatty()
    try:
        process = subprocess.Popen(
            arguments, env=environ, cwd=ROOT, pass_fds=[lock], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace")
    except OSError as error:
        raise Stop(f"cannot run {arguments[0]} ({error.strerror}).") from None
    with process:
        try:
            for line in process.stderr:
                if "Retrying" not in line:
                    last.append(line.rstrip())
                if terminal and "ownload" in line:
                    print(f"\r\033[K  {line.strip()[:70]}", end="", file=sys.stderr, flush=True)
        except BaseException:
            process.kill()    # else it would go on writing into a folder that is being removed
            raise
    if terminal:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    if process.returncode:
        if any("No space left" in line or "os error 28" in line for line in last):
            trouble = "the disk is full; free some space, or point LAB_ENVS to a folder on another one"
        lines = "\n".join(f"    {line}" for line in last)
        raise Stop(f"could not build the environment: {trouble}. {Path(arguments[0]).name} said:\n{lines}")


def find_uv(store: Path, lock: int) -> str:
    """LAB_UV, a recent uv on PATH, or one that pip installs into the store."""
    if named := os.environ.get("LAB_UV"):
        return named
    if found := shutil.which("uv"):
        with contextlib.suppress(OSError):    # a pyenv shim may be there and not run
            version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
            numbers = re.match(r"uv (\d+)\.(\d+)", version)
            if numbers and (int(numbers[1]), int(numbers[2])) >= (0, 8):
                return found
    folder = store / "uv"
    if not (folder / "ok").exists():
        shutil.rmtree(folder, ignore_errors=True)
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv>=0.8"]
        if subprocess.run([BASE_PYTHON, "-c", "import pip"], capture_output=True).returncode == 0:
            # --target needs neither a virtual environment nor the right to change this Python.
            command([BASE_PYTHON, *install, "--target", str(folder)], os.environ, lock)
        elif subprocess.run([BASE_PYTHON, "-c", "import ensurepip"], capture_output=True).returncode == 0:
            command([BASE_PYTHON, "-m", "venv", str(folder)], os.environ, lock)
            command([str(folder / "bin/python"), *install], os.environ, lock)
        else:
            raise Stop(f"{BASE_PYTHON} has neither pip nor venv; install python3-venv or uv, or set LAB_UV.")
        (folder / "ok").touch()
    return str(folder / "bin/uv")


def uv_environ() -> dict[str, str]:
    """Variables for uv: where pip would look for packages, uv looks too, although it does not read pip's settings."""
    misleading = {"VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHONHOME"}    # they name some other environment
    environ = {name: value for name, value in os.environ.items() if name not in misleading}
    environ.setdefault("UV_SYSTEM_CERTS", "1")    # certificates of a company's proxy, which pip and curl trust
    environ.setdefault("UV_PYTHON_DOWNLOADS", "never")
    pip = pip_settings()
    for setting, variable, separator in (
            ("index-url", "UV_DEFAULT_INDEX", " "), ("extra-index-url", "UV_INDEX", " "),
            ("find-links", "UV_FIND_LINKS", ","), ("trusted-host", "UV_INSECURE_HOST", " "),
            ("cert", "SSL_CERT_FILE", " ")):
        if value := separator.join(pip.get(setting, "").split()):
            environ.setdefault(variable, value)
    if "extra-index-url" in pip:    # pip takes the best version of all indexes, uv by default that of the first
        environ.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    return environ


def pip_settings() -> dict[str, str]:
    """pip's settings: from its files, as `pip config list` prints them, then from PIP_* variables."""
    listing = subprocess.run([BASE_PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    settings = {}
    for section in ("global", "install"):    # in pip's order: the later one wins
        for name, value in re.findall(rf"^{section}\.([\w-]+)='(.*)'$", listing, re.MULTILINE):
            settings[name] = value.replace("\\n", " ")
    for name, value in os.environ.items():
        if name.startswith("PIP_"):
            settings[name[4:].lower().replace("_", "-")] = value
    return settings


# --- the process -------------------------------------------------------------------------------------------------

def cpu_kind() -> str:
    """A short name for this kind of CPU, from the first entry of /proc/cpuinfo, and the cores that may be used."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [os.uname().machine, str(cores)]
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if not line.strip():
                break
            if line.startswith(("model name", "flags", "Features", "CPU part")):
                lines.append(line)
    return digest(*lines)


def built_environ(environ: Mapping[str, str], folder: Path, accelerator: str) -> dict[str, str]:
    """`process_environ` for an environment that was built here."""
    result = process_environ(environ, accelerator)
    result.pop("PYTHONHOME", None)    # it would send the environment's Python to another one's library
    # What PYTHONPATH holds comes last, see `lab.experiment.load`: nothing there may stand in for a module of ours.
    return result | {"VIRTUAL_ENV": str(folder), "PATH": f"{folder}/bin:{environ.get('PATH', os.defpath)}",
                     "PYTHONPATH": str(ROOT), "LAB_PYTHONPATH": environ.get("PYTHONPATH", "")}


def process_environ(environ: Mapping[str, str], accelerator: str) -> dict[str, str]:
    """The variables that must be set before the process starts. What the user has set stays as it is."""
    defaults = {
        "PYTHONPATH": str(ROOT),
        # Without it JAX falls back to the CPU with a warning when a GPU or TPU cannot be used.
        "JAX_PLATFORMS": {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}[PLATFORMS[accelerator]],
        # Compiled programs are kept, small and quick ones too: a study or a test run has hundreds of them. One folder
        # per kind of CPU, which JAX's key leaves out though a home folder may be shared by different machines, and per
        # number of cores: what was compiled on one takes 1.2 of the time on two.
        "JAX_COMPILATION_CACHE_DIR": str(CACHE / "xla" / cpu_kind()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # XLA's C++ log: errors only. Its warnings are notes to its developers.
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONUTF8": "1",    # files and streams are UTF-8, whatever the locale
    }
    first = environ.get("JAX_PLATFORMS", defaults["JAX_PLATFORMS"]).split(",")[0]
    # What was chosen, for lab to compare with what JAX really uses.
    defaults["LAB_PLATFORM"] = {"cuda": "gpu", "rocm": "gpu", "": PLATFORMS[accelerator]}.get(first, first)
    result = defaults | dict(environ)
    if "PYTHONPATH" in environ:
        result["PYTHONPATH"] = os.pathsep.join([str(ROOT), environ["PYTHONPATH"]])
    if defaults["LAB_PLATFORM"] != "cpu":
        return result
    # YNNPACK's convolutions use one thread. Without them mnist_cnn takes 27 ms an update instead of 47, a ResNet of
    # width 16 185 instead of 262, and toys 5-20 % more (2 cores, jax 0.10.2). Of the other flags tried (fast math,
    # oneDNN, vector width, fusion emitters, scheduler, XNNPACK graphs) none gained anything. Of a flag that is given
    # twice XLA takes the second, so the user's come last.
    ours = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
    result["XLA_FLAGS"] = f"{ours} {environ.get('XLA_FLAGS', '')}".strip()
    if sys.platform == "linux":
        # XLA's CPU programs allocate and free their temporaries at every step. glibc gives large blocks back to the
        # kernel, and faulting them in costs a quarter of the time. Read by malloc at process start, hence here.
        result = {
            "MALLOC_MMAP_MAX_": "0",    # large blocks come from the heap, not from mmap
            "MALLOC_TRIM_THRESHOLD_": str(2**40),    # the heap never shrinks
            "MALLOC_TOP_PAD_": "268435456",    # and grows by 256 MiB at a time
        } | result
    return result


def describe(folder: Path, choice: Choice) -> str:
    """What `./launch.sh env` prints."""
    installed = folder.glob("lib/python*/site-packages/jax-*.dist-info")
    jax = next((path.stem.removeprefix("jax-") for path in installed), "unknown")
    return (f"environment  {folder}\naccelerator  {choice.accelerator} ({choice.reason})\n"
            f"python       {sys.version.split()[0]} ({BASE_PYTHON})\njax          {jax}")


def main(arguments: list[str]) -> None:
    """Finds or builds the environment and becomes the command in it."""
    verb, rest = (arguments or [""])[0], arguments[1:]
    if verb in ("tests", "ruff", "env", "prepare") or verb.partition("=")[0] in LAUNCHERS:
        signals.heed()
    if verb.partition("=")[0] in LAUNCHERS:    # starting elsewhere needs no environment here
        from lab import launch

        sys.exit(launch.main(arguments))
    if verb == "prepare":
        script = str(ROOT / "lab/data/prepare.py")
        if not rest or {"-h", "--help"} & set(rest):    # answered without TensorFlow
            os.execv(BASE_PYTHON, [BASE_PYTHON, "-I", script, *rest])
        name = environment_name(["prepare"], *PREPARE)
        folder = ensure(Plan(name, list(PREPARE), "import tensorflow_datasets", "preparing data needs TensorFlow"))
        os.execv(folder / "bin/python", [str(folder / "bin/python"), "-I", script, *rest])

    choice = choose_accelerator(os.environ)
    if python := existing.find(os.environ):
        pyproject = ROOT / "pyproject.toml"
        found = existing.check(python, verb, pyproject, process_environ(os.environ, choice.accelerator))
        choice = existing.accelerator_there(choice, found, python)
        environ = process_environ(os.environ, choice.accelerator)
        shown = existing.describe(python, choice, found, pyproject)
    else:
        extras = [choice.accelerator, *(["test"] if verb in ("tests", "ruff") else []), *asked_extras(os.environ)]
        folder = ensure(plan_environment(extras, f"accelerator {choice.accelerator}: {choice.reason}"))
        python, shown = str(folder / "bin/python"), describe(folder, choice)
        environ = built_environ(os.environ, folder, choice.accelerator)
    if verb == "env":
        print(python if rest == ["--python"] else shown)
        return
    # -P keeps the current folder out of the search path: a user's random.py there must not shadow a module.
    words = [python, "-P", "-m", "lab", *arguments]
    if verb == "tests":
        os.chdir(ROOT)    # so that paths such as tests/test_step.py mean the same from everywhere
        words = [python, "-P", "-m", "pytest", *rest]
    elif verb == "ruff":
        words = [python, "-P", "-m", "ruff", *rest]
    else:
        signals.hold()    # until lab hears them itself
    os.execve(words[0], words, environ)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (Stop, OSError) as error:
        say(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
