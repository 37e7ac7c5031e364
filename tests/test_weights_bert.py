"""BERT and RoBERTa from other people's files: each head against a forward pass in NumPy, and against transformers."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.special import erf

from lab.errors import UserError
from lab.models.bert import BERT
from lab.weights import Weights, find, read
from lab.weights.bert import config
from lab.weights.read import variables_of
from lab.weights.rules import Rule
from lab.weights.write import write

V, D, N, F, L, DEPTH = 60, 16, 4, 24, 12, 2
CONFIG = {"hidden_size": D, "num_hidden_layers": DEPTH, "num_attention_heads": N, "intermediate_size": F,
          "hidden_act": "gelu", "vocab_size": V}
KINDS = {"bert": CONFIG | {"model_type": "bert", "max_position_embeddings": L, "type_vocab_size": 2,
                           "layer_norm_eps": 1e-12},
         "roberta": CONFIG | {"model_type": "roberta", "max_position_embeddings": L + 2, "type_vocab_size": 1,
                              "layer_norm_eps": 1e-5}}
HEADS = {"bert": {"ForMaskedLM": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm",
                                  "cls.predictions"), "Model": (), "ForSequenceClassification": ("bert.pooler.dense",
                                                                                                 "classifier")},
         "roberta": {"ForMaskedLM": ("lm_head.dense", "lm_head.layer_norm", "lm_head"), "Model": (),
                     "ForSequenceClassification": ("classifier.dense", "classifier.out_proj")}}
CLASS = {"bert": "Bert", "roberta": "Roberta"}
RNG = np.random.default_rng(3)
IDS = RNG.integers(5, V, (2, L))
MASK = np.ones_like(IDS)
MASK[1, 7:] = 0


def tensors(kind: str, head: str) -> dict[str, np.ndarray]:
    """Random tensors under their names in a file."""
    shapes = {f"{kind}.embeddings.word_embeddings.weight": (V, D),
              f"{kind}.embeddings.position_embeddings.weight": (KINDS[kind]["max_position_embeddings"], D),
              f"{kind}.embeddings.token_type_embeddings.weight": (KINDS[kind]["type_vocab_size"], D)}
    dense = {f"{kind}.encoder.layer.{i}.{name}": shape for i in range(DEPTH) for name, shape in {
        "attention.self.query": (D, D), "attention.self.key": (D, D), "attention.self.value": (D, D),
        "attention.output.dense": (D, D), "intermediate.dense": (F, D), "output.dense": (D, F)}.items()}
    norms = [f"{kind}.encoder.layer.{i}.{name}" for i in range(DEPTH)
             for name in ("attention.output.LayerNorm", "output.LayerNorm")] + [f"{kind}.embeddings.LayerNorm"]
    if head == "ForMaskedLM":
        dense[HEADS[kind][head][0]] = (D, D)
        norms.append(HEADS[kind][head][1])
        shapes[f"{HEADS[kind][head][2]}.bias"] = (V,)
    elif head == "ForSequenceClassification":
        dense |= {HEADS[kind][head][0]: (D, D), HEADS[kind][head][1]: (3, D)}
    shapes |= {f"{name}.weight": shape for name, shape in dense.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in dense.items()}
    shapes |= {f"{name}.{part}": (D,) for name in norms for part in ("weight", "bias")}
    rng = np.random.default_rng(0)
    small = ("embeddings.weight", "predictions.bias", "lm_head.bias")  # so that epsilon matters
    return {name: rng.normal(0, 0.005 if name.endswith(small) else 0.3, shape).astype(np.float32)
            for name, shape in shapes.items()}


def folder(path, kind: str, head: str, w: dict[str, np.ndarray], **fields) -> str:
    path.mkdir()
    classes = {"id2label": {"0": "a", "1": "b", "2": "c"}} if head == "ForSequenceClassification" else {}
    values = KINDS[kind] | {"architectures": [CLASS[kind] + head]} | classes | fields
    (path / "config.json").write_text(json.dumps(values))
    save_file(w, path / "model.safetensors")
    return str(path)


def trunk(w: dict[str, np.ndarray], kind: str, ids: np.ndarray, mask: np.ndarray, heads: int, epsilon: float,
          depth: int) -> np.ndarray:
    """The last hidden states in float64, (B, L, D)."""
    def dense(x, name):
        return x @ w[f"{name}.weight"].T.astype(float) + w[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    skip = 2 if kind == "roberta" else 0
    e = f"{kind}.embeddings"
    x = norm(w[f"{e}.word_embeddings.weight"][ids].astype(float) + w[f"{e}.token_type_embeddings.weight"][0]
             + w[f"{e}.position_embeddings.weight"][skip:skip + ids.shape[1]], f"{e}.LayerNorm")
    for i in range(depth):
        b = f"{kind}.encoder.layer.{i}"
        q, k, v = (dense(x, f"{b}.attention.self.{n}").reshape(*ids.shape, heads, -1).transpose(0, 2, 1, 3)
                   for n in ("query", "key", "value"))
        scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1]) + np.where(mask[:, None, None], 0, -1e30)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        y = (p / p.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        x = norm(x + dense(y, f"{b}.attention.output.dense"), f"{b}.attention.output.LayerNorm")
        h = dense(x, f"{b}.intermediate.dense")
        x = norm(x + dense(h * (1 + erf(h / np.sqrt(2))) / 2, f"{b}.output.dense"), f"{b}.output.LayerNorm")
    return x


def reference(w: dict[str, np.ndarray], kind: str, head: str, epsilon: float | None = None) -> np.ndarray:
    """The output of transformers' class, in NumPy."""
    epsilon = KINDS[kind]["layer_norm_eps"] if epsilon is None else epsilon
    x = trunk(w, kind, IDS, MASK, N, epsilon, DEPTH)
    names = HEADS[kind][head]
    dense = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    if head == "ForMaskedLM":
        h = dense(x, names[0])
        h = h * (1 + erf(h / np.sqrt(2))) / 2
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + epsilon)
        h = h * w[f"{names[1]}.weight"] + w[f"{names[1]}.bias"]
        return h @ w[f"{kind}.embeddings.word_embeddings.weight"].T + w[f"{names[2]}.bias"]
    return dense(np.tanh(dense(x[:, 0], names[0])), names[1]) if names else x


def difference(location: str, wanted: np.ndarray) -> float:
    """Largest difference between our output and the reference where tokens are real, by the largest output."""
    model, variables, _ = read(location)
    ours = np.asarray(model.apply(variables, jnp.asarray(IDS), train=False, mask=jnp.asarray(MASK)))
    error = np.abs(ours - wanted)
    return float((error if error.ndim == 2 else error[MASK > 0]).max() / np.abs(wanted).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS["bert"])
def test_outputs_equal_a_forward_pass_in_numpy(kind, head, tmp_path):
    w = tensors(kind, head)
    location = folder(tmp_path / "w", kind, head, w)
    assert difference(location, reference(w, kind, head)) < 1e-5
    # Negative controls: the other kind's epsilon, and positions that begin at another row.
    assert difference(location, reference(w, kind, head, epsilon={"bert": 1e-5, "roberta": 1e-12}[kind])) > 1e-4
    moved = w | {f"{kind}.embeddings.position_embeddings.weight":
                 np.roll(w[f"{kind}.embeddings.position_embeddings.weight"], 1, 0)}
    assert difference(location, reference(moved, kind, head)) > 1e-4


def test_names_of_early_files(tmp_path):
    w = tensors("bert", "ForMaskedLM")
    early = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
             for n, x in w.items()}
    early |= {"bert.embeddings.position_ids": np.arange(L)[None], "cls.seq_relationship.weight": np.zeros((2, D), "f"),
              "cls.predictions.decoder.weight": w["bert.embeddings.word_embeddings.weight"].copy()}
    location = folder(tmp_path / "w", "bert", "ForMaskedLM", early)
    assert difference(location, reference(w, "bert", "ForMaskedLM")) < 1e-4
    assert set(find(location).report()["unused"]) == {"bert.embeddings.position_ids", "cls.seq_relationship.weight",
                                                      "cls.predictions.decoder.weight"}


def sentences(path) -> None:
    """Files that make a folder one of sentence-transformers."""
    kinds = ("Transformer", "Pooling", "Normalize")
    (path / "modules.json").write_text(json.dumps([{"type": f"sentence_transformers.models.{k}"} for k in kinds]))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True,
                                                                "pooling_mode_cls_token": False}))


def test_sentence_embeddings(tmp_path):
    w = {name.removeprefix("bert."): x for name, x in tensors("bert", "Model").items()}
    location = folder(tmp_path / "w", "bert", "Model", w)
    sentences(tmp_path / "w")
    hidden = reference({f"bert.{name}": x for name, x in w.items()}, "bert", "Model")
    pooled = (hidden * MASK[..., None]).sum(1) / MASK.sum(1, keepdims=True)
    wanted = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    assert difference(location, wanted) < 1e-5
    assert difference(location, pooled) > 1e-2  # negative control
    (tmp_path / "w" / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(UserError, match="pooling_mode_max_tokens"):
        find(location)


def test_a_classifier_on_a_pretrained_trunk(tmp_path):
    location = folder(tmp_path / "w", "bert", "Model", tensors("bert", "Model"))
    model = find(location).model.clone(output="logits", classes=5, pool="mean")
    Weights(location, random=("^classify/",)).check(model)
    with pytest.raises(UserError, match="hidden_multiple"):
        Weights(location).check(model.clone(hidden_multiple=2.0))


def test_unknown_heads_and_fields_are_sentences(tmp_path):
    w = tensors("bert", "Model")
    for name, fields, said in (("a", {"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering"),
                               ("b", {"position_embedding_type": "relative_key"}, "only 'absolute'"),
                               ("c", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
                               ("d", {"chunk_size": 2}, "'chunk_size', which is not known")):
        with pytest.raises(UserError, match=said):
            find(folder(tmp_path / name, "bert", "Model", w, **fields))


def test_rules_that_skip_rows_write_zeros():
    rule, table = Rule("a", "b", skip=2), RNG.normal(size=(5, 3))
    (ours,) = rule.read(table, {})
    assert np.array_equal(ours, table[2:])
    assert np.array_equal(rule.write([ours], {}), np.concatenate([np.zeros((2, 3)), table[2:]]))


@pytest.mark.parametrize("head", HEADS["bert"])
def test_what_is_written_reads_back_bit_by_bit(head, tmp_path):
    first = find(folder(tmp_path / "w", "bert", head, tensors("bert", head)))
    arrays = first.arrays()
    write(first.model, arrays, tmp_path / "out")
    second = find(str(tmp_path / "out"))
    back = second.arrays()
    assert second.model == first.model and back.keys() == arrays.keys()
    assert all(np.array_equal(back[path], arrays[path]) for path in arrays)
    assert variables_of(back).keys() == {"params"}


def test_models_that_bert_does_not_hold():
    with pytest.raises(UserError, match="norm_place='post'"):
        write(BERT(vocab=V), {}, None)
    with pytest.raises(UserError, match="pooler, not mean"):
        config(BERT(vocab=V, classes=3, pool="mean", norm_place="post", norm_epsilon=1e-12, mlp="gelu_exact"))


@pytest.mark.skipif("LAB_TRANSFORMERS" not in os.environ, reason="needs torch and transformers: LAB_TRANSFORMERS=1")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS["bert"])
def test_outputs_equal_those_of_transformers(kind, head, tmp_path):
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    location = folder(tmp_path / "w", kind, head, tensors(kind, head))
    theirs = getattr(hf, CLASS[kind] + head).from_pretrained(location, dtype=torch.float32).eval()
    ids = np.where(MASK, IDS, 1 if kind == "roberta" else 0)  # RoBERTa's positions count tokens other than 1
    out = theirs(torch.tensor(ids), attention_mask=torch.tensor(MASK))
    wanted = (out.last_hidden_state if head == "Model" else out.logits).detach().numpy()
    assert difference(location, wanted) < 1e-5
    if kind == "bert":
        found = find(location)
        write(found.model, found.arrays(), tmp_path / "out")
        back, info = getattr(hf, CLASS[kind] + head).from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(n for n in info["missing_keys"] if "pooler" not in n) and not info["unexpected_keys"]
        out = back.eval()(torch.tensor(ids), attention_mask=torch.tensor(MASK))
        again = (out.last_hidden_state if head == "Model" else out.logits).detach().numpy()
        assert np.abs(again - wanted)[MASK > 0 if again.ndim == 3 else ...].max() < 1e-5
