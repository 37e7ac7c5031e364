"""/v1/predict: records of a table, messages or images, as JSON or as a file, to predictions.

A record takes the way of `./launch.sh predict`: it is written to a temporary file of our own name, which the run's data
reads, so that numbers, gaps and categories mean the same in both.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from starlette.requests import Request
from starlette.routing import Route

from lab.errors import UserError
from lab.serve.fields import Fields, Problem, kind, parsed
from lab.serve.requests import Json, body_of
from lab.serve.service import Service
from lab.serve.worker import Worker

IMAGES = {b"\x89PNG\r\n\x1a\n": ".png", b"\xff\xd8\xff": ".jpg"}
PIXELS = 1 << 24  # of an image: a small file can hold a very large one


@dataclass(frozen=True)
class Form:
    """What the records are."""

    kind: Literal["table", "messages", "images"]
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Of a table: column -> its categories, () for numbers; of messages: the column with the text."""
    classes: Sequence[str] = ()
    decimal: str = "."
    encoding: str = "UTF-8"


class Predictions(Service):
    """The service of a classifier or regressor.

    Args:
      predict: a file, or a folder with images -> one JSON object per record; raises UserError.
    """

    kind = "predict"

    def __init__(self, name: str, worker: Worker, form: Form, predict: Callable[[Path], list[dict[str, Any]]]):
        super().__init__(name, worker)
        self.worker, self.form, self._predict = worker, form, predict

    def described(self) -> dict[str, Any]:
        """What /v1/models says of it."""
        columns = [{"name": name, "values": list(values)} for name, values in self.form.columns.items()]
        return {"input": self.form.kind, "columns": columns, "classes": list(self.form.classes)}

    def routes(self) -> list[Route]:
        """Its endpoint."""
        return [Route("/v1/predict", self._answer, methods=["POST"])]

    async def _answer(self, request: Request) -> Json:
        sort, body = request.headers.get("content-type", "").partition(";")[0].strip(), await body_of(request)
        if sort == "text/csv" and self.form.kind != "images":
            files = [(".csv", body)]
        elif sort in ("image/png", "image/jpeg") and self.form.kind == "images":
            files = [_image(body, "the body")]
        else:
            fields = Fields(parsed(body))
            self.check_model(fields)
            files = self._files(fields.any("records"))
        found = await self.worker.run(request, lambda: self._computed(files))
        return Json({"object": "list", "model": self.name,
                     "data": [{"index": i, **row} for i, row in enumerate(found)]})

    def _files(self, records: Any) -> list[tuple[str, bytes]]:
        """(ending, content) of the files that hold the records. Raises Problem (422)."""
        if not isinstance(records, list) or not records:
            raise Problem(422, "records must be an array of at least one record.", "records")
        if self.form.kind == "images":
            return [_image(_decoded(record, i), f"records[{i}]") for i, record in enumerate(records)]
        out = io.StringIO(newline="")
        out.write("sep=,\r\n")
        writer = csv.writer(out, quoting=csv.QUOTE_ALL)
        writer.writerow(self.form.columns)
        for i, record in enumerate(records):
            writer.writerow(self._cells(record, f"records[{i}]"))
        try:
            return [(".csv", out.getvalue().encode(self.form.encoding))]
        except UnicodeEncodeError as e:
            raise Problem(422, f"The records have no form in {self.form.encoding}: {e.reason}.", "records") from None

    def _cells(self, record: Any, place: str) -> list[str]:
        if self.form.kind == "messages" and isinstance(record, str):
            record = {next(iter(self.form.columns)): record}
        if not isinstance(record, dict):
            raise Problem(422, f"{place} must be an object, not {kind(record)}.", "records")
        if missing := [name for name in self.form.columns if name not in record]:
            raise Problem(422, f"{place} has no {missing[0]!r}; null is a missing value.", "records")
        return [self._cell(record[name], f"{place}[{name!r}]") for name in self.form.columns]

    def _cell(self, value: Any, place: str) -> str:
        if isinstance(value, bool | list | dict):
            raise Problem(422, f"{place} must be a number, a string or null, not {kind(value)}.", "records")
        if isinstance(value, str):
            if "\0" in value:
                raise Problem(422, f"{place} has a character NUL.", "records")
            return value
        return "" if value is None else repr(value).replace(".", self.form.decimal)

    def _computed(self, files: Sequence[tuple[str, bytes]]) -> list[dict[str, Any]]:
        """In the worker's thread."""
        with tempfile.TemporaryDirectory(prefix="lab-serve-") as folder:
            for i, (ending, content) in enumerate(files):
                Path(folder, f"{i:06}{ending}").write_bytes(content)
            images = self.form.kind == "images"
            path = Path(folder) if images else Path(folder, f"000000{files[0][0]}")
            try:
                return self._predict(path)
            except UserError as e:
                said = str(e).replace(str(path), "The request").replace(folder, "The request")
                raise UserError(said.replace(path.name, "the request")) from None


def _decoded(record: Any, i: int) -> bytes:
    """The bytes of an image in JSON: {"image": base64}, or base64 alone, also as a data: address."""
    text = record.get("image") if isinstance(record, dict) else record
    if not isinstance(text, str):
        raise Problem(422, f'records[{i}] must be an object with "image", base64 of a PNG or JPEG file.', "records")
    text = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Problem(422, f"records[{i}] is not base64.", "records") from None


def _image(content: bytes, place: str) -> tuple[str, bytes]:
    """(ending, content). Raises Problem (422) for what is no image, or one that is too large to decode."""
    from PIL import Image

    ending = next((end for magic, end in IMAGES.items() if content.startswith(magic)), None)
    if ending is None:
        raise Problem(422, f"{place} is not a PNG or JPEG file.", "records")
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            width, height = image.size
    except Exception as e:  # Pillow raises many kinds for damaged files
        raise Problem(422, f"{place} is damaged: {type(e).__name__}.", "records") from None
    if width * height > PIXELS:
        raise Problem(422, f"{place} has {width} x {height} pixels, more than {PIXELS}.", "records")
    return ending, content
