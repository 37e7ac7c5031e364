"""EfficientNet against ResNet-18 at equal FLOPs, on 4,000 images of CIFAR-10 and 1,000 of its test images; 5 seeds.

    ./launch.sh experiments/ablate_cifar_efficientnet.py --full     # first: ./launch.sh prepare cifar10
    ./launch.sh experiments/ablate_cifar_efficientnet.py            # no accelerator: the local config, on digits

Measured with --full (busy 2-core Intel Xeon VM with AMX, 2026-11-28): test accuracy after 300 steps of 32, seeds 0 to
4: EfficientNet 37.8, 37.8, 37.2, 38.5, 37.8 % (mean 37.8), ResNet 30.3, 34.3, 34.1, 36.2, 29.4 % (32.9): 5.0 points
apart, 95 % interval 1.5 to 8.4. Forward FLOPs are equal to 1 %, parameters are not (579,000 and 100,000). Both have
cifar_resnet's rate; it was tuned for neither. 10 cells, 7 minutes (cores).
"""

from dataclasses import replace

from experiments import cifar_resnet
from lab.data.images import TfdsImages
from lab.experiment import Checkpoint, Evaluate
from lab.models.cnn import ResNet
from lab.models.efficientnet import EfficientNet
from lab.optim import SGD, LinearDecay
from lab.study.design import Study

# Without dropout and stochastic depth, as the ResNet: in so few epochs both underfit.
NETWORK = EfficientNet(width_multiple=0.5, depth_multiple=0.3, stem="cifar", classes=10, dropout=0.0,
                       stochastic_depth=0.0)

study = Study(
    base=replace(
        cifar_resnet.experiment,
        data=replace(cifar_resnet.experiment.data, validation=400,
                     source=TfdsImages("cifar10", train="train[:4000]", test="test[:1000]")),
        model=ResNet(depth=18, stem="cifar", classes=10, width=6),
        optim=SGD(lr=LinearDecay(0.1, warmup=50, end=0.0), momentum=0.9, nesterov=True, l2=5e-4),
        steps=300, batch=32,
        evaluate=Evaluate(every=150, metric="accuracy", mode="max"),
        checkpoint=Checkpoint(every=0, keep=1, best=False)),
    arms={"efficientnet": {"model": NETWORK}},
    seeds=5,
    split="test",
)

local = replace(
    study,
    base=replace(study.base, data=cifar_resnet.local.data, model=study.base.model.clone(width=9)),
)
