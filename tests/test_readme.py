"""The READMEs: short, with links that lead somewhere, and commands whose flags exist."""

import re
import shlex

import pytest

from lab.commands.arguments import find_experiment, parse
from lab.commands.bench import BenchOptions
from lab.commands.plan import PlanOptions
from lab.commands.train import TrainOptions
from lab.study.run.command import StudyOptions
from tests.conftest import ROOT
from tests.test_layout import READING_PATH

READMES = sorted(path for path in ROOT.rglob("README.md") if ".venvs" not in path.parts)
ROOMS = [path for path in READMES if path.parent.parent == ROOT / "lab"]


def anchors(text):
    """Of the headings of a page, as GitHub makes them, and of its own marks."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a name="([^"]+)"', text))


def test_their_length():
    assert (ROOT / "README.md").read_text().count("\n") <= 250
    for path in ROOMS:
        assert path.read_text().count("\n") <= 60, path
    rooms = {path.parent.name for path in (ROOT / "lab").glob("*/__init__.py")}
    assert {path.parent.name for path in ROOMS} == rooms


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            found = path.parent / name if name else path
            assert found.exists(), target
            assert not anchor or anchor in anchors(found.read_text()), target


def test_the_front_page_lists_the_reading_path():
    text = (ROOT / "README.md").read_text()
    for name in READING_PATH:
        assert f"]({name})" in text, name


def commands():
    """(README, words) of every command that names one of our experiments."""
    for path in READMES:
        shown = r"^ {4,}(?:LAB_\w+=\S+ )*\./launch\.sh (.*?)(?: {2,}#.*| #.*)?$"
        for line in re.findall(shown, path.read_text(), re.MULTILINE):
            if re.search(r"experiments/(?!x\.py)\w+\.py", line) and "..." not in line and "…" not in line:
                yield pytest.param(line, id=f"{path.parent.name}: {line}")


@pytest.mark.parametrize("line", commands())
def test_the_flags_of_a_command_exist(line, monkeypatch):
    monkeypatch.setenv("LAB_PLATFORM", "cpu")
    words = shlex.split(line)
    at = next(i for i, word in enumerate(words) if word.startswith("experiments/"))
    path, flags = find_experiment(words[at]), words[at + 1:]
    options = {"bench": BenchOptions, "plan": PlanOptions}.get(words[at - 1] if at else "", TrainOptions)
    if "--vary" in flags or "study" in path.read_text().partition("\n\n")[2] and "Study(" in path.read_text():
        options = StudyOptions
    if "--help" in flags:
        with pytest.raises(SystemExit) as found:
            parse(path, flags, options)
        assert found.value.code == 0
        return
    flags = [word.replace("RUN", "runs/x").replace("train.csv", str(ROOT / "README.md")) for word in flags]
    parse(path, flags, options)


def test_a_flag_that_is_gone_is_seen(capsys):
    with pytest.raises(SystemExit):
        parse(find_experiment("experiments/gpt_small.py"), ["--optim.decay", "0.1"], TrainOptions)
    assert "--optim" in capsys.readouterr().err
