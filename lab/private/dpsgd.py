"""DP-SGD (Abadi et al., "Deep learning with differential privacy", 2016) for any task whose loss sums over records.

Each record's gradient is clipped to a norm; the clipped gradients are added over microbatches and devices; the noise is
drawn once for the total, from (seed, step). What the optimizer gets is (sum + noise) / (expected records of a batch).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lab.errors import UserError
from lab.pretrained import Private
from lab.private import accountant, sampling
from lab.tasks.adversarial import Adversarial

SLACK = 1e-3  # of delta: what the cap on Poisson batches may add to it, over the whole run


@dataclass(frozen=True)
class DPSGD(Private):
    """Private training: (epsilon, delta)-differential privacy of the training records, for whoever sees the model.

    Give `noise_multiplier`, `target_epsilon`, or both. The target alone sets the noise so that `steps` spend it; with
    both, the run ends before the step that would pass the target. With Poisson sampling `batch` is the room for a
    batch: rows that were not drawn have weight 0.
    """

    noise_multiplier: float | None = None
    """Standard deviation of the noise on the sum of clipped gradients, in units of clip_norm."""
    target_epsilon: float | None = None
    """The privacy budget."""
    clip_norm: float = 1.0
    """L2 norm to which each record's gradient is clipped; that of its mean loss."""
    delta: float = 1e-5
    """Probability with which epsilon may not hold; below 1 / records."""
    sampling: Literal["poisson", "shuffle"] = "poisson"
    """poisson: each record is in each batch with the same probability, independently. shuffle: the usual epochs,
    accounted without amplification by sampling."""
    expected_batch: int | None = None
    """Records of a Poisson batch on average; None: as many as leave the cap `batch` practically unused."""
    public: bool = False
    """Values fitted to the training records (means, vocabularies) are public knowledge, so fitting costs no privacy."""
    records: int | None = None
    """Number of training records; filled in from the data."""

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        for name, value in (("noise_multiplier", self.noise_multiplier), ("target_epsilon", self.target_epsilon),
                            ("clip_norm", self.clip_norm), ("expected_batch", self.expected_batch)):
            if isinstance(value, int | float) and not value > 0:
                raise UserError(f"--private.{name.replace('_', '-')} must be above 0, not {value}.")
        if not 0 < self.delta < 1:
            raise UserError(f"--private.delta must be between 0 and 1, not {self.delta}.")
        if self.noise_multiplier is None and self.target_epsilon is None:
            raise UserError("DPSGD needs --private.noise-multiplier, --private.target-epsilon, or both.")

    def filled(self, experiment: Any) -> DPSGD:
        """With all numbers set. Loads the data for their count."""
        self.validate()
        if None not in (self.records, self.expected_batch, self.noise_multiplier):
            return self
        records, batch, steps = self.records or len(experiment.data.load().train), experiment.batch, experiment.steps
        if self.sampling == "shuffle":
            expected = batch
        else:
            expected = self.expected_batch or accountant.largest_expected(records, batch, SLACK * self.delta / steps)
        found = replace(self, records=records, expected_batch=expected)
        if self.noise_multiplier is not None:
            return found
        try:
            noise = accountant.noise_for(self.target_epsilon, found.rate, found.releases(steps), self.delta)
        except ValueError as e:
            raise UserError(f"--private.target-epsilon {self.target_epsilon} cannot be kept: {e}. Fewer --steps, a "
                            f"smaller --private.expected-batch or more records.") from None
        return replace(found, noise_multiplier=noise)

    @property
    def rate(self) -> float:
        """The probability of a record to be in a batch, as accounted."""
        return 1.0 if self.sampling == "shuffle" else self.expected_batch / self.records

    def releases(self, steps: int) -> int:
        """How often a record may be used in so many steps, as accounted: at `rate`."""
        return -(-steps * self.expected_batch // self.records) if self.sampling == "shuffle" else steps

    def epsilon(self, steps: int) -> float:
        """The privacy spent after so many steps."""
        return accountant.epsilon(self.rate, self.noise_multiplier, self.releases(steps), self.delta)

    def last_step(self, steps: int, stride: int) -> int:
        """The last of `steps` steps within the budget, a multiple of `stride` (steps of one call)."""
        if self.target_epsilon is None or self.epsilon(steps) <= self.target_epsilon:
            return steps
        low, high = 0, steps // stride
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.epsilon(middle * stride) <= self.target_epsilon else (low, middle - 1)
        return low * stride

    def check(self, experiment: Any, data: Any, state: Any) -> None:
        """Raises UserError for what is not private, or cannot be accounted. `state`: its shapes."""
        if jax.tree.leaves(state.model_state):
            raise UserError("Private training is not for models with batch statistics (BatchNorm): a record would "
                            "change the gradients of others. Choose another normalisation, such as --model.norm group "
                            "or --model.no-batch-norm.")
        if isinstance(experiment.task, Adversarial):
            raise UserError("Private training needs a loss that is a sum over records, which a GAN's is not.")
        if hasattr(data.train, "in_epoch"):
            raise UserError("Private training needs records that are the same in every epoch; the windows of this text "
                            "move. A data set of messages or dialogues has such records.")
        if len(data.train) != self.records:
            raise UserError(f"--private.records is {self.records}, and there are {len(data.train):,} training "
                            f"records. Leave it out.")
        if self.delta >= 1 / self.records:
            raise UserError(f"--private.delta {self.delta:g} must be below 1 / {self.records:,} records: with a larger "
                            f"one, publishing a record at random would count as private.")
        if (what := sampling.fitted(experiment.data)) and not self.public:
            raise UserError(f"This data fits {what} to the training records, which is not private. If these values are "
                            f"public knowledge, say so with --private.public; or set them yourself.")
        if self.sampling == "shuffle" and self.records % experiment.batch:
            raise UserError(f"With --private.sampling shuffle, --batch {experiment.batch} must divide the "
                            f"{self.records:,} records: a batch across two epochs could have a record twice.")
        if self.sampling == "poisson" and self.expected_batch > experiment.batch:
            raise UserError(f"--private.expected-batch {self.expected_batch} is above --batch {experiment.batch}, the "
                            f"room for a batch.")
        if self.cut(experiment) > self.delta:
            raise UserError(f"Batches of {self.expected_batch} records on average would pass --batch "
                            f"{experiment.batch} too often. Give more room: --batch, or a smaller "
                            f"--private.expected-batch.")
        if self.last_step(experiment.steps, experiment.steps_per_call) == 0:
            raise UserError(f"The first step already spends epsilon {self.epsilon(1):.3g}, above "
                            f"--private.target-epsilon {self.target_epsilon:g}. Raise --private.noise-multiplier.")

    def cut(self, experiment: Any) -> float:
        """The probability that any Poisson batch of a run is larger than `batch`, and cut off."""
        if self.sampling == "shuffle":
            return 0.0
        return experiment.steps * accountant.overflow(self.records, self.expected_batch, experiment.batch)

    def describe(self, experiment: Any) -> str:
        """A line or two on the privacy of a run."""
        last = self.last_step(experiment.steps, experiment.steps_per_call)
        early = f", where the budget ends it (of {experiment.steps:,})" if last < experiment.steps else ""
        drawn = (f"epochs in random order, batches of {self.expected_batch}" if self.sampling == "shuffle" else
                 f"Poisson batches of {self.expected_batch} on average, at most {experiment.batch} (cut off in a run "
                 f"with probability {self.cut(experiment):.1g})")
        return (f"Private: epsilon {self.epsilon(last):.4g} at delta {self.delta:g} after {last:,} steps{early}. Noise "
                f"multiplier {self.noise_multiplier:g}, clip norm {self.clip_norm:g}; {self.records:,} records, "
                f"{drawn}.")

    def spent(self, steps: int) -> dict[str, float]:
        """What result.json says."""
        return {"epsilon": self.epsilon(steps), "delta": self.delta, "noise_multiplier": self.noise_multiplier,
                "clip_norm": self.clip_norm, "sampling_rate": self.rate, "releases": self.releases(steps)}

    def reader(self, program: Any) -> Callable[[int], dict[str, Any]] | None:
        """As `lab.data.pipeline.reader`, for Poisson batches; None: the usual batches."""
        return sampling.reader(program, self.rate) if self.sampling == "poisson" else None

    def protected(self, sums: Callable[..., Any], key: Array) -> Callable[..., Any]:
        """The `SumGradients` (lab/train/step.py) of clipped gradients, plus noise. `key`: of the noise.

        The weight is the expected number of records, since that of the drawn ones is not private. A record's random
        numbers depend on its number in place of the microbatch's, so that microbatches do not change the result.
        """
        def sum_gradients(gradient: Callable[..., Any], state: Any, batch: Any) -> Any:
            grads, (_, metrics, model_state) = sums(self._clipped(gradient), state, batch)
            key_of_step = jax.random.fold_in(key, state.step)

            def noisy(path: Any, g: Array) -> Array:
                own = jax.random.fold_in(key_of_step, zlib.crc32(jax.tree_util.keystr(path).encode()))
                return g + self.noise_multiplier * self.clip_norm * jax.random.normal(own, g.shape, g.dtype)

            return jax.tree.map_with_path(noisy, grads), (jnp.float32(self.expected_batch), metrics, model_state)

        return sum_gradients

    def _clipped(self, gradient: Callable[..., Any]) -> Callable[..., Any]:
        """The gradient function of lab/train/step.py with each record's gradient clipped."""
        def clipped(params: Any, model_state: Any, rows: Any, step: Array, part: Any) -> Any:
            def one(row: Any) -> Any:
                grads, (weight, metrics, _) = gradient(params, model_state, jax.tree.map(lambda x: x[None], row), step,
                                                       row["index"])
                return jax.tree.map(lambda g: g / jnp.where(weight > 0, weight, 1), grads), weight, metrics

            grads, weight, metrics = jax.vmap(one)(rows)
            leaves, tree = jax.tree.flatten(grads)
            total, count = optax.per_example_global_norm_clip(leaves, self.clip_norm)
            sums = jax.tree.map(lambda x: x.sum(0), (weight, metrics))
            clipped = {"clipped": (count.astype(jnp.float32), rows["weight"].sum())}
            return jax.tree.unflatten(tree, total), (sums[0], sums[1] | clipped, model_state)

        return clipped
