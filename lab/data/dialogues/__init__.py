"""Dialogues between a user and an assistant."""

from lab.data.dialogues.dialogues import Dialogues
from lab.data.dialogues.sources import Jsonl, PythonDocs, QuestionsAnswers, Taskmaster

__all__ = ["Dialogues", "Jsonl", "PythonDocs", "QuestionsAnswers", "Taskmaster"]
