"""The Llama family (Touvron et al. 2023): Llama, SmolLM2, Qwen2.5, Qwen3 and Mistral, as transformers writes them."""

from __future__ import annotations

from typing import Any

from lab.errors import UserError
from lab.models.attention import RopeScaling
from lab.models.gpt import GPT
from lab.weights.rules import Architecture, Config, Rule, Unused


def model(config: Config) -> GPT:
    """Our model of a config.json."""
    kind, width, heads = config["model_type"], config.take("hidden_size"), config.take("num_attention_heads")
    config.expect(hidden_act="silu", use_sliding_window=False, rope_interleaved=False)
    if kind == "mistral":
        config.expect(sliding_window=None)
    elif kind.startswith("qwen"):
        config.take("sliding_window", None)  # not used: see use_sliding_window
        config.expect(layer_types=["full_attention"] * config.take("num_hidden_layers"))
    base, scaling = _rope(config)
    attention_bias = config.take("attention_bias", False)
    value = GPT(
        depth=config.take("num_hidden_layers"), width=width, heads=heads,
        kv_heads=config.take("num_key_value_heads", heads), head_width=config.take("head_dim", None),
        hidden_multiple=config.take("intermediate_size") / width, context=config.take("max_position_embeddings"),
        vocab=config.take("vocab_size"), norm="rmsnorm", norm_epsilon=config.take("rms_norm_eps"), position="rotary",
        rope_base=base, rope_scaling=scaling, mlp="swiglu", bias=False, qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2" or attention_bias,  # Qwen2.5 has no field that says so
        out_bias=attention_bias, mlp_bias=config.take("mlp_bias", False),
        tied=config.take("tie_word_embeddings", False),
    )
    config.finish("attention_dropout", "pretraining_tp", "is_llama_config", "transformers.js_config",
                  "max_window_layers")
    return value


def config(model: GPT) -> dict[str, Any]:
    """The config.json of a model that fits."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling is not None:
        scaling = model.rope_scaling
        rope = {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low,
                "high_freq_factor": scaling.high, "original_max_position_embeddings": scaling.context}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": model.depth,
            "hidden_size": model.width, "num_attention_heads": model.heads, "num_key_value_heads": model.groups,
            "head_dim": model.head, "intermediate_size": round(model.hidden_multiple * model.width),
            "max_position_embeddings": model.context, "vocab_size": model.vocab, "hidden_act": "silu",
            "rms_norm_eps": model.norm_epsilon, "rope_theta": model.rope_base,
            "rope_parameters": rope | {"rope_theta": model.rope_base}, "attention_bias": False, "mlp_bias": False,
            "tie_word_embeddings": model.tied} | ({"rope_scaling": rope} if model.rope_scaling else {})


def _rope(config: Config) -> tuple[float, RopeScaling | None]:
    """(base, scaling). transformers 5 writes both in rope_parameters, earlier versions in two fields."""
    inside = config.take("rope_parameters", None) or {}
    base = inside.get("rope_theta", config.take("rope_theta", 10_000.0))
    scaling = {k: v for k, v in inside.items() if k != "rope_theta"} or config.take("rope_scaling", None) or {}
    config.take("rope_scaling", None)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return float(base), None
    if kind != "llama3":
        raise UserError(f"{config.title}: rotary scaling {kind!r} is not known here; only 'llama3' is.")
    return float(base), RopeScaling(float(scaling["factor"]), float(scaling["low_freq_factor"]),
                                    float(scaling["high_freq_factor"]),
                                    int(scaling["original_max_position_embeddings"]))


def _dense(theirs: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{theirs}.weight", f"{ours}/kernel", "F D -> D F"), Rule(f"{theirs}.bias", f"{ours}/bias")


BLOCK = "model.layers.{i}"
RULES = (
    Rule("model.embed_tokens.weight", "wte/embedding"),
    Rule(f"{BLOCK}.input_layernorm.weight", "block_{i}/attention_norm/scale"),
    *_dense(f"{BLOCK}.self_attn.q_proj", "block_{i}/attn/query"),
    *_dense(f"{BLOCK}.self_attn.k_proj", "block_{i}/attn/key"),
    *_dense(f"{BLOCK}.self_attn.v_proj", "block_{i}/attn/value"),
    *_dense(f"{BLOCK}.self_attn.o_proj", "block_{i}/attn/out"),
    Rule(f"{BLOCK}.self_attn.q_norm.weight", "block_{i}/attn/query_norm/scale"),
    Rule(f"{BLOCK}.self_attn.k_norm.weight", "block_{i}/attn/key_norm/scale"),
    Rule(f"{BLOCK}.post_attention_layernorm.weight", "block_{i}/mlp_norm/scale"),
    *_dense(f"{BLOCK}.mlp.gate_proj", "block_{i}/ffn/gate"),
    *_dense(f"{BLOCK}.mlp.up_proj", "block_{i}/ffn/up"),
    *_dense(f"{BLOCK}.mlp.down_proj", "block_{i}/ffn/down"),
    Rule("model.norm.weight", "final_norm/scale"),
    Rule("lm_head.weight", "head", "V D -> D V"),
    Unused(r"lm_head\.weight", "tied to the token embedding", same="model.embed_tokens.weight"),
)


def gguf_model(config: Config) -> GPT:
    """Our model of a GGUF file's metadata."""
    width, heads = config.take("embedding_length"), config.take("attention.head_count")
    head = config.take("attention.key_length", width // heads)
    config.expect(**{"attention.value_length": head, "rope.dimension_count": head, "rope.scaling.type": "none"})
    qwen3, qwen2 = (config["model_type"] == f"{kind} (GGUF)" for kind in ("qwen3", "qwen2"))
    value = GPT(
        depth=config.take("block_count"), width=width, heads=heads, head_width=None if head * heads == width else head,
        kv_heads=config.take("attention.head_count_kv", heads), context=config.take("context_length"),
        hidden_multiple=config.take("feed_forward_length") / width, vocab=config.take("vocab"), norm="rmsnorm",
        norm_epsilon=config.take("attention.layer_norm_rms_epsilon"), position="rotary", mlp="swiglu",
        rope_base=config.take("rope.freq_base", 10_000.0), bias=False, qkv_bias=qwen2, out_bias=False, mlp_bias=False,
        qk_norm=qwen3, tied=config.take("tied"),
    )
    config.finish("vocab_size")
    return value


def _gguf_rules(query: str | None, key: str | None) -> tuple[Rule | Unused, ...]:
    at = "blk.{i}"

    def dense(theirs: str, ours: str, kernel: str | None = None, bias: str | None = None) -> tuple[Rule, Rule]:
        return (Rule(f"{at}.{theirs}.weight", f"block_{{i}}/{ours}/kernel", kernel or "F D -> D F"),
                Rule(f"{at}.{theirs}.bias", f"block_{{i}}/{ours}/bias", bias))

    return (
        Rule("token_embd.weight", "wte/embedding"),
        Rule(f"{at}.attn_norm.weight", "block_{i}/attention_norm/scale"),
        *dense("attn_q", "attn/query", query), *dense("attn_k", "attn/key", key), *dense("attn_v", "attn/value"),
        *dense("attn_output", "attn/out"),
        Rule(f"{at}.attn_q_norm.weight", "block_{i}/attn/query_norm/scale"),
        Rule(f"{at}.attn_k_norm.weight", "block_{i}/attn/key_norm/scale"),
        Rule(f"{at}.ffn_norm.weight", "block_{i}/mlp_norm/scale"),
        *dense("ffn_gate", "ffn/gate"), *dense("ffn_up", "ffn/up"), *dense("ffn_down", "ffn/down"),
        Rule("output_norm.weight", "final_norm/scale"),
        Rule("output.weight", "head", "V D -> D V"),
    )


# llama.cpp's rotary turns neighbours, not halves, so its converter interleaves the rows of queries and keys.
PERMUTED = _gguf_rules("(N half two) D -> D (N two half)", "(G half two) D -> D (G two half)")
LLAMA_GGUF = (Architecture("llama (GGUF)", "", gguf_model, PERMUTED),
              *(Architecture(f"{name} (GGUF)", "", gguf_model, _gguf_rules(None, None)) for name in ("qwen2", "qwen3")))
LIKE = GPT(norm="rmsnorm", position="rotary", mlp="swiglu", bias=False)
LLAMA = (Architecture("llama", "model.", model, RULES, LIKE, config),
         *(Architecture(name, "model.", model, RULES) for name in ("mistral", "qwen2", "qwen3")))
