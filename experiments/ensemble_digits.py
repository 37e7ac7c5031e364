"""An ensemble: 5 networks with different initial weights, trained in one program; averages their predictions.

    ./launch.sh experiments/ensemble_digits.py

Measured (2-core CPU, 2026-11-22, seed 0): 99.16 % of 359 test digits; single members 99.00 % on average. 3 s.
"""

from dataclasses import replace

from experiments import mnist_cnn
from lab.experiment import Checkpoint, Evaluate
from lab.models.linear import MLP, Ensemble
from lab.optim import AdamW, Cosine

experiment = replace(
    mnist_cnn.local,
    model=Ensemble(MLP(classes=10, depth=2, width=64, dropout=0.2), members=5),
    optim=AdamW(lr=Cosine(3e-3, warmup=20, end=0.01), weight_decay=0.05),
    steps=600, steps_per_call=20, evaluate=Evaluate(every=100), checkpoint=Checkpoint(every=100),
)

local = experiment
