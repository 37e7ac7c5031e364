"""Dialogues between a user and an assistant."""

from lab.data.dialogues.dialogues import Dialogues
from lab.data.dialogues.pairs import JsonlPairs, PythonDocsPairs
from lab.data.dialogues.preferences import Preferences
from lab.data.dialogues.sources import Jsonl, PythonDocs, QuestionsAnswers, Taskmaster

__all__ = ["Dialogues", "Jsonl", "JsonlPairs", "Preferences", "PythonDocs", "PythonDocsPairs", "QuestionsAnswers",
           "Taskmaster"]
