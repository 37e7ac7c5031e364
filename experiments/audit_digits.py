"""Does a private run keep what it claims? Digits with 600 canaries: mislabelled, half of them left out by coins.

    ./launch.sh experiments/audit_digits.py --run-dir runs/audited
    ./launch.sh audit runs/audited
    ... --private.target-epsilon 1000       # for comparison: as good as no noise

Measured (busy 2-core Intel Xeon VM with AMX, 2026-11-28), 295 canaries in training against 305 left out, by the loss:
area under the ROC curve 0.602 (95 % interval 0.555 to 0.648) at epsilon 8, with 83.8 % of 359 test digits right; 0.669
(0.626 to 0.712) at epsilon 1000, 96.1 %. The attack shows epsilon to be at least 0.31 and 0.90. 21 to 39 s of training.
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
