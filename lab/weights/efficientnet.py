"""EfficientNet-B0 to B3 (Tan & Le 2019), in the names of timm and of torchvision, whose models are equal."""

from __future__ import annotations

import functools
import math

from lab.models.efficientnet import SIZES, STAGES, EfficientNet
from lab.weights.resnet import COUNT, batch_norm, conv, timm_classes, timm_inputs
from lab.weights.rules import Architecture, Config, Rules, dense

MOST = max(size["depth_multiple"] for size in SIZES.values())


def model(size: str, config: Config) -> EfficientNet:
    """Our model of timm's config.json: {"architecture": "efficientnet_b0", "num_classes": 1000}."""
    return EfficientNet(classes=timm_classes(config), **SIZES[size])


def _rules(outer: dict[str, str], block: str, first: int, parts: tuple[dict[str, str], ...]) -> Rules:
    """Rules for all sizes: those whose parameters a model lacks do not apply.

    Our name -> theirs, of `outer` layers and of `parts` of the blocks: of the first stage, and of the others. `block`
    has {stage}, counted from `first`, and {j}, from 0.
    """
    def rules(ours: str, theirs: str) -> Rules:
        if ours.endswith("_norm"):
            return batch_norm(theirs, ours)
        if ours == "head":
            return dense(theirs, ours)
        if ours.endswith(("squeeze", "excite")):  # 1x1 convolutions of one pixel there
            return dense(theirs, ours, "F D 1 1 -> D F")
        return conv(theirs, ours)

    found = [COUNT, *(rule for ours, theirs in outer.items() for rule in rules(ours, theirs))]
    for i, (*_, blocks) in enumerate(STAGES):
        for j in range(math.ceil(blocks * MOST)):
            at, here = block.format(stage=i + first, j=j), f"stage{i + 1}_block{j + 1}"
            for ours, theirs in parts[i > 0].items():
                found += rules(f"{here}/{ours}", f"{at}.{theirs}")
    return tuple(found)


def _timm(names: dict[str, str]) -> dict[str, str]:
    """With their norms, which are numbered, and the squeeze-excitation."""
    norms = {f"{ours}_norm": f"bn{i}" for i, ours in enumerate(names, 1)}
    return names | norms | {"squeeze": "se.conv_reduce", "excite": "se.conv_expand"}


def _torchvision(first: int) -> dict[str, str]:
    """The layers from number `first` on, which is 1 in blocks that do not expand."""
    parts = ("expand", "depthwise", "", "project")[first:]
    names = {name: i for i, name in enumerate(parts) if name}
    se = parts.index("")
    return ({name: f"block.{i}.0" for name, i in names.items()}
            | {f"{name}_norm": f"block.{i}.1" for name, i in names.items()}
            | {"squeeze": f"block.{se}.fc1", "excite": f"block.{se}.fc2"})


TIMM_RULES = _rules({"stem": "conv_stem", "stem_norm": "bn1", "last": "conv_head", "last_norm": "bn2",
                     "head": "classifier"}, "blocks.{stage}.{j}", 0,
                    (_timm({"depthwise": "conv_dw", "project": "conv_pw"}),
                     _timm({"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"})))
TORCHVISION_RULES = _rules({"stem": "features.0.0", "stem_norm": "features.0.1", "last": "features.8.0",
                            "last_norm": "features.8.1", "head": "classifier.1"}, "features.{stage}.{j}", 1,
                           (_torchvision(1), _torchvision(0)))
EFFICIENTNET_FAMILY = tuple(
    Architecture(f"{prefix}efficientnet_{size}", "", functools.partial(model, size), rules, inputs=timm_inputs)
    for prefix, rules in (("", TIMM_RULES), ("torchvision_", TORCHVISION_RULES)) for size in SIZES)
