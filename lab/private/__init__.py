"""Differentially private training: DPSGD as a value, its accountant and its sampling; canaries. README.md says more."""

from lab.private.canaries import Canaries
from lab.private.dpsgd import DPSGD

__all__ = ["DPSGD", "Canaries"]
