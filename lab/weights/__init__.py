"""Other people's weights."""

from lab.weights.read import find, model_of, read
from lab.weights.start import Weights

__all__ = ["Weights", "find", "model_of", "read"]
