"""The main job needs jax, flax, optax, orbax, numpy, einops, tyro and its tokenizer; the rest is imported on use."""

import os
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Put on PYTHONPATH, Python runs this file first: the modules named are not there.
BLOCK = """
import os, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in os.environ["ABSENT"].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""
OPTIONAL = "grain,tensorflow_datasets,importlib_resources,sklearn,PIL,matplotlib"


def launch(folder: Path, *words: str, absent: str) -> subprocess.CompletedProcess:
    (folder / "sitecustomize.py").write_text(BLOCK)
    environ = {**os.environ, "PYTHONPATH": str(folder), "LAB_PYTHON": sys.executable, "ABSENT": absent}
    return subprocess.run([ROOT / "launch.sh", *words], env=environ, cwd=folder, capture_output=True, text=True)


def test_the_main_job_needs_few_packages(tmp_path):
    """Its pictures need matplotlib: a warning, and the run has its result."""
    done = launch(tmp_path, "experiments/gpt_small.py", "--local", "--steps", "11", "--model.depth", "1",
                  "--evaluate.records", "8", "--run-dir", "run", absent=OPTIONAL)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/result.json").exists()
    said = done.stdout + done.stderr
    assert "matplotlib" in said and "Traceback" not in said


def test_a_package_that_is_not_there_is_one_sentence(tmp_path):
    done = launch(tmp_path, "experiments/gpt_small.py", "--local", "--run-dir", "run", absent="tokenizers")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{sys.executable} -m pip install tokenizers" in done.stderr


@pytest.mark.parametrize("package,what", [("flax", "rich"), ("orbax-checkpoint", "psutil"), ("jax", "scipy")])
def test_what_comes_with_a_required_package(package, what):
    """So lab may import it anywhere: an environment with the one has the other."""
    assert any(entry.startswith(what) and "extra" not in entry for entry in requires(package))
