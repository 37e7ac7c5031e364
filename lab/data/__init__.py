"""Data components: where records come from and how they become batches. Nothing here imports JAX at module level."""

import hashlib
import json
import logging

from lab.files import cache_folder

__all__ = ["cache_folder", "digest", "log"]
log = logging.getLogger("lab.data")


def digest(*parts: object) -> str:
    """A short, stable hash (16 hex digits of sha256) of a sequence of plain values."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()[:16]
