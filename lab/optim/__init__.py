"""Optimizers and learning-rate schedules."""

from lab.optim.optimizers import SGD, Adafactor, Adam, AdamW, Lion, Muon, Optax, Optimizer, ScheduleFreeAdamW
from lab.optim.schedules import Constant, Cosine, InverseSqrt, LinearDecay, Schedule, WarmupStableDecay

__all__ = [
    "SGD",
    "Adafactor",
    "Adam",
    "AdamW",
    "Lion",
    "Muon",
    "Optax",
    "Optimizer",
    "ScheduleFreeAdamW",
    "Constant",
    "Cosine",
    "InverseSqrt",
    "LinearDecay",
    "Schedule",
    "WarmupStableDecay",
]
