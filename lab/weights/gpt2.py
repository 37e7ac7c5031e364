"""GPT-2 (Radford et al. 2019), in the form of transformers' GPT2LMHeadModel."""

from __future__ import annotations

from typing import Any

from lab.models.gpt import GPT
from lab.weights.rules import ACTIVATIONS, NAMES, Architecture, Config, Rule, Unused, dense, norm


def model(config: Config) -> GPT:
    """Our model of a config.json."""
    width = config.take("n_embd")
    config.expect(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False,
                  add_cross_attention=False, tie_word_embeddings=True)
    value = GPT(
        depth=config.take("n_layer"), width=width, heads=config.take("n_head"), context=config.take("n_positions"),
        vocab=config.take("vocab_size"), hidden_multiple=(config.take("n_inner", None) or 4 * width) / width,
        mlp=config.choose("activation_function", ACTIVATIONS, "gelu_new"),
        norm_epsilon=config.take("layer_norm_epsilon", 1e-5),
    )
    config.finish("n_ctx", "attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_activation", "summary_first_dropout",
                  "summary_proj_to_labels", "summary_type", "summary_use_proj", "n_special", "predict_special_tokens")
    return value


def config(model: GPT) -> dict[str, Any]:
    """The config.json of a model that fits."""
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": model.depth, "n_embd": model.width,
            "n_head": model.heads, "n_positions": model.context, "vocab_size": model.vocab,
            "n_inner": round(model.hidden_multiple * model.width), "layer_norm_epsilon": model.norm_epsilon,
            "activation_function": NAMES[model.mlp],
            "tie_word_embeddings": True, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


QKV = ("query", "key", "value")
BLOCK = "transformer.h.{i}"

GPT2 = Architecture("gpt2", "transformer.", model, (
    Rule("transformer.wte.weight", "wte/embedding"),
    Rule("transformer.wpe.weight", "wpe/embedding"),
    *norm(f"{BLOCK}.ln_1", "block_{i}/attention_norm"),
    # Conv1D: kernels are (inputs, outputs), as ours.
    Rule(f"{BLOCK}.attn.c_attn.weight", tuple(f"block_{{i}}/attn/{x}/kernel" for x in QKV), "D (parts F) -> parts D F"),
    Rule(f"{BLOCK}.attn.c_attn.bias", tuple(f"block_{{i}}/attn/{x}/bias" for x in QKV), "(parts F) -> parts F"),
    *dense(f"{BLOCK}.attn.c_proj", "block_{i}/attn/out", None),
    *norm(f"{BLOCK}.ln_2", "block_{i}/mlp_norm"),
    *dense(f"{BLOCK}.mlp.c_fc", "block_{i}/ffn/up", None),
    *dense(f"{BLOCK}.mlp.c_proj", "block_{i}/ffn/down", None),
    *norm("transformer.ln_f", "final_norm"),
    Unused(r"transformer\.h\.\d+\.attn\.(masked_)?bias", "the causal mask"),
    Unused(r"lm_head\.weight", "tied to the token embedding", same="transformer.wte.weight"),
), GPT(), {"mlp": NAMES}, config)
