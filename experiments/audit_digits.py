"""Does a private run keep what it claims? Digits with 600 canaries: mislabelled, half of them left out by coins.

    ./launch.sh experiments/audit_digits.py --run-dir runs/audited
    ./launch.sh audit runs/audited
"""

from dataclasses import replace

from experiments import mnist_private
from lab.experiment import Checkpoint, Evaluate
from lab.models.linear import MLP
from lab.optim import SGD, Constant
from lab.private import DPSGD, Canaries

experiment = replace(
    mnist_private.local,
    data=Canaries(mnist_private.local.data, count=600),
    model=MLP(classes=10, depth=1, width=256),
    optim=SGD(lr=Constant(0.3), momentum=0.9),
    private=DPSGD(target_epsilon=8.0, clip_norm=0.3, delta=1e-4, expected_batch=128), steps=600, batch=192,
    evaluate=Evaluate(every=200), checkpoint=Checkpoint(every=200),
)

local = experiment
