"""ViT-S/16 on ImageNet, 90 epochs, mean pooling, fixed positions; the local config is a small ViT on digits.

    ./launch.sh experiments/imagenet_vit_s16.py --full      # first: ./launch.sh prepare imagenet2012

Expected: about 75 % top-1. Beyer et al. 2022 ("Better plain ViT baselines for ImageNet-1k") reach 76.5 % with this
recipe plus RandAugment, which lab lacks. Not trained here, only planned (``--full --dry-run``); the local config, on
scikit-learn's digits, has been run.
"""

from dataclasses import replace

from experiments import imagenet_resnet50, mnist_cnn
from lab.data.images import Augment
from lab.experiment import Evaluate
from lab.models.vit import ViT
from lab.optim import AdamW, Cosine
from lab.tasks.supervised import Classify

experiment = replace(
    imagenet_resnet50.experiment,
    data=replace(imagenet_resnet50.experiment.data, mean=(0.5,), std=(0.5,),
                 augment=Augment(resized_crop=0.05, flip=True, mixup=0.2)),
    model=ViT(depth=12, width=384, heads=6, patch=16, classes=1000, pool="mean", position="sincos"),
    task=Classify(),
    optim=AdamW(lr=Cosine(1e-3, warmup=10_000, end=0.0), b1=0.9, b2=0.999, weight_decay=0.1, grad_clip_norm=1.0),
)

local = replace(
    mnist_cnn.local,
    model=ViT(depth=4, width=64, heads=4, patch=2, classes=10, pool="mean", position="sincos"),
    optim=AdamW(lr=Cosine(2e-3, warmup=50, end=0.0), weight_decay=0.1, grad_clip_norm=1.0),
    steps=800, evaluate=Evaluate(every=200, metric="accuracy", mode="max"),
)
