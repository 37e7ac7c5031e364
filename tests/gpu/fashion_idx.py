"""fashion_cnn on a folder of IDX files, as PyTorch can train it too; for tests/gpu only.

    ./launch.sh tests/gpu/fashion_idx.py --full --data.source.path FOLDER
"""

from dataclasses import replace

from experiments import fashion_cnn
from lab.data.images import Idx
from lab.experiment import Checkpoint, Evaluate

experiment = replace(
    fashion_cnn.experiment, data=replace(fashion_cnn.experiment.data, source=Idx("idx")),
    steps=92_000, evaluate=Evaluate(every=0), checkpoint=Checkpoint(every=0),    # so that a call may make many of them
)
local = fashion_cnn.local
