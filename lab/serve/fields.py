"""The fields of a JSON request, checked: what is wrong is a `Problem` with its HTTP status."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
         404: "invalid_request_error", 408: "invalid_request_error", 413: "invalid_request_error",
         422: "invalid_request_error", 429: "rate_limit_error"}
TEXT = 1000  # characters of a stop string


class Problem(Exception):
    """A request that gets no answer. `param`: the field; `after`: seconds to wait before the next try."""

    def __init__(self, status: int, message: str, param: str | None = None, after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.after = status, message, param, after

    def body(self) -> dict[str, Any]:
        """OpenAI's form of an error."""
        return {"error": {"message": self.message, "type": TYPES.get(self.status, "server_error"),
                          "param": self.param, "code": self.status}}


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def parsed(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises Problem (400; 422 for another value than an object)."""
    try:
        found = json.loads(body.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        reason = str(e).splitlines()[0][:120] if isinstance(e, json.JSONDecodeError) else type(e).__name__
        raise Problem(400, f"The body is not JSON in UTF-8: {reason}.") from None
    if not isinstance(found, dict):
        raise Problem(422, f"The body must be a JSON object, not {kind(found)}.")
    return found


def kind(value: Any) -> str:
    """What JSON calls it."""
    return {type(None): "null", bool: "a boolean", str: "a string", list: "an array", dict: "an object"}.get(
        type(value), "a number")


class Fields:
    """The fields of an object. Each method raises Problem (422) for a wrong type or a value out of range."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = values

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def any(self, name: str) -> Any:
        """The value, unchecked; None if there is none."""
        return self._values.get(name)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number in [low, high]."""
        value = default if self._values.get(name) is None else self._values[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Problem(422, f"{name} must be a number, not {kind(value)}.", name)
        if not (abs(value) <= 1e300 and math.isfinite(value) and low <= value <= high):
            raise Problem(422, f"{name} must be from {low:g} to {high:g}.", name)
        return float(value)

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """A whole number in [low, high], or the default."""
        value = self._values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise Problem(422, f"{name} must be a whole number, not {kind(value)}.", name)
        if not low <= value <= high:
            raise Problem(422, f"{name} must be from {low} to {high}.", name)
        return value

    def flag(self, name: str) -> bool:
        """True or false; false by default."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, bool):
            raise Problem(422, f"{name} must be true or false, not {kind(value)}.", name)
        return bool(value)

    def text(self, name: str, default: str = "") -> str:
        """A string."""
        value = self._values.get(name)
        if value is not None and not isinstance(value, str):
            raise Problem(422, f"{name} must be a string, not {kind(value)}.", name)
        return default if value is None else value

    def texts(self, name: str, most: int) -> list[str]:
        """A string, or an array of up to `most`; none may be empty."""
        value = self._values.get(name)
        found = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(x, str) for x in found):
            raise Problem(422, f"{name} must be a string or an array of strings.", name)
        if len(found) > most or not all(0 < len(x) <= TEXT for x in found):
            raise Problem(422, f"{name} must be up to {most} strings of 1 to {TEXT} characters.", name)
        return found

    def refuse(self, ignored: Mapping[str, Sequence[Any]]) -> None:
        """Problem for a field that is not supported, unless it has one of the values that ask for nothing."""
        for name, harmless in ignored.items():
            value = self._values.get(name)
            if value is not None and value not in harmless:
                raise Problem(422, f"{name} is not supported by this server.", name)


def seed_of(fields: Fields) -> int:
    """The field `seed`, modulo 2^32; a random one if there is none."""
    seed = fields.integer("seed", None, -(1 << 63), (1 << 64) - 1)
    return secrets.randbelow(1 << 32) if seed is None else seed % (1 << 32)


def messages(value: Any, roles: Sequence[str] = ("system", "user", "assistant")) -> list[dict[str, str]]:
    """The messages of a chat, with their text only. Raises Problem (422)."""
    if not isinstance(value, list) or not value:
        raise Problem(422, "messages must be an array of at least one message.", "messages")
    found = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise Problem(422, f"messages[{i}] must be an object, not {kind(message)}.", "messages")
        role = "system" if message.get("role") == "developer" else message.get("role")
        if role not in roles:
            raise Problem(422, f"messages[{i}].role must be one of {', '.join(roles)}.", "messages")
        found.append({"role": role, "content": _content(message.get("content"), f"messages[{i}].content")})
    return found


def _content(value: Any, name: str) -> str:
    if isinstance(value, list) and value and all(isinstance(part, dict) and part.get("type") == "text" and
                                                 isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise Problem(422, f"{name} must be a string or an array of text parts.", "messages")
    return value
