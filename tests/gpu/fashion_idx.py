"""fashion_cnn on a folder of IDX files, as PyTorch can train it too; for tests/gpu only.

    ./launch.sh tests/gpu/fashion_idx.py --full --data.source.path FOLDER
"""

from dataclasses import replace

from experiments import fashion_cnn
from lab.data.idx import Idx

experiment = replace(fashion_cnn.experiment, data=replace(fashion_cnn.experiment.data, source=Idx("idx")))
local = fashion_cnn.local
