"""gpt_small on data that every machine has, with its own vocabulary; for tests/gpu only.

    ./launch.sh tests/gpu/gpt_stdlib.py --full --batch 64 --grad-accum-steps 1
"""

from dataclasses import replace

from experiments import gpt_small
from lab.data.text import PythonStdlib, Text
from lab.data.tokenizers import BPE
from lab.experiment import Experiment


def on_stdlib(experiment: Experiment) -> Experiment:
    """The experiment on the standard library's text, as tokens of a vocabulary of 50,304."""
    return replace(experiment, data=Text(PythonStdlib(), BPE(vocab=50_304), length=experiment.data.length))


experiment = on_stdlib(gpt_small.experiment)
small = gpt_small.local
local = replace(small, optim=replace(experiment.optim, lr=small.optim.lr), model=small.model.clone(position="learned"))
