"""The Llama family (Touvron et al. 2023): Llama, SmolLM2, Qwen2.5, Qwen3 and Mistral, as transformers writes them."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np

from lab.errors import UserError
from lab.models.attention import RopeScaling
from lab.models.gpt import GPT
from lab.weights.gguf_files import FACTORS
from lab.weights.rules import Architecture, Config, Rule, Unused


def model(config: Config) -> GPT:
    """Our model of a config.json."""
    kind, width, heads = config["model_type"], config.take("hidden_size"), config.take("num_attention_heads")
    config.expect(hidden_act="silu", use_sliding_window=False, rope_interleaved=False, use_mrope=False)
    context = config.take("max_position_embeddings")
    if kind == "mistral" and (window := config.take("sliding_window", 4096)) is not None and window < context:
        raise UserError(f"{config.title}: attention has a sliding window of {window} tokens; only a whole context can "
                        f"be read.")
    if kind.startswith("qwen"):
        config.take("sliding_window", None)  # not used: see use_sliding_window
        config.expect(layer_types=["full_attention"] * config.take("num_hidden_layers"))
    base, scaling = _rope(config)
    attention_bias = config.take("attention_bias", False)
    value = GPT(
        depth=config.take("num_hidden_layers"), width=width, heads=heads,
        kv_heads=config.take("num_key_value_heads", heads), head_width=config.take("head_dim", None),
        hidden_multiple=config.take("intermediate_size") / width, context=context, vocab=config.take("vocab_size"),
        norm="rmsnorm", norm_epsilon=config.take("rms_norm_eps"), position="rotary", rope_base=base,
        rope_scaling=scaling, mlp="swiglu", bias=False, qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2" or attention_bias,  # Qwen2.5 has no field that says so
        out_bias=attention_bias, mlp_bias=config.take("mlp_bias", False),
        tied=config.take("tie_word_embeddings", False),
    )
    config.finish("attention_dropout", "pretraining_tp", "is_llama_config", "transformers.js_config",
                  "max_window_layers")
    return value


def config(kind: str, model: GPT) -> dict[str, Any]:
    """The config.json, with model_type `kind`, of a model that fits."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling is not None:
        scaling = model.rope_scaling
        rope = {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low,
                "high_freq_factor": scaling.high, "original_max_position_embeddings": scaling.context}
    biases = {"attention_bias": False} | ({"mlp_bias": False} if kind == "llama" else {"use_sliding_window": False})
    return {"architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind,
            "num_hidden_layers": model.depth, "hidden_size": model.width, "num_attention_heads": model.heads,
            "num_key_value_heads": model.groups, "head_dim": model.head,
            "intermediate_size": round(model.hidden_multiple * model.width),
            "max_position_embeddings": model.context, "vocab_size": model.vocab, "hidden_act": "silu",
            "rms_norm_eps": model.norm_epsilon, "rope_theta": model.rope_base,
            "rope_parameters": rope | {"rope_theta": model.rope_base}, "tie_word_embeddings": model.tied,
            **({} if kind == "qwen2" else biases), **({"rope_scaling": rope} if model.rope_scaling else {})}


def _rope(config: Config) -> tuple[float, RopeScaling | None]:
    """(base, scaling). transformers 5 writes both in rope_parameters, earlier versions in two fields; where both are,
    rope_scaling counts."""
    new, old = (config.take(name, None) or {} for name in ("rope_parameters", "rope_scaling"))
    rope = Config(old or new, f"{config.title} (rotary positions)")
    base = rope.take("rope_theta", config.take("rope_theta", 10_000.0))
    kind = rope.take("rope_type", rope.take("type", "default"))
    rope.expect(partial_rotary_factor=1.0)
    scaling = None
    if kind == "llama3":
        scaling = RopeScaling(rope.take("factor"), rope.take("low_freq_factor"), rope.take("high_freq_factor"),
                              rope.take("original_max_position_embeddings"))
    elif kind != "default":
        raise UserError(f"{config.title}: rotary scaling {kind!r} is not known here; only 'llama3' is.")
    rope.finish()
    return float(base), scaling


def gguf_model(config: Config) -> GPT:
    """Our model of a GGUF file's metadata."""
    width, heads = config.take("embedding_length"), config.take("attention.head_count")
    head = config.take("attention.key_length", width // heads)
    config.expect(**{"attention.value_length": head, "rope.dimension_count": head, "rope.scaling.type": "none"})
    base = config.take("rope.freq_base", 10_000.0)
    qwen3, qwen2 = (config["model_type"] == f"{kind} (GGUF)" for kind in ("qwen3", "qwen2"))
    value = GPT(
        depth=config.take("block_count"), width=width, heads=heads, head_width=None if head * heads == width else head,
        kv_heads=config.take("attention.head_count_kv", heads), context=config.take("context_length"),
        hidden_multiple=config.take("feed_forward_length") / width, vocab=config.take("vocab"), norm="rmsnorm",
        norm_epsilon=config.take("attention.layer_norm_rms_epsilon"), position="rotary", mlp="swiglu",
        rope_base=base, rope_scaling=_scaling_of(config, base), bias=False, qkv_bias=qwen2, out_bias=False,
        mlp_bias=False, qk_norm=qwen3, tied=config.take("tied"),
    )
    config.finish("vocab_size")
    return value


def _scaling_of(config: Config, base: float) -> RopeScaling | None:
    """Llama 3.1's scaling, of whose numbers a GGUF file has only what they do to each wavelength."""
    if (factors := config.take("rope_freqs", None)) is None:
        return None
    scaling = RopeScaling(factor=float(factors.max()))  # as published but for the factor: 8 in Llama 3.1, 32 in 3.2
    frequency = base ** (-np.arange(len(factors)) / len(factors))
    if not np.allclose(frequency / scaling.scaled(frequency), factors, rtol=1e-4):
        raise UserError(f"{config.title}: the factors of rotary wavelengths, rope_freqs.weight, are not those of Llama "
                        f"3.1 and later.")
    return scaling


HF = {"embedding": "model.embed_tokens", "block": "model.layers.{i}.", "attention_norm": "input_layernorm",
      "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj", "out": "self_attn.o_proj",
      "query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm", "mlp_norm": "post_attention_layernorm",
      "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj", "final_norm": "model.norm",
      "head": "lm_head"}
IN_GGUF = {"embedding": "token_embd", "block": "blk.{i}.", "attention_norm": "attn_norm", "query": "attn_q",
           "key": "attn_k", "value": "attn_v", "out": "attn_output", "query_norm": "attn_q_norm",
           "key_norm": "attn_k_norm", "mlp_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
           "final_norm": "output_norm", "head": "output"}


def _rules(names: dict[str, str], query: str = "F D -> D F", key: str = "F D -> D F") -> tuple[Rule | Unused, ...]:
    """`names`: of our layers in their files; `query`, `key`: patterns of these kernels."""
    def scale(name: str, room: str = "") -> Rule:
        return Rule(f"{names['block']}{names[name]}.weight", f"block_{{i}}/{room}{name}/scale")

    def dense(name: str, room: str, pattern: str = "F D -> D F") -> tuple[Rule, Rule]:
        theirs, ours = f"{names['block']}{names[name]}", f"block_{{i}}/{room}/{name}"
        return Rule(f"{theirs}.weight", f"{ours}/kernel", pattern), Rule(f"{theirs}.bias", f"{ours}/bias")

    return (
        Rule(f"{names['embedding']}.weight", "wte/embedding"),
        scale("attention_norm"), *dense("query", "attn", query), *dense("key", "attn", key), *dense("value", "attn"),
        *dense("out", "attn"), scale("query_norm", "attn/"), scale("key_norm", "attn/"),
        scale("mlp_norm"), *dense("gate", "ffn"), *dense("up", "ffn"), *dense("down", "ffn"),
        Rule(f"{names['final_norm']}.weight", "final_norm/scale"),
        Rule(f"{names['head']}.weight", "head", "V D -> D V"),
        Unused(re.escape(FACTORS), "read as the scaling of rotary positions"),
        Unused(re.escape(f"{names['head']}.weight"), "tied to the token embedding",
               same=f"{names['embedding']}.weight"),
    )


RULES = _rules(HF)
# llama.cpp's rotary turns neighbours, not halves, so its converter interleaves the rows of queries and keys.
PERMUTED = _rules(IN_GGUF, "(N half two) D -> D (N two half)", "(G half two) D -> D (G two half)")
LLAMA_GGUF = (Architecture("llama (GGUF)", "", gguf_model, PERMUTED),
              *(Architecture(f"{name} (GGUF)", "", gguf_model, _rules(IN_GGUF)) for name in ("qwen2", "qwen3")))
LIKE = GPT(norm="rmsnorm", position="rotary", mlp="swiglu", bias=False)
HOLDS = {"kv_heads": None, "rope_base": None, "rope_scaling": None, "tied": None}
LLAMA = tuple(Architecture(name, "model.", model, RULES, like, HOLDS | more, functools.partial(config, name))
              for name, like, more in (("llama", LIKE, {"head_width": None}), ("qwen2", LIKE.clone(qkv_bias=True), {}),
                                       ("qwen3", LIKE.clone(qk_norm=True), {"head_width": None}))
              ) + (Architecture("mistral", "model.", model, RULES),)
