"""A custom model, task and data set in one file: a gated recurrent network classifies three kinds of waves.

    ./launch.sh experiments/own_parts.py
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lab.data.dataset import Data, Dataset
from lab.data.pipeline import Arrays
from lab.experiment import Evaluate, Experiment
from lab.optim import AdamW, Cosine
from lab.tasks.base import Task, apply


@dataclass(frozen=True)
class Waves(Data):
    """Noisy sine, square and sawtooth waves: "inputs" float32 (64, 1), "targets" int32 (), the class."""

    def load(self) -> Dataset:
        random, kind = np.random.default_rng(0), np.arange(1500, dtype=np.int32) % 3
        t = np.linspace(0, random.uniform(2, 5, 1500), 64, axis=1) + random.uniform(size=(1500, 1))
        waves = np.stack([np.sin(2 * np.pi * t), np.sign(np.sin(2 * np.pi * t)), 2 * (t % 1) - 1])
        x = waves[kind, np.arange(1500)] + 0.5 * random.normal(size=t.shape)
        splits = [Arrays({"inputs": x[part, :, None].astype(np.float32), "targets": kind[part]})
                  for part in (slice(300, None), slice(150, 300), slice(150))]
        return Dataset(*splits, classes=("sine", "square", "sawtooth"))


class MinGRU(nn.Module):
    """(B, L, 1) -> logits (B, 3): h_t = (1 - z_t) h_(t-1) + z_t c_t, all steps in parallel (Feng et al. 2024)."""

    width: int = 32

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
        x = nn.gelu(nn.Conv(self.width, (5,), name="conv")(inputs))
        z, c = nn.sigmoid(nn.Dense(self.width, name="gate")(x)), nn.Dense(self.width, name="candidate")(x)
        _, h = jax.lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (1 - z, z * c), axis=1)
        return nn.Dense(3, name="out")(nn.gelu(h).mean(1))


@dataclass(frozen=True)
class Focal(Task):
    """Focal loss (Lin et al. 2017): down-weights records that the model classifies confidently."""
    def loss(self, model, variables, batch, rngs, train):
        logits, extra = apply(model, variables, batch["inputs"], rngs=rngs, train=train)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][:, None], axis=1)[:, 0]
        loss, right = -(1 - jnp.exp(logp)) * logp, logits.argmax(-1) == batch["targets"]
        total, n, hits = ((x * batch["weight"]).sum() for x in (loss, jnp.ones_like(loss), right))
        return total, n, {"loss": (total, n), "accuracy": (hits, n)}, extra


experiment = local = Experiment(
    data=Waves(), model=MinGRU(), task=Focal(), optim=AdamW(lr=Cosine(1e-2, warmup=20)), steps=200, batch=64,
    evaluate=Evaluate(every=50, metric="accuracy", mode="max"))
