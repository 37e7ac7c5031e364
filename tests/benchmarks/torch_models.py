"""lab's GPT, ConvNet, LSTM and Linear in PyTorch, written for PyTorch's speed: fused layers wherever it has them.

Each module says where its parameters are in lab's (`places`), so that both begin with the same numbers and the count of
parameters is compared. Where PyTorch has two ways to do the same, the way is an argument; `WAYS` lists them. Imports
nothing of lab.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

Places = Iterator[tuple[nn.Parameter, tuple[str, ...]]]
"""(parameter, paths of lab's parameters that it holds, side by side)."""

Outputs = tuple[torch.Tensor, torch.Tensor]
"""(outputs of all steps, last state) of a layer."""

WAYS = {"GPT": {"attention": ("sdpa", "plain")}, "ConvNet": {"layout": ("channels_last", "contiguous")},
        "LSTM": {"texts": ("packed", "flipped")}, "Linear": {}}


def dense(module: nn.Linear, *names: str) -> Places:
    """The places of a linear layer whose outputs are those of lab's `names`, one after another."""
    yield module.weight, tuple(f"{name}/kernel" for name in names)
    if module.bias is not None:
        yield module.bias, tuple(f"{name}/bias" for name in names)


def scaled(module: nn.Module, name: str) -> Places:
    """The places of a norm."""
    yield module.weight, (f"{name}/scale",)
    if module.bias is not None:
        yield module.bias, (f"{name}/bias",)


def as_torch(paths: tuple[str, ...], arrays: Mapping[str, np.ndarray]) -> torch.Tensor:
    """lab's arrays side by side in PyTorch's layout: output features come first, and kernels are OIHW."""
    joined = np.concatenate([arrays[path] for path in paths], axis=-1)
    if not paths[0].endswith("embedding"):
        joined = joined.transpose({1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[joined.ndim])
    return torch.from_numpy(np.ascontiguousarray(joined))


def load(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Gives the model lab's parameters, each exactly once; what has no place there is 0 and stays 0."""
    used = [path for _, paths in model.places() for path in paths]
    assert sorted(used) == sorted(arrays), set(used) ^ set(arrays)
    placed = set()
    with torch.no_grad():
        for parameter, paths in model.places():
            parameter.copy_(as_torch(paths, arrays))
            placed.add(parameter)
        for parameter in set(model.parameters()) - placed:
            parameter.zero_().requires_grad_(False)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == sum(x.size for x in arrays.values()), count


class Block(nn.Module):
    """Pre-norm block with one product for query, key and value."""

    def __init__(self, spec: Mapping[str, Any], attention: str):
        super().__init__()
        D, bias = spec["width"], spec["bias"]
        hidden = round(spec["hidden_multiple"] * D)
        self.norms = nn.ModuleList(nn.LayerNorm(D, 1e-5, bias=bias) for _ in range(2))
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=bias), nn.Linear(D, D, bias=bias)
        self.up, self.down = nn.Linear(D, hidden, bias=bias), nn.Linear(hidden, D, bias=bias)
        self.heads, self.dropout, self.attention = spec["heads"], spec["dropout"], attention

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.dropout if self.training else 0.0
        if self.attention == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        else:
            hidden = torch.ones(L, L, dtype=torch.bool, device=x.device).triu(1)
            scores = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
            y = F.dropout(scores.softmax(-1), rate) @ v
        return self.out(y.transpose(1, 2).reshape(B, L, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + F.dropout(self.attend(self.norms[0](x)), self.dropout, self.training)
        h = self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))
        return x + F.dropout(h, self.dropout, self.training)

    def places(self, name: str) -> Places:
        yield from dense(self.qkv, *(f"{name}/attn/{part}" for part in ("query", "key", "value")))
        yield from dense(self.out, f"{name}/attn/out")
        yield from dense(self.up, f"{name}/ffn/up")
        yield from dense(self.down, f"{name}/ffn/down")
        yield from scaled(self.norms[0], f"{name}/attention_norm")
        yield from scaled(self.norms[1], f"{name}/mlp_norm")


class GPT(nn.Module):
    """Token ids (B, L) -> logits (B, L, V)."""

    def __init__(self, spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray], attention: str = "sdpa"):
        super().__init__()
        self.wte = nn.Embedding(spec["vocab"], spec["width"])
        self.wpe = nn.Embedding(spec["context"], spec["width"])
        self.blocks = nn.ModuleList(Block(spec, attention) for _ in range(spec["depth"]))
        self.norm = nn.LayerNorm(spec["width"], 1e-5, bias=spec["bias"])
        self.head = None if spec["tied"] else nn.Linear(spec["width"], spec["vocab"], bias=False)
        self.dropout = spec["dropout"]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), (self.head or self.wte).weight)

    def places(self) -> Places:
        yield self.wte.weight, ("wte/embedding",)
        yield self.wpe.weight, ("wpe/embedding",)
        for i, block in enumerate(self.blocks):
            yield from block.places(f"block_{i}")
        yield from scaled(self.norm, "final_norm")
        if self.head is not None:
            yield self.head.weight, ("head",)


class ConvNet(nn.Module):
    """Images (B, C, H, W) -> logits (B, classes)."""

    def __init__(self, spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray], layout: str = "contiguous"):
        super().__init__()
        before = arrays["conv_0_0/kernel"].shape[2]
        self.convs, self.norms = nn.ModuleDict(), nn.ModuleDict()
        for i, (channels, convs) in enumerate(zip(spec["channels"], spec["convs"], strict=True)):
            for j in range(convs):
                self.convs[f"{i}_{j}"] = nn.Conv2d(before, channels, 3, padding=1, bias=False)
                self.norms[f"{i}_{j}"] = nn.BatchNorm2d(channels)
                before = channels
        shapes = {name: arrays[f"{name}/kernel"].shape for name in ("dense", "head") if f"{name}/kernel" in arrays}
        self.dense = nn.Linear(*shapes["dense"]) if "dense" in shapes else None
        self.head = nn.Linear(*shapes["head"])
        self.rates = spec["dropout"], spec["dense_dropout"]
        self.stages, self.layout = list(spec["convs"]), getattr(
            torch, {"contiguous": "contiguous_format"}.get(layout, layout))
        self.to(memory_format=self.layout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=self.layout)
        for i, convs in enumerate(self.stages):
            for j in range(convs):
                x = F.relu(self.norms[f"{i}_{j}"](self.convs[f"{i}_{j}"](x)), inplace=True)
            x = F.dropout(F.max_pool2d(x, 2), self.rates[0], self.training)
        x = x.permute(0, 2, 3, 1).flatten(1)  # lab's order; free where channels are last
        if self.dense is not None:
            x = F.dropout(F.relu(self.dense(x), inplace=True), self.rates[1], self.training)
        return self.head(x)

    def places(self) -> Places:
        for name in self.convs:
            yield self.convs[name].weight, (f"conv_{name}/kernel",)
            yield from scaled(self.norms[name], f"norm_{name}")
        if self.dense is not None:
            yield from dense(self.dense, "dense")
        yield from dense(self.head, "head")


class LSTM(nn.Module):
    """Token ids and mask (B, L) -> logits (B, classes). lab never lets padding into the second direction, so either
    texts are packed, or they are turned round within their length for an LSTM of its own.

    `torch.compile` leaves the LSTM itself eager (graph breaks), so both forms are about the same. Its allow_rnn unrolls
    the 100 steps instead: not compiled after 4 minutes (torch 2.13, busy 2-core machine).
    """

    def __init__(self, spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray], texts: str = "packed"):
        super().__init__()
        self.embedding = nn.Embedding(spec["vocab"], spec["width"])
        self.packed = texts == "packed"
        width, H, directions = spec["width"], spec["hidden"], 1 + spec["bidirectional"]
        self.layers = nn.ModuleList()
        for _ in range(spec["depth"]):
            each = (nn.LSTM(width, H, batch_first=True, bidirectional=self.packed and spec["bidirectional"])
                    for _ in range(1 if self.packed else directions))
            self.layers.append(nn.ModuleList(each))
            width = H * directions
        self.head = nn.Linear(width, spec["classes"])
        self.rate, self.pool = spec["dropout"], spec["pool"]

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        real, lengths = mask.bool()[..., None], mask.sum(1).clamp(min=1)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = F.dropout(x, self.rate, self.training)
            x, last = (self._packed if self.packed else self._flipped)(layer, x, lengths)
        if self.pool == "last":
            x = last * real.any(1)
        elif self.pool == "mean":
            x = (x * real).sum(1) / real.sum(1).clamp(min=1)
        else:
            x = x.masked_fill(~real, -1).amax(1) * real.any(1)
        return self.head(F.dropout(x, self.rate, self.training))

    def _packed(self, layer: nn.ModuleList, x: torch.Tensor, lengths: torch.Tensor) -> Outputs:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        outputs, (last, _) = layer[0](packed)
        outputs, _ = nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True, total_length=x.shape[1])
        return outputs, torch.cat(tuple(last), -1)

    def _flipped(self, layer: nn.ModuleList, x: torch.Tensor, lengths: torch.Tensor) -> Outputs:
        place = torch.arange(x.shape[1], device=x.device)
        turned = torch.where(place < lengths[:, None], lengths[:, None] - 1 - place, place)[..., None]
        outputs, lasts = [], []
        for i, lstm in enumerate(layer):
            turn = (lambda h: h.gather(1, turned.expand_as(h))) if i else (lambda h: h)
            h, _ = lstm(turn(x))
            lasts.append(h[torch.arange(len(h), device=h.device), lengths - 1])
            outputs.append(turn(h))
        return torch.cat(outputs, -1), torch.cat(lasts, -1)

    def places(self) -> Places:
        yield self.embedding.weight, ("embedding/embedding",)
        parts = {"weight_ih": "input", "weight_hh": "recurrent", "bias_ih": "bias"}  # torch's second bias stays 0
        for i, layer in enumerate(self.layers):
            for j, lstm in enumerate(layer):
                for name, parameter in lstm.named_parameters():
                    part, backward = re.fullmatch(r"(.*)_l0(_reverse)?", name).groups()
                    if part in parts:
                        direction = "backward" if backward or j else "forward"
                        yield parameter, (f"layer_{i}/{direction}_{parts[part]}",)
        yield from dense(self.head, "classify")


class Linear(nn.Module):
    """(B, ...) -> (B,) without classes, else logits (B, classes)."""

    def __init__(self, spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray]):
        super().__init__()
        self.head = nn.Linear(*arrays["head/kernel"].shape)
        self.regression = spec["classes"] is None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(x.flatten(1))
        return y[:, 0] if self.regression else y

    def places(self) -> Places:
        yield from dense(self.head, "head")


MODELS = {"GPT": GPT, "ConvNet": ConvNet, "LSTM": LSTM, "Linear": Linear}


def build(spec: Mapping[str, Any], arrays: Mapping[str, np.ndarray], ways: Mapping[str, str]) -> nn.Module:
    """The model of a job with lab's parameters. `spec`: the fields of lab's; `ways`: see `WAYS`."""
    model = MODELS[kind_of(spec)](spec, arrays, **ways)
    load(model, arrays)
    return model


def kind_of(spec: Mapping[str, Any]) -> str:
    """The class of a part of a job, without its module."""
    return spec["class"].rpartition(".")[2]
