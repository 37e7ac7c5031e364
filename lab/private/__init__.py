"""Differentially private training: DPSGD as a value, its accountant and its sampling. README.md says more."""

from lab.private.dpsgd import DPSGD

__all__ = ["DPSGD"]
