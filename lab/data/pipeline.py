"""Records to batches, as a function of (seed, step): no state, so resuming is exact on any number of hosts.

*Records* have `len(r)` and `r[indices] -> dict of arrays` (indices: int array (n,), leading axes n). Records that
depend on the training epoch also have `r.in_epoch(indices, epochs, seed)` (`lab.data.text.text`).

Speed (2-core CPU VM, busy, 2026-11-22): 512 windows of 1024 tokens, gpt_small's batch, from a memory-mapped token file
of 559 MB: `train_batch` makes 220-350 Mtok/s, 77-280 through `Prefetch`; 8-45 when the file is not in the page cache.
For comparison, at 55 % MFU (860 MFLOP per token) one H200 consumes 0.63 Mtok/s, and a v5e-8 1.0.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from lab.data.order import epoch_keys, shuffled
from lab.errors import UserError

Batch = dict[str, np.ndarray]
ALL = slice(None)


class Records(Protocol):
    """Records of a data set; the top of this file says what they must have."""

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


def train_indices(step: int, batch: int, size: int, seed: int) -> np.ndarray:
    """The records of one training batch, int64 (batch,). `step`: number of completed steps, from 0.

    Row i is at position step * batch + i in the infinite stream of epochs. Each epoch has each record once, in its own
    order. A batch may span two epochs.
    """
    return _train_places(step, batch, size, seed)[0]


def _train_places(step: int, batch: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`train_indices`, and the epoch of each."""
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
    """An offset in [0, length) per epoch, int64 (n,): 0 in the first, then drawn from (seed, epoch)."""
    drawn = {epoch: int(epoch_keys(seed ^ 0x57494E44, epoch, 1)[0]) % length if epoch else 0
             for epoch in np.unique(epochs).tolist()}
    return np.array([drawn[epoch] for epoch in epochs.tolist()], np.int64)


# ----------------------------------------------------------------------------------------------------- batches


def train_batch(records: Records, step: int, batch: int, seed: int, rows: slice = ALL) -> Batch:
    """The `rows` of the training batch of `step`, with `weight` (float32 ones) and `index` (numbers of the records)."""
    indices, epochs = (places[rows] for places in _train_places(step, batch, len(records), seed))
    return _numbered(_in_epoch(records, indices, epochs, seed), indices, np.ones(len(indices), np.float32))


def train_batches(records: Records, call: int, steps: int, batch: int, seed: int, rows: slice = ALL) -> Batch:
    """The `train_batch`es of the `steps` steps of call `call`, stacked on a first axis; computes indices once."""
    indices, epochs = (places.reshape(steps, batch)[:, rows]
                       for places in _train_places(call, steps * batch, len(records), seed))
    flat = indices.ravel()
    found = _numbered(_in_epoch(records, flat, epochs.ravel(), seed), flat, np.ones(flat.size, np.float32))
    return {name: x.reshape(*indices.shape, *x.shape[1:]) for name, x in found.items()}


def _in_epoch(records: Records, indices: np.ndarray, epochs: np.ndarray, seed: int) -> Batch:
    return records.in_epoch(indices, epochs, seed) if hasattr(records, "in_epoch") else records[indices]


def reader(program: Any) -> Callable[[int], Batch]:
    """For a `lab.train.program.Program`: a function from a call's number (from 0) to this process's rows of its
    training batch, with an axis of steps first if a call makes several."""
    experiment, records = program.experiment, program.train_records
    if experiment.private is not None and (private := experiment.private.reader(program)):
        return private
    own = {"batch": experiment.batch, "seed": experiment.seed, "rows": program.rows}
    if program.stacked:
        return lambda call: train_batches(records, call, experiment.steps_per_call, **own)
    return lambda call: train_batch(records, call, **own)


def eval_batches(records: Records, batch: int, limit: int | None = None, rows: slice = ALL) -> Iterator[Batch]:
    """Each record once, in order, in batches of one shape; the last batch is padded with the last record at weight 0.

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
    """The batch with `weight` and `index`; the step derives the records' random keys from `index`."""
    return batch | {"weight": weight, "index": indices.astype(np.int32)}
