"""The network and recipe of experiments/cifar_resnet.py written once more, in PyTorch: an independent reference.

    PYTHONPATH=. python tests/reference_cifar_torch.py DATA_DIR --width 16 --steps 620 --batch 64 --seed 0

Needs torch beside lab's own packages. Only the data, its order and the learning rate come from lab.
"""

import argparse
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from experiments.cifar_resnet import experiment
from lab.data.images.images import Images
from lab.data.images.sources import TfdsImages
from lab.data.pipeline import train_batch
from lab.optim import LinearDecay

MEAN, STD = (torch.tensor(x).view(1, 3, 1, 1) for x in (experiment.data.mean, experiment.data.std))


class Block(nn.Module):
    def __init__(self, before: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm2.weight)
        project = stride != 1 or before != channels
        self.shortcut = nn.Sequential(nn.Conv2d(before, channels, 1, stride, bias=False),
                                      nn.BatchNorm2d(channels)) if project else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.shortcut(x))


def resnet18(width: int) -> nn.Sequential:
    blocks = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    before = width
    for stage in range(4):
        for i in range(2):
            blocks.append(Block(before, width * 2**stage, 2 if stage and not i else 1))
            before = width * 2**stage
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    return model


def pixels(images: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def augment(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Zero-padded crops and flips, as `Augment(crop=4, flip=True)`."""
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    out = np.empty_like(images)
    for i, (y, x, flip) in enumerate(random.integers(0, (9, 9, 2), (len(images), 3))):
        crop = padded[i, y:y + 32, x:x + 32]
        out[i] = crop[:, ::-1] if flip else crop
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data_dir")
    for name, default in (("width", 16), ("steps", 620), ("batch", 64), ("seed", 0), ("warmup", 60)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peak", type=float, default=0.05)
    o = parser.parse_args()
    torch.manual_seed(o.seed)
    random = np.random.default_rng(o.seed)
    data = Images(TfdsImages("cifar10", data_dir=o.data_dir), shape=(32, 32, 3), validation=0).load()
    model = resnet18(o.width)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD([{"params": matrices, "weight_decay": 5e-4}, {"params": rest, "weight_decay": 0.0}],
                                lr=0.1, momentum=0.9, nesterov=True)
    rate = LinearDecay(o.peak, warmup=o.warmup, end=0.0).build(o.steps)
    start = time.perf_counter()
    for step in range(o.steps):
        batch = train_batch(data.train, step, o.batch, o.seed)
        for group in optimizer.param_groups:
            group["lr"] = float(rate(step))
        images, targets = pixels(augment(batch["inputs"], random)), torch.from_numpy(batch["targets"]).long()
        loss = F.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    model.eval()
    everything = data.test[np.arange(len(data.test))]
    with torch.no_grad():
        logits = torch.cat([model(pixels(part)) for part in np.array_split(everything["inputs"], 10)])
    right = (logits.argmax(1).numpy() == everything["targets"]).mean()
    print(f"torch {torch.__version__}, seed {o.seed}: test accuracy {right:.4f}, "
          f"{1000 * seconds / o.steps:.0f} ms a step")


if __name__ == "__main__":
    main()
