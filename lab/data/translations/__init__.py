"""Pairs of a source text and a target text."""

from lab.data.translations.sources import PairsFile, PythonSignatures, TfdsPairs
from lab.data.translations.translations import Translations

__all__ = ["PairsFile", "PythonSignatures", "TfdsPairs", "Translations"]
