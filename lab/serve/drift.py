"""Whether what is asked and answered still looks like the training data; for /metrics."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lab.data.statistics import Bins, stability

KEPT = 1000  # records, the latest
FEWEST = 100  # records for a number that says more than chance does


class Drift:
    """The latest values of each feature. A request only leaves its values here; they are compared when /metrics asks.

    Args:
      expected: feature -> its bins in training, see `lab.data.statistics`.
    """

    def __init__(self, expected: Mapping[str, Bins]):
        self._expected = expected
        self._latest: dict[str, deque[Any]] = {name: deque(maxlen=KEPT) for name in expected}

    def saw(self, values: Mapping[str, Sequence[Any]]) -> None:
        """Values of some records, by feature; unknown features are left out."""
        for name in self._latest.keys() & values.keys():
            self._latest[name].extend(values[name])

    def gauges(self) -> Iterator[tuple[str, Callable[[], float]]]:
        """(feature, its population stability index now; NaN for too few records)."""
        for name in self._expected:
            yield name, lambda name=name: self._index(name)

    def _index(self, name: str) -> float:
        latest = list(self._latest[name])
        return stability(self._expected[name], latest) if len(latest) >= FEWEST else math.nan
