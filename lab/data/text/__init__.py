"""Text as tokens."""

from lab.data.text.sources import PythonStdlib, TextFiles, TfdsText
from lab.data.text.text import Text

__all__ = ["PythonStdlib", "TextFiles", "TfdsText", "Text"]
