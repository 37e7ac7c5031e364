"""A lower bound on the time of a step on given chips (roofline model, Williams et al. 2009)."""

from __future__ import annotations

from dataclasses import dataclass

from lab.planning.topologies import Topology


@dataclass(frozen=True)
class Roofline:
    """Minimum seconds per step of each resource, at the vendor's peak rates."""

    compute: float
    """Matmuls and convolutions."""
    memory: float
    """Traffic of each device's memory."""
    network: float
    """Bytes sent by each device, over all its links in parallel."""

    @property
    def seconds(self) -> float:
        """Lower bound: the maximum, which assumes perfect overlap. Real steps are slower."""
        return max(self.compute, self.memory, self.network)

    @property
    def one_by_one(self) -> float:
        """The sum, which assumes no overlap."""
        return self.compute + self.memory + self.network

    @property
    def limit(self) -> str:
        """The name of the bottleneck."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


def roofline(topology: Topology, precision: str, flops: float, traffic: float, sent: float) -> Roofline | None:
    """The bound for one step; None for chips with unknown peaks.

    Args:
      topology: the devices.
      precision: the compute dtype, which determines the peak.
      flops: floating-point operations of all devices together, recomputation included.
      traffic: bytes that each device reads and writes.
      sent: bytes that each device sends.
    """
    chip = topology.chip
    if chip.flops is None or chip.bandwidth is None:
        return None
    network = sent / topology.network if topology.network else 0.0
    return Roofline(flops / (topology.devices * chip.flops[precision]), traffic / chip.bandwidth, network)


def mfu(topology: Topology, precision: str, flops: float, seconds: float) -> float:
    """Model FLOPs utilisation (PaLM, Chowdhery et al. 2022): `flops` (without recomputation) / (peak x `seconds`).

    Requires a chip with known peaks.
    """
    return flops / (topology.devices * topology.chip.flops[precision] * seconds)
