"""Initial parameters: from another run (transfer learning), or word vectors from a file.

lab/train/restore.py loads the arrays. Paths are relative to the state's parameters or mutable collections:
``block_0/attn/query/kernel``, ``batch_stats/stem_norm/mean``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lab.errors import UserError


def check_rules(**rules: tuple[str, ...]) -> None:
    """Raises UserError for a rule that is not a regular expression; names its field."""
    for name, expressions in rules.items():
        for rule in expressions:
            try:
                re.compile(rule)
            except re.error as e:
                raise UserError(f"--init-from.{name}: {rule!r} is not a regular expression ({e}).") from None


class Start:
    """Base class for `Experiment.init_from`: frozen dataclasses with a field `freeze`. A user's subclass also defines
    ``load(state, data) -> (arrays by path, report)``.
    """

    freeze: tuple[str, ...]

    def frozen_rules(self) -> tuple[tuple[str, float], ...]:
        """Learning-rate multipliers (path regex, 0.0) of the frozen parameters."""
        return tuple((rule, 0.0) for rule in self.freeze)


@dataclass(frozen=True)
class Adapt:
    """Base class for `Experiment.adapt`: how a model is trained by parameters beside its own, such as LoRA of
    lab/adapt, which has the methods."""


@dataclass(frozen=True)
class Private:
    """Base class for `Experiment.private`: how training protects its records, such as DPSGD of lab/private, which has
    the methods."""


@dataclass(frozen=True)
class Pretrained(Start):
    """Loads the parameters of another run by path. Paths that the run lacks are initialised at random.

    Loads averaged parameters if the run's optimizer keeps an average. Never loads optimizer state.
    """

    run: str | None = None
    """Run folder (latest checkpoint) or checkpoint RUN/checkpoints/STEP; None: initialise at random."""
    include: tuple[str, ...] = (".*",)
    """Load paths that match one of these regular expressions (searched in the path)."""
    exclude: tuple[str, ...] = ()
    """Of those, skip paths that match one of these, such as an output layer for other classes."""
    freeze: tuple[str, ...] = ()
    """Path regexes of parameters to freeze (searched in the path)."""
    experiment: str | None = field(default=None, metadata={"fingerprint": False})
    """The run's experiment file, needed if it defines classes and was not run on this machine."""

    def validate(self) -> None:
        """Raises UserError for an invalid regular expression."""
        check_rules(include=self.include, exclude=self.exclude, freeze=self.freeze)


@dataclass(frozen=True)
class Continue(Start):
    """Continues another run from a checkpoint with other settings: loads its parameters, optimizer state and step.
    Creates a new run and leaves the other one unchanged.

    `steps` counts all steps, including those of the other run, and the schedule is rebuilt for that total. The data
    continues with the next batch. State that does not match (a new layer, another optimizer's moments) is initialised
    at random and reported.
    """

    run: str
    """Run folder, or checkpoint RUN/checkpoints/STEP."""
    step: int | None = None
    """Step of the checkpoint; None: the latest."""
    freeze: tuple[str, ...] = ()
    """Path regexes of parameters to freeze (searched in the path)."""
    experiment: str | None = field(default=None, metadata={"fingerprint": False})
    """The run's experiment file, needed if it defines classes and was not run on this machine."""

    def validate(self) -> None:
        """Raises UserError for a step below 1 or an invalid regular expression."""
        if self.step is not None and self.step < 1:
            raise UserError(f"--init-from.step must be at least 1, not {self.step}.")
        check_rules(freeze=self.freeze)


@dataclass(frozen=True)
class WordVectors(Start):
    """Pretrained word vectors in GloVe's text format (a word and its numbers on each line) for an embedding.

    The first line may be a header as in word2vec and fastText: the numbers of words and dimensions. Words that the file
    lacks get random vectors. Source of the format: Pennington et al. 2014.
    """

    path: str
    """The text file, such as glove.6B.100d.txt or wiki.en.vec."""
    parameter: str = "embedding/embedding"
    """Path of the embedding, (vocabulary, dimension)."""
    freeze: tuple[str, ...] = ()
    """Path regexes of parameters to freeze: ("^embedding/",) freezes the vectors."""

    def validate(self) -> None:
        """Raises UserError for an invalid regular expression."""
        check_rules(freeze=self.freeze)
