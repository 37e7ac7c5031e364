"""The experiment: one frozen dataclass that, with a seed and a step, determines everything a run computes.

An experiment holds objects, not names: ``Experiment(data=Text(...), model=GPT(...), task=LanguageModel(), ...)``.
This file has the dataclass, the checks that need no device, and the fingerprint; lab/configuration has the JSON form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lab.configuration.field_types import check_types
from lab.configuration.limits import check_devices, check_numbers, check_parallel
from lab.configuration.protocols import DataPart, HarnessPart, ModelPart, OptimPart, StartPart, TaskPart
from lab.configuration.values import digest, flat, to_json
from lab.errors import UserError
from lab.pretrained import Adapt, Pretrained, Private

HOW = {"fingerprint": False}  # marks fields that change how a run executes, not what it computes


@dataclass(frozen=True)
class Evaluate:
    """When and on which records to evaluate, and when to stop early."""

    every: int = 250
    """Steps between evaluations. A run always evaluates before the first step and at the end; 0: only then."""
    records: int | None = None
    """Validation records to use, evenly spaced; None: all."""
    metric: str = "loss"
    """Validation metric that selects the best checkpoint and drives early stopping."""
    mode: Literal["min", "max"] = "min"
    """Whether a lower (min) or a higher (max) metric is better."""
    patience: int | None = None
    """Stop after this many consecutive evaluations without a new best; None: never."""
    harness: HarnessPart | None = field(default=None, metadata={"fingerprint": "if set"})
    """Benchmarks of a finished run, such as Harness(("blimp",)) of lab/harness; None: none."""


@dataclass(frozen=True)
class Checkpoint:
    """When to save checkpoints and which to keep."""

    every: int = 250
    """Steps between checkpoints. A run always saves at the end; 0: only then."""
    keep: int = 2
    """Number of latest checkpoints to keep."""
    permanent: int | None = None
    """Never delete checkpoints at multiples of this many steps; None: no permanent checkpoints."""
    best: bool = True
    """Also save and keep the state with the best validation metric so far."""


@dataclass(frozen=True)
class Log:
    """Training metrics logged by a run."""

    every: int = 1
    """Write the metrics of every n-th step to metrics.jsonl."""


@dataclass(frozen=True)
class Mesh:
    """The device mesh. Results do not depend on it, up to summation order. See lab/parallel/sharding.py.

    One of the four sizes may be -1: all remaining devices.
    """

    data: int = -1
    """Devices that split the batch."""
    fsdp: int = 1
    """Devices that split the batch and also shard parameters and optimizer state."""
    tensor: int = 1
    """Devices that shard attention heads, the MLP hidden width and the vocabulary."""
    sequence: int = 1
    """Devices that shard the length axis of a Transformer's activations."""
    rules: tuple[tuple[str, str], ...] = ()
    """Sharding rules tried before the built-in ones: (path regex, mesh axes of the last dimensions, e.g. "-, fsdp")."""

    def validate(self) -> None:
        """Raises UserError for invalid sizes."""
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor, "sequence": self.sequence}
        for axis, size in sizes.items():
            if size != -1:
                _at_least(f"--mesh.{axis}", size, 1)
        if list(sizes.values()).count(-1) > 1:
            raise UserError("Only one of --mesh.data, --mesh.fsdp, --mesh.tensor and --mesh.sequence may be -1, all "
                            "the devices that the others leave.")
        check_devices(sizes)


@dataclass(frozen=True)
class Experiment:
    """The complete description of one training run."""

    data: DataPart
    model: ModelPart
    task: TaskPart
    optim: OptimPart
    steps: int
    """Training steps; a run makes exactly this many."""
    batch: int
    """Records per step, over all devices and microbatches."""
    grad_accum_steps: int = 1
    """Microbatches per step, computed in sequence to save memory. Does not change the result (up to rounding), and may
    change when a run resumes. Exception: dropout and BatchNorm act per microbatch, so with either, this number changes
    the result and is part of the fingerprint."""
    steps_per_call: int = field(default=1, metadata=HOW)
    """Steps per compiled call (a scan). Above 1 speeds up small models by saving dispatch time."""
    seed: int = 0
    """Random seed of initial weights, data order and dropout."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters and optimizer state stay float32."""
    evaluate: Evaluate = Evaluate()
    init_from: StartPart = Pretrained()
    """Pretrained parameters to start from, and which of them to freeze."""
    adapt: Adapt | None = field(default=None, metadata={"fingerprint": "if set"})
    """Adapters to train beside the frozen model, such as LoRA(rank=8) of lab/adapt; None: train the model itself."""
    private: Private | None = field(default=None, metadata={"fingerprint": "if set"})
    """Differential privacy of the training records, such as DPSGD(target_epsilon=3) of lab/private."""
    checkpoint: Checkpoint = field(default=Checkpoint(), metadata=HOW)
    log: Log = field(default=Log(), metadata=HOW)
    mesh: Mesh = field(default=Mesh(), metadata=HOW)
    parallel: Literal["jit", "pmap"] = "jit"
    """How a step is distributed: sharded by the compiler (jit), or plain data parallelism (pmap). Results that depend
    on `grad_accum_steps` also depend on this."""
    exact: bool = False
    """Bitwise equal training steps on any device count that divides virtual_shards; slower (lab/train/gradients.py)."""
    virtual_shards: int = 8
    """Parts of the batch computed separately with `exact`; unused without it."""
    deterministic: bool = field(default=False, metadata=HOW)
    """Bitwise reproducible runs on GPUs (fails on an H100 with jax 0.11.2); CPUs and TPUs are always reproducible."""
    data_on_device: Literal["auto", "always", "never"] = field(default="auto", metadata=HOW)
    """Keep the training records on the devices and gather batches there; auto: on accelerators, if they fit."""

    @property
    def optimizer(self) -> Any:
        """The optimizer, with learning rate 0 for the frozen parameters."""
        frozen = self.init_from.frozen_rules()
        return self.optim.freezing(frozen) if frozen else self.optim

    def filled(self) -> Experiment:
        """The experiment with derived fields set: those of its task; a `model.vocab` of None is the tokenizer's size.
        Loads the data if the size depends on it (`Chars`). Raises UserError if the data has no tokenizer.
        """
        self = getattr(self.task, "filled", lambda experiment: experiment)(self)
        if self.private is not None:
            self = dataclasses.replace(self, private=self.private.filled(self))
        if getattr(self.model, "vocab", 0) is not None:
            return self
        size = self.data.metadata().get("vocab") or self.data.load().metadata.get("vocab")
        if not size:
            raise UserError("--model.vocab follows the tokenizer where it is left out, but this data has none.")
        return dataclasses.replace(self, model=self.model.clone(vocab=size + getattr(self.model, "reserved_ids", 0)))

    def validate(self) -> None:
        """Checks everything that needs neither data nor devices.

        Raises:
          UserError: names the field and its valid values.
        """
        check_types(self)
        check_numbers(flat(to_json(self)))
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed must be in [0, 2^32), not {self.seed}.")
        for name in ("steps", "batch", "grad_accum_steps", "steps_per_call", "virtual_shards"):
            _at_least(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        if self.batch % self.grad_accum_steps:
            raise UserError(f"--batch {self.batch} is not divisible by --grad-accum-steps {self.grad_accum_steps}.")
        _at_least("--evaluate.every", self.evaluate.every, 0)
        for name in ("records", "patience"):
            _at_least(f"--evaluate.{name}", getattr(self.evaluate, name), 1)
        for name, least in (("every", 0), ("keep", 1), ("permanent", 1)):
            _at_least(f"--checkpoint.{name}", getattr(self.checkpoint, name), least)
        _at_least("--log.every", self.log.every, 1)
        self.mesh.validate()
        check_parallel(self)
        for flag, value in (("--steps", self.steps), ("--evaluate.every", self.evaluate.every),
                            ("--checkpoint.every", self.checkpoint.every),
                            ("--checkpoint.permanent", self.checkpoint.permanent)):
            if (value or 0) % self.steps_per_call:
                raise UserError(f"{flag} {value} is not a multiple of --steps-per-call {self.steps_per_call}.")
        self.optim.validate(self.steps)
        for part in (self.data, self.model, self.task, self.init_from, self.adapt, self.private, self.evaluate.harness):
            if hasattr(part, "validate"):  # optional in a user's model
                part.validate()
        check_model(self.model, self.data.metadata())
        for part, other in ((self.init_from, self.model), (self.adapt, self.init_from)):
            if hasattr(part, "check"):
                part.check(other)

    def identity(self) -> dict[str, Any]:
        """JSON of the fields that determine the result. Includes `grad_accum_steps` and `parallel` only if random
        numbers or normalisation depend on the microbatch: see `Task.mixes_rows`.
        """
        whole, undivided = self._identities()
        mixes_rows = getattr(self.task, "mixes_rows", lambda *_: True)
        if whole == undivided or mixes_rows(self.model, self.data, self.precision) or getattr(self.adapt, "dropout", 0):
            return whole
        return undivided

    def _identities(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """`identity` with and without `grad_accum_steps` and `parallel`. Both omit fields that have the default."""
        value = to_json(self, identity=True)
        if not self.exact:
            del value["virtual_shards"]
        alone = {name for name, one in (("grad_accum_steps", 1), ("parallel", "jit")) if getattr(self, name) == one}
        return tuple({name: item for name, item in value.items() if name not in left_out}
                     for left_out in (alone, {"grad_accum_steps", "parallel"}))

    def may_be(self, fingerprint: str) -> bool:
        """Whether `fingerprint` matches one of the two possible identities; choosing one needs a trace of the model."""
        return fingerprint in map(digest, self._identities())

    def fingerprint(self) -> str:
        """Hash of `identity`, 12 hex digits; equal in every process and on every Python version."""
        return digest(self.identity())


def check_model(model: Any, metadata: Mapping[str, Any]) -> None:
    """Calls the model's optional method `check`, which raises UserError if the model does not fit the metadata."""
    if hasattr(model, "check"):
        model.check(metadata)


def _at_least(flag: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise UserError(f"{flag} must be at least {least}, not {value}.")
