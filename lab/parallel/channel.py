"""What the processes of one run tell each other beside JAX: who has arrived, values, when to stop, who has ended.

JAX ends the survivors of a dead process with SIGABRT once its own time-outs have passed, and no Python code gets a
word in. Here process 0 keeps one TCP connection to each process. The operating system closes it when a process dies,
so that the others know within a second which one it was, and say so; a machine that vanishes is missed by its silence.
A message is one line of JSON. A connection begins with each side's proof that it has the secret of the run.
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

GRACE = 1.0  # seconds in which process 0 may come to say the same mistake itself
LEAVE = 3.0  # seconds in which the others end before process 0 does: JAX aborts them when its service is gone
LONGEST = 1 << 26  # bytes of one message
LONGEST_HELLO = 4096  # from somebody of whom nothing is known yet
TOLD = (0, 75, 130, 141)  # exit statuses that are no error


def _encoded(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def own_addresses(host: str) -> list[tuple[int, Any]]:
    """(family, socket address without a port) of this machine under the name by which others reach it.

    Empty where that is not known: the name leads to loopback here only (/etc/hosts of Debian), or to a router.
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
    """Sockets that listen where the others look for process 0: there only, or where that is not known everywhere."""
    if addresses := own_addresses(host):
        return [socket.create_server((address, port, *scope), family=family) for family, (address, *scope) in addresses]
    if socket.has_dualstack_ipv6():
        return [socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)]
    return [socket.create_server(("", port))]


class Channel:
    """One process's connection to the hub. Its thread ends this process as soon as another one has ended."""

    def __init__(self, host: str, port: int, process: int, processes: int, seconds: float, silence: float,
                 secret: bytes | None = None):
        """Returns when all processes have arrived. `secret`: by default `shared_secret()`.

        Raises:
          UserError: process 0 is not reached within `seconds`, or has another secret.
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
        with self._change:  # the hub's own limit comes first; this one is for a hub that is no hub
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
        """Proves that this process belongs to the run, if the other side does. Raises UserError where it does not."""
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
        """The values (plain JSON) of all processes, in their order; returns when all have come here."""
        with self._change:
            self._gathers += 1
            self._values = None
        self._write({"kind": "gather", "number": self._gathers, "value": value, "last": last})
        with self._change:
            self._change.wait_for(lambda: self._values is not None)
            return self._values

    def stopping(self, wanted: int | None) -> int | None:
        """The signal for which all processes stop at this very call, or None.

        All processes call this at the same places. `wanted`: a signal that this process got. An agreement costs one
        round of messages; while it is on its way nobody passes this call, so all can stop at the next one.
        """
        with self._change:
            self._calls += 1
            if wanted is not None and not self._asked:
                self._asked = True
                self._write({"kind": "stop", "signal": wanted})
            self._change.wait_for(lambda: not self._reporting)
            return self._signal if self._stop_at is not None and self._calls >= self._stop_at else None

    def leave(self, status: int, sentence: str = "") -> None:
        """Ends this process, and tells the others why before."""
        self._leaving = True
        with self._change:
            self._write({"kind": "end", "status": status, "sentence": sentence})
            self._change.wait_for(lambda: self._left, GRACE + LEAVE + 1)
        self._exit(status)

    # --------------------------------------------------------------------------------------------- for the own threads

    def _write(self, message: dict[str, Any]) -> None:
        with self._send_lock, contextlib.suppress(OSError):  # the listening thread says it when the hub is gone
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
                    self._closed |= message["last"]  # here, because the hub may be gone before the main thread wakes
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
            clear = b"\r\033[K\033[?25h" if sys.stderr.isatty() else b""  # the live line, and its hidden cursor
            os.write(2, clear + sentence.encode() + b"\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what JAX's threads say while they are torn down helps nobody
        if sentence and self.log:
            with contextlib.suppress(OSError), open_file(self.log) as log:
                log.write(sentence + "\n")
        self._exit(status)

    def _exit(self, status: int) -> None:
        """Ends at once: the ordinary way would wait for the others in JAX's shutdown barrier."""
        with contextlib.suppress(Exception):  # nothing may keep this process alive now
            self.at_exit()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
