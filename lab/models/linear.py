"""Linear and softmax regression, the multilayer perceptron, and an ensemble of any classifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lab.errors import UserError
from lab.models.dropout import dropout
from lab.models.layers import Dense
from lab.models.members import Members, Several


def check_classes(classes: int | None, metadata: Mapping[str, int], flag: str = "--model.classes") -> None:
    """Raises UserError if the data's number of classes differs from `classes` (None: regression)."""
    found = metadata.get("classes", classes)
    if found == classes:
        return
    if classes is None:
        raise UserError(f"The data has {found} classes, and a model without classes predicts one number. "
                        f"Use {flag} {found}.")
    raise UserError(f"The data has {found} classes and the model {classes}. Use {flag} {found}.")


def check_sizes(**sizes: int | None) -> None:
    """Raises UserError if a size is below 1; None is allowed."""
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise UserError(f"--model.{name.replace('_', '-')} must be at least 1, not {value}.")


def check_rates(**rates: float | Array) -> None:
    """Raises UserError if a dropout rate is outside [0, 1); traced rates are not checked."""
    for name, value in rates.items():
        if isinstance(value, int | float) and not 0 <= value < 1:
            raise UserError(f"--model.{name.replace('_', '-')} must be in [0, 1), not {value}.")


def output(x_BD: Array, classes: int | None) -> Array:
    """Zero-initialised output layer in float32: logits (B, classes), or (B,) if `classes` is None."""
    y = nn.Dense(classes or 1, dtype=jnp.float32, kernel_init=nn.initializers.zeros, name="head")(x_BD)
    return y[:, 0] if classes is None else y


class Linear(nn.Module):
    """Linear regression, or softmax regression (with 2 classes: logistic regression), on inputs of any shape.

    (B, ...) -> float32: (B,) without classes, else logits (B, classes). Initialised to zero, since the loss is convex.
    """

    classes: int | None = None
    """Number of classes; None: regression, one number for each record."""

    def validate(self) -> None:
        """Raises UserError for a field out of range."""
        check_sizes(classes=self.classes)

    def check(self, metadata: Mapping[str, int]) -> None:
        """Raises UserError if data with this metadata (classes) does not fit the model."""
        check_classes(self.classes, metadata)

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Array:
        return output(inputs.reshape(inputs.shape[0], -1), self.classes)


class MLP(nn.Module):
    """Multilayer perceptron with ReLU on inputs of any shape.

    (B, ...) -> float32: (B,) without classes, else logits (B, classes). He initialisation (He et al. 2015); the
    output layer is zero.
    """

    classes: int | None = None
    """Number of classes; None: regression, one number for each record."""
    depth: int = 2
    """Number of hidden layers."""
    width: int = 256
    """Units of each hidden layer."""
    dropout: float = 0.0
    """Dropout rate after every hidden layer."""

    def validate(self) -> None:
        """Raises UserError for a field out of range."""
        check_sizes(classes=self.classes, depth=self.depth, width=self.width)
        check_rates(dropout=self.dropout)

    def check(self, metadata: Mapping[str, int]) -> None:
        """Raises UserError if data with this metadata (classes) does not fit the model."""
        check_classes(self.classes, metadata)

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Array:
        x_BF = inputs.reshape(inputs.shape[0], -1)
        for i in range(self.depth):
            he = (2 / x_BF.shape[1]) ** 0.5
            x_BF = nn.relu(Dense(self.width, bias=True, stddev=he, name=f"dense_{i}")(x_BF))
            x_BF = dropout(self, x_BF, self.dropout, train)
        return output(x_BF, self.classes)


class Ensemble(Several):
    """M copies of a classifier on the same inputs (Lakshminarayanan et al. 2017): `Members` of float32 logits
    (B, M, classes).

    Members differ in initial weights and dropout. Each has its own loss (computed by the task) and optimizer state, so
    it trains exactly as it would alone. Predictions are mean probabilities.
    """

    bootstrap: bool = field(default=False, metadata={"fingerprint": "if set"})
    """Bagging (Breiman 1996): each member learns a bootstrap sample of its own, Poisson(1) weights of the training
    records. A run then ends with the out-of-bag estimate. See `lab.models.members.bootstrap`."""

    def validate(self) -> None:
        """Raises UserError for a field out of range, here or in the member."""
        check_sizes(members=self.members)
        self.member.validate()
        if getattr(self.member, "classes", None) is None:
            raise UserError("The members of an Ensemble must be classifiers. Give --model.member.classes.")
        if isinstance(self.member, Linear) and not self.bootstrap:
            raise UserError("All members would stay equal: Linear starts at zero. Use MLP as --model.member, or "
                            "--model.bootstrap.")

    def check(self, metadata: Mapping[str, int]) -> None:
        """Raises UserError if data with this metadata does not fit the members."""
        check_classes(self.member.classes, metadata, "--model.member.classes")
        self.member.check(metadata)

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool, **kwargs: Any) -> Members:
        def run(member: nn.Module) -> Array:
            return member(inputs, train=train, **kwargs)

        every = nn.vmap(run, variable_axes={"params": 0, "batch_stats": 0},
                        split_rngs={"params": True, "dropout": True}, out_axes=1, axis_size=self.members)
        return Members(every(self.member))
