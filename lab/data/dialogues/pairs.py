"""Sources of pairs: two answers to one prompt, of which somebody preferred the first.

A *source* is as in sources.py, except that `read()` returns pairs, made by `paired`. A new source here also joins
`Source` in preferences.py and the package's `__init__.py`; one in your experiment's file needs neither.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from lab.data.dialogues.sources import Message, PythonDocs, checked, json_lines
from lab.data.reading import check_encoding
from lab.errors import UserError


class Pair(NamedTuple):
    """Two answers to one prompt."""

    name: str
    """For error messages."""
    prompt: list[Message]
    """The dialogue so far. A message of the user is its last."""
    chosen: str
    rejected: str

    @property
    def dialogues(self) -> list[list[Message]]:
        """The prompt with the chosen answer, and with the rejected one."""
        return [[*self.prompt, {"role": "assistant", "content": answer}] for answer in (self.chosen, self.rejected)]


def paired(name: str, prompt: Any, chosen: Any, rejected: Any) -> Pair:
    """The pair of what a file may hold: a prompt as text or messages, and answers as text or messages. Messages may be
    an answer alone, or the whole dialogue; the prompt may then be None.

    Raises:
      UserError: something else; a prompt that does not end with the user; different prompts; or equal answers.
    """
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(prompt, list | None):
        raise UserError(f"{name}: the prompt must be text or a list of messages.")
    (before, chosen), (other, rejected) = (_answered(f"{name}, {which}", prompt, answer)
                                           for which, answer in (("chosen", chosen), ("rejected", rejected)))
    if before != other:
        raise UserError(f"{name}: chosen and rejected must be answers to one prompt, and they differ before their last "
                        f"message.")
    if not before or before[-1]["role"] != "user":
        raise UserError(f"{name}: the prompt must end with a message of the user, whom the two answer.")
    if chosen.strip() == rejected.strip():
        raise UserError(f"{name}: chosen and rejected are the same, so neither is preferred: leave the pair out.")
    return Pair(name, before, chosen, rejected)


def _answered(name: str, prompt: list[Message] | None, answer: Any) -> tuple[list[Message], str]:
    """(the messages before the answer, the answer)."""
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if not isinstance(answer, list) or not answer:
        raise UserError(f"{name}: an answer must be text or a list of messages.")
    if prompt is None and len(answer) < 2:
        raise UserError(f"{name}: there is no prompt; give one, or the whole dialogue as messages.")
    alone = len(answer) == 1
    messages = checked(name, [*prompt, *answer] if alone else answer)[1]
    if len(messages) != len(answer) + alone * len(prompt or ()):
        raise UserError(f"{name}: the last message must be the assistant's, which is the answer.")
    *before, last = messages
    if not alone and prompt and before[-len(prompt):] != checked(name, [*prompt, last])[1][:-1]:
        raise UserError(f"{name}: the messages before the answer are not the prompt.")
    return before, last["content"]


@dataclass(frozen=True)
class JsonlPairs:
    """A file with a JSON object per line: {"prompt": ..., "chosen": ..., "rejected": ...}, the form of Hugging Face and
    trl. Each is text, or messages {"role": ..., "content": ...}; whole dialogues as chosen and rejected need no prompt.
    Other keys are ignored, and so are blank lines."""

    path: str
    """The file, gzip if named .gz."""
    prompt: str = "prompt"
    """The key of the prompt."""
    chosen: str = "chosen"
    """The key of the better answer."""
    rejected: str = "rejected"
    """The key of the worse answer."""
    encoding: str = "UTF-8"
    """Encoding of the file."""

    @property
    def title(self) -> str:
        return self.path

    def validate(self) -> None:
        """UserError without a path, for an unknown encoding, or if two keys are one."""
        check_encoding(self.encoding)
        if not self.path.strip() or len({self.prompt, self.chosen, self.rejected}) < 3:
            raise UserError("JsonlPairs needs path=, a file with a JSON object per line, and three of its keys, "
                            "prompt=, chosen= and rejected=.")

    def read(self) -> list[Pair]:
        """All lines. UserError, naming the line, if one is not JSON or no pair; or for an empty file."""
        return [self._pair(*line) for line in json_lines(self.path, self.encoding, "a prompt and two answers")]

    def _pair(self, name: str, row: dict[str, Any]) -> Pair:
        for flag, key in (("chosen", self.chosen), ("rejected", self.rejected)):
            if key not in row:
                raise UserError(f"{name} has no {key!r}, but {', '.join(map(repr, row)) or 'no keys'}: "
                                f"--data.source.{flag} names the key.")
        return paired(name, row.get(self.prompt), row[self.chosen], row[self.rejected])


@dataclass(frozen=True)
class PythonDocsPairs:
    """Pairs that every machine has: a function of Python's standard library as the prompt, the first line of its
    docstring as the chosen answer, and the same words in reverse as the rejected one. They depend on the Python
    version."""

    title = "functions of Python's standard library, their documentation forwards and backwards"

    def validate(self) -> None:
        """Nothing can be checked without reading."""

    def read(self) -> list[Pair]:
        """One pair per function whose documentation is not the same backwards, in the order of `PythonDocs`."""
        found = ((name, prompt, last["content"], " ".join(reversed(last["content"].split())))
                 for name, (*prompt, last) in PythonDocs().read())
        return [paired(name, prompt, chosen, rejected) for name, prompt, chosen, rejected in found
                if chosen.split() != rejected.split()]
