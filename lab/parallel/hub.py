"""The hub in process 0: accepts all processes, forwards messages, and reports which process ended and why."""

from __future__ import annotations

import contextlib
import json
import secrets
import select
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from lab.errors import UserError
from lab.parallel.channel import GRACE, LEAVE, LONGEST, LONGEST_HELLO, _encoded, _servers
from lab.parallel.shared_secret import proof, proves, shared_secret


class Hub:
    """The server side of the channel, in daemon threads of process 0. Waits for all processes, then relays messages."""

    def __init__(self, host: str, port: int, processes: int, seconds: float, silence: float,
                 secret: bytes | None = None):
        """Starts listening. `seconds`: time limit for all processes to connect; `silence`: seconds without a message
        after which a process counts as lost; `secret`: by default `shared_secret()`.

        Raises:
          UserError: the port is taken.
        """
        self.place, self.processes, self.seconds, self.silence = f"{host}:{port}", processes, seconds, silence
        self._secret = secret or shared_secret()
        self._refused = 0
        self._sockets: dict[int, socket.socket] = {}
        self._names: dict[int, str] = {}
        self._gathered: dict[int, dict[int, Any]] = defaultdict(dict)
        self._calls: dict[int, int] = {}
        self._gone: set[int] = set()
        self._stopping = self._over = False
        self._lock = threading.RLock()
        try:
            self._servers = _servers(host, port)
        except OSError as e:
            raise UserError(f"Process 0 cannot listen at {self.place} ({e.strerror}). Is another run using it? "
                            f"Choose another port in LAB_COORDINATOR.") from e
        for work in (self._accept, self._ping):
            threading.Thread(target=work, name="hub", daemon=True).start()

    def _accept(self) -> None:
        limit = time.monotonic() + self.seconds
        while len(self._sockets) < self.processes and not (self._over and 0 in self._sockets):
            for server in select.select(self._servers, [], [], 0.1)[0]:
                connection, _ = server.accept()
                threading.Thread(target=self._listen, args=(connection,), name="hub", daemon=True).start()
            if time.monotonic() > limit and len(self._sockets) < self.processes:
                missing = [str(k) for k in range(self.processes) if k not in self._sockets]
                which = f"Process {missing[0]}" if len(missing) == 1 else f"Processes {', '.join(missing)}"
                strange = f" {self._refused} connections had another LAB_SECRET." if self._refused else ""
                self._end(2, f"{which} of {self.processes} did not arrive at {self.place} within {self.seconds:g} s "
                             f"(LAB_START_SECONDS).{strange} Look at what they printed, and whether they reach that "
                             f"address.")
        for server in self._servers:
            server.close()
        if not self._over:
            self._send({"kind": "start"})

    def _listen(self, connection: socket.socket) -> None:
        connection.settimeout(self.silence)
        lines = connection.makefile("rb")
        try:
            hello = self._greet(connection, lines)
            process, name = int(hello["process"]), str(hello["name"])
        except (OSError, ValueError, KeyError, TypeError):
            connection.close()  # not a process of this run
            return
        with self._lock:
            twice = process in self._sockets
            self._sockets.setdefault(process, connection)
            self._names.setdefault(process, name)
        if twice or hello["processes"] != self.processes or not 0 <= process < self.processes:
            connection.sendall(_encoded({"kind": "end", "status": 2, "sentence": ""}))
            self._end(2, f"{name} says it is process {process} of {hello['processes']}; process 0 expects "
                         f"{self.processes} processes, each with a number of its own (LAB_PROCESSES, LAB_PROCESS_ID).")
            return
        how = "ended without a word (killed, out of memory, or its machine went down)"
        try:
            while line := lines.readline(LONGEST):
                self._handle(process, json.loads(line))
        except TimeoutError:
            how = f"has not been heard of for {self.silence:g} s"
        except (OSError, ValueError):
            pass
        self._gone.add(process)
        self._end(1, f"Process {process} ({name}) {how}. All processes stop; the same command goes on from the last "
                     f"checkpoint.")

    def _greet(self, connection: socket.socket, lines: Any) -> dict[str, Any]:
        """The hello message of a process, after mutual authentication. Raises ValueError, OSError, KeyError or
        TypeError for a peer that is not of this run.
        """
        hello, nonce = json.loads(lines.readline(LONGEST_HELLO)), secrets.token_hex(16)
        if hello["kind"] != "hello":
            raise ValueError
        said = hello["nonce"], nonce, hello["process"], hello["processes"], hello["name"]
        connection.sendall(_encoded({"kind": "hub", "nonce": nonce, "proof": proof(self._secret, "hub", *said)}))
        if not proves(json.loads(lines.readline(LONGEST_HELLO))["proof"], self._secret, "process", *said):
            self._refused += 1
            raise ValueError
        return hello

    def _handle(self, process: int, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "end":
            # In its own thread: this one must keep reading to see the connection close.
            words = process, message["status"], message["sentence"]
            threading.Thread(target=self._left, args=words, name="hub", daemon=True).start()
        with self._lock:
            if kind == "gather":
                values = self._gathered[message["number"]]
                values[process] = message["value"]
                if len(values) == self.processes:
                    del self._gathered[message["number"]]
                    self._over |= message["last"]
                    self._send({"kind": "gathered", "values": [values[k] for k in range(self.processes)],
                                "last": message["last"]})
            elif kind == "stop" and not self._stopping:
                self._stopping = True
                self._send({"kind": "report", "signal": message["signal"]})
            elif kind == "calls":
                self._calls[process] = message["calls"]
                if len(self._calls) == self.processes:
                    self._send({"kind": "stop_at", "call": max(self._calls.values()) + 1})

    def _left(self, process: int, status: int, sentence: str) -> None:
        if process:
            time.sleep(GRACE)
            sentence = sentence and f"Process {process} ({self._names[process]}): {sentence}"
        self._end(status, sentence)

    def _ping(self) -> None:
        while not self._over:
            time.sleep(self.silence / 4)
            self._send({"kind": "ping"})

    def _end(self, status: int, sentence: str) -> None:
        with self._lock:
            if self._over:
                return
            self._over = True
        message, others = {"kind": "end", "status": status, "sentence": sentence}, self._sockets.keys() - {0}
        self._send(message, others)
        limit = time.monotonic() + LEAVE
        while (others - self._gone or 0 not in self._sockets) and time.monotonic() < limit:
            time.sleep(0.01)
        self._send(message, {0})  # last, because it ends process 0 with this hub

    def _send(self, message: dict[str, Any], processes: Iterable[int] | None = None) -> None:
        data = _encoded(message)
        with self._lock:
            chosen = self._sockets.keys() & (self._sockets if processes is None else processes)
            for process in sorted(chosen, reverse=True):  # process 0 last: it may exit at once and end this hub
                with contextlib.suppress(OSError):
                    self._sockets[process].sendall(data)
