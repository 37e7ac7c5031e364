"""Optimizers and learning-rate schedules."""

from lab.optim.adafactor import Adafactor
from lab.optim.lion import Lion
from lab.optim.muon import Muon
from lab.optim.optimizers import Adam, AdamW, Optimizer
from lab.optim.prune import Prune
from lab.optim.schedule_free import ScheduleFreeAdamW
from lab.optim.schedules import Constant, Cosine, InverseSqrt, LinearDecay, Schedule, WarmupStableDecay
from lab.optim.sgd import SGD
from lab.optim.wrapped import Optax

__all__ = ["SGD", "Adafactor", "Adam", "AdamW", "Constant", "Cosine", "InverseSqrt", "LinearDecay", "Lion", "Muon",
           "Optax", "Optimizer", "Prune", "Schedule", "ScheduleFreeAdamW", "WarmupStableDecay"]
