"""Our outputs beside those of Hugging Face's transformers, for the same weights and inputs, in float32."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lab.errors import UserError
from lab.models.bert import BERT
from lab.models.gpt import GPT
from lab.weights.read import Found

TEXT, RANDOM, PADDED, CACHED = 256, 128, 64, 32  # tokens of a row, at most
PADDING = {"roberta": 1, "xlm-roberta": 1}  # positions of these count the tokens other than this id; others: 0
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model")
Batch = dict[str, np.ndarray]
"""`ids` and `mask` int32 (B, L), or `images` float32 (B, H, W, C)."""


@dataclass(frozen=True)
class Row:
    """Differences on one batch, where tokens are real."""

    kind: str
    shape: tuple[int, ...]
    largest: float
    """max |ours - theirs|."""
    mean: float
    output: float
    """max |theirs|."""
    agree: float | None
    """Share of equal largest logits; None for outputs that are no logits."""


def check_packages() -> None:
    """UserError if torch or transformers is not installed; imports neither, since that takes 0.3 GB."""
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        raise UserError(f"parity needs {' and '.join(missing)}: UV_TORCH_BACKEND=cpu LAB_EXTRAS=parity,gguf "
                        f"./launch.sh parity ...")


def packages() -> tuple[Any, Any]:
    """(torch, transformers), which print no progress."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers


def batches(found: Found, length: int, text: str) -> dict[str, Batch]:
    """What both models get, by kind: real text (if transformers finds a tokenizer there), random ids, `length` random
    ids, a padded batch, and for a GPT the text or ids that are decoded token by token; for other models, images."""
    rng, model = np.random.default_rng(0), found.model
    if not isinstance(model, GPT | BERT):
        return {"random images": {"images": rng.normal(size=(2, *found.inputs.shape[1:])).astype(np.float32)}}

    def ids(rows: int, columns: int) -> Batch:
        found = rng.integers(min(2, model.vocab - 1), model.vocab, (rows, min(columns, length)), np.int32)
        return {"ids": found, "mask": np.ones_like(found)}

    real = _encoded(found, text, min(TEXT, length))
    rows = {"real text": {"ids": real, "mask": np.ones_like(real)}} if real is not None else {}
    rows |= {"random ids": ids(2, RANDOM), "longest": ids(1, length), "padded": ids(3, PADDED)}
    padded = rows["padded"]
    L = padded["ids"].shape[1]
    padded["mask"] = (np.arange(L) < np.array([[L], [-(-L // 2)], [-(-L // 9)]])).astype(np.int32)
    padded["ids"] = np.where(padded["mask"], padded["ids"], PADDING.get(found.architecture.name, 0)).astype(np.int32)
    if isinstance(model, GPT):
        whole = rows.get("real text") or ids(1, CACHED)
        rows["key/value cache"] = {name: x[:, :CACHED] for name, x in whole.items()}
    return rows


def _place(place: Path) -> tuple[str, dict[str, str]]:
    """Arguments of `from_pretrained` for a folder or a GGUF file."""
    return (str(place), {}) if place.is_dir() else (str(place.parent), {"gguf_file": place.name})


def _encoded(found: Found, text: str, length: int) -> np.ndarray | None:
    """The first tokens of the text, int32 (1, L), by transformers' tokenizer; None where there is none."""
    if found.place.is_dir() and not any((found.place / name).exists() for name in TOKENIZERS):
        return None
    folder, more = _place(found.place)
    tokenizer = packages()[1].AutoTokenizer.from_pretrained(folder, **more)
    ids = tokenizer(text[: 20 * length])["input_ids"][:length]  # no token has so many characters on average
    return np.array([ids], np.int32) if max(ids) < found.model.vocab else None


def our_outputs(model: Any, variables: Mapping[str, Any], rows: Mapping[str, Batch]) -> dict[str, np.ndarray]:
    """Kind -> our output, in full float32 on any device."""
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(lambda v, x, **mask: model.apply(v, x, train=False, **mask))
        return {kind: _decoded(model, variables, batch["ids"]) if kind == "key/value cache" else
                np.asarray(apply(variables, batch["images"]) if "images" in batch else
                           apply(variables, batch["ids"], mask=batch["mask"])) for kind, batch in rows.items()}


def _decoded(model: GPT, variables: Mapping[str, Any], ids_BL: np.ndarray) -> np.ndarray:
    """Logits (B, L, V) of a prefill of the first half, and one token at a time after it."""
    L = ids_BL.shape[1]
    if model.position == "rotary":
        model = model.clone(context=L)  # else the cache has the rows of the whole context
    step = jax.jit(lambda v, ids, positions: model.apply(v, ids, train=False, decode=True, positions=positions,
                                                         mutable=["cache"]))
    begin = max(L // 2, 1)
    logits, cache = step(variables, ids_BL[:, :begin], jnp.arange(begin))
    found = [np.asarray(logits)]
    for i in range(begin, L):
        logits, cache = step({**variables, **cache}, ids_BL[:, i:i + 1], jnp.arange(i, i + 1))
        found.append(np.asarray(logits))
    return np.concatenate(found, axis=1)


def load_theirs(found: Found) -> Any:
    """transformers' model of these weights, float32, in evaluation. UserError if it has no class for it, or lacks
    tensors of it."""
    torch, transformers = packages()
    model = found.model
    if isinstance(model, GPT):
        cls = transformers.AutoModelForCausalLM
    elif not gives_logits(model):
        cls = transformers.AutoModel
    elif not isinstance(model, BERT):
        cls = transformers.AutoModelForImageClassification
    else:
        cls = (transformers.AutoModelForMaskedLM if model.classes is None else
               transformers.AutoModelForSequenceClassification)
    folder, more = _place(found.place)
    try:
        theirs, said = cls.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
                                           **more)
    except (ValueError, KeyError, OSError) as e:
        raise UserError(f"transformers cannot load {found.location}: {str(e).strip().splitlines()[0][:200]}") from None
    if missing := sorted(name for name in said["missing_keys"] if "pooler" not in name):
        raise UserError(f"transformers finds no {missing[0]} in {found.location}, and would begin at random there.")
    return theirs.eval()


def their_output(theirs: Any, model: Any, batch: Batch) -> np.ndarray:
    """What `model`, ours, should return for this batch, in the type of their parameters."""
    torch = packages()[0]
    with torch.no_grad():
        if "images" in batch:
            images = torch.tensor(batch["images"].transpose(0, 3, 1, 2)).to(theirs.dtype)
            out = theirs(pixel_values=images)
            return (out.logits if gives_logits(model) else out.last_hidden_state[:, 0]).numpy()
        mask = torch.tensor(batch["mask"]).long()
        out = theirs(input_ids=torch.tensor(batch["ids"]).long(), attention_mask=mask)
        if gives_logits(model):
            return out.logits.numpy()
        hidden = out.last_hidden_state
        if model.output == "hidden":
            return hidden.numpy()
        weight = mask[..., None].to(hidden.dtype)
        pooled = hidden[:, 0] if model.pool == "first" else (hidden * weight).sum(1) / weight.sum(1)
        return torch.nn.functional.normalize(pooled).numpy()


def gives_logits(model: Any) -> bool:
    """Whether a model's outputs are logits, not embeddings or hidden states."""
    return getattr(model, "output", "logits") == "logits" and (isinstance(model, GPT | BERT)
                                                               or model.classes is not None)


def compare(kind: str, batch: Batch, ours: np.ndarray, theirs: np.ndarray, logits: bool) -> Row:
    """The row of one batch; `logits`: the outputs are."""
    shape = next(iter(batch.values())).shape
    if ours.shape != theirs.shape:
        raise UserError(f"Our output for {kind} is {ours.shape}, and that of transformers {theirs.shape}.")
    real = batch["mask"] > 0 if ours.ndim == 3 else ...
    ours, theirs = ours[real], theirs[real]
    error = np.abs(ours - theirs)
    agree = float((ours.argmax(-1) == theirs.argmax(-1)).mean()) if logits else None
    return Row(kind, shape, float(error.max()), float(error.mean()), float(np.abs(theirs).max()), agree)


def rounding(theirs: Any, model: Any, batch: Batch, ours: np.ndarray, their32: np.ndarray) -> tuple[float, float]:
    """(ours, theirs): the largest differences of both float32 outputs from transformers in float64."""
    exact = their_output(theirs.double(), model, batch)
    real = batch["mask"] > 0 if ours.ndim == 3 else ...
    return tuple(float(np.abs(x - exact)[real].max()) for x in (ours, their32))
