"""Layers in training: the running statistics of frozen BatchNorm layers stay, and adapters with dropout add theirs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn


@contextlib.contextmanager
def as_trained(experiment: Any) -> Iterator[None]:
    """Context for tracing an experiment's model in training."""
    adapt = experiment.adapt
    with frozen_statistics(adapt or experiment.optimizer), adapt.beside_layers() if adapt else contextlib.nullcontext():
        yield


def frozen_statistics(optimizer: Any) -> contextlib.AbstractContextManager[None]:
    """Context for tracing a model in training: each BatchNorm frozen by `optimizer` uses its running statistics without
    updating them, as in evaluation. A BatchNorm is frozen if all its parameters are; one without parameters, if the
    paths of its statistics are. `optimizer`: or adapters, which freeze all else.
    """
    if not getattr(optimizer, "lr_multipliers", True):
        return contextlib.nullcontext()

    def evaluated(call: Callable, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if not isinstance(module, nn.BatchNorm) or context.method_name != "__call__" or not frozen(module):
            return call(*args, **kwargs)
        field = module.use_running_average
        object.__setattr__(module, "use_running_average", None)  # Flax accepts either the field or the argument
        try:
            return call(*args, **kwargs | {"use_running_average": True})
        finally:
            object.__setattr__(module, "use_running_average", field)

    def frozen(module: nn.Module) -> bool:
        names = module.variables.get("params") or module.variables["batch_stats"]
        return all(optimizer.frozen("/".join((*module.path, name))) for name in names)

    return nn.intercept_methods(evaluated)
