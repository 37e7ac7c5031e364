"""For the fuzzers: a fault is the project's own wherever in the repository it is raised, also in a stand-in here."""

import pytest

from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def nothing_here_is_an_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a frame of a test would make an author's mistake of each fault, and a sentence of its traceback."""
    monkeypatch.setattr("lab.errors.LAB", ROOT)
