"""Multi-task learning with a shared trunk on Fashion-MNIST: class, coarse group, and image reconstruction.

    ./launch.sh experiments/multitask_fashion.py
    ./launch.sh experiments/multitask_fashion.py --full      # first: ./launch.sh prepare fashion_mnist
"""

from dataclasses import replace

from experiments import fashion_cnn, mnist_cnn
from lab.data.images import Augment
from lab.experiment import Evaluate
from lab.models.multitask import ClassifyAndReconstruct
from lab.optim import AdamW, Cosine
from lab.tasks.multitask import MultiTask, Part
from lab.tasks.regress import Regress
from lab.tasks.supervised import Classify

#           T-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot
CLOTHES = (0, 1, 0, 1, 0, 2, 0, 2, 3, 2)
SMALL_OR_LARGE = (0,) * 5 + (1,) * 5

experiment = replace(
    fashion_cnn.experiment,
    data=replace(fashion_cnn.experiment.data, augment=Augment(flip=True)),
    model=ClassifyAndReconstruct(classes=10, groups=4),
    task=MultiTask((Part("class", Classify()),
                    Part("group", Classify(), weight=0.5, groups=CLOTHES, group_names=("top", "long", "shoe", "bag")),
                    Part("image", Regress(), weight=0.5, target="inputs"))),
    optim=AdamW(lr=Cosine(2e-3, warmup=100, end=0.01), weight_decay=0.05),
    steps=2000, evaluate=Evaluate(every=500),
)

local = replace(
    experiment, data=mnist_cnn.local.data, model=ClassifyAndReconstruct(classes=10, groups=2),
    task=MultiTask((Part("class", Classify()),
                    Part("group", Classify(), weight=0.5, groups=SMALL_OR_LARGE, group_names=("0 to 4", "5 to 9")),
                    Part("image", Regress(), weight=0.5, target="inputs"))),
    steps=600, batch=64, evaluate=Evaluate(every=200),
)
