"""BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019), as transformers and sentence-transformers write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lab.errors import UserError
from lab.models.bert import BERT
from lab.weights.rules import ACTIVATIONS, NAMES, Architecture, Config, Rule, Rules, Unused, dense, norm

POOLING = {"pooling_mode_cls_token": "first", "pooling_mode_mean_tokens": "mean"}
SKIPPED = {"bert": 0, "roberta": 2, "xlm-roberta": 2}  # RoBERTa's first position is 2: the id of padding and 1


def model(config: Config) -> BERT:
    """Our model of a config.json, and of sentence-transformers' modules.json beside it."""
    kind, width = config["model_type"], config.take("hidden_size")
    config.expect(position_embedding_type="absolute", is_decoder=False, add_cross_attention=False,
                  tie_word_embeddings=True)
    if SKIPPED[kind]:
        config.expect(pad_token_id=1)  # the first position is the next number
    value = BERT(
        depth=config.take("num_hidden_layers"), width=width, heads=config.take("num_attention_heads"),
        hidden_multiple=config.take("intermediate_size") / width, vocab=config.take("vocab_size"),
        context=config.take("max_position_embeddings") - SKIPPED[kind], segments=config.take("type_vocab_size"),
        norm_place="post", norm_epsilon=config.take("layer_norm_eps", 1e-12),
        mlp=config.choose("hidden_act", ACTIVATIONS, "gelu"), dropout=config.take("hidden_dropout_prob", 0.1),
        mask_id=_mask_id(Path(config.title).parent), **_head(config),
    )
    config.finish("attention_probs_dropout_prob", "classifier_dropout", "problem_type", "directionality",
                  "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head",
                  "pooler_type")  # the last six are of Google's code
    return value


def _head(config: Config) -> dict[str, Any]:
    """The fields of our model that decide what it returns."""
    (name, *_) = config.take("architectures", None) or ["?Model"]
    what = name.removeprefix("XLM").removeprefix("Bert").removeprefix("Roberta")
    if what in ("ForMaskedLM", "ForPreTraining"):
        return {}
    if what == "ForSequenceClassification":
        return {"classes": config.classes(), "pool": "pooler"}
    if what != "Model":
        raise UserError(f"{config.title}: the architecture {name} cannot be read; the trunk of one can, with "
                        f'"architectures": ["BertModel"].')
    return _sentence(Path(config.title).parent) or {"output": "hidden"}


def _sentence(folder: Path) -> dict[str, Any] | None:
    """The fields of a sentence-transformers model; None for other folders."""
    if not (folder / "modules.json").exists():
        return None
    try:
        modules = [module["type"].split(".")[-1] for module in json.loads((folder / "modules.json").read_text("utf-8"))]
        pooling = json.loads((folder / "1_Pooling" / "config.json").read_text("utf-8"))
        chosen = [name for name, on in pooling.items() if name.startswith("pooling_mode") and on is True]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder} has a modules.json of sentence-transformers, and no 1_Pooling/config.json that "
                        f"fits it.") from None
    if modules != ["Transformer", "Pooling", "Normalize"] or len(chosen) != 1 or chosen[0] not in POOLING:
        raise UserError(f"{folder / 'modules.json'}: only a Transformer, Pooling by the mean or the first token, and "
                        f"Normalize can be read, not {', '.join(modules)} with {', '.join(chosen) or 'no pooling'}.")
    return {"output": "embedding", "pool": POOLING[chosen[0]]}


def _mask_id(folder: Path) -> int | None:
    """The id of [MASK] or <mask> in the folder's tokenizer.json; None without one."""
    try:
        tokens = json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
        return next((token["id"] for token in tokens if token["content"] in ("[MASK]", "<mask>")), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def config(model: BERT) -> dict[str, Any]:
    """The config.json of a model that fits, in BERT's form. UserError for another pooling of a classifier."""
    if model.output == "logits" and model.classes is not None and model.pool != "pooler":
        raise UserError(f"transformers' BERT classifies by --model.pool pooler, not {model.pool}.")
    name = ("BertModel" if model.output != "logits" else
            "BertForMaskedLM" if model.classes is None else "BertForSequenceClassification")
    return {"architectures": [name], "model_type": "bert", "num_hidden_layers": model.depth,
            "hidden_size": model.width, "num_attention_heads": model.heads, "vocab_size": model.vocab,
            "intermediate_size": round(model.hidden_multiple * model.width), "max_position_embeddings": model.context,
            "type_vocab_size": model.segments, "hidden_act": NAMES[model.mlp],
            "layer_norm_eps": model.norm_epsilon, "hidden_dropout_prob": model.dropout,
            "attention_probs_dropout_prob": model.dropout, "position_embedding_type": "absolute",
            "tie_word_embeddings": True}


def _rules(trunk: str, skip: int, heads: Rules) -> Rules:
    """`trunk`: its name in their files; `skip`: rows of the table of positions that no token has."""
    block, ours = f"{trunk}.encoder.layer.{{i}}", "block_{i}"
    return (
        Rule(f"{trunk}.embeddings.word_embeddings.weight", "wte/embedding"),
        Rule(f"{trunk}.embeddings.position_embeddings.weight", "wpe/embedding", skip=skip),
        Rule(f"{trunk}.embeddings.token_type_embeddings.weight", "wse/embedding"),
        *norm(f"{trunk}.embeddings.LayerNorm", "embedding_norm"),
        *dense(f"{block}.attention.self.query", f"{ours}/attn/query"),
        *dense(f"{block}.attention.self.key", f"{ours}/attn/key"),
        *dense(f"{block}.attention.self.value", f"{ours}/attn/value"),
        *dense(f"{block}.attention.output.dense", f"{ours}/attn/out"),
        *norm(f"{block}.attention.output.LayerNorm", f"{ours}/attention_norm"),
        *dense(f"{block}.intermediate.dense", f"{ours}/ffn/up"),
        *dense(f"{block}.output.dense", f"{ours}/ffn/down"),
        *norm(f"{block}.output.LayerNorm", f"{ours}/mlp_norm"),
        *heads,
        Unused(rf"{trunk}\.pooler\.dense\.(weight|bias)", "the pooler, which this model's output does not use"),
        Unused(rf"{trunk}\.embeddings\.(position|token_type)_ids", "a buffer"),
    )


BERT_RULES = _rules("bert", SKIPPED["bert"], (
    *dense("bert.pooler.dense", "pooler"), *dense("classifier", "classify"),
    *dense("cls.predictions.transform.dense", "mlm_dense"), *norm("cls.predictions.transform.LayerNorm", "mlm_norm"),
    Rule("cls.predictions.bias", "mlm_bias"),
    Unused(r"cls\.predictions\.decoder\.weight", "tied to the token embedding",
           same="bert.embeddings.word_embeddings.weight"),
    Unused(r"cls\.predictions\.decoder\.bias", "a copy", same="cls.predictions.bias"),
    Unused(r"cls\.seq_relationship\.(weight|bias)", "next-sentence prediction"),
))
ROBERTA_RULES = _rules("roberta", SKIPPED["roberta"], (
    *dense("classifier.dense", "pooler"), *dense("classifier.out_proj", "classify"),
    *dense("lm_head.dense", "mlm_dense"), *norm("lm_head.layer_norm", "mlm_norm"), Rule("lm_head.bias", "mlm_bias"),
    Unused(r"lm_head\.decoder\.weight", "tied to the token embedding",
           same="roberta.embeddings.word_embeddings.weight"),
    Unused(r"lm_head\.decoder\.bias", "a copy", same="lm_head.bias"),
))
LIKE = BERT(norm_place="post", norm_epsilon=1e-12, mlp="gelu_exact")
HOLDS = {"segments": None, "classes": None, "pool": None, "mask_id": None, "mlp": NAMES, "output": None}
TENSORFLOW = ((".gamma", ".weight"), (".beta", ".bias"))
BERT_FAMILY = (Architecture("bert", "bert.", model, BERT_RULES, LIKE, HOLDS, config, TENSORFLOW),
               *(Architecture(name, "roberta.", model, ROBERTA_RULES) for name in ("roberta", "xlm-roberta")))
