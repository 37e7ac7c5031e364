"""Records to batches, as a function of (seed, step): no state, so resuming is exact on any number of hosts.

*Records* are anything with `len(r)` and `r[indices] -> dict of arrays` (indices: int array (n,), leading axes n). Those
that are cut otherwise in every epoch of training also have `r.in_epoch(indices, epochs, seed)` (`lab.data.text.text`).

Speed (2-core CPU VM, busy, 2026-11-22): 512 windows of 1024 tokens, gpt_small's batch, from a memory-mapped token file
of 559 MB: `train_batch` makes 220-350 Mtok/s, 77-280 through `Prefetch`; 8-45 when the file is not in the page cache.
One H200 at 55 % MFU takes 0.63 (6 N + 12 * layers * width * length = 860 MFLOP a token at 989 TFLOP/s), a v5e-8 1.0.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import ModuleType, TracebackType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from lab.errors import UserError

T = TypeVar("T")
Batch = dict[str, np.ndarray]
ALL = slice(None)
FEW = 1 << 12  # records below which the digits are so small that the order needs more rounds to look random


class Records(Protocol):
    """See the module's text."""

    def __len__(self) -> int: ...
    def __getitem__(self, indices: np.ndarray) -> Batch: ...


class Arrays:
    """Records held in memory. `arrays`: name -> (n, ...), all of one length."""

    def __init__(self, arrays: Batch):
        self.arrays = arrays

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, indices: np.ndarray) -> Batch:
        return {name: array[indices] for name, array in self.arrays.items()}


# ------------------------------------------------------------------------------------------------------- order


def _mix(x: int) -> int:
    """A good hash of 32 bits to 32 bits (C. Wellons' lowbias32), for the keys."""
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def _keys(seed: int, epoch: int, rounds: int) -> list[np.uint32]:
    key = 0
    for part in (seed, seed >> 32, epoch, epoch >> 32):
        key = _mix(key ^ (part & 0xFFFFFFFF)) + 1 & 0xFFFFFFFF
    return [np.uint32(_mix(key + r * 0x9E3779B9 & 0xFFFFFFFF)) for r in range(rounds)]


def shuffled(position: Any, epoch: int, seed: int, size: int, xp: ModuleType = np) -> Any:
    """Where `position` comes in the order of `epoch`: a seeded one-to-one map of [0, size) onto itself.

    The generalised Feistel network of Black & Rogaway ("Ciphers with arbitrary finite domains", CT-RSA 2002; the idea
    is Luby & Rackoff's): a number below a * b, where a and b are about sqrt(size), is a pair of digits, and each round
    adds a hash of one digit to the other. Numbers that leave [0, size) go round again ("cycle-walking"). It is uint32
    arithmetic only, so the order never changes with NumPy's version, nothing is held in memory, and `xp` may be
    `jax.numpy` (outside of jit). `position`: integer or array of them; the result is uint32 of the same shape.
    """
    if not 1 <= size <= 2**32 - 2**17:  # a * b must not wrap around
        raise ValueError(f"size {size} is not in [1, 2**32 - 2**17]")
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    sides = np.uint32(a), np.uint32(b)
    keys = _keys(seed, epoch, 12 if size < FEW else 8)
    one, half, last = np.uint32(1), np.uint32(16), np.uint32(size - 1)
    first, second = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)

    def network(x: Any) -> Any:
        digits = [x // sides[1], x % sides[1]]
        for r, key in enumerate(keys):
            this = r % 2  # the digit that changes; the other one is hashed
            h = (digits[1 - this] ^ key) * first
            h = (h ^ (h >> half)) * second
            h = (h ^ (h >> half)) >> one  # the good bits of a product are the high ones; then room for the sum
            digits[this] = (digits[this] + h) % sides[this]
        return digits[0] * sides[1] + digits[1]

    # At least one axis: NumPy warns when *scalars* wrap around.
    x = network(xp.atleast_1d(xp.asarray(position, dtype=xp.uint32)))
    while bool((x > last).any()):
        x = xp.where(x > last, network(x), x)
    return x.reshape(np.shape(position))


def fixed_order(size: int) -> np.ndarray:
    """An order of `size` records, int64 (size,), that is the same for every run: who goes into which split."""
    return shuffled(np.arange(size), 0, 0, size).astype(np.int64)


def train_indices(step: int, batch: int, size: int, seed: int) -> np.ndarray:
    """The records of one training batch, int64 (batch,). `step`: completed updates before it, from 0.

    Row i is at place p = step * batch + i of the endless stream of epochs: each epoch has each record once, in an order
    of its own; a batch may end one epoch and begin the next.
    """
    return _train_places(step, batch, size, seed)[0]


def _train_places(step: int, batch: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`train_indices`, and the epoch that each belongs to."""
    if size < 1:
        raise UserError("There is no training record.")
    place, stop = step * batch, (step + 1) * batch
    parts, epochs = [], np.arange(place, stop) // size
    while place < stop:
        epoch, start = divmod(place, size)
        end = min(size, start + stop - place)
        parts.append(shuffled(np.arange(start, end), epoch, seed, size))
        place += end - start
    return np.concatenate(parts).astype(np.int64), epochs


def epoch_offsets(epochs: np.ndarray, seed: int, length: int) -> np.ndarray:
    """A number in [0, length) for each epoch, int64 (n,): 0 in the first, then drawn by (seed, epoch)."""
    drawn = {epoch: int(_keys(seed ^ 0x57494E44, epoch, 1)[0]) % length if epoch else 0
             for epoch in np.unique(epochs).tolist()}
    return np.array([drawn[epoch] for epoch in epochs.tolist()], np.int64)


# ----------------------------------------------------------------------------------------------------- batches


def train_batch(records: Records, step: int, batch: int, seed: int, rows: slice = ALL) -> Batch:
    """The `rows` of the training batch of `step`, with `weight` (float32 ones) and `index` (numbers of the records)."""
    indices, epochs = (places[rows] for places in _train_places(step, batch, len(records), seed))
    return _numbered(_in_epoch(records, indices, epochs, seed), indices, np.ones(len(indices), np.float32))


def train_batches(records: Records, call: int, updates: int, batch: int, seed: int, rows: slice = ALL) -> Batch:
    """`train_batch` of the `updates` steps of call number `call`, as the first axis: their indices come at once."""
    indices, epochs = (places.reshape(updates, batch)[:, rows]
                       for places in _train_places(call, updates * batch, len(records), seed))
    flat = indices.ravel()
    found = _numbered(_in_epoch(records, flat, epochs.ravel(), seed), flat, np.ones(flat.size, np.float32))
    return {name: x.reshape(*indices.shape, *x.shape[1:]) for name, x in found.items()}


def _in_epoch(records: Records, indices: np.ndarray, epochs: np.ndarray, seed: int) -> Batch:
    return records.in_epoch(indices, epochs, seed) if hasattr(records, "in_epoch") else records[indices]


def reader(program: Any) -> Callable[[int], Batch]:
    """For a `lab.train.program.Program`: this process's rows of the training batch of a call, by the number of calls
    before.

    Where a call makes several updates, they are the first axis.
    """
    experiment, records = program.experiment, program.train_records
    own = {"batch": experiment.batch, "seed": experiment.seed, "rows": program.rows}
    if program.stacked:
        return lambda call: train_batches(records, call, experiment.steps_per_call, **own)
    return lambda call: train_batch(records, call, **own)


def eval_batches(records: Records, batch: int, limit: int | None = None, rows: slice = ALL) -> Iterator[Batch]:
    """Each record once, in order, in batches of one shape; the end is filled with the last record at weight 0.

    `limit`: use that many evenly spaced records instead of all. `rows`: this process's part of each batch.
    """
    size = len(records)
    count = size if limit is None else min(limit, size)
    if count < 1:
        raise UserError("There is no record to evaluate on.")
    chosen = np.arange(count, dtype=np.int64) * size // count
    for start in range(0, count, batch):
        place = np.arange(start, start + batch)[rows]
        weight = (place < count).astype(np.float32)
        indices = chosen[np.minimum(place, count - 1)]
        yield _numbered(records[indices], indices, weight)


def _numbered(batch: Batch, indices: np.ndarray, weight: np.ndarray) -> Batch:
    """The records with their `weight` and their `index`, from which the step makes their random keys."""
    return batch | {"weight": weight, "index": indices.astype(np.int32)}


class Prefetch(Generic[T]):
    """Iterate over make(start), ..., make(stop - 1), computed ahead by one background thread.

    `depth`: how many results may wait. An exception in `make` is raised where the result was expected. `wait_seconds`:
    how long the consumer was blocked so far. Use it in a `with` block or call `close`; both are safe at any time.
    """

    def __init__(self, make: Callable[[int], T], start: int, stop: int, depth: int = 2):
        self.wait_seconds = 0.0
        self._make, self._range, self._depth = make, range(start, stop), max(1, depth)
        self._ready: deque[T] = deque()
        self._change = threading.Condition()
        self._finished = self._closed = False
        self._error: BaseException | None = None
        # A daemon: a `make` that never returns must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        error = None
        try:
            for step in self._range:
                with self._change:
                    self._change.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                    if self._closed:
                        return
                result = self._make(step)
                with self._change:
                    self._ready.append(result)
                    self._change.notify_all()
        except BaseException as caught:  # raised again in the consumer's thread
            error = caught
        finally:
            with self._change:
                self._error, self._finished = error, True
                self._change.notify_all()

    def __iter__(self) -> "Prefetch[T]":
        return self

    def __next__(self) -> T:
        begin = time.perf_counter()
        with self._change:
            self._change.wait_for(lambda: self._ready or self._finished or self._closed)
            self.wait_seconds += time.perf_counter() - begin
            if self._closed:
                raise StopIteration
            if self._ready:
                self._change.notify_all()
                return self._ready.popleft()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self) -> None:
        """Stop the thread and drop what it prepared; waits at most a second for a `make` in progress."""
        with self._change:
            self._closed = True
            self._ready.clear()
            self._change.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
