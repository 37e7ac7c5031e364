"""Log-likelihoods of token rows whose bits depend on the row alone: not on the batch, its order or its padding.

A compiler may compute a row in another order of summation in a batch of another shape. Here the shape follows from the
row: its length decides the length that it is padded to, which decides how many rows are computed together (a
microbatch, filled up with empty rows). A larger batch is more microbatches under `lax.map`, and more devices are more
of the same program under `shard_map`.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax import Array
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec

log = logging.getLogger(__name__)
SHORTEST = 8
ROWS = PartitionSpec("rows")


@dataclass(frozen=True)
class Language:
    """A language model with its tokenizer, and the devices that share its work."""

    model: Any
    """Token ids (B, L) -> logits (B, L, V), such as GPT."""
    variables: Any
    text: Any
    """The tokenizer: see `lab.data.tokenizers.Fitted`."""
    batch: int | None = None
    """Rows per call over all devices, rounded up to whole microbatches; None: one microbatch per device."""

    @functools.cached_property
    def mesh(self) -> Mesh:
        """All devices of all processes, in one axis."""
        return Mesh(np.array(jax.devices()), ("rows",))

    @functools.cached_property
    def placed(self) -> Any:
        """The variables, on every device."""
        return jax.device_put(self.variables, NamedSharding(self.mesh, PartitionSpec()))

    @property
    def context(self) -> int:
        """The most tokens that the model sees."""
        return self.model.context

    def put(self, rows: np.ndarray) -> Array:
        """An array whose leading axis is divided among the devices. Every process passes all rows."""
        return jax.make_array_from_callback(rows.shape, NamedSharding(self.mesh, ROWS), lambda index: rows[index])

    @functools.cached_property
    def memory(self) -> int:
        """Bytes for one call on a device: an eighth of a GPU's or TPU's memory. On CPUs 512 MiB (or a 32nd of the
        machine's memory): more is no faster, and all CPUs with 16 GiB compute the same bits."""
        stats = self.mesh.local_devices[0].memory_stats() if self.on_accelerator else None
        if stats and "bytes_limit" in stats:
            return stats["bytes_limit"] // 8
        return 4 << 30 if self.on_accelerator else min(512 << 20, psutil.virtual_memory().total // 32)

    @property
    def on_accelerator(self) -> bool:
        """Whether the devices are GPUs or TPUs."""
        return self.mesh.devices.flat[0].platform != "cpu"


def padded_length(tokens: int, context: int) -> int:
    """The length that a row is padded to: 2^n or 3 * 2^n, at least 8, at most the context."""
    length = SHORTEST
    while length < tokens:
        length = length * 3 // 2 if length & (length - 1) == 0 else length // 3 * 4
    return min(length, context)


def together(language: Language, length: int) -> int:
    """How many rows of this padded length are computed together: a power of two, by the device's memory.

    Depends on no other rows, so that neither does a row's result. Float32: logits and what the log-softmax makes of
    them (3 V per token), a block's hidden states (16 D) and attention scores (2 N per pair of tokens).
    """
    model, tokens = language.model, 16384 if language.on_accelerator else 512  # enough to keep a device busy
    width, heads = getattr(model, "width", 0), getattr(model, "heads", 0)  # a model of a user's own may lack them
    one = 4 * length * (3 * model.vocab + 16 * width + 2 * heads * length)
    return 1 << max(min(language.memory // one, tokens // length), 1).bit_length() - 1


@functools.partial(jax.jit, static_argnames=("model", "mesh", "rows"))
def _scores(variables: Any, tokens_BT: Array, *, model: Any, mesh: Mesh, rows: int) -> tuple[Array, Array]:
    """(log-probabilities, whether greedy) of all tokens but the first, (B, L) of (B, L + 1); `rows` at a time."""
    def one(variables: Any, tokens_RT: Array) -> tuple[Array, Array]:
        logits_RLV, targets_RL = model.apply(variables, tokens_RT[:, :-1], train=False), tokens_RT[:, 1:]
        own_RL = jnp.take_along_axis(logits_RLV, targets_RL[..., None], -1)[..., 0]
        return own_RL - jax.nn.logsumexp(logits_RLV, -1), jnp.argmax(logits_RLV, -1) == targets_RL

    def on_device(variables: Any, tokens_BT: Array) -> tuple[Array, Array]:
        parts = tokens_BT.reshape(-1, rows, tokens_BT.shape[-1])
        return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), jax.lax.map(lambda x: one(variables, x), parts))

    return jax.shard_map(on_device, mesh=mesh, in_specs=(PartitionSpec(), ROWS), out_specs=ROWS,
                         check_vma=False)(variables, tokens_BT)


def score(language: Language, rows: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(natural log-probabilities float32, whether each is the largest) of the tokens of each row after its first,
    (n - 1,) each. A row has 2 to context + 1 tokens.
    """
    found: list[Any] = [None] * len(rows)
    done, progress = 0, Progress()
    for length, places in by_length([len(row) - 1 for row in rows], language.context):
        size = together(language, length)
        for chosen in batches(places, calls(size, language)):
            tokens = np.zeros((calls(size, language), length + 1), np.int32)
            for row, place in zip(tokens, chosen, strict=False):
                row[: len(rows[place])] = rows[place]
            values = process_allgather(_scores(language.placed, language.put(tokens), model=language.model,
                                               mesh=language.mesh, rows=size), tiled=True)
            for i, place in enumerate(chosen):
                found[place] = tuple(x[i, : len(rows[place]) - 1] for x in values)
            done += len(chosen)
            progress(f"scored {done:,} of {len(rows):,} texts")
    return found


class Progress:
    """Logs a line, at most every `seconds`."""

    def __init__(self, seconds: float = 15.0):
        self.seconds, self.last = seconds, time.monotonic()

    def __call__(self, line: str) -> None:
        if time.monotonic() - self.last >= self.seconds:
            log.info(line)
            self.last = time.monotonic()


def calls(size: int, language: Language) -> int:
    """Rows of one call: whole microbatches of `size` rows on every device."""
    each = size * language.mesh.size
    return each * max(-(-(language.batch or each) // each), 1)


def by_length(lengths: Sequence[int], context: int) -> Iterator[tuple[int, list[int]]]:
    """(padded length, indices of its rows from long to short), the longest first: memory runs out at once or never."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for length in sorted({padded_length(n, context) for n in lengths}, reverse=True):
        yield length, [i for i in order if padded_length(lengths[i], context) == length]


def batches(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive parts of at most this size."""
    for first in range(0, len(places), size):
        yield places[first: first + size]
