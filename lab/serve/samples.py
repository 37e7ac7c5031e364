"""/v1/predict for a model that makes images: as many as asked for, each a function of the seed and its number."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from starlette.requests import Request
from starlette.routing import Route

from lab.serve.fields import Fields, parsed, seed_of
from lab.serve.requests import Json, body_of
from lab.serve.service import Service
from lab.serve.worker import Worker

MOST = 64  # images of a request


class Samples(Service):
    """The service of a generator.

    Args:
      make: (number, seed) -> uint8 images (n, H, W, C), C 1 or 3; image i depends on the seed and i only.
    """

    kind = "samples"

    def __init__(self, name: str, worker: Worker, make: Callable[[int, int], np.ndarray]):
        super().__init__(name, worker)
        self.worker, self._make = worker, make

    def described(self) -> dict[str, Any]:
        """What /v1/models says of it."""
        return {"input": "samples", "most": MOST}

    def routes(self) -> list[Route]:
        """Its endpoint."""
        return [Route("/v1/predict", self._answer, methods=["POST"])]

    async def _answer(self, request: Request) -> Json:
        fields = Fields(parsed(await body_of(request)))
        self.check_model(fields)
        number, seed = fields.integer("n", 1, 1, MOST), seed_of(fields)
        images = await self.worker.run(request, lambda: [_png(image) for image in self._make(number or 1, seed)])
        return Json({"object": "list", "model": self.name, "seed": seed,
                     "data": [{"index": i, "image": base64.b64encode(png).decode()} for i, png in enumerate(images)]})


def _png(image_HWC: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC).save(out, "PNG")
    return out.getvalue()
