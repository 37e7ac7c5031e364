"""Sources of dialogues.

A *source* is a frozen dataclass in an experiment: `title` (display name), `validate()` (UserError for wrong fields;
reads nothing) and `read()`, the dialogues in a fixed order, each with a name for error messages. A dialogue is a list
of {"role": "system", "user" or "assistant", "content": text}, made by `checked`. A new source here also joins `Source`
in dialogues.py and the package's `__init__.py`; one in your experiment's file needs neither.
"""

import json
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.data.reading import check_encoding, lines_of, read_text
from lab.data.tables.csv_files import read_columns
from lab.data.text.sources import PythonStdlib
from lab.errors import Absent, UserError
from lab.files import user_path

Message = dict[str, str]
Dialogue = tuple[str, list[Message]]
"""(name for error messages, messages)."""

ROLES = ("system", "user", "assistant")
# Taskmaster's speakers in lower case -> roles. Its coffee shop has a customer and a barista.
SPEAKERS = {"user": "user", "customer": "user", "assistant": "assistant", "agent": "assistant", "barista": "assistant"}
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may spell one alone
# A function with its signature on one line, and the first line of its docstring.
_DOCUMENTED = re.compile(r'^ *def (\w+\([^\n]*\))[^\n]*:\n +r?"""(\w[^\n]*?)(?:"""|\n)', re.MULTILINE)


def checked(name: str, messages: Any) -> Dialogue:
    """The dialogue, up to its last answer.

    Raises:
      UserError: a message without role or text, an unknown role, a system message that is not the first, no answer.
    """
    if not isinstance(messages, list):
        raise UserError(f'{name}: "messages" is no list of messages.')
    found: list[Message] = []
    for i, message in enumerate(messages, 1):
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if not isinstance(role, str) or not isinstance(content, str) or not content.strip():
            raise UserError(f'{name}: message {i} needs "role" and "content", which is text and not empty.')
        if role not in ROLES:
            raise UserError(f"{name}: message {i} has the role {role!r}; the roles are {', '.join(ROLES)}.")
        if role == "system" and i > 1:
            raise UserError(f"{name}: message {i} is a system message, which only the first may be.")
        if _SURROGATE.search(content):
            raise UserError(f"{name}: message {i} has half of a surrogate pair, which is no character: remove it.")
        found.append({"role": role, "content": content})
    while found and found[-1]["role"] != "assistant":
        found.pop()
    if not found:
        raise UserError(f"{name} has no assistant turn, so there is nothing to learn from it: leave it out.")
    return name, found


def json_lines(path: str, encoding: str, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(FILE:LINE, object) for each line of a file that is not blank; {} for JSON that is no object. `what`: the lines
    hold, for the message about an empty file.

    Raises:
      UserError: the file is unreadable or empty, or a line is not JSON.
    """
    text = "".join(read_text(user_path(path), encoding)).removeprefix("\ufeff")
    if not text.strip():
        raise UserError(f"{path} is empty: it needs a JSON object per line, with {what}.")
    for number, line in enumerate(lines_of(text), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as e:
                raise UserError(f"{path}:{number} is not JSON ({e}); each line is an object of its own.") from None
            yield f"{path}:{number}", row if isinstance(row, dict) else {}


@dataclass(frozen=True)
class Jsonl:
    """A file with a JSON object per line: {"messages": [{"role": ..., "content": ...}, ...]}, the form of OpenAI and
    Hugging Face; or a prompt and its completion, as two texts. Other keys are ignored, and so are blank lines."""

    path: str
    """The file, gzip if named .gz."""
    prompt: str = "prompt"
    """The key of the prompt, in lines without "messages"."""
    completion: str = "completion"
    """The key of the completion."""
    encoding: str = "UTF-8"
    """Encoding of the file."""

    @property
    def title(self) -> str:
        return self.path

    def validate(self) -> None:
        """UserError without a path or for an unknown encoding."""
        check_encoding(self.encoding)
        if not self.path.strip():
            raise UserError("Jsonl needs path=, a file with a JSON object per line.")

    def read(self) -> list[Dialogue]:
        """All lines. UserError, naming the line, if one is not JSON or no dialogue; or for an empty file."""
        return [self._dialogue(*line) for line in json_lines(self.path, self.encoding, "the messages of a dialogue")]

    def _dialogue(self, name: str, row: dict[str, Any]) -> Dialogue:
        if "messages" in row:
            return checked(name, row["messages"])
        if self.prompt not in row or self.completion not in row:
            raise UserError(f'{name} has neither "messages" nor {self.prompt!r} and {self.completion!r}, but '
                            f"{', '.join(map(repr, row)) or 'no keys'}: --data.source.prompt and "
                            f"--data.source.completion name the two.")
        return checked(name, [{"role": "user", "content": row[self.prompt]},
                              {"role": "assistant", "content": row[self.completion]}])


@dataclass(frozen=True)
class QuestionsAnswers:
    """A CSV file with a question and its answer in each row; `lab.data.tables.csv_files.Csv` describes the format."""

    path: str
    """The file, gzip if named .gz."""
    question: str = "question"
    """The column with the user's text."""
    answer: str = "answer"
    """The column with the assistant's."""
    encoding: str = "UTF-8"
    """Encoding of the file."""

    @property
    def title(self) -> str:
        return self.path

    def validate(self) -> None:
        """UserError without a path, for an unknown encoding, or if both columns are one."""
        check_encoding(self.encoding)
        if not self.path.strip() or self.question == self.answer:
            raise UserError("QuestionsAnswers needs path=, a CSV file, and two of its columns, question= and answer=.")

    def read(self) -> list[Dialogue]:
        """All rows. UserError for a missing column, an empty cell, or what `read_columns` refuses."""
        table = read_columns(self.path, encoding=self.encoding)
        columns = (map(str, table.column(name)) for name in (self.question, self.answer))
        return [checked(f"{self.path}:{line}", [{"role": "user", "content": question},
                                                {"role": "assistant", "content": answer}])
                for line, question, answer in zip(table.lines, *columns, strict=True)]


@dataclass(frozen=True)
class Taskmaster:
    """Google's Taskmaster dialogues (Byrne et al. 2019), such as Taskmaster-4's orders in a coffee shop. What a speaker
    says in several utterances in a row is one message of several lines."""

    path: str
    """The folder with data_00.json.xz, ... (or .json)."""
    orders: bool = False
    """Taskmaster-4: the last answer ends with the order of the annotated API calls, if there is one: "[mocha; oat
    milk]", what the assistant has to understand beside saying something."""

    @property
    def title(self) -> str:
        return self.path

    def validate(self) -> None:
        """UserError without a path."""
        if not self.path.strip():
            raise UserError("Taskmaster needs path=, the folder with its data_00.json.xz, ...")

    def read(self) -> list[Dialogue]:
        """All dialogues. UserError for a folder without files, or a file that is not in this format."""
        folder = user_path(self.path)
        files = [path for path in sorted(folder.glob("data_*")) if path.name.endswith((".json", ".json.xz"))]
        if not files:
            raise Absent(f"{self.path} has no file data_*.json.xz or data_*.json (looked from {Path.cwd()}).")
        return [dialogue for path in files for dialogue in _taskmaster(path, self.orders)]


def _taskmaster(path: Path, orders: bool) -> list[Dialogue]:
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rb") as file:
            rows = json.load(file)
        talks = [(f"{path.name}, {row['conversation_id']}", row["utterances"]) for row in rows]
        found = [checked(name, _turns(name, said)) for name, said in talks]
        if orders:
            for (_, messages), (_, said) in zip(found, talks, strict=True):
                messages[-1]["content"] += "".join(f" [{'; '.join(order)}]" for order in [_order(said)] if order)
        return found
    except (OSError, EOFError, lzma.LZMAError, ValueError) as e:
        raise UserError(f"{path} is no readable JSON ({e}): copy it again.") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not in Taskmaster's format: a list of dialogues with conversation_id and "
                        f"utterances, each with speaker and text.") from None


def _turns(name: str, utterances: list[dict[str, str]]) -> list[Message]:
    turns: list[Message] = []
    for utterance in utterances:
        role = SPEAKERS.get(utterance["speaker"].lower())
        if role is None:
            raise UserError(f"{name} has the speaker {utterance['speaker']!r}; known are {', '.join(SPEAKERS)}.")
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n" + utterance["text"]
        else:
            turns.append({"role": role, "content": utterance["text"]})
    return turns


def _order(utterances: list[dict[str, Any]]) -> list[str]:
    """Drinks, options and extras of the last response of the API with an order, in lower case."""
    order: dict[str, Any] = {}
    for utterance in utterances:
        for note in utterance.get("annotations", []):
            if note["name"] != "response":
                continue
            try:
                value = json.loads(note["value"])
            except ValueError:  # a few are cut
                continue
            order = value if isinstance(value, dict) and "order_id" in value and "menu_items" in value else order
    found: list[str] = []
    for item in order.get("menu_items", []):
        name = item["menu_item_name"] if item["menu_item_name"] != "var_drink" else _plain(item["menu_item_id"])
        count = str(item.get("quantity", 1))
        found += [name if count == "1" else f"{count} {name}",
                  *(option["option"] for option in item.get("attributes") or []),
                  *(_plain(addon["addon_id"]) for addon in item.get("addons") or [])]
    places = [option["option"] for option in order.get("attributes") or [] if option["attribute_id"] == "order-type"]
    found += ["to go" for place in places if re.match("to ?go", place, re.IGNORECASE)]
    return [" ".join(slot.lower().split()) for slot in found if slot]


def _plain(identifier: str) -> str:
    """"oat-milk-1234" -> "oat milk"."""
    return re.sub(r"[-\s]*\d*$", "", identifier).replace("-", " ")


@dataclass(frozen=True)
class PythonDocs:
    """Dialogues of one turn that every machine has: a function of Python's standard library and the first line of its
    docstring. They depend on the Python version."""

    title = "functions of Python's standard library"

    def validate(self) -> None:
        """Nothing can be checked without reading."""

    def read(self) -> list[Dialogue]:
        """One dialogue per documented function of a top-level module, in the order of the files."""
        found = []
        for name, path in PythonStdlib().open().paths.items():
            if "/" not in name:
                text = path.read_text(encoding="utf-8", errors="replace")
                found += [checked(f"{name}, {function}", [{"role": "user", "content": f"{name[:-3]}.{function}"},
                                                          {"role": "assistant", "content": answer.strip()}])
                          for function, answer in _DOCUMENTED.findall(text)]
        return found
