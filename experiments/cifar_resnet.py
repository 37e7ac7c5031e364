"""ResNet-18 on CIFAR-10 with crops and flips; the local config is a quarter as wide, on scikit-learn's digits.

    ./launch.sh experiments/cifar_resnet.py
    ./launch.sh experiments/cifar_resnet.py --full      # first: ./launch.sh prepare cifar10
"""

from dataclasses import replace

from experiments import mnist_cnn
from lab.data.images import Augment, Images, TfdsImages
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.cnn import ResNet
from lab.optim import SGD, LinearDecay
from lab.tasks.supervised import Classify

experiment = Experiment(
    data=Images(TfdsImages("cifar10"), shape=(32, 32, 3), validation=0, mean=(0.491, 0.482, 0.447),
                std=(0.247, 0.243, 0.262), augment=Augment(crop=4, flip=True)),
    model=ResNet(depth=18, stem="cifar", classes=10),
    task=Classify(),
    optim=SGD(lr=LinearDecay(0.1, warmup=1000, end=0.0), momentum=0.9, nesterov=True, l2=5e-4),
    steps=11_700, batch=128,    # 30 epochs of 50,000
    evaluate=Evaluate(every=1170), checkpoint=Checkpoint(every=1170),
)

local = replace(experiment, data=mnist_cnn.local.data, model=ResNet(depth=18, stem="cifar", classes=10, width=16),
                optim=SGD(lr=LinearDecay(0.1, warmup=20, end=0.0), momentum=0.9, nesterov=True, l2=5e-4),
                steps=300, batch=64, evaluate=Evaluate(every=100), checkpoint=Checkpoint(every=100))
