"""A text model as a function of the embeddings of its tokens, without a change to the model.

`nn.intercept_methods` replaces what the model's embedding returns for exactly the array of tokens that it was called
with; positions and segments have embeddings of their own, and a tied output layer uses the table, not the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax import Array

from lab.errors import UserError
from lab.models.layers import Embed

Run = Callable[[Any, Array], Any]
"""(variables, tokens (B, L)) -> the model's output; it must pass on the array of tokens itself."""


def _at_tokens(tokens: Array, then: Callable[[nn.Module, Callable[[], Array]], Array]) -> Any:
    """An interceptor of the embedding of these tokens. `then`: (embedding, what it would return) -> the replacement."""
    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if isinstance(module, Embed | nn.Embed) and context.method_name == "__call__" and args and args[0] is tokens:
            return then(module, lambda: call(*args, **kwargs))
        return call(*args, **kwargs)

    return intercept


def with_embeddings(run: Run, tokens: Array) -> Callable[[Any, Array], Any]:
    """(variables, embeddings (B, L, D)) -> what `run` gives if the tokens (L,) had these embeddings."""
    def replaced(variables: Any, x_BLD: Array) -> Any:
        tokens_BL = jax.numpy.broadcast_to(tokens, (len(x_BLD), len(tokens)))
        with nn.intercept_methods(_at_tokens(tokens_BL, lambda module, own: x_BLD.astype(own().dtype))):
            return run(variables, tokens_BL)

    return replaced


def embedding_table(run: Run, variables: Any, tokens: np.ndarray) -> np.ndarray:
    """The table (V, D) in which the model looks up its tokens, float32.

    Raises:
      UserError: the model calls no `Embed` or `nn.Embed` with its tokens.
    """
    found = []

    def noted(module: nn.Module, own: Callable[[], Array]) -> Array:
        found.append(module.embedding)
        return own()

    def table(variables: Any, tokens_BL: Array) -> Array:
        with nn.intercept_methods(_at_tokens(tokens_BL, noted)):
            run(variables, tokens_BL)
        if not found:
            raise UserError("The model calls no Embed with its tokens, so there are no embeddings to attribute to.")
        return found[0].astype(np.float32)

    return np.asarray(jax.jit(table)(variables, tokens[None]))
