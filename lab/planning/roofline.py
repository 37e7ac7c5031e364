"""The least time that an update can take on given chips (roofline, Williams et al. 2009)."""

from __future__ import annotations

from dataclasses import dataclass

from lab.planning.topologies import Topology


@dataclass(frozen=True)
class Roofline:
    """Seconds that one update takes at the least, by what has to be done; each at the maker's peak."""

    compute: float
    """Matrix products and convolutions."""
    memory: float
    """Bytes through every device's memory."""
    network: float
    """Bytes over every device's links, all of them at once."""

    @property
    def seconds(self) -> float:
        """The largest: everything else is hidden behind it. No real update is as fast."""
        return max(self.compute, self.memory, self.network)

    @property
    def one_by_one(self) -> float:
        """The sum: nothing is hidden behind anything."""
        return self.compute + self.memory + self.network

    @property
    def limit(self) -> str:
        """The name of the largest."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


def roofline(topology: Topology, precision: str, flops: float, traffic: float, sent: float) -> Roofline | None:
    """The bound for one update; None for chips whose peaks are unknown.

    Args:
      topology: the devices.
      precision: the compute type, which decides the peak.
      flops: floating-point operations of all devices together, recomputation included.
      traffic: bytes that each device reads and writes.
      sent: bytes that each device sends to others.
    """
    chip = topology.chip
    if chip.flops is None or chip.bandwidth is None:
        return None
    network = sent / topology.network if topology.network else 0.0
    return Roofline(flops / (topology.devices * chip.flops[precision]), traffic / chip.bandwidth, network)


def mfu(topology: Topology, precision: str, flops: float, seconds: float) -> float:
    """Model FLOPs utilisation (PaLM, Chowdhery et al. 2022): `flops` without recomputation, over peak x `seconds`.

    Only for chips whose peaks are known.
    """
    return flops / (topology.devices * topology.chip.flops[precision] * seconds)
