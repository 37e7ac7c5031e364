"""Experiments as values: type checks, limits, JSON."""
