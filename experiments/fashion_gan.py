"""A generative adversarial network on Fashion-MNIST; the local config generates scikit-learn's 8x8 digits.

    ./launch.sh experiments/fashion_gan.py
    ./launch.sh experiments/fashion_gan.py --full      # first: ./launch.sh prepare fashion_mnist
    ./launch.sh evaluate runs/fashion_gan-... --judge runs/fashion_cnn-...      # classifies its samples

Measured (2-core CPU, 2026-11-22, 5 seeds, 2,000 samples each, classified by fashion_cnn.py's seed 0): no seed
collapsed; all 10 classes appear, with an entropy of 0.972-0.994 of the maximum (real test images: 0.999). The
classifier is confident (0.9 or more) for 31-37 % of the samples, and for 82 % of the real images.
"""

from dataclasses import replace

from lab.data.images import Images, TfdsImages
from lab.data.tables import Sklearn
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.gan import GAN
from lab.optim import Adam, LinearDecay
from lab.tasks.adversarial import Adversarial

experiment = Experiment(
    data=Images(TfdsImages("fashion_mnist"), shape=(28, 28, 1), validation=1000),  # mean and std 0.5: pixels in [-1, 1]
    model=GAN(shape=(28, 28, 1)),
    task=Adversarial(),
    # Two parameter groups by path, here with the same rate; the samples come from averaged parameters.
    optim=Adam(
        lr=LinearDecay(5e-4, end=0.0),
        b1=0.5,
        b2=0.999,
        ema=0.995,
        lr_multipliers=(("^generator/", 1.0), ("^discriminator/", 1.0)),
    ),
    steps=4000,
    batch=64,
    evaluate=Evaluate(every=500),
    checkpoint=Checkpoint(every=500, best=False),
)

local = replace(experiment, data=Images(Sklearn("digits"), shape=(8, 8, 1)), model=GAN(shape=(8, 8, 1)),
                steps=1500, evaluate=Evaluate(every=250))
