"""Writes a GPT of the shape of Llama or Qwen as a .gguf file, which llama.cpp and transformers read."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lab.errors import UserError
from lab.files import make_folder
from lab.weights.llama import LLAMA_GGUF
from lab.weights.read import sizes
from lab.weights.rules import Architecture, applicable
from lab.weights.write import architecture_of

Type = Literal["F32", "F16", "Q8_0"]
SUFFIX = " (GGUF)"  # of the names of architectures
NORMAL, CONTROL, UNUSED = 1, 3, 5  # values of tokenizer.ggml.token_type
BLOCK = 32  # values that share a scale in Q8_0; rows that it does not divide are F16


class Vocabulary(NamedTuple):
    """The tokenizer as GGUF has it."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    """The name of the rule by which text is split before the merges apply."""


def vocabulary(tokenizer: str, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer.json of byte-level BPE, padded with unused tokens to `size`.

    Raises:
      UserError: a tokenizer of another kind, or with a rule for splitting text that has no name here.
    """
    state = json.loads(tokenizer)
    parts = state.get("pre_tokenizer") or {}
    parts = parts.get("pretokenizers", [parts])
    kinds = [part.get("type") for part in parts]
    split = parts[-1].get("use_regex", True) and not parts[-1].get("add_prefix_space") and kinds[-1] == "ByteLevel"
    digits = kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits")
    if state["model"]["type"] != "BPE" or state.get("normalizer") or not split or not (len(kinds) == 1 or digits):
        raise UserError(f"A .gguf file can be written with byte-level BPE that splits text as GPT-2 or SmolLM2, not "
                        f"with {state['model']['type']} and {', '.join(map(str, kinds))}.")
    ids = state["model"]["vocab"] | {token["content"]: token["id"] for token in state["added_tokens"]}
    special = {token["content"] for token in state["added_tokens"] if token["special"]}
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    for token, i in ids.items():
        tokens[i], types[i] = token, CONTROL if token in special else NORMAL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    return Vocabulary(tokens, types, merges, "smollm" if digits else "gpt-2")


def write_gguf(model: Any, arrays: Mapping[str, Any], file: Path, kind: Type, tokenizer: str,
               ends: Mapping[str, int | None], name: str) -> None:
    """Writes a model, its parameters by path and its tokenizer (tokenizer.json) to `file`; `ends`: bos_token_id and
    eos_token_id. Matrices are stored as `kind`, and vectors as F32.

    Raises:
      UserError: the `gguf` package is missing, or the format does not hold the model or its tokenizer.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("Writing a .gguf file needs the package gguf: LAB_EXTRAS=gguf ./launch.sh ...") from None
    architecture = check(model)
    words = vocabulary(tokenizer, model.vocab)
    temporary = make_folder(file.parent) / f".{file.name}.{secrets.token_hex(8)}.tmp"
    writer = gguf.GGUFWriter(temporary, architecture.name.removesuffix(SUFFIX))
    _describe(writer, model, words, ends, name)
    writer.add_file_type({"F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16,
                          "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for rule in applicable(architecture.rules, model.depth, arrays):
        x = np.ascontiguousarray(rule.write([np.asarray(arrays[path], np.float32) for path in rule.paths],
                                            sizes(model)))
        fits = kind if kind != "Q8_0" or x.shape[-1] % BLOCK == 0 else "F16"
        stored = gguf.GGMLQuantizationType["F32" if x.ndim == 1 else fits]
        writer.add_tensor(rule.theirs, gguf.quants.quantize(x, stored), raw_dtype=stored)
    try:
        writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check(model: Any) -> Architecture:
    """The form of GGUF that holds the model. UserError if none does."""
    name = architecture_of(model).name + SUFFIX
    found = next((a for a in LLAMA_GGUF if a.name == name), None)
    if found is None or model.rope_scaling is not None:
        raise UserError("A .gguf file is for a GPT of the shape of Llama, Qwen2 or Qwen3 (norm='rmsnorm', "
                        "position='rotary', mlp='swiglu', rope_scaling=None); --to FOLDER writes this one.")
    if model.scan:
        raise UserError("The layers of this model are stacked: train with --model.scan False to export.")
    return found


def _describe(writer: Any, model: Any, words: Vocabulary,
              ends: Mapping[str, int | None], name: str) -> None:
    writer.add_name(name)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.width)
    writer.add_block_count(model.depth)
    writer.add_feed_forward_length(round(model.hidden_multiple * model.width))
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.groups)
    writer.add_key_length(model.head)
    writer.add_value_length(model.head)
    writer.add_rope_dimension_count(model.head)
    writer.add_rope_freq_base(model.rope_base)
    writer.add_layer_norm_rms_eps(model.norm_epsilon)
    writer.add_vocab_size(model.vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    for add, end in ((writer.add_bos_token_id, "bos_token_id"), (writer.add_eos_token_id, "eos_token_id")):
        if ends.get(end) is not None:
            add(ends[end])
    writer.add_add_bos_token(False)
