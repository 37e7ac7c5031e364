"""``--processes N``: a multi-process run on one machine, to find bugs that need several processes."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lab import signals
from lab.errors import UserError
from lab.parallel.processes import visible_gpus
from lab.parallel.shared_secret import new_secret

ENDING_SECONDS = 20.0  # for the remaining processes to exit after the first has ended; then SIGKILL
# Log lines of JAX's C++ services after a process has died. They do not name the process; our message does.
ECHO = re.compile(rb"[EF]\d{4} [\d:.]+ +\d+ (coordination_service\w*\.cc|preemption_\w+\.cc|client\.h):"
                  rb"|Additional GRPC error information|:UNKNOWN:Error received from peer")
FORCE = "--xla_force_host_platform_device_count"


def start_processes(args: Sequence[str]) -> int:
    """Runs `args` with ``--processes N`` or ``--processes NxM`` (M devices each); returns the common exit status.

    Process 0 owns the terminal; stderr of the other processes is shown with their number as prefix. Signals are
    forwarded to all processes. When one dies, the rest end within seconds.

    Raises:
      UserError: malformed numbers, or too few GPUs.
    """
    at = args.index("--processes")
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", args[at + 1] if at + 1 < len(args) else "")
    rest = [*args[:at], *args[at + 2:]]
    if not found or not int(found[1]) or found[2] == "0":
        raise UserError("--processes must be N, or NxM for M devices each: ./launch.sh --processes 2x4 EXPERIMENT.py")
    if not rest or not (rest[0].endswith(".py") or rest[0] == "bench"):
        raise UserError("--processes is for training: ./launch.sh --processes 2 EXPERIMENT.py [--flags]")
    return _Family(rest, int(found[1]), int(found[2]) if found[2] else None).wait()


def devices_of(process: int, processes: int, each: int | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that assign a process its share of this machine's devices.

    Raises:
      UserError: too few GPUs, or a TPU.
    """
    if environ.get("LAB_PLATFORM") == "gpu":
        gpus = visible_gpus(environ)
        each = each or len(gpus) // processes
        if not each or each * processes > len(gpus):
            raise UserError(f"--processes {processes}x{each or 1} needs {processes * (each or 1)} GPUs; there are "
                            f"{len(gpus)}. LAB_ACCELERATOR=cpu tries it without.")
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[process * each: (process + 1) * each])}
    if environ.get("LAB_PLATFORM") == "tpu":
        raise UserError("--processes cannot split a machine's TPU. LAB_ACCELERATOR=cpu tries it without.")
    flags = environ.get("XLA_FLAGS", "")
    if each is None:
        forced = re.search(rf"{FORCE}=(\d+)", flags)
        each = max(1, int(forced[1]) // processes) if forced else 1
    return {"XLA_FLAGS": f"{re.sub(rf'{FORCE}=[0-9]+', '', flags)} {FORCE}={each}".strip()}


def _free_ports() -> int:
    """A free port such that the next one is also free."""
    while True:
        with socket.socket() as a, socket.socket() as b:
            a.bind(("127.0.0.1", 0))
            port = a.getsockname()[1]
            try:
                b.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


class _Family:
    """The child processes and their supervisor."""

    def __init__(self, args: Sequence[str], processes: int, each: int | None):
        self.signal: int | None = None
        self.readers: list[threading.Thread] = []
        self.sentences: list[str] = []
        port, self.children, secret = _free_ports(), [], new_secret()
        environs = [devices_of(k, processes, each, os.environ) for k in range(processes)]
        for k, environ in enumerate(environs):
            environ |= {"LAB_COORDINATOR": f"127.0.0.1:{port}", "LAB_PROCESSES": str(processes),
                        "LAB_PROCESS_ID": str(k), "LAB_PARENT": str(os.getpid()), "LAB_SECRET": secret}
            # Own session, so that Ctrl-C reaches each child once, through this process.
            self.children.append(subprocess.Popen(
                [sys.executable, "-P", "-m", "lab", *args], env=os.environ | environ, start_new_session=True,
                stderr=subprocess.PIPE if k else None, stdin=subprocess.DEVNULL))
        for k, child in enumerate(self.children):
            if k:
                self.readers.append(threading.Thread(target=_prefix, args=(k, child), daemon=True))
                self.readers[-1].start()
        for number in signals.HEARD:
            signal.signal(number, self._forward)
        signals.release()

    def _forward(self, number: int, frame: Any) -> None:
        self.signal = self.signal or number
        for child in self.children:  # also a second signal, which the children handle
            child.send_signal(number)  # nothing, if it has ended

    def wait(self) -> int:
        """The first nonzero exit status, else 0. Kills processes that outlive the first exit by `ENDING_SECONDS`."""
        limit, told = math.inf, {}
        while len(told) < len(self.children):
            for k, child in enumerate(self.children):
                if k not in told and child.poll() is not None:
                    told[k] = self._status(k)
                    limit = min(limit, time.monotonic() + ENDING_SECONDS)
            if time.monotonic() > limit:
                self.signal = self.signal or signal.SIGKILL
                for child in self.children:
                    child.kill()
            time.sleep(0.05)
        for reader in self.readers:  # the survivors say why; a child of theirs may keep the pipe open
            reader.join(1.0)
        for sentence in self.sentences:
            print(sentence, file=sys.stderr, flush=True)
        return next((status for status in told.values() if status), 0)

    def _status(self, k: int) -> int:
        """The exit status of an ended child. Notes an error if an unexpected signal ended it."""
        code = self.children[k].returncode
        if code >= 0:
            return code
        if self.signal is not None:
            return {signal.SIGINT: 130, signal.SIGKILL: 1}.get(self.signal, 75)
        self.sentences.append(f"error: Process {k} was ended by {signal.Signals(-code).name}.")
        return 1


def _prefix(k: int, child: subprocess.Popen) -> None:
    for line in child.stderr:
        if ECHO.match(line):
            continue
        sys.stderr.write(f"[{k}] {line.decode(errors='replace')}")
        sys.stderr.flush()
