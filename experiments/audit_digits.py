"""Does a private run keep what it claims? Digits with 600 canaries: mislabelled, half of them left out by coins.

    ./launch.sh experiments/audit_digits.py --run-dir runs/audited
    ./launch.sh audit runs/audited
"""

from dataclasses import replace

from experiments import mnist_private
from lab.private import Canaries

experiment = replace(mnist_private.local, data=Canaries(mnist_private.local.data, count=600))

local = experiment
