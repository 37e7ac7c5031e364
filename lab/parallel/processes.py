"""Multi-process start-up for every launcher: detects the processes, starts `jax.distributed`, and synchronises them.

A launcher sets LAB_COORDINATOR (host:port of process 0), LAB_PROCESSES and LAB_PROCESS_ID. SLURM's srun, Open MPI's
mpirun, SkyPilot and TPU pods are detected. The port after the coordinator's is used, too. LAB_SECRET is the same random
text in all processes; without it they must share a home folder (lab/parallel/shared_secret.py).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lab import signals
from lab.errors import UserError
from lab.files import ROOT, make_folder
from lab.parallel.channel import TOLD, Channel, place

START_SECONDS = 120.0  # LAB_START_SECONDS: time limit for all processes to connect
SILENCE_SECONDS = 45.0  # LAB_SILENCE_SECONDS: time-out for a lost machine; a dead process is noticed at once


class Launch(NamedTuple):
    """The process layout, as set by a launcher."""

    launcher: str
    host: str
    port: int
    processes: int
    process: int
    local_devices: list[int] | None = None
    """The machine's GPUs that this process uses; None: all visible ones."""


def find_launch(environ: Mapping[str, str]) -> Launch | None:
    """The launch described by `environ`; None for a single process.

    Raises:
      UserError: LAB_COORDINATOR, LAB_PROCESSES and LAB_PROCESS_ID are inconsistent, or some of the launcher's own
        variables are missing.
    """
    if any(environ.get(name) for name in ("LAB_COORDINATOR", "LAB_PROCESSES", "LAB_PROCESS_ID")):
        return _explicit(environ)
    if _number(environ, "SKYPILOT_NUM_NODES") > 1:  # SkyPilot unsets SLURM's variables
        _need("SkyPilot", environ, "SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK")
        port = _number(environ, "JAX_COORDINATOR_PORT", 8476)
        return Launch("SkyPilot", environ["SKYPILOT_NODE_IPS"].split()[0], port,
                      _number(environ, "SKYPILOT_NUM_NODES"), _number(environ, "SKYPILOT_NODE_RANK", least=0))
    if "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ:
        # SLURM_NTASKS counts the allocation's tasks. A shell opened by srun in a larger allocation is a 1-task step.
        tasks = _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS"))
        if tasks > 1:
            _need("SLURM", environ, "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_LOCALID")
            return _detected("SLURM")._replace(processes=tasks, local_devices=_slurm_devices(environ))
    if _number(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        _need("Open MPI", environ, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_MCA_orte_hnp_uri")
        return _detected("Open MPI")
    several = environ.get("TPU_WORKER_HOSTNAMES", "").count(",") or environ.get("MEGASCALE_NUM_SLICES")
    platform = environ.get("LAB_PLATFORM")  # on other platforms TPU variables are leftovers
    if platform == "tpu" or (several and not platform):
        found = _detected("TPU pod")
        return found if found and found.processes > 1 else None
    return None


def _number(environ: Mapping[str, str], name: str, default: int = 1, least: int = 1) -> int:
    """The integer in a variable, `default` if unset. Raises UserError if it is not an integer >= `least`."""
    text = environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}={text} must be a number of at least {least}. {_ALONE.format(name)}")
    return int(text)


def _need(launcher: str, environ: Mapping[str, str], *names: str) -> None:
    """Raises UserError if a multi-process launcher left any of the variables `names` unset."""
    if missing := [name for name in names if not environ.get(name)]:
        set_here = ", ".join(sorted(n for n in environ if n.startswith(names[0].partition("_")[0] + "_")))
        raise UserError(f"{launcher} seems to have started several processes, but {' and '.join(missing)} "
                        f"{'is' if len(missing) == 1 else 'are'} not set (there are {set_here}). "
                        f"{_ALONE.format('them')}")


# Advice for inconsistent variables.
_ALONE = ("If several processes were started, set LAB_COORDINATOR, LAB_PROCESSES and LAB_PROCESS_ID in each; if this "
          "one is alone, unset {}.")


def _explicit(environ: Mapping[str, str]) -> Launch | None:
    try:
        host, _, port = environ["LAB_COORDINATOR"].rpartition(":")
        found = Launch("LAB_COORDINATOR", host.strip("[]"), int(port), int(environ["LAB_PROCESSES"]),
                       int(environ["LAB_PROCESS_ID"]))
    except (KeyError, ValueError):
        raise UserError("Several processes need LAB_COORDINATOR=HOST:PORT of process 0, LAB_PROCESSES=N and "
                        "LAB_PROCESS_ID=0 ... N-1, all three, in each process.") from None
    if not host or not 0 < found.port < 65536 or not 0 <= found.process < found.processes:
        raise UserError(f"LAB_COORDINATOR={environ['LAB_COORDINATOR']} must be HOST:PORT, and LAB_PROCESS_ID="
                        f"{found.process} in 0 ... LAB_PROCESSES - 1 = {found.processes - 1}.")
    return found if found.processes > 1 else None


def _detected(launcher: str) -> Launch | None:
    """The launch as JAX detects it, by the rules of `jax.distributed.initialize()`."""
    from jax._src.clusters import ClusterEnv  # private API: the public one takes no time limit

    seconds = int(_seconds("LAB_START_SECONDS", START_SECONDS))
    try:
        address, processes, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, seconds)
    except (LookupError, ValueError, RuntimeError, OSError) as e:  # variables of another launcher, or stale ones
        raise UserError(f"The variables of {launcher} cannot be used ({type(e).__name__}: {str(e)[:160]}). "
                        f"{_ALONE.format('them')}") from e
    if address is None or processes is None or process is None:
        return None
    host, _, port = address.rpartition(":")
    return Launch(launcher, host, int(port), processes, process, devices)


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES names; without it the numbers of all GPUs of this machine."""
    if visible := environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    return sorted((path.name[6:] for path in Path("/dev").glob("nvidia[0-9]*")), key=int)


def _slurm_devices(environ: Mapping[str, str]) -> list[int] | None:
    """JAX assigns GPU i to task i of a node. Here a node's only task gets all GPUs; a task bound to one GPU gets 0."""
    tasks = max(int(n) for n in re.findall(r"(?:^|,)(\d+)", environ.get("SLURM_STEP_TASKS_PER_NODE", "1")))
    count = len(visible_gpus(environ))
    if not count:
        return None
    if tasks == 1:
        return list(range(count))
    return [0] if count == 1 else [int(environ.get("SLURM_LOCALID", 0))]


def _seconds(name: str, default: float) -> float:
    try:
        seconds = float(os.environ.get(name) or default)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UserError(f"{name}={os.environ[name]} must be a number of seconds.")
    return seconds


class Processes:
    """This process and its peers in the run. By default a single process, which needs no communication."""

    def __init__(self, launch: Launch | None = None, channel: Channel | None = None):
        self.process, self.count = (launch.process, launch.processes) if launch else (0, 1)
        self.first = self.process == 0
        self._channel, self._scratch = channel, None

    def gather(self, value: Any) -> list[Any]:
        """All processes' values (plain JSON), in process order. Blocks until every process has called it."""
        return self._channel.gather(value) if self._channel else [value]

    def share(self, value: Any) -> Any:
        """Process 0's value (plain JSON) in every process."""
        return self._channel.gather(value if self.first else None)[0] if self._channel else value

    def stopping(self, wanted: int | None) -> int | None:
        """The signal for which all processes stop at this call, or None. `wanted`: a signal that this process received.

        All processes must call this at the same places.
        """
        return self._channel.stopping(wanted) if self._channel else wanted

    def check_same(self, mine: dict[str, Any], advice: str) -> None:
        """Barrier that checks that all processes have the same values (plain JSON).

        Raises:
          UserError: values differ from those of process 0; names them. All processes then stop.
        """
        if not self._channel:
            return
        first = self.share(mine)
        if found := [name for name in sorted(mine.keys() | first.keys()) if mine.get(name) != first.get(name)]:
            shown = "; ".join(f"{name} is {mine.get(name, 'missing')} there and {first.get(name, 'missing')} in "
                              f"process 0" for name in found[:3])
            more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
            raise UserError(f"{shown}{more}. {advice}")
        self.gather(None)

    def own_folder(self, folder: Path) -> Path:
        """Output folder of this process: `folder` in process 0. Elsewhere a temporary folder, because every process
        computes the outputs (collectives need all of them) but only those of process 0 are kept.
        """
        if self.first:
            return folder
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="lab-"))
            self._channel.at_exit = self._clean
        return self._scratch

    def log(self, folder: Path) -> Path | None:
        """This process's log file in the run folder; None for a single process."""
        if not self._channel:
            return None
        self._channel.log = folder / "logs" / f"process-{self.process}.txt"
        make_folder(self._channel.log.parent)
        return self._channel.log

    def leave(self, status: int, sentence: str = "") -> None:
        """Ends all processes for the same reason. Returns only if there is a single process."""
        if self._channel:
            self._channel.leave(status, sentence)

    def leave_by(self, error: BaseException) -> None:
        """Ends all processes after an unhandled exception. Returns only if there is a single process."""
        if not self._channel:
            return
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
            self.leave(status, "" if status in TOLD else f"It ended with exit status {status}; see what it printed.")
        # The exception may come from a collective whose peer died (raised by JAX, Gloo or gRPC). The channel then ends
        # this process within the 5 s, with a message that names the peer.
        threading.Event().wait(5)
        traceback.print_exception(error)
        self.leave(1, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")

    def close(self) -> None:
        """Normal shutdown. All processes must call it."""
        if self._channel:
            import jax

            self._channel.gather(None, last=True)
            jax.distributed.shutdown()
            self._clean()

    def _clean(self) -> None:
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)


ALONE = Processes()


def start() -> Processes:
    """Connects to the other processes, if the launcher started several. Call it before JAX initialises its devices.

    Raises:
      UserError: a process did not connect in time (names it), or cannot be reached.
    """
    launch = find_launch(os.environ)
    if launch is None:
        return Processes()
    seconds, silence = _seconds("LAB_START_SECONDS", START_SECONDS), _seconds("LAB_SILENCE_SECONDS", SILENCE_SECONDS)
    # Only process 0 prints, and only from Python: Gloo's C++ code prints a line per peer to stdout.
    sys.stdout = signals.Output(open(os.devnull if launch.process else os.dup(1), "wb"), line_buffering=True)  # noqa: SIM115
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    port = launch.port + 1 if launch.port < 65535 else launch.port - 1
    channel = Channel(launch.host, port, launch.process, launch.processes, seconds, silence)
    _initialize(launch, channel, seconds, silence)
    processes = Processes(launch, channel)
    signals.install(processes.leave, quiet=not processes.first)  # replaces JAX's handler, which only records a SIGTERM
    return processes


def _initialize(launch: Launch, channel: Channel, seconds: float, silence: float) -> None:
    """Starts `jax.distributed`. Its time-outs are longer than ours, because it aborts without naming the process.

    The margin is wide: with a heartbeat time-out of 60 s, processes were aborted after 38 and 43 s (measured).
    """
    import jax

    address, own = place(launch.host, launch.port), channel.addresses  # of several, JAX takes one or all
    if any("_proxy" in name.lower() for name in os.environ):
        os.environ.setdefault("no_grpc_proxy", launch.host)  # a corporate proxy would not reach it
    late = threading.Timer(seconds, channel.leave, (2, f"JAX's runtime at {address} was not reached within "
                                                       f"{seconds:g} s. Is that port open between the machines?", True))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            address, launch.processes, launch.process, local_device_ids=launch.local_devices,
            cluster_detection_method="deactivate",
            coordinator_bind_address=place(own[0], launch.port) if len(own) == 1 else None, shutdown_timeout_seconds=30,
            initialization_timeout=int(seconds) + 30, heartbeat_timeout_seconds=int(2 * silence) + 30)
    except RuntimeError as e:
        raise UserError(f"JAX's runtime did not start at {address}: {str(e).splitlines()[0][:200]}.") from e
    finally:
        late.cancel()


def code_version(file: Path | None) -> dict[str, str]:
    """Digests of the code of a run: lab's files, the experiment's file, package versions."""
    files = {str(path.relative_to(ROOT)): path for path in (ROOT / "lab").rglob("*.py")}
    if file:
        files[file.name] = file
    found = {f"the file {name}": hashlib.sha256(path.read_bytes()).hexdigest()[:12] for name, path in files.items()}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        found[f"the version of {name}"] = importlib.metadata.version(name)
    return found | {"the version of Python": platform.python_version()}
