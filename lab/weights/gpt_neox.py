"""GPT-NeoX (Black et al. 2022), as transformers writes it: GPT-2's block with rotary positions."""

from __future__ import annotations

from typing import Any

from lab.models.gpt import GPT
from lab.weights.rules import ACTIVATIONS, NAMES, Architecture, Config, Rule, Unused, dense, norm


def model(config: Config) -> GPT:
    """Our model of a config.json. Parallel residuals and partly rotated heads (Pythia) cannot be read."""
    width = config.take("hidden_size")
    config.require(use_parallel_residual=False)
    config.expect(attention_bias=True, rope_scaling=None)
    # transformers 5 has these in rope_parameters, which count, and earlier versions in two fields.
    early = {"rope_theta": config.take("rotary_emb_base", 10_000),
             "partial_rotary_factor": config.take("rotary_pct", 0.25)}
    rope = Config(early | (config.take("rope_parameters", None) or {}), f"{config.title} (rotary positions)")
    base = float(rope.take("rope_theta"))
    rope.expect(rope_type="default", partial_rotary_factor=1.0)
    rope.finish()
    value = GPT(
        depth=config.take("num_hidden_layers"), width=width, heads=config.take("num_attention_heads"),
        context=config.take("max_position_embeddings"), vocab=config.take("vocab_size"), position="rotary",
        hidden_multiple=config.take("intermediate_size") / width, mlp=config.choose("hidden_act", ACTIVATIONS),
        rope_base=base, norm_epsilon=config.take("layer_norm_eps"), tied=config.take("tie_word_embeddings", False),
    )
    config.finish("attention_dropout", "hidden_dropout", "classifier_dropout", "is_decoder")
    return value


def config(model: GPT) -> dict[str, Any]:
    """The config.json of a model that fits."""
    return {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "num_hidden_layers": model.depth,
            "hidden_size": model.width, "num_attention_heads": model.heads, "vocab_size": model.vocab,
            "intermediate_size": round(model.hidden_multiple * model.width), "max_position_embeddings": model.context,
            "hidden_act": NAMES[model.mlp], "rotary_pct": 1.0,
            "rotary_emb_base": model.rope_base, "use_parallel_residual": False, "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base, "partial_rotary_factor": 1.0},
            "layer_norm_eps": model.norm_epsilon, "tie_word_embeddings": model.tied}


BLOCK = "gpt_neox.layers.{i}"
QKV = tuple(f"block_{{i}}/attn/{name}" for name in ("query", "key", "value"))
GPT_NEOX = Architecture("gpt_neox", "gpt_neox.", model, (
    Rule("gpt_neox.embed_in.weight", "wte/embedding"),
    *norm(f"{BLOCK}.input_layernorm", "block_{i}/attention_norm"),
    # The three kinds of each head are neighbours.
    Rule(f"{BLOCK}.attention.query_key_value.weight", tuple(f"{name}/kernel" for name in QKV),
         "(N parts K) D -> parts D (N K)"),
    Rule(f"{BLOCK}.attention.query_key_value.bias", tuple(f"{name}/bias" for name in QKV),
         "(N parts K) -> parts (N K)"),
    *dense(f"{BLOCK}.attention.dense", "block_{i}/attn/out"),
    *norm(f"{BLOCK}.post_attention_layernorm", "block_{i}/mlp_norm"),
    *dense(f"{BLOCK}.mlp.dense_h_to_4h", "block_{i}/ffn/up"),
    *dense(f"{BLOCK}.mlp.dense_4h_to_h", "block_{i}/ffn/down"),
    *norm("gpt_neox.final_layer_norm", "final_norm"),
    Rule("embed_out.weight", "head", "V D -> D V"),
    Unused(r"embed_out\.weight", "tied to the token embedding", same="gpt_neox.embed_in.weight"),
    Unused(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)", "buffers"),
), GPT(norm="layernorm", position="rotary"),
   {"mlp": NAMES, "rope_base": None, "tied": None}, config)
