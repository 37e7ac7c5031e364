"""Linear regression as in linear_regression.py, by Adam: what changes when only the optimizer does.

    ./launch.sh experiments/linear_regression_adam.py
    ./launch.sh experiments/linear_regression_adam.py --full --data.source.path housing.csv
"""

from dataclasses import replace

from experiments import linear_regression
from lab.optim import Adam, Cosine

experiment = replace(linear_regression.experiment, optim=Adam(lr=Cosine(0.02, warmup=0)))

local = replace(linear_regression.local, optim=Adam(lr=Cosine(0.05, warmup=0)))
