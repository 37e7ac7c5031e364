"""ResNet-18, 34 and 50 (He et al. 2016), in the names of torchvision and timm, and as transformers writes them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lab.errors import UserError
from lab.models.cnn import BLOCKS, ResNet
from lab.weights.rules import Architecture, Config, Rule, Rules, Unused

SIZE = 224  # no parameter depends on the images' height and width
COUNT = Unused(r".*\.num_batches_tracked", "a count, which evaluation does not use")
LAYERS = {("basic", BLOCKS[18]): 18, ("basic", BLOCKS[34]): 34, ("bottleneck", BLOCKS[50]): 50}


def timm_model(depth: int, config: Config) -> ResNet:
    """Our model of timm's config.json, for torchvision's weights {"architecture": "resnet50", "num_classes": 1000}."""
    return ResNet(depth=depth, classes=timm_classes(config))


def timm_classes(config: Config) -> int:
    """Number of classes in timm's config.json. UserError for a field that may change the model."""
    config.expect(global_pool="avg")
    args = Config(config.take("model_args", None) or {}, f"model_args in {config.title}")
    args.expect(global_pool="avg")
    args.finish("in_chans", "num_classes")
    classes = config.take("num_classes")
    config.finish("architecture", "num_features", "pretrained_cfg", "label_names", "label_descriptions")
    return classes


def timm_inputs(config: Config) -> jax.ShapeDtypeStruct:
    """One image, (1, H, W, C)."""
    channels, *_ = (config.take("pretrained_cfg", None) or {}).get("input_size", [3])
    return _image((config.take("model_args", None) or {}).get("in_chans", channels))


def timm_config(model: ResNet) -> dict[str, Any]:
    """timm's config.json of a model that fits, but for its images' channels. UserError for another width."""
    if model.width != 64:
        raise UserError(f"timm's ResNets have --model.width 64, not {model.width}.")
    return {"architecture": f"resnet{model.depth}", "architectures": [f"resnet{model.depth}"],
            "num_classes": model.classes, "num_features": 512 if model.depth < 50 else 2048, "global_pool": "avg"}


def timm_image_fields(model: ResNet, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of timm's config.json for the channels of the images."""
    channels = shapes["stem/kernel"][2]
    return {"model_args": {"in_chans": channels},
            "pretrained_cfg": {"input_size": [channels, SIZE, SIZE], "num_classes": model.classes,
                               "first_conv": "conv1", "classifier": "fc"}}


def model(config: Config) -> ResNet:
    """Our model of transformers' config.json."""
    (name, *_) = config.take("architectures", None) or ["ResNetForImageClassification"]
    if name != "ResNetForImageClassification":
        raise UserError(f"{config.title}: the architecture {name} cannot be read; ResNetForImageClassification can.")
    config.expect(hidden_act="relu", downsample_in_first_stage=False, downsample_in_bottleneck=False)
    width, kind = config.take("embedding_size", 64), config.take("layer_type", "bottleneck")
    depths, sizes = (tuple(config.take(n, [])) for n in ("depths", "hidden_sizes"))
    wanted = tuple(width * (4 if kind == "bottleneck" else 1) * 2**i for i in range(4))
    if (kind, depths) not in LAYERS or sizes != wanted:
        raise UserError(f"{config.title}: {kind} layers {depths} with hidden_sizes {sizes} are no ResNet-18, 34 or 50.")
    value = ResNet(depth=LAYERS[kind, depths], width=width, classes=config.classes())
    config.finish("num_channels", "out_features", "out_indices", "stage_names")
    return value


def inputs(config: Config) -> jax.ShapeDtypeStruct:
    """One image, (1, H, W, C)."""
    return _image(config.take("num_channels", 3))


def _image(channels: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, SIZE, SIZE, channels), np.float32)


def conv(theirs: str, ours: str) -> tuple[Rule, ...]:
    """A convolution's kernel."""
    return (Rule(f"{theirs}.weight", f"{ours}/kernel", "O I y x -> y x I O"),)


def batch_norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    """BatchNorm: two parameters, and two statistics of another collection."""
    return (Rule(f"{theirs}.weight", f"{ours}/scale"), Rule(f"{theirs}.bias", f"{ours}/bias"),
            Rule(f"{theirs}.running_mean", f"batch_stats/{ours}/mean"),
            Rule(f"{theirs}.running_var", f"batch_stats/{ours}/var"))


def _rules(stem: tuple[str, str], block: str, layer: tuple[str, str], shortcut: tuple[str, str], head: str,
           first: int) -> Rules:
    """Rules for every depth: those whose parameters a model lacks do not apply.

    Pairs are the names of a convolution and its norm. `block` has {stage} and {j}, `layer` has {k}; stages and layers
    are counted from `first`, blocks from 0.
    """
    found = [*conv(stem[0], "stem"), *batch_norm(stem[1], "stem_norm"),
             Rule(f"{head}.weight", "head/kernel", "O I -> I O"), Rule(f"{head}.bias", "head/bias"), COUNT]
    for i, blocks in enumerate(BLOCKS[50]):
        for j in range(blocks):
            theirs, ours = block.format(stage=i + first, j=j), f"stage{i + 1}_block{j + 1}"
            for k in range(3):
                kernel, norm = (f"{theirs}.{name.format(k=k + first)}" for name in layer)
                found += [*conv(kernel, f"{ours}/conv{k + 1}"), *batch_norm(norm, f"{ours}/norm{k + 1}")]
            found += [*conv(f"{theirs}.{shortcut[0]}", f"{ours}/shortcut"),
                      *batch_norm(f"{theirs}.{shortcut[1]}", f"{ours}/shortcut_norm")]
    return tuple(found)


TIMM_RULES = _rules(("conv1", "bn1"), "layer{stage}.{j}", ("conv{k}", "bn{k}"), ("downsample.0", "downsample.1"), "fc",
                    first=1)
HF_RULES = _rules(("resnet.embedder.embedder.convolution", "resnet.embedder.embedder.normalization"),
                  "resnet.encoder.stages.{stage}.layers.{j}", ("layer.{k}.convolution", "layer.{k}.normalization"),
                  ("shortcut.convolution", "shortcut.normalization"), "classifier.1", first=0)
TIMM_RESNETS = tuple(
    Architecture(f"resnet{depth}", "", functools.partial(timm_model, depth), TIMM_RULES, ResNet(depth=depth),
                 {"classes": None, "zero_init": None}, timm_config, inputs=timm_inputs,
                 image_fields=timm_image_fields) for depth in BLOCKS)
RESNET_FAMILY = (*TIMM_RESNETS, Architecture("resnet", "resnet.", model, HF_RULES, inputs=inputs))
