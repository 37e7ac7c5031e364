"""Parameters to begin with: those of another run (transfer learning), or word vectors from a file.

The arrays are read by lab/train/initial.py. Paths are those within the state's parameters and mutable
collections: ``block_0/attn/query/kernel``, ``batch_stats/stem_norm/mean``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lab.errors import UserError


def _check_rules(**rules: tuple[str, ...]) -> None:
    for name, expressions in rules.items():
        for rule in expressions:
            try:
                re.compile(rule)
            except re.error as e:
                raise UserError(f"--init-from.{name}: {rule!r} is not a regular expression ({e}).") from None


class Start:
    """The base of values for `Experiment.init_from`: frozen dataclasses with a field `freeze`. One of your own also has
    ``load(state, data) -> (arrays by path, report)``.
    """

    freeze: tuple[str, ...]

    def frozen_rules(self) -> tuple[tuple[str, float], ...]:
        """(regular expression, 0.0) of parameters that are not updated, as multipliers of the learning rate."""
        return tuple((rule, 0.0) for rule in self.freeze)


@dataclass(frozen=True)
class Pretrained(Start):
    """The parameters of another run, where paths agree; what that run lacks begins at random.

    Averaged parameters are taken where that run's optimizer averages. Optimizer state is never taken.
    """

    run: str | None = None
    """A run folder (its latest checkpoint), or one of its checkpoints, RUN/checkpoints/STEP; None: begin at random."""
    include: tuple[str, ...] = (".*",)
    """Regular expressions searched in the paths: what to take."""
    exclude: tuple[str, ...] = ()
    """Regular expressions searched in the paths: what not to take after all (an output layer for other classes)."""
    freeze: tuple[str, ...] = ()
    """Regular expressions searched in the paths of parameters that training leaves as they are."""
    experiment: str | None = field(default=None, metadata={"fingerprint": False})
    """That run's experiment file, if it defines classes of its own and was not run on this machine."""

    def validate(self) -> None:
        """Raises UserError for what is not a regular expression."""
        _check_rules(include=self.include, exclude=self.exclude, freeze=self.freeze)


@dataclass(frozen=True)
class Continue(Start):
    """Another run at one of its checkpoints, to go on from under other settings: its parameters, the state of its
    optimizer, and its number of updates. That run stays as it is; this is a new one.

    `steps` counts all updates, those of the other run too, and the schedule is evaluated anew for that number. The data
    goes on with the batch of the next update. What does not fit (a new layer, another optimizer's moments) begins
    afresh and is named.
    """

    run: str
    """A run folder, or one of its checkpoints, RUN/checkpoints/STEP."""
    step: int | None = None
    """The checkpoint after this many updates; None: the latest."""
    freeze: tuple[str, ...] = ()
    """Regular expressions searched in the paths of parameters that training leaves as they are."""
    experiment: str | None = field(default=None, metadata={"fingerprint": False})
    """That run's experiment file, if it defines classes of its own and was not run on this machine."""

    def validate(self) -> None:
        """Raises UserError for a step below 1, and for what is not a regular expression."""
        if self.step is not None and self.step < 1:
            raise UserError(f"--init-from.step must be at least 1, not {self.step}.")
        _check_rules(freeze=self.freeze)


@dataclass(frozen=True)
class WordVectors(Start):
    """Pretrained word vectors in GloVe's text format (a word and its numbers on each line) for an embedding.

    The first line may be a header as word2vec and fastText write it: the numbers of words and of dimensions. Rows of
    words that the file lacks begin at random. Source of the format: Pennington et al. 2014.
    """

    path: str
    """The text file, such as glove.6B.100d.txt or wiki.en.vec."""
    parameter: str = "embedding/embedding"
    """Path of the embedding, (vocabulary, dimension)."""
    freeze: tuple[str, ...] = ()
    """Regular expressions of parameters that training leaves as they are: ("^embedding/",) keeps the vectors."""

    def validate(self) -> None:
        """Raises UserError for what is not a regular expression."""
        _check_rules(freeze=self.freeze)
