"""/v1/embeddings: a vector for each text, by an encoder; OpenAI's form."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from starlette.requests import Request
from starlette.routing import Route

from lab.serve.fields import Fields, Problem, parsed
from lab.serve.requests import Json, body_of
from lab.serve.service import Service
from lab.serve.worker import Worker

ROWS = 16  # texts that are computed at once
MOST = 2048  # texts of a request
Embed = Callable[[Sequence[Sequence[int]]], np.ndarray]
"""Token ids of texts -> float32 (texts, D)."""


def embedder(model: nn.Module, variables: Any, pad: int) -> tuple[Embed, Callable[[], None]]:
    """(token ids of texts -> vectors, a function that compiles). The batch has 1 or `ROWS` rows, and a length that is a
    power of two, so few programs are compiled. `model`: BERT with `output="embedding"`."""
    variables = jax.device_put(variables)
    apply = jax.jit(lambda ids_BL, mask_BL: model.apply(variables, ids_BL, train=False, mask=mask_BL))

    def block(texts: Sequence[Sequence[int]]) -> np.ndarray:
        longest = max(map(len, texts))
        width = min(max(16, 1 << (longest - 1).bit_length()), model.context)
        rows = 1 if len(texts) == 1 else ROWS
        ids_BL, mask_BL = np.full((rows, width), pad, np.int32), np.zeros((rows, width), np.uint8)
        mask_BL[:, 0] = 1  # rows that only fill the batch
        for row, mask, ids in zip(ids_BL, mask_BL, texts, strict=False):
            row[:len(ids)], mask[:len(ids)] = ids, 1
        return np.asarray(apply(ids_BL, mask_BL))[:len(texts)]

    def embed(texts: Sequence[Sequence[int]]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # equal lengths together
        found = np.concatenate([block([texts[i] for i in order[at:at + ROWS]]) for at in range(0, len(order), ROWS)])
        return found[np.argsort(order)]

    def compile_all() -> None:
        width = 16
        while True:
            for rows in (1, 2):
                block([[pad] * min(width, model.context)] * rows)
            if width >= model.context:
                return
            width *= 2

    return embed, compile_all


class Embeddings(Service):
    """The service of an encoder.

    Args:
      text: its tokenizer, which adds its special tokens.
      context: tokens of a text, at most.
    """

    kind = "embeddings"

    def __init__(self, name: str, worker: Worker, text: Any, embed: Embed, context: int):
        super().__init__(name, worker)
        self.worker, self._text, self._embed, self._context = worker, text, embed, context

    def described(self) -> dict[str, Any]:
        """What /v1/models says of it."""
        return {"context": self._context}

    def routes(self) -> list[Route]:
        """Its endpoint."""
        return [Route("/v1/embeddings", self._answer, methods=["POST"])]

    async def _answer(self, request: Request) -> Json:
        fields = Fields(parsed(await body_of(request)))
        self.check_model(fields)
        form = fields.text("encoding_format", "float")
        if form not in ("float", "base64"):
            raise Problem(422, "encoding_format must be float or base64.", "encoding_format")
        fields.refuse({"dimensions": ()})
        texts = self._texts(fields.any("input"))
        vectors, count = await self.worker.run(request, lambda: self._computed(texts))
        data = [{"object": "embedding", "index": i, "embedding": vector.tolist() if form == "float" else
                 base64.b64encode(vector.astype("<f4").tobytes()).decode()} for i, vector in enumerate(vectors)]
        return Json({"object": "list", "model": self.name, "data": data,
                     "usage": {"prompt_tokens": count, "total_tokens": count}})

    def _texts(self, value: Any) -> list[str]:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise Problem(422, "input must be a string or an array of strings, none of them empty.", "input")
        if len(texts) > MOST:
            raise Problem(422, f"input has {len(texts)} texts, more than {MOST}.", "input")
        return texts

    def _computed(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        """(vectors, number of tokens). In the worker's thread."""
        ids = [self._text.encode(text).tolist() for text in texts]
        for i, one in enumerate(ids):
            if not 0 < len(one) <= self._context:
                raise Problem(400, f"input[{i}] has {len(one)} tokens, and the model's context is {self._context}.",
                              "input")
        return self._embed(ids), sum(map(len, ids))
