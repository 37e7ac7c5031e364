"""The thread that owns the device: requests join and leave the slots between two steps of the model.

Each turn of its loop computes one part of one waiting prompt, then one token for every slot that generates. So a long
prompt does not hold up the others for more than `slots.WIDTHS[-1]` tokens.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lab.serve.sampling import Sampled, Settings
from lab.serve.slots import Slots

log = logging.getLogger(__name__)
Reason = Literal["stop", "length", "deadline", "cancelled", "failed"]


class Busy(Exception):
    """The queue is full. `seconds`: when to try again."""

    def __init__(self, seconds: int):
        super().__init__("the queue is full")
        self.seconds = seconds


class Closed(Exception):
    """The engine accepts no more requests."""


class Token(NamedTuple):
    """A token, with natural logarithms of probabilities: its own, and those of the most likely tokens."""

    id: int
    logp: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Request:
    """A text to continue.

    `emit` is called in the engine's thread with each `Token`, and last with the reason of the end.
    """

    ids: Sequence[int]
    new_tokens: int
    settings: Settings
    stop: Sequence[int]
    emit: Callable[[Token | Reason], None]
    deadline: float = math.inf
    """Time of `time.monotonic` at which it ends, wherever it is."""
    cancelled: bool = False
    """Set from any thread; the slot is free at the next step."""
    began: float = field(default_factory=time.monotonic)
    reused: int = 0
    """Tokens of the prompt that were in the cache."""
    made: int = 0
    token: int | None = None
    """The last token, which is not in the cache yet."""


class Engine:
    """Runs requests on `Slots`, in a thread of its own. Other threads call `submit`, `close` and the counters."""

    def __init__(self, slots: Slots, queue: int = 64):
        """`queue`: requests that may wait for a slot."""
        self.slots, self.limit = slots, queue
        self.ready = threading.Event()
        self.failed = False
        """Whether the model could not be compiled."""
        self.running: dict[int, Request] = {}
        self.waiting: deque[Request] = deque()
        self._used = [0.0] * len(slots.ids)
        self._seconds = 1.0  # of a request, recently
        self._wake = threading.Condition()
        self._closing = self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread, which compiles first; `ready` is set when it has. Earlier requests wait."""
        self._thread.start()

    def gauges(self) -> dict[str, tuple[str, Callable[[], float]]]:
        """See `lab.serve.metrics.Metrics`."""
        return {"slots": ("Slots.", lambda: len(self.slots.ids)),
                "slots_busy": ("Slots that hold a request.", lambda: len(self.running)),
                "queue": ("Requests that wait for a slot.", lambda: len(self.waiting))}

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
          Busy: the queue is full.
          Closed: the engine is stopping.
          ValueError: the request does not fit the context.
        """
        if not 0 < len(request.ids) <= self.slots.context - request.new_tokens:
            raise ValueError(f"{len(request.ids)} + {request.new_tokens} tokens in a context of {self.slots.context}")
        with self._wake:
            if self._closing:
                raise Closed("the engine is stopping")
            # A free slot counts: a request waits in the queue until the thread takes it.
            if len(self.running) + len(self.waiting) >= len(self._used) + self.limit:
                turns = (len(self.waiting) + 1) / len(self._used)
                raise Busy(max(1, min(60, math.ceil(turns * self._seconds))))
            self.waiting.append(request)
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        """Ends a request at the next step."""
        request.cancelled = True
        with self._wake:
            self._wake.notify()

    def known(self, ids: Sequence[int]) -> int:
        """How many of `ids` are in a slot, now."""
        return max(_common(text, ids) for text in list(self.slots.ids))

    def refuse(self) -> None:
        """Accepts nothing more."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def close(self, seconds: float) -> bool:
        """Accepts nothing more, and waits up to `seconds` for what was accepted; then cancels it. Returns whether the
        thread has ended."""
        self.refuse()
        if self._thread.is_alive():
            self._thread.join(seconds if self.ready.is_set() else 0)
        self._stopped = True
        with self._wake:
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(2 if self.ready.is_set() else 0)
        return not self._thread.is_alive()

    # ------------------------------------------------------------------------------------- in the engine's thread

    def _run(self) -> None:
        try:
            self.slots.compile()
        except Exception:
            log.exception("the model could not be compiled")
            self.failed = self._closing = self._stopped = True
            return
        self.ready.set()
        while self._wait():
            try:
                self._turn()
            except Exception:  # of the device: the cache was given away, so nothing that ran can go on
                log.exception("a step failed; its requests end")
                for slot in list(self.running):
                    self._end(slot, "failed")
                self.slots.clear()
        for request in [*self.running.values(), *self.waiting]:
            request.emit("cancelled")
        self.running.clear()

    def _wait(self) -> bool:
        """Waits for work. False: there is none and will be none."""
        with self._wake:
            while not (self.running or self.waiting or self._closing or self._stopped):
                self._wake.wait()
            return not self._stopped and bool(self.running or self.waiting)

    def _turn(self) -> None:
        self._drop()
        self._admit()
        self._prefill()
        self._decode()

    def _over(self, request: Request) -> Reason | None:
        return "cancelled" if request.cancelled else "deadline" if time.monotonic() >= request.deadline else None

    def _drop(self) -> None:
        """Ends what is cancelled or late."""
        for slot, request in list(self.running.items()):
            if reason := self._over(request):
                self._end(slot, reason)
        with self._wake:
            over = [request for request in self.waiting if self._over(request)]
            for request in over:
                self.waiting.remove(request)
        for request in over:
            request.emit(self._over(request) or "cancelled")

    def _admit(self) -> None:
        """Gives free slots to waiting requests, first come, first served."""
        while len(self.running) < len(self._used):
            with self._wake:
                if not self.waiting:
                    return
                request = self.waiting.popleft()
                slot, request.reused = self._choose(request.ids)
                self.running[slot] = request
            self.slots.rewind(slot, request.reused)

    def _choose(self, ids: Sequence[int]) -> tuple[int, int]:
        """(slot, how many of `ids` its cache already begins with). A text that the new one continues is taken up if
        that keeps more than it forgets; else, among the slots of the smallest step, the text that was used longest ago
        goes."""
        free = [slot for slot in range(len(self._used)) if slot not in self.running]
        known = {slot: _common(self.slots.ids[slot], ids) for slot in free}
        kept = {slot: 2 * known[slot] - len(self.slots.ids[slot]) for slot in free}
        best = max(free, key=kept.__getitem__)
        if kept[best] <= 0:
            best = min(free, key=lambda slot: (self.slots.rows_to(slot), self._used[slot]))
        return best, min(known[best], len(ids) - 1)  # the logits of the last token are needed

    def _prefill(self) -> None:
        """A part of the prompt that came first."""
        for slot, request in self.running.items():
            if request.token is None:
                new = request.ids[len(self.slots.ids[slot]):]
                count, found = self.slots.extend(slot, new, request.settings)
                if count == len(new):
                    self._found(slot, 0, found)
                return

    def _decode(self) -> None:
        """A token for each slot whose prompt is in the cache."""
        tokens = {slot: r.token for slot, r in self.running.items() if r.token is not None}
        if tokens:
            found = self.slots.step(tokens, {slot: self.running[slot].settings for slot in tokens})
            for slot in tokens:
                self._found(slot, slot, found)

    def _found(self, slot: int, row: int, found: Sampled) -> None:
        """Hands out the token of a row; ends its request if that was the last one."""
        request = self.running[slot]
        token = int(found.token_B[row])
        if token in request.stop:
            return self._end(slot, "stop")
        request.token, request.made = token, request.made + 1
        top = list(zip(found.top_BT[row].tolist(), found.top_logp_BT[row].tolist(), strict=True))
        request.emit(Token(token, float(found.logp_B[row]), top))
        if request.made == request.new_tokens:
            self._end(slot, "length")

    def _end(self, slot: int, reason: Reason) -> None:
        request = self.running.pop(slot)
        self._used[slot] = time.monotonic()
        self._seconds += 0.2 * (self._used[slot] - request.began - self._seconds)
        request.emit(reason)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the beginning that two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def collect(engine: Engine, **fields: Any) -> tuple[list[Token], Reason, Request]:
    """Submits a request and waits for its end: its tokens and why it ended. For programs without an event loop."""
    found: list[Token] = []
    done = threading.Event()
    reason: list[Reason] = []

    def emit(event: Token | Reason) -> None:
        if isinstance(event, Token):
            found.append(event)
        else:
            reason.append(event)
            done.set()

    request = Request(emit=emit, **fields)
    engine.submit(request)
    done.wait()
    return found, reason[0], request
