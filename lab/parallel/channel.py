"""Control channel between the processes of a run, independent of JAX: start-up barrier, gather, stop, failure reports.

When a process dies, JAX aborts the others with SIGABRT after its own time-outs, and no Python code runs. Here process 0
keeps one TCP connection to each process. The operating system closes it when a process dies, so the other processes
report within a second which one it was. A lost machine is detected by a time-out. A message is one line of JSON. Each
connection starts with a mutual proof of the run's secret.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.errors import UserError
from lab.files import open_file
from lab.parallel.shared_secret import proof, proves, shared_secret

GRACE = 1.0  # seconds to wait for process 0 to report the same error itself
LEAVE = 3.0  # seconds that process 0 outlives the other processes: JAX aborts them when its service is gone
LONGEST = 1 << 26  # maximum bytes of a message
LONGEST_HELLO = 4096  # same, before authentication
TOLD = (0, 75, 130, 141)  # exit statuses that are not errors


def _encoded(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def own_addresses(host: str) -> list[tuple[int, Any]]:
    """(family, socket address without a port) of this machine, under the name that other machines use for it.

    Empty if unknown: the name resolves to loopback here (/etc/hosts of Debian), or to a router.
    """
    if host == "localhost" or host.startswith("127."):
        return [(socket.AF_INET, ("127.0.0.1",))]
    try:
        found = {(family, address) for family, *_, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)}
    except OSError:
        return []
    here = []
    for family, (address, _, *scope) in sorted(found):
        if address.startswith("127.") or address == "::1":
            return []
        with socket.socket(family) as probe, contextlib.suppress(OSError):
            probe.bind((address, 0, *scope))
            here.append((family, (address, *scope)))
    return here if len(here) == len(found) else []


def _servers(host: str, port: int) -> list[socket.socket]:
    """Listening sockets of process 0: on the addresses of `host`, or on all addresses if those are unknown."""
    if addresses := own_addresses(host):
        return [socket.create_server((address, port, *scope), family=family) for family, (address, *scope) in addresses]
    if socket.has_dualstack_ipv6():
        return [socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)]
    return [socket.create_server(("", port))]


class Channel:
    """One process's connection to the hub. A thread ends this process as soon as another process has ended."""

    def __init__(self, host: str, port: int, process: int, processes: int, seconds: float, silence: float,
                 secret: bytes | None = None):
        """Returns when all processes have arrived. `secret`: by default `shared_secret()`.

        Raises:
          UserError: process 0 is unreachable for `seconds`, or has another secret.
        """
        self._secret = secret or shared_secret()
        self.process, self.processes, self.place = process, processes, f"{host}:{port}"
        self.log: Path | None = None
        self.at_exit: Callable[[], None] = lambda: None
        self.seconds, self.silence = seconds, silence
        self._change = threading.Condition()
        self._send_lock = threading.Lock()
        self._values: list[Any] | None = None
        self._gathers = self._calls = 0
        self._started = self._reporting = self._asked = self._leaving = self._left = self._closed = False
        self._stop_at: int | None = None
        self._signal: int | None = None
        self._parent = os.getppid()
        self._socket = self._connect(host, port)
        for work in (self._listen, self._ping):
            threading.Thread(target=work, name="channel", daemon=True).start()
        with self._change:  # the hub times out first, unless it is not our hub
            if not self._change.wait_for(lambda: self._started, seconds + 10):
                raise UserError(f"Something answers at {self.place}, but it is not process 0 of this run.")

    def _connect(self, host: str, port: int) -> socket.socket:
        limit, reason = time.monotonic() + self.seconds, ""
        while (left := limit - time.monotonic()) > 0:
            try:
                connection = socket.create_connection((host, port), timeout=min(left, 5))
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.settimeout(max(self.silence, self.seconds))
                self._greet(connection)
                return connection
            except OSError as e:
                reason = e.strerror or str(e)
                time.sleep(min(0.2, max(0.0, left)))
        raise UserError(f"Process {self.process} did not reach process 0 at {self.place} within {self.seconds:g} s "
                        f"({reason}). Is process 0 running, and does this machine reach that address? "
                        f"LAB_START_SECONDS changes the limit.")

    def _greet(self, connection: socket.socket) -> None:
        """Mutual authentication: checks the hub's proof, then sends ours. Raises UserError if the hub's is wrong."""
        said = secrets.token_hex(16), f"{socket.gethostname()}, pid {os.getpid()}"
        hello = {"kind": "hello", "process": self.process, "processes": self.processes, "name": said[1],
                 "nonce": said[0]}
        connection.sendall(_encoded(hello))
        self._lines = connection.makefile("rb")
        if not (line := self._lines.readline(LONGEST_HELLO)):
            raise ConnectionResetError("it closed the connection")
        try:
            answer = json.loads(line)
            all_said = said[0], answer["nonce"], self.process, self.processes, said[1]
            good = proves(answer["proof"], self._secret, "hub", *all_said)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"Something answers at {self.place}, but it is not process 0 of this run.") from None
        mine = proof(self._secret, "process", *all_said) if good else ""
        connection.sendall(_encoded({"kind": "proof", "proof": mine}))
        if not good:
            raise UserError(f"What answers at {self.place} has another secret. If it is process 0 of this run, the "
                            f"machines share no home folder: set LAB_SECRET to the same random text in all processes.")

    # ------------------------------------------------------------------------------------------- for the main thread

    def gather(self, value: Any, *, last: bool = False) -> list[Any]:
        """All processes' values (plain JSON), in process order. Blocks until every process has called it."""
        with self._change:
            self._gathers += 1
            self._values = None
        self._write({"kind": "gather", "number": self._gathers, "value": value, "last": last})
        with self._change:
            self._change.wait_for(lambda: self._values is not None)
            return self._values

    def stopping(self, wanted: int | None) -> int | None:
        """The signal for which all processes stop at this call, or None.

        All processes must call this at the same places. `wanted`: a signal that this process received. The agreement
        takes one round of messages, during which this call blocks in every process, so that all stop at the same call.
        """
        with self._change:
            self._calls += 1
            if wanted is not None and not self._asked:
                self._asked = True
                self._write({"kind": "stop", "signal": wanted})
            self._change.wait_for(lambda: not self._reporting)
            return self._signal if self._stop_at is not None and self._calls >= self._stop_at else None

    def leave(self, status: int, sentence: str = "") -> None:
        """Tells the other processes why, then ends this process."""
        self._leaving = True
        with self._change:
            self._write({"kind": "end", "status": status, "sentence": sentence})
            self._change.wait_for(lambda: self._left, GRACE + LEAVE + 1)
        self._exit(status)

    # ---------------------------------------------------------------------------------------- for the channel's threads

    def _write(self, message: dict[str, Any]) -> None:
        with self._send_lock, contextlib.suppress(OSError):  # the listening thread reports a lost hub
            self._socket.sendall(_encoded(message))

    def _ping(self) -> None:
        while not self._closed:
            time.sleep(min(1.0, self.silence / 4))
            self._write({"kind": "ping"})
            if "LAB_PARENT" in os.environ and os.getppid() != self._parent:
                self._ended(1, "The process that started this one has ended, so this one ends, too.", aloud=True)

    def _listen(self) -> None:
        how = "ended without a word (killed, out of memory, or its machine went down)"
        try:
            while line := self._lines.readline(LONGEST):
                self._handle(json.loads(line))
        except TimeoutError:
            how = f"has not been heard of for {self.silence:g} s"
        except (OSError, ValueError):
            pass
        if not self._closed:
            self._ended(1, f"Process 0 ({self.place}) {how}. All processes stop; the same command goes on from the "
                           f"last checkpoint.", aloud=True)

    def _handle(self, message: dict[str, Any]) -> None:
        with self._change:
            match message["kind"]:
                case "start":
                    self._started = True
                    self._socket.settimeout(self.silence)
                case "gathered":
                    self._values = message["values"]
                    self._closed |= message["last"]  # set here: the hub may be gone before the main thread wakes
                case "report":
                    self._reporting, self._signal = True, message["signal"]
                    self._write({"kind": "calls", "calls": self._calls})
                case "stop_at":
                    self._reporting, self._stop_at = False, message["call"]
                case "end":
                    self._ended(message["status"], message["sentence"], aloud=self.process == 0)
            self._change.notify_all()

    def _ended(self, status: int, sentence: str, aloud: bool) -> None:
        if self._leaving:
            self._left = True
            return
        if sentence and status not in TOLD:
            sentence = f"error: {sentence}"
        if sentence and aloud:
            clear = b"\r\033[K\033[?25h" if sys.stderr.isatty() else b""  # clears the live line and shows the cursor
            os.write(2, clear + sentence.encode() + b"\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hides messages of JAX's threads at teardown
        if sentence and self.log:
            with contextlib.suppress(OSError), open_file(self.log) as log:
                log.write(sentence + "\n")
        self._exit(status)

    def _exit(self, status: int) -> None:
        """Exits at once: a normal exit would block in JAX's shutdown barrier."""
        with contextlib.suppress(Exception):  # must exit whatever fails
            self.at_exit()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
