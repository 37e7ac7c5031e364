"""An assistant: a language model of dialogues whose run ends with a report of its answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from lab.errors import UserError
from lab.files import make_folder, replace_file
from lab.tasks.base import EvalResult
from lab.tasks.language import LanguageModel
from lab.tasks.text_quality import quality_table, slot_scores, text_quality

BEFORE = "answers/before.json"


@dataclass(frozen=True)
class Assistant(LanguageModel):
    """Next-token prediction of the answers of `Dialogues`. Also answers held-out dialogues, before the first step and
    at the end.

    answers/answers.json has the answers to the last question of each dialogue, the most likely token at each position,
    beside the real ones; and statistics of all answers (`lab.tasks.text_quality`) with precision, recall and F1 of the
    slots that the real answers list in square brackets. answers/answers.md shows some side by side.
    """

    answers: int = 100
    """Number of held-out dialogues (test, otherwise validation) to answer."""
    shown: int = 10
    """Number of them to show side by side."""
    new_tokens: int = 64
    """Maximum number of tokens of an answer."""

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        super().validate()
        for name in ("answers", "shown", "new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--task.{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}.")

    def check(self, output: Any, data: Any) -> None:
        """Raises UserError for data without dialogues."""
        if not hasattr(data, "held_out"):
            raise UserError("Assistant needs the dialogues of data=Dialogues(...); LanguageModel takes any text.")

    def snapshot(self, outcome: EvalResult) -> None:
        """Writes the answers of the model that has not been trained."""
        if outcome.step == 0:
            make_folder((outcome.folder / BEFORE).parent)
            replace_file(outcome.folder / BEFORE, json.dumps(self._answers(outcome), ensure_ascii=False))

    def artifacts(self, outcome: EvalResult) -> list[str]:
        """Writes the report of the answers; returns its table, and the lines of `LanguageModel`."""
        lines = super().artifacts(outcome)
        dialogues = self._dialogues(outcome)
        models = {"model": self._answers(outcome)}
        if (path := outcome.folder / BEFORE).is_file():
            models = {"before": json.loads(path.read_text("utf-8")), "after": models["model"]}
        references = [messages[-1]["content"] for messages in dialogues]
        values = {name: text_quality(texts) | slot_scores(references, texts) for name, texts in models.items()}
        values["real answers"] = text_quality(references)
        found = [{"messages": messages[:-1], "real": messages[-1]["content"],
                  **{name: texts[i] for name, texts in models.items()}} for i, messages in enumerate(dialogues)]
        folder = make_folder(outcome.folder / "answers")
        replace_file(folder / "answers.json", json.dumps({"statistics": values, "answers": found}, indent=1,
                                                         ensure_ascii=False) + "\n")
        replace_file(folder / "answers.md", _side_by_side(found[: self.shown], [*models, "real"]))
        return [*lines, f"{len(found)} answers to held-out dialogues ({folder / 'answers.md'} shows "
                        f"{min(self.shown, len(found))}):", *quality_table(values)]

    def _dialogues(self, outcome: EvalResult) -> list[list[dict[str, str]]]:
        """Evenly spaced held-out dialogues, each up to its last answer."""
        held_out = outcome.data.held_out
        spread = np.linspace(0, len(held_out) - 1, min(self.answers, len(held_out))).astype(int)
        return [held_out[i] for i in spread]

    def _answers(self, outcome: EvalResult) -> list[str]:
        """The model's answer to each of `_dialogues`."""
        from lab.models.generate import sample_texts

        data = outcome.data
        text = SimpleNamespace(encode=data.prompt_ids, continuation=data.continuation, eot=data.eot,
                               metadata=data.metadata)
        prompts: list[Any] = [messages[:-1] for messages in self._dialogues(outcome)]
        return sample_texts(outcome.compute, outcome.model.context, text, prompts, seed=0, temperature=0.0,
                            new_tokens=min(self.new_tokens, outcome.model.context // 2))


def _side_by_side(found: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Markdown: the messages of each dialogue, and a table of the answers to the last."""
    lines = ["# Answers", ""]
    for i, row in enumerate(found, 1):
        lines += [f"## {i}", "", *(f"**{message['role']}**: {_line(message['content'])}  "
                                   for message in row["messages"]), "",
                  "| model | answer |", "|---|---|", *(f"| {name} | {_line(row[name])} |" for name in columns), ""]
    return "\n".join(lines)


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
