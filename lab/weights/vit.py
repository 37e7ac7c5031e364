"""Vision Transformers as transformers writes them: ViT (Dosovitskiy et al. 2021) and DINOv2 (Oquab et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lab.errors import UserError
from lab.models.vit import ViT
from lab.weights.rules import ACTIVATIONS, NAMES, Architecture, Config, Rule, Rules, Unused, dense, norm

BACKBONE = ("apply_layernorm", "out_features", "out_indices", "reshape_hidden_states", "stage_names")
Shapes = Mapping[str, tuple[int, ...]]


def model(config: Config) -> ViT:
    """Our model of a config.json: a classifier, or the features of the class token."""
    kind, width = config["model_type"], config.take("hidden_size")
    (name, *_) = config.take("architectures", None) or ["?Model"]
    what = name.removeprefix("ViT").removeprefix("Dinov2")
    if what not in ("Model", "ForImageClassification"):
        raise UserError(f"{config.title}: the architecture {name} cannot be read; the trunk of one can, with "
                        f'"architectures": ["{"ViT" if kind == "vit" else "Dinov2"}Model"].')
    hidden = config.take("intermediate_size") if kind == "vit" else config.take("mlp_ratio", 4) * width
    if kind == "dinov2":
        config.expect(use_swiglu_ffn=False)
    value = ViT(
        depth=config.take("num_hidden_layers"), width=width, heads=config.take("num_attention_heads"),
        hidden_multiple=hidden / width, patch=_square(config, "patch_size", 16 if kind == "vit" else 14),
        pool="token+mean" if kind == "dinov2" and what != "Model" else "token",
        classes=None if what == "Model" else config.classes(),
        norm_epsilon=config.take("layer_norm_eps", 1e-12 if kind == "vit" else 1e-6),
        mlp=config.choose("hidden_act", ACTIVATIONS, "gelu"), layer_scale=kind == "dinov2",
        qkv_bias=None if config.take("qkv_bias", True) else False, dropout=config.take("hidden_dropout_prob", 0.0),
    )
    if uneven := [side for side in inputs(config).shape[1:3] if side % value.patch]:
        raise UserError(f"{config.title}: image_size {uneven[0]} is not divisible by patch_size {value.patch}.")
    config.finish("attention_probs_dropout_prob", "problem_type", "num_channels", "encoder_stride", "pooler_act",
                  "pooler_output_size", "drop_path_rate", "layerscale_value", "use_mask_token", *BACKBONE)
    return value


def inputs(config: Config) -> jax.ShapeDtypeStruct:
    """One image of the size that a config.json names, (1, H, W, C)."""
    size = config.take("image_size", 224)
    height, width = size if isinstance(size, list) else (size, size)
    return jax.ShapeDtypeStruct((1, height, width, config.take("num_channels", 3)), np.float32)


def _square(config: Config, name: str, default: int) -> int:
    size = config.take(name, default)
    if isinstance(size, list) and len(set(size)) > 1:
        raise UserError(f"{config.title}: {name} is {size}; only squares can be read.")
    return size[0] if isinstance(size, list) else size


def config(model: ViT) -> dict[str, Any]:
    """The config.json of a model that fits, but for the images' size."""
    dinov2 = model.layer_scale
    if dinov2 and model.pool != ("token" if model.classes is None else "token+mean"):
        raise UserError("DINOv2 in transformers classifies by --model.pool token+mean, and has the features of token.")
    if dinov2 and model.hidden_multiple != int(model.hidden_multiple):
        raise UserError(f"DINOv2 needs a whole --model.hidden-multiple, not {model.hidden_multiple}.")
    own = ({"model_type": "dinov2", "mlp_ratio": int(model.hidden_multiple), "use_mask_token": False} if dinov2 else
           {"model_type": "vit", "intermediate_size": round(model.hidden_multiple * model.width)})
    return {"architectures": [("Dinov2" if dinov2 else "ViT") + ("Model" if model.classes is None else
                                                                 "ForImageClassification")],
            "num_hidden_layers": model.depth, "hidden_size": model.width, "num_attention_heads": model.heads,
            "patch_size": model.patch, "hidden_act": NAMES[model.mlp], "layer_norm_eps": model.norm_epsilon,
            "qkv_bias": model.qkv_bias is not False, "hidden_dropout_prob": model.dropout,
            "attention_probs_dropout_prob": model.dropout} | own


def image_fields(model: ViT, shapes: Shapes) -> dict[str, Any]:
    """The fields of config.json for the images' size, by the shapes of the parameters. UserError unless square."""
    patches = shapes["wpe/embedding"][0] - 1
    side = math.isqrt(patches)
    if side**2 != patches:
        raise UserError(f"Only models of square images can be exported, and this one has {patches} patches.")
    return {"image_size": side * model.patch, "num_channels": shapes["patches/kernel"][0] // model.patch**2}


def resized(table_LD: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Position embeddings for another grid of patches (rows, columns), float32; those before the patches stay.

    Bicubic without smoothing, as `interpolate_pos_encoding` of transformers (torch's interpolate: half-pixel centres,
    a = -0.75, edges repeated).
    """
    first = len(table_LD) - old[0] * old[1]
    y, x = (_cubic(n, m) for n, m in zip(old, new, strict=True))
    grid = np.einsum("Hh,Ww,hwD->HWD", y, x, table_LD[first:].reshape(*old, -1).astype(np.float64), optimize=True)
    grid_LD = grid.reshape(new[0] * new[1], -1).astype(np.float32)
    return np.concatenate([table_LD[:first].astype(np.float32), grid_LD])


def _cubic(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """Weights (new, old) of Keys' cubic convolution (1981) on a line."""
    place = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for k in range(-1, 3):
        index = np.floor(place) + k
        d = np.abs(place - index)
        near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
        np.add.at(weights, (np.arange(new), np.clip(index, 0, old - 1).astype(int)), np.where(d <= 1, near, far))
    return weights


def _rules(trunk: str, block: Rules) -> Rules:
    """`block`: the rules for the norms, the MLP and what else differs between the two."""
    theirs, ours = f"{trunk}.encoder.layer.{{i}}.attention", "block_{i}/attn"
    return (
        Rule(f"{trunk}.embeddings.cls_token", "token", "1 1 D -> D"),
        Rule(f"{trunk}.embeddings.position_embeddings", "wpe/embedding", "1 L D -> L D"),
        # A convolution's kernel: channels before rows and columns of pixels; ours are after them.
        Rule(f"{trunk}.embeddings.patch_embeddings.projection.weight", "patches/kernel", "D C y x -> (y x C) D"),
        Rule(f"{trunk}.embeddings.patch_embeddings.projection.bias", "patches/bias"),
        *dense(f"{theirs}.attention.query", f"{ours}/query"), *dense(f"{theirs}.attention.key", f"{ours}/key"),
        *dense(f"{theirs}.attention.value", f"{ours}/value"), *dense(f"{theirs}.output.dense", f"{ours}/out"),
        *block,
        *norm(f"{trunk}.layernorm", "final_norm"),
        *dense("classifier", "head"),
        Unused(rf"{trunk}\.pooler\.dense\.(weight|bias)", "the pooler, which classifiers do not use"),
        Unused(rf"{trunk}\.embeddings\.mask_token", "stands for hidden patches in pretraining"),
        Unused(r"classifier\.(weight|bias)", "a head, which this model's output does not use"),
    )


BLOCK, OURS = "vit.encoder.layer.{i}", "block_{i}"
VIT_RULES = _rules("vit", (
    *norm(f"{BLOCK}.layernorm_before", f"{OURS}/attention_norm"),
    *norm(f"{BLOCK}.layernorm_after", f"{OURS}/mlp_norm"),
    *dense(f"{BLOCK}.intermediate.dense", f"{OURS}/ffn/up"), *dense(f"{BLOCK}.output.dense", f"{OURS}/ffn/down"),
))
DINO = "dinov2.encoder.layer.{i}"
DINOV2_RULES = _rules("dinov2", (
    *norm(f"{DINO}.norm1", f"{OURS}/attention_norm"), *norm(f"{DINO}.norm2", f"{OURS}/mlp_norm"),
    *dense(f"{DINO}.mlp.fc1", f"{OURS}/ffn/up"), *dense(f"{DINO}.mlp.fc2", f"{OURS}/ffn/down"),
    Rule(f"{DINO}.layer_scale1.lambda1", f"{OURS}/attention_scale"),
    Rule(f"{DINO}.layer_scale2.lambda1", f"{OURS}/mlp_scale"),
))
HOLDS = {"patch": None, "classes": None, "mlp": NAMES, "qkv_bias": (True, False)}
VIT_FAMILY = (
    Architecture("vit", "vit.", model, VIT_RULES, ViT(mlp="gelu_exact"), HOLDS, config, inputs=inputs,
                 image_fields=image_fields),
    Architecture("dinov2", "dinov2.", model, DINOV2_RULES, ViT(mlp="gelu_exact", layer_scale=True),
                 HOLDS | {"pool": ("token", "token+mean")}, config, inputs=inputs, image_fields=image_fields),
)
