"""Control channel between the processes of a run, independent of JAX: start, agreement, and reports of who ended why.

Why not JAX's own coordination alone: the table in lab/parallel/README.md. Each process keeps one TCP connection to
process 0. The operating system closes it when a process dies, so the others report within a second which one it was; a
lost machine is detected by its silence. `multiprocessing.connection` authenticates and frames; messages are JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from lab.errors import UserError
from lab.files import open_file
from lab.parallel.shared_secret import shared_secret

GRACE = 1.0  # seconds to wait for process 0 to report the same error itself
LEAVE = 3.0  # seconds that process 0 outlives the other processes: JAX aborts them when its service is gone
TOLD = (0, 75, 130, 141)  # exit statuses that are not errors
# Each side proves its knowledge of another key. With one key, process 0 could be made to answer its own challenge.
ZERO, OTHER = b"process 0 ", b"another process "


def place(host: str, port: int) -> str:
    """HOST:PORT, with brackets around the colons of an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _servers(host: str, port: int) -> list[socket.socket]:
    """Listening sockets of process 0: on the addresses of `host`, or on all addresses of this machine if those are
    unknown: the name resolves to loopback here (/etc/hosts of Debian), or to a router.
    """
    host = "127.0.0.1" if host == "localhost" else host
    with contextlib.suppress(OSError):  # of a port that is taken: again below
        found = {str(address[0]) for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        if host in found or not any(address == "::1" or address.startswith("127.") for address in found):
            return [socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
                    for address in found]
    both = socket.has_dualstack_ipv6()
    return [socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)]


class _Link:
    """A connection to one process. To send or receive raises BlockingIOError if it takes `silence` seconds."""

    def __init__(self, connected: socket.socket, silence: float):
        connected.settimeout(None)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            connected.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(silence), int(silence % 1 * 1e6)))
        self.connection, self.name = Connection(connected.detach()), ""
        self.gone, self._lock = threading.Event(), threading.Lock()

    def send(self, **message: Any) -> None:
        with self._lock, contextlib.suppress(OSError):  # the listening thread reports a lost peer
            self.connection.send_bytes(json.dumps(message).encode())

    def receive(self) -> dict[str, Any]:
        return json.loads(self.connection.recv_bytes())


def _start(work: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=work, args=arguments, name="channel", daemon=True).start()


class Channel:
    """The connections of this process. Their threads end it as soon as another process has ended.

    Process 0 relays all values, so that all processes see them in the same order.
    """

    def __init__(self, host: str, port: int, process: int, processes: int, seconds: float, silence: float):
        """Returns when all processes have arrived. `seconds`: time limit for that; `silence`: seconds without a message
        after which a process counts as lost.

        Raises:
          UserError: the port is taken; process 0 is unreachable for `seconds`, or has another secret.
        """
        self.process, self.processes, self.place = process, processes, place(host, port)
        self.addresses: list[str] = []  # on which process 0 listens
        self.log: Path | None = None
        self.at_exit: Callable[[], None] = lambda: None
        self._secret, self._seconds, self._silence = shared_secret(), seconds, silence
        self._links: dict[int, _Link] = {}
        self._values: dict[str, Any] = {}
        self._change = threading.Condition()
        self._gathers = self._calls = self._refused = 0
        self._over = False
        _start(self._ping)
        if process:
            self._links[0] = self._connect(host, port)
            _start(self._listen, 0, self._links[0])
        else:
            self._accept(host, port)
        self._wait_for("start")

    def _connect(self, host: str, port: int) -> _Link:
        limit, reason = time.monotonic() + self._seconds, ""
        while (left := limit - time.monotonic()) > 0:
            try:
                link = _Link(socket.create_connection((host, port), timeout=min(left, 5)), self._silence)
                deliver_challenge(link.connection, ZERO + self._secret)
                answer_challenge(link.connection, OTHER + self._secret)
                link.send(process=self.process, processes=self.processes,
                          name=f"{socket.gethostname()}, pid {os.getpid()}")
                link.name = self.place
                return link
            except BlockingIOError:
                reason = "it does not answer"
            except (AuthenticationError, OSError, EOFError) as e:
                reason = getattr(e, "strerror", None) or str(e) or "it closed the connection"
                if isinstance(e, AuthenticationError) or reason == "bad message length":
                    raise UserError(f"What answers at {self.place} is not process 0 of this run, or has another "
                                    f"secret. If the machines share no home folder, set LAB_SECRET to the same random "
                                    f"text in all processes.") from None
                time.sleep(min(0.2, left))
        raise UserError(f"Process {self.process} did not reach process 0 at {self.place} within {self._seconds:g} s "
                        f"({reason}). Is process 0 running, and does this machine reach that address? "
                        f"LAB_START_SECONDS changes the limit.")

    def _accept(self, host: str, port: int) -> None:
        try:
            servers = _servers(host, port)
        except OSError as e:
            raise UserError(f"Process 0 cannot listen at {self.place} ({e.strerror}). Is another run using it? "
                            f"Choose another port in LAB_COORDINATOR.") from e
        self.addresses = [server.getsockname()[0] for server in servers]
        limit = time.monotonic() + self._seconds
        while missing := [str(k) for k in range(1, self.processes) if k not in self._links]:
            for server in select.select(servers, [], [], 0.1)[0]:
                _start(self._admit, server.accept()[0])
            if time.monotonic() > limit:
                strange = f" {self._refused} connections had another LAB_SECRET." if self._refused else ""
                self._end(2, f"Process{'es' * (len(missing) > 1)} {', '.join(missing)} of {self.processes} did not "
                             f"arrive at {self.place} within {self._seconds:g} s (LAB_START_SECONDS).{strange} Look at "
                             f"what they printed, and whether they reach that address.")
        for server in servers:
            server.close()
        self._put("start", True)

    def _admit(self, connected: socket.socket) -> None:
        """Body of process 0's thread for one connection. A peer without the secret is not heard."""
        try:
            link = _Link(connected, self._silence)
            answer_challenge(link.connection, ZERO + self._secret)
            deliver_challenge(link.connection, OTHER + self._secret)
            hello = link.receive()
            process, processes, link.name = hello["process"], hello["processes"], hello["name"]
        except (AuthenticationError, AssertionError, OSError, EOFError, ValueError, KeyError) as e:
            self._refused += isinstance(e, AuthenticationError)
            return
        if 0 < process < processes == self.processes and self._links.setdefault(process, link) is link:
            self._listen(process, link)
            return
        link.send(kind="end", status=2, sentence="")
        self._end(2, f"{link.name} says it is process {process} of {processes}; process 0 expects {self.processes} "
                     f"processes, each with a number of its own (LAB_PROCESSES, LAB_PROCESS_ID).")

    # ------------------------------------------------------------------------------------------- for the main thread

    def gather(self, value: Any, *, last: bool = False) -> list[Any]:
        """See `Processes.gather`. `last`: processes may end after this call."""
        self._gathers += 1
        keys = [f"{self._gathers}/{k}" for k in range(self.processes)]
        self._share(keys[self.process], value)
        self._wait_for(*keys)
        for link in self._links.values() if last else ():
            link.send(kind="bye")
        return [self._values.pop(key) for key in keys]

    def stopping(self, wanted: int | None) -> int | None:
        """See `Processes.stopping`. The agreement takes one round of messages, during which this call blocks in every
        process, so that all stop at the same call. Without a signal it sends nothing.
        """
        with self._change:
            self._calls += 1
            if wanted is not None and "stop" not in self._values:
                self._share("stop", wanted)
            if "stop" not in self._values:
                return None
            self._wait_for(*(keys := [f"calls/{k}" for k in range(self.processes)]))
            return self._values["stop"] if self._calls > max(self._values[key] for key in keys) else None

    def leave(self, status: int, sentence: str = "", aloud: bool = False) -> None:
        """Tells the other processes why, then ends this process. `aloud`: prints the sentence here, too."""
        self._end(status, sentence, aloud)
        threading.Event().wait()  # another thread is ending this process

    def _share(self, key: str, value: Any) -> None:
        """Gives a value to all processes."""
        if self.process:
            self._links[0].send(kind="put", key=key, value=value)
        else:
            self._put(key, json.loads(json.dumps(value)))  # as it arrives elsewhere

    def _wait_for(self, *keys: str) -> None:
        with self._change:
            self._change.wait_for(lambda: self._values.keys() >= set(keys))

    # ---------------------------------------------------------------------------------------- for the channel's threads

    def _put(self, key: str, value: Any) -> None:
        with self._change:
            if key in self._values:  # several processes want to stop: the first signal counts
                return
            self._values[key] = value
            for link in () if self.process else self._links.values():
                link.send(kind="put", key=key, value=value)
            if key == "stop":  # here, because the main thread may be in a collective
                self._share(f"calls/{self.process}", self._calls)
            self._change.notify_all()

    def _ping(self) -> None:
        parent = os.environ.get("LAB_PARENT")
        while True:
            time.sleep(min(1.0, self._silence / 4))
            for link in list(self._links.values()):
                link.send(kind="ping")
            if parent and os.getppid() != int(parent):
                self._end(1, "The process that started this one has ended, so this one ends, too.")

    def _listen(self, process: int, link: _Link) -> None:
        how, bye = "ended without a word (killed, out of memory, or its machine went down)", False
        try:
            while True:
                match (message := link.receive())["kind"]:
                    case "put":
                        self._put(message["key"], message["value"])
                    case "bye":
                        bye = True
                    case "end" if process:  # in a thread of its own: this one waits for the connection to close
                        sentence = message["sentence"] and f"Process {process} ({link.name}): {message['sentence']}"
                        _start(self._end, message["status"], sentence, True, GRACE)
                    case "end":
                        link.gone.set()
                        self._end(message["status"], message["sentence"], aloud=False)
        except BlockingIOError:
            how = f"has not been heard of for {self._silence:g} s"
        except (OSError, EOFError, ValueError):
            pass
        link.gone.set()
        if not bye:
            self._end(1, f"Process {process} ({link.name}) {how}. All processes stop; the same command resumes from "
                         f"the last checkpoint.")

    def _end(self, status: int, sentence: str, aloud: bool = True, delay: float = 0.0) -> None:
        """Ends all processes. Only the first call counts; a later one returns."""
        time.sleep(delay)
        with self._change:
            if self._over:
                return
            self._over = True
        for link in (links := list(self._links.values())):
            link.send(kind="end", status=status, sentence=sentence)
        text = f"error: {sentence}" if sentence and status not in TOLD else sentence
        if text and aloud:
            clear = b"\r\033[K\033[?25h" if sys.stderr.isatty() else b""  # clears the live line and shows the cursor
            os.write(2, clear + text.encode() + b"\n")
        with contextlib.suppress(Exception):  # must exit whatever fails
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hides messages of JAX's threads at teardown
            if text and self.log:
                with open_file(self.log) as log:
                    log.write(text + "\n")
            self.at_exit()
        limit = time.monotonic() + LEAVE + (GRACE + 1) * bool(self.process)
        for link in links:
            link.gone.wait(max(0.0, limit - time.monotonic()))
        os._exit(status)  # a normal exit would block in JAX's shutdown barrier
