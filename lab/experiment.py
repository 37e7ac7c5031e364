"""The experiment: one frozen value that, with a seed and a step, decides everything that a run computes.

An experiment holds objects, not names: ``Experiment(data=Text(...), model=GPT(...), task=LanguageModel(), ...)``.
Here are that value, what it must satisfy before any device is touched, its fingerprint, and its JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from lab.configuration.field_types import check_types, fields
from lab.configuration.limits import check_devices, check_numbers
from lab.configuration.rebuild import from_json
from lab.configuration.values import differences, digest, flat, override, to_json, value_at
from lab.errors import UserError
from lab.pretrained import Pretrained

__all__ = ["Checkpoint", "Evaluate", "Experiment", "Log", "Mesh", "check_types", "differences", "digest", "fields",
           "flat", "from_json", "override", "to_json", "value_at"]
ROOT = Path(__file__).resolve().parent.parent
HOW = {"fingerprint": False}  # marks fields that say how a run is carried out, not what it computes


@dataclass(frozen=True)
class Evaluate:
    """When and on what to evaluate, and when that is reason to stop."""

    every: int = 250
    """Updates between evaluations; there is always one before the first update and one at the end. 0: only those."""
    records: int | None = None
    """Records of the validation split to use, evenly spaced; None: all of it."""
    metric: str = "loss"
    """The validation metric that decides which checkpoint is the best, and early stopping."""
    mode: Literal["min", "max"] = "min"
    """Whether a small or a large value of the metric is good."""
    patience: int | None = None
    """Stop after this many evaluations in a row without a new best; None: never."""


@dataclass(frozen=True)
class Checkpoint:
    """Which states of a run are kept."""

    every: int = 250
    """Updates between checkpoints; there is always one at the end. 0: only that."""
    keep: int = 2
    """How many of the latest are kept."""
    permanent: int | None = None
    """Checkpoints at multiples of this many updates are never deleted; None: there are none such."""
    best: bool = True
    """Also save and keep the state with the best validation metric so far."""


@dataclass(frozen=True)
class Log:
    """What a run writes down while it goes."""

    every: int = 1
    """Write the metrics of every n-th update to metrics.jsonl."""


@dataclass(frozen=True)
class Mesh:
    """How devices are laid out. The result does not depend on it (up to the order of sums). See
    lab/parallel/sharding.py.

    One of the four may be -1: all devices that the others leave.
    """

    data: int = -1
    """Devices along the batch."""
    fsdp: int = 1
    """Devices along the batch that also divide parameters and optimizer state among them."""
    tensor: int = 1
    """Devices that divide attention heads, the hidden width of MLPs and the vocabulary."""
    sequence: int = 1
    """Devices that divide the length of a Transformer's activations."""
    rules: tuple[tuple[str, str], ...] = ()
    """Own rules before the project's: (regular expression for paths, axes of the last dimensions such as "-, fsdp")."""

    def validate(self) -> None:
        """Raises UserError for sizes that are none."""
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor, "sequence": self.sequence}
        for axis, size in sizes.items():
            if size != -1:
                _at_least(f"--mesh.{axis}", size, 1)
        if list(sizes.values()).count(-1) > 1:
            raise UserError("Only one of --mesh.data, --mesh.fsdp, --mesh.tensor and --mesh.sequence may be -1, all "
                            "the devices that the others leave.")
        check_devices(sizes)


@runtime_checkable
class DataPart(Protocol):
    """Data such as Text(...). Here is what nothing works without; see lab/data/messages/messages.py."""

    def record_spec(self) -> Mapping[str, tuple[tuple[int, ...], Any]]:
        """name -> shape and type of one record."""

    def load(self) -> Any:
        """The data: see lab/data/dataset.py."""


@runtime_checkable
class ModelPart(Protocol):
    """A Linen module such as GPT(...)."""

    def init(self, rngs: Any, *args: Any) -> Any:
        """Its variables."""

    def apply(self, variables: Any, *args: Any) -> Any:
        """What it computes."""


@runtime_checkable
class TaskPart(Protocol):
    """A task such as Classify(). See lab/tasks/base.py."""

    def loss(self, model: Any, variables: Any, batch: Any, rngs: Any, train: bool) -> tuple[Any, Any, Any, Any]:
        """(loss sum, weight, metrics, mutable collections) of a batch."""


@runtime_checkable
class OptimPart(Protocol):
    """An optimizer such as AdamW(...). See lab/optim/optimizers.py."""

    def build(self, steps: int) -> Any:
        """The optax transformation for a run of so many updates."""


@runtime_checkable
class StartPart(Protocol):
    """A beginning such as Pretrained(...). See lab/pretrained.py."""

    def frozen_rules(self) -> tuple[tuple[str, float], ...]:
        """(regular expression, 0.0) of parameters that are not updated, as multipliers of the learning rate."""


@dataclass(frozen=True)
class Experiment:
    """One training run, completely."""

    data: DataPart
    model: ModelPart
    task: TaskPart
    optim: OptimPart
    steps: int
    """Updates of the parameters; a run makes exactly this many."""
    batch: int
    """Records in an update, over all devices and microbatches."""
    grad_accum_steps: int = 1
    """Parts that the batch is computed in, one after another, to save memory. The result is the same up to rounding,
    and a run may go on with another number; except with dropout or batch statistics (BatchNorm), which belong to a
    part: there another number is another experiment."""
    steps_per_call: int = field(default=1, metadata=HOW)
    """Updates in one compiled call (a scan); more than 1 helps models so small that starting a step costs."""
    seed: int = 0
    """Decides initial weights, order of the data and dropout."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Compute type; parameters and optimizer state stay float32."""
    evaluate: Evaluate = Evaluate()
    init_from: StartPart = Pretrained()
    """Parameters to begin with instead of random ones, and which of them stay as they are."""
    checkpoint: Checkpoint = field(default=Checkpoint(), metadata=HOW)
    log: Log = field(default=Log(), metadata=HOW)
    mesh: Mesh = field(default=Mesh(), metadata=HOW)
    parallel: Literal["jit", "pmap"] = "jit"
    """How an update is spread over devices: by the compiler, or as plain data parallelism by jax.pmap. Where results
    depend on `grad_accum_steps` they depend on this, too."""
    exact: bool = False
    """The same bits on every number of devices that divides virtual_shards, at some cost (lab/train/gradients.py)."""
    virtual_shards: int = 8
    """Parts of a batch that are computed alone when exact; without, nothing reads it."""
    deterministic: bool = field(default=False, metadata=HOW)
    """The same bits every time on GPUs, at some cost; CPUs and TPUs give them anyway."""
    data_on_device: Literal["auto", "always", "never"] = field(default="auto", metadata=HOW)
    """Keep the training records on the devices and gather batches there; auto: on accelerators, where they fit."""

    @property
    def optimizer(self) -> Any:
        """The optimizer with the frozen parameters at rate 0."""
        frozen = self.init_from.frozen_rules()
        return (
            dataclasses.replace(self.optim, lr_multipliers=frozen + self.optim.lr_multipliers) if frozen else self.optim
        )

    def filled(self) -> Experiment:
        """The same with what follows from other fields: `model.vocab`, where it is None, is the tokenizer's.

        Reads the data where the tokenizer's size is not known without (`Chars`). Raises UserError where there is none.
        """
        if getattr(self.model, "vocab", 0) is not None:
            return self
        size = self.data.metadata().get("vocab") or self.data.load().metadata.get("vocab")
        if not size:
            raise UserError("--model.vocab follows the tokenizer where it is left out, but this data has none.")
        return dataclasses.replace(self, model=self.model.clone(vocab=size + getattr(self.model, "reserved_ids", 0)))

    def validate(self) -> None:
        """Checks all that can be checked without data and devices.

        Raises:
          UserError: names the field and what would be right.
        """
        check_types(self)
        check_numbers(flat(to_json(self)))
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed must be in [0, 2^32), not {self.seed}.")
        for name, least in (("steps", 1), ("batch", 1), ("grad_accum_steps", 1), ("steps_per_call", 1)):
            _at_least(f"--{name}", getattr(self, name), least)
        if self.batch % self.grad_accum_steps:
            raise UserError(f"--batch {self.batch} is not divisible by --grad-accum-steps {self.grad_accum_steps}.")
        _at_least("--evaluate.every", self.evaluate.every, 0)
        _at_least("--evaluate.records", self.evaluate.records, 1)
        _at_least("--evaluate.patience", self.evaluate.patience, 1)
        _at_least("--checkpoint.every", self.checkpoint.every, 0)
        _at_least("--checkpoint.keep", self.checkpoint.keep, 1)
        _at_least("--checkpoint.permanent", self.checkpoint.permanent, 1)
        _at_least("--log.every", self.log.every, 1)
        self._validate_parallel()
        for flag, value in (("--steps", self.steps), ("--evaluate.every", self.evaluate.every),
                            ("--checkpoint.every", self.checkpoint.every),
                            ("--checkpoint.permanent", self.checkpoint.permanent)):
            if (value or 0) % self.steps_per_call:
                raise UserError(f"{flag} {value} is not a multiple of --steps-per-call {self.steps_per_call}.")
        self.optim.validate(self.steps)
        for part in (self.data, self.model, self.task, self.init_from):
            if hasattr(part, "validate"):  # a user's model need not have it
                part.validate()
        check_model(self.model, self.data.metadata())

    def _validate_parallel(self) -> None:
        self.mesh.validate()
        _at_least("--virtual-shards", self.virtual_shards, 1)
        if self.parallel == "pmap" and (self.steps_per_call > 1 or self.data_on_device == "always" or self.exact):
            raise UserError(
                "--parallel pmap is for plain updates: leave out --steps-per-call, --data-on-device and --exact."
            )
        if self.exact and self.grad_accum_steps > 1:
            raise UserError(
                "--exact computes its virtual shards one after another already: leave out --grad-accum-steps."
            )
        if self.exact and self.batch % self.virtual_shards:
            raise UserError(f"--batch {self.batch} is not divisible by --virtual-shards {self.virtual_shards}.")

    def identity(self) -> dict[str, Any]:
        """JSON of what decides the result. How the work is divided does not, unless what is drawn or normalised in a
        part of the batch belongs to that part: see `Task.mixes_rows`.
        """
        whole, undivided = self._identities()
        mixes_rows = getattr(self.task, "mixes_rows", lambda *_: True)
        if whole == undivided or mixes_rows(self.model, self.data, self.precision):
            return whole
        return undivided

    def _identities(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """`identity` where how the batch is divided decides the result, and where it does not."""
        value = to_json(self, identity=True)
        if not self.exact:
            del value["virtual_shards"]
        alone = {name for name, one in (("grad_accum_steps", 1), ("parallel", "jit")) if getattr(self, name) == one}
        return tuple({name: item for name, item in value.items() if name not in left_out}
                     for left_out in (alone, {"grad_accum_steps", "parallel"}))

    def may_be(self, fingerprint: str) -> bool:
        """Whether this experiment can have a fingerprint, as far as can be said without tracing its model."""
        return fingerprint in map(digest, self._identities())

    def fingerprint(self) -> str:
        """12 hexadecimal digits of what this run computes: the same in every process and on every Python version."""
        return digest(self.identity())


def check_model(model: Any, metadata: Mapping[str, Any]) -> None:
    """Raises UserError where a model that can tell does not fit data with these metadata."""
    if hasattr(model, "check"):
        model.check(metadata)


def _at_least(flag: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise UserError(f"{flag} must be at least {least}, not {value}.")
