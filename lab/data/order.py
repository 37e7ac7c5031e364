"""The order of records in an epoch, as a function of (seed, epoch, position)."""

import math
from types import ModuleType
from typing import Any

import numpy as np

FEW = 1 << 12  # below this many records the digits are small, and the order needs more rounds to look random


def _mix(x: int) -> int:
    """A 32-bit integer hash (C. Wellons' lowbias32), for the round keys."""
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def epoch_keys(seed: int, epoch: int, rounds: int) -> list[np.uint32]:
    """`rounds` hashes of (seed, epoch)."""
    key = 0
    for part in (seed, seed >> 32, epoch, epoch >> 32):
        key = _mix(key ^ (part & 0xFFFFFFFF)) + 1 & 0xFFFFFFFF
    return [np.uint32(_mix(key + r * 0x9E3779B9 & 0xFFFFFFFF)) for r in range(rounds)]


def shuffled(position: Any, epoch: int, seed: int, size: int, xp: ModuleType = np) -> Any:
    """The record at `position` in the order of `epoch`: a seeded permutation of [0, size).

    The generalised Feistel network of Black & Rogaway ("Ciphers with arbitrary finite domains", CT-RSA 2002; the idea
    is Luby & Rackoff's). A number below a * b, where a and b are about sqrt(size), is a pair of digits, and each round
    adds a hash of one digit to the other. Results outside [0, size) are permuted again ("cycle-walking"). Only uint32
    arithmetic is used, so the order does not depend on NumPy's version, takes no memory, and `xp` may be `jax.numpy`
    (outside of jit). `position`: integer or integer array; the result is uint32 of the same shape.
    """
    if not 1 <= size <= 2**32 - 2**17:  # a * b must not wrap around
        raise ValueError(f"size {size} is not in [1, 2**32 - 2**17]")
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    sides = np.uint32(a), np.uint32(b)
    keys = epoch_keys(seed, epoch, 12 if size < FEW else 8)
    one, half, last = np.uint32(1), np.uint32(16), np.uint32(size - 1)
    first, second = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)

    def network(x: Any) -> Any:
        digits = [x // sides[1], x % sides[1]]
        for r, key in enumerate(keys):
            this = r % 2  # the digit to change; the other one is hashed
            h = (digits[1 - this] ^ key) * first
            h = (h ^ (h >> half)) * second
            h = (h ^ (h >> half)) >> one  # a product's high bits are the random ones; shift once more so the sum fits
            digits[this] = (digits[this] + h) % sides[this]
        return digits[0] * sides[1] + digits[1]

    # At least one axis: NumPy warns when *scalars* wrap around.
    x = network(xp.atleast_1d(xp.asarray(position, dtype=xp.uint32)))
    while bool((x > last).any()):
        x = xp.where(x > last, network(x), x)
    return x.reshape(np.shape(position))


def fixed_order(size: int) -> np.ndarray:
    """An order of `size` records, int64 (size,), equal in all runs, which assigns records to splits."""
    return shuffled(np.arange(size), 0, 0, size).astype(np.int64)
