"""`./launch.sh parity`: our outputs beside those of transformers. What compares needs LAB_TRANSFORMERS=1."""

import os
from pathlib import Path

import pytest

from lab.weights import find
from lab.weights.parity import batches, compare, our_outputs
from lab.weights.read import variables_of
from tests.test_weights import D, F, G, L, N, V

needs_transformers = pytest.mark.skipif("LAB_TRANSFORMERS" not in os.environ,
                                        reason="needs torch and transformers: LAB_TRANSFORMERS=1")
SIZES = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": N, "intermediate_size": F,
         "max_position_embeddings": L}
IMAGES = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": N, "image_size": 12, "patch_size": 4,
          "num_labels": 7}
FAMILIES = {  # class of transformers, without Config or what follows it -> fields of its config.json, what follows
    "GPT2": ({"n_layer": 2, "n_embd": D, "n_head": N, "vocab_size": V, "n_positions": L}, "LMHeadModel"),
    "GPTNeoX": (SIZES | {"use_parallel_residual": False, "rotary_pct": 1.0, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}, "ForCausalLM"),
    "Llama": (SIZES | {"num_key_value_heads": G}, "ForCausalLM"),
    "Mistral": (SIZES | {"num_key_value_heads": G, "sliding_window": None}, "ForCausalLM"),
    "Qwen2": (SIZES | {"num_key_value_heads": G}, "ForCausalLM"),
    "Qwen3": (SIZES | {"num_key_value_heads": G, "head_dim": 24}, "ForCausalLM"),
    "Bert": (SIZES, "ForMaskedLM"),
    "Bert no head": (SIZES, "Model"),
    "Roberta": (SIZES | {"max_position_embeddings": L + 2}, "ForSequenceClassification"),
    "ViT": (IMAGES | {"intermediate_size": F}, "ForImageClassification"),
    "ViT no head": (IMAGES | {"intermediate_size": F}, "Model"),
    "Dinov2": (IMAGES | {"mlp_ratio": 2, "layerscale_value": 0.5}, "ForImageClassification"),
    "ResNet": ({"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic", "num_labels": 7},
               "ForImageClassification"),
}


@pytest.fixture
def place(tmp_path) -> Path:
    return tmp_path


def random_model(folder: Path, family: str, noise: float = 0.05, **fields) -> str:
    """A folder with weights of this class at random, in which no bias is 0 and no scale 1."""
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    (values, head), family = FAMILIES[family], family.partition(" ")[0]
    torch.manual_seed(0)
    model = getattr(hf, family + head)(getattr(hf, f"{family}Config")(**(values | fields)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * noise)
        if hasattr(model, "tie_weights"):
            model.tie_weights()
    model.save_pretrained(folder)
    return str(folder)


def test_without_the_packages_it_is_a_sentence(mistake, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "parity needs torch and transformers: UV_TORCH_BACKEND=cpu LAB_EXTRAS=parity" in mistake("parity", "nowhere")


@needs_transformers
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_with_transformers(family, typed, tmp_path):
    noise = 0.0 if family == "ResNet" else 0.05  # its logits would be above 10,000
    status, out, err = typed("parity", random_model(tmp_path / "w", family, noise))
    assert status == 0 and "within 0.0001" in out, out + err
    images, encoder = family.startswith(("ViT", "Dino", "ResNet")), family.startswith(("Bert", "Roberta"))
    kinds = ("random images",) if images else ("random ids", f"longest of {L}", "padded")
    assert all(kind in out for kind in kinds) and ("key/value cache" in out) == (not images and not encoder)


@needs_transformers
def test_gpt2_at_its_true_size(typed, tmp_path):
    status, out, err = typed("parity", random_model(tmp_path / "w", "GPT2", 0.0, n_layer=12, n_embd=768, n_head=12,
                                                    vocab_size=50257, n_positions=1024))
    assert status == 0 and "1 x 1024" in out, out + err


@needs_transformers
def test_exit_status_and_mistakes(typed, mistake, tmp_path):
    location = random_model(tmp_path / "w", "Llama")
    status, out, _ = typed("parity", location, "--tolerance", "1e-12", "--length", "8")
    assert status == 1 and "above 1e-12" in out and "1 x 8" in out
    assert "from transformers in float64, ours differs by" in out
    for words, said in ((("--length", "25"), "--length 25 is not between 1 and"), (("--text", "none"), "--text none")):
        assert said in mistake("parity", location, *words)


@needs_transformers
@pytest.mark.parametrize("family, wrong", {"GPT2": ("transposed", "epsilon"),
                                           "Llama": ("transposed", "interleaved", "epsilon")}.items())
def test_what_is_wrong_is_above_the_tolerance(family, wrong, tmp_path):
    """Negative controls of the comparison, at the sizes of the test above."""
    from lab.weights.parity import load_theirs, their_output

    found = find(random_model(tmp_path / "w", family, 0.0))
    rows = batches(found, L, "")
    theirs = load_theirs(found)
    reference = {kind: their_output(theirs, found.model, batch) for kind, batch in rows.items()}

    def largest(model, arrays) -> float:
        ours = our_outputs(model, variables_of(arrays), rows)
        return max(compare(kind, batch, ours[kind], reference[kind], True).largest for kind, batch in rows.items())

    arrays = found.arrays()
    assert largest(found.model, arrays) < 1e-4
    out, query = "block_0/attn/out/kernel", "block_0/attn/query/kernel"
    halves = arrays[query].reshape(D, N, 2, -1)
    broken = {"transposed": (found.model, arrays | {out: arrays[out].T}),
              "interleaved": (found.model, arrays | {query: halves.swapaxes(2, 3).reshape(D, D)}),
              "epsilon": (found.model.clone(norm_epsilon=1e-12), arrays)}
    for kind in wrong:
        assert largest(*broken[kind]) > 1e-4, kind
