"""ResNet-50 on ImageNet, 90 epochs; the local config is cifar_resnet's.

    ./launch.sh experiments/imagenet_resnet50.py --full      # first: ./launch.sh prepare imagenet2012

Expected: 76 to 77 % top-1 on the validation images (Goyal et al. 2017: 76.3 %, big_vision: 76.7 %). Not trained here,
only planned (``--full --dry-run``); the local config has been run.
"""

from dataclasses import replace

from experiments import cifar_resnet
from lab.data.images import Augment, Images, TfdsImages
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.cnn import ResNet
from lab.optim import SGD, Cosine
from lab.tasks.supervised import Classify

experiment = Experiment(
    data=Images(
        TfdsImages("imagenet2012"),
        shape=(224, 224, 3),
        border=16,
        resize=True,
        classes=1000,
        validation=10_000,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        augment=Augment(resized_crop=0.08, flip=True),
    ),
    model=ResNet(depth=50),
    task=Classify(label_smoothing=0.1),
    # 0.1 for 256 images, scaled with the batch, after 5 epochs of warm-up (Goyal et al. 2017, sections 2.1 and 2.2).
    optim=SGD(lr=Cosine(0.4, warmup=6255, end=0.0), momentum=0.9, nesterov=True, l2=5e-5),
    steps=112_590,
    batch=1024,
    precision="bfloat16",  # 90 epochs
    evaluate=Evaluate(every=6255, metric="accuracy", mode="max"),
    checkpoint=Checkpoint(every=2500),
)

local = replace(cifar_resnet.local, precision="float32")
