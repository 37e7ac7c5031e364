"""Short labelled texts."""

from lab.data.messages.messages import Messages
from lab.data.messages.sources import PythonPackages, TextFolder, TfdsMessages

__all__ = ["Messages", "PythonPackages", "TextFolder", "TfdsMessages"]
