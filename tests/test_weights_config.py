"""What a config.json says, read as transformers 5 reads it, or refused with a sentence."""

import json

import numpy as np
import pytest

from lab.errors import UserError
from lab.weights import find
from lab.weights.location import is_location, locate
from lab.weights.read import ARCHITECTURES
from lab.weights.rules import Config
from tests.test_weights import GPT2_CONFIG, LLAMA_CONFIG, llama_tensors, written

SCALING = LLAMA_CONFIG["rope_scaling"]
LLAMA = {name: value for name, value in LLAMA_CONFIG.items() if name != "rope_scaling"}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
NEOX = SIZES | {"vocab_size": 60, "max_position_embeddings": 32, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
                "use_parallel_residual": False, "rotary_pct": 1.0}
BERT = SIZES | {"architectures": ["BertForSequenceClassification"], "vocab_size": 60, "max_position_embeddings": 34,
                "type_vocab_size": 2, "pad_token_id": 1}
VIT = SIZES | {"architectures": ["ViTModel"], "image_size": 32, "patch_size": 16}


def model(kind: str, fields: dict):
    return ARCHITECTURES[kind].model(Config(fields | {"model_type": kind}, "config.json"))


@pytest.mark.parametrize("kind, fields", [
    ("gpt2", GPT2_CONFIG | {"n_special": 0, "predict_special_tokens": True, "output_past": True}),  # medium, large, xl
    ("qwen2", LLAMA | {"use_mrope": False, "use_sliding_window": False, "sliding_window": 32768}),  # Qwen2.5
    ("xlm-roberta", BERT | {"output_past": True}),
    ("bert", BERT | {"directionality": "bidi", "pooler_fc_size": 768, "pooler_num_attention_heads": 12,
                     "pooler_num_fc_layers": 3, "pooler_size_per_head": 128, "pooler_type": "first_token_transform"}),
    ("mistral", LLAMA | {"sliding_window": LLAMA["max_position_embeddings"]}),
])
def test_what_published_files_have_beside_the_known_fields(kind, fields):
    assert model(kind, fields).depth == 2
    with pytest.raises(UserError, match="'new_trick'"):
        model(kind, fields | {"new_trick": 1})


def test_rotary_positions_as_transformers_5_reads_them():
    default = {"rope_type": "default", "rope_theta": 77.0}
    assert model("llama", LLAMA | {"rope_parameters": default}).rope_base == 77.0
    assert model("llama", LLAMA | {"rope_scaling": default}).rope_base == 77.0
    both = model("llama", LLAMA | {"rope_parameters": default, "rope_scaling": SCALING})
    assert both.rope_scaling is not None and both.rope_base == LLAMA["rope_theta"]
    neox = {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 1.0}
    assert model("gpt_neox", NEOX | {"rotary_emb_base": 500, "rope_parameters": neox}).rope_base == 77.0
    assert model("gpt_neox", NEOX | {"rotary_emb_base": 500}).rope_base == 500.0


@pytest.mark.parametrize("kind, fields, said", [
    ("llama", LLAMA | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "factor is 0.5"),
    ("llama", LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "'full_attention'"),
    ("llama", LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "has no 'low_freq_factor'"),
    ("mistral", LLAMA | {"max_position_embeddings": 8192}, "sliding window of 4096"),  # transformers' default
    ("gpt_neox", {k: v for k, v in NEOX.items() if k != "use_parallel_residual"}, "no 'use_parallel_residual'"),
    ("gpt_neox", {k: v for k, v in NEOX.items() if k != "rotary_pct"}, "partial_rotary_factor is 0.25"),
    ("roberta", BERT | {"pad_token_id": 0}, "pad_token_id is 0"),
    ("bert", BERT | {"problem_type": "regression"}, "'regression'"),
    ("vit", VIT | {"image_size": 40}, "image_size 40 is not divisible by patch_size 16"),
])
def test_what_cannot_be_read_is_refused(kind, fields, said):
    with pytest.raises(UserError, match=said):
        model(kind, fields)


def test_defaults_that_a_file_leaves_out():
    assert model("bert", BERT | {"id2label": None, "num_labels": 3, "problem_type": None}).classes == 3
    assert model("dinov2", {k: v for k, v in VIT.items() if k not in ("patch_size", "intermediate_size")} | {
        "architectures": ["Dinov2Model"], "image_size": 28}).patch == 14


@pytest.mark.parametrize("name, value, said", [
    ("hidden_size", None, "cannot be used"), ("hidden_size", 0, "cannot be used"), ("vocab_size", "x", "vocab must be"),
    ("vocab_size", None, "vocabulary is null"), ("num_attention_heads", 5, "width 32 is not divisible by heads 5"),
    ("num_key_value_heads", 3, "heads 4 is not divisible by kv-heads 3"), ("num_hidden_layers", 1.5, "depth must be"),
    ("num_hidden_layers", 1_000_000, "describes 1000000 layers, and .* only 21 tensors"), ("model_type", [4], "known"),
    ("rms_norm_eps", float("nan"), "norm-epsilon must be above 0"), ("tie_word_embeddings", None, "tied must be bool"),
    ("rope_scaling", [1], "cannot be used"), ("rope_scaling", SCALING | {"factor": "x"}, "factor must be float"),
    ("rope_scaling", SCALING | {"high_freq_factor": 1.0}, "low below high"), ("hidden_act", ["silu"], "only 'silu'"),
])
def test_a_field_with_a_wrong_value_is_a_sentence(name, value, said, tmp_path):
    with pytest.raises(UserError, match=said):
        find(written(tmp_path / "w", LLAMA_CONFIG | {name: value}, llama_tensors()))


def test_shards_and_numbers_that_are_wrong(tmp_path):
    from safetensors.numpy import save_file

    w, folder = llama_tensors(), tmp_path / "w"
    written(folder, LLAMA_CONFIG, w)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"lm_head.weight": w["lm_head.weight"] * 2}, folder / "b.safetensors")

    def index(*files: str) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {f: f for f in files}}))

    index("a.safetensors", "b.safetensors")
    with pytest.raises(UserError, match="two files hold a tensor lm_head.weight"):
        find(str(folder))
    for bad in ("..", "", "/etc/passwd", "sub/a.safetensors", "pytorch_model.bin"):
        index("a.safetensors", bad)
        with pytest.raises(UserError, match="outside its folder, or not .safetensors"):
            find(str(folder))
    hub = tmp_path / "hub"  # the hub's cache: links to files with other names elsewhere
    hub.mkdir()
    index("a.safetensors")
    for file in ("a.safetensors", "config.json", "model.safetensors.index.json"):
        (hub / file).symlink_to((folder / file).rename(tmp_path / f"blob of {file}"))
    assert find(str(hub)).arrays()
    w["model.norm.weight"][3] = np.nan
    with pytest.raises(UserError, match="model.norm.weight has values that are NaN or infinite"):
        find(written(tmp_path / "nan", LLAMA_CONFIG, w)).arrays()


def test_files_and_names_that_are_no_location(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for file, said in (("w.bin", "is a pickle.*Convert it"), ("model.safetensors", "name the folder")):
        (tmp_path / file).write_text("")
        assert is_location(file)
        with pytest.raises(UserError, match=said):
            locate(str(tmp_path / file))
    for name, said in (("hf:../..", "is not hf:ORG/NAME"), ("hf:a/b@../c", "is not hf:ORG/NAME"),
                       ("hf:-a/b", "no name of a repository"), ("package:__main__/x", "is not package:NAME/PATH")):
        with pytest.raises(UserError, match=said):
            locate(name)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not JSON"):
        find(str(tmp_path))
