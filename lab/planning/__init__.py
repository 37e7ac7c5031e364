"""Ahead-of-time compilation for other machines: memory, collectives, time bounds."""
