"""Other people's weights: each family against a forward pass in NumPy, and against transformers if installed."""

import errno
import json
import math
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from lab.api import open_run
from lab.configuration.rebuild import from_json
from lab.configuration.values import to_json
from lab.data.text import Text, TextFiles
from lab.data.tokenizers import Bytes
from lab.errors import UserError
from lab.experiment import Experiment
from lab.models.attention import RopeScaling
from lab.models.gpt import GPT
from lab.optim import AdamW
from lab.tasks.language import LanguageModel
from lab.weights import Weights, find, model_of, read
from lab.weights.location import locate
from lab.weights.read import parameter_shapes, variables_of
from lab.weights.write import architecture_of, write
from tests.conftest import ROOT

V, D, N, G, L, DEPTH, F = 300, 32, 4, 2, 24, 2, 96
GPT2_CONFIG = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": D, "n_layer": DEPTH, "n_head": N,
               "n_positions": L, "n_ctx": L, "vocab_size": V, "activation_function": "gelu_new",
               "layer_norm_epsilon": 1e-3, "resid_pdrop": 0.1}
LLAMA_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": D, "vocab_size": V,
                "num_hidden_layers": DEPTH, "num_attention_heads": N, "num_key_value_heads": G, "intermediate_size": F,
                "max_position_embeddings": L, "rms_norm_eps": 1e-3, "rope_theta": 500_000.0, "hidden_act": "silu",
                "tie_word_embeddings": False,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                 "original_max_position_embeddings": 8}}


def random(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.3, shape).astype(np.float32)


def gpt2_tensors() -> dict[str, np.ndarray]:
    shapes = {"wte.weight": (V, D), "wpe.weight": (L, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
    for i in range(DEPTH):
        block = {"ln_1": (D,), "ln_2": (D,), "attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, 4 * D),
                 "mlp.c_proj": (4 * D, D)}
        shapes |= {f"h.{i}.{name}.weight": shape for name, shape in block.items()}
        shapes |= {f"h.{i}.{name}.bias": shape[-1:] for name, shape in block.items()}
    return {name: random(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}


def llama_tensors() -> dict[str, np.ndarray]:
    K = D // N
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for i in range(DEPTH):
        block = {"input_layernorm": (D,), "post_attention_layernorm": (D,), "self_attn.q_proj": (D, D),
                 "self_attn.k_proj": (G * K, D), "self_attn.v_proj": (G * K, D), "self_attn.o_proj": (D, D),
                 "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    return {name: random(*shape, seed=100 + k) for k, (name, shape) in enumerate(shapes.items())}


def written(folder, config: dict, tensors: dict[str, np.ndarray]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "model.safetensors")
    return str(folder)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(q, k, v):
    """Causal attention in float64 of (L, heads, K) arrays."""
    scores = np.einsum("lnk,snk->nls", q, k) / math.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
    return np.einsum("nls,snk->lnk", softmax(scores), v).reshape(len(q), -1)


def gpt2(w: dict[str, np.ndarray], ids: np.ndarray, epsilon: float = 1e-3) -> np.ndarray:
    """Logits (L, V) of one text, in float64, from Radford et al. 2019."""
    w = {name: x.astype(np.float64) for name, x in w.items()}

    def dense(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][ids] + w["wpe.weight"][: len(ids)]
    for i in range(DEPTH):
        q, k, v = np.split(dense(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, axis=-1)
        y = attention(*(t.reshape(len(ids), N, D // N) for t in (q, k, v)))
        x = x + dense(y, f"h.{i}.attn.c_proj")
        h = dense(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + dense(h, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def frequencies(width: int) -> np.ndarray:
    """Llama 3.1's rotary frequencies, one at a time, as its paper's code has them."""
    found = []
    for j in range(width // 2):
        f = 500_000.0 ** (-2 * j / width)
        length = 2 * math.pi / f
        if length > 8 / 1.0:
            f /= 8.0
        elif length > 8 / 4.0:
            smooth = (8 / length - 1.0) / (4.0 - 1.0)
            f = (1 - smooth) * f / 8.0 + smooth * f
        found.append(f)
    return np.array(found)


def llama(w: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Logits (L, V) of one text, in float64, from Touvron et al. 2023; rotations as complex numbers."""
    w = {name: x.astype(np.float64) for name, x in w.items()}
    K = D // N

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * w[f"{name}.weight"]

    def turned(x):
        angle = np.outer(np.arange(len(x)), frequencies(K))[:, None]
        z = (x[..., : K // 2] + 1j * x[..., K // 2:]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], -1)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(DEPTH):
        at = f"model.layers.{i}"
        h = norm(x, f"{at}.input_layernorm")
        q, k, v = (h @ w[f"{at}.self_attn.{p}_proj.weight"].T for p in "qkv")
        q, k, v = (t.reshape(len(ids), -1, K) for t in (q, k, v))
        y = attention(turned(q), np.repeat(turned(k), N // G, 1), np.repeat(v, N // G, 1))
        x = x + y @ w[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm")
        gate, up = (h @ w[f"{at}.mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}.mlp.down_proj.weight"].T
    return norm(x, "model.norm") @ w["lm_head.weight"].T


FAMILIES = {"gpt2": (GPT2_CONFIG, gpt2_tensors, gpt2), "llama": (LLAMA_CONFIG, llama_tensors, llama)}
IDS = np.random.default_rng(1).integers(0, V, L)


def difference(location: str, reference: np.ndarray) -> float:
    model, variables, _ = read(location)
    ours = model.apply(variables, jnp.asarray(IDS[None]), train=False)[0]
    return float(np.abs(np.asarray(ours) - reference).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_a_forward_pass_in_numpy(family, tmp_path):
    config, tensors, forward = FAMILIES[family]
    w = tensors()
    reference = forward(w, IDS)
    assert difference(written(tmp_path / "good", config, w), reference) < 1e-4 * np.abs(reference).max()
    # Negative controls: a transposed kernel, another epsilon, interleaved rotary halves, another base.
    square = next(name for name in w if name.endswith(("attn.c_proj.weight", "o_proj.weight")))
    assert difference(written(tmp_path / "turned", config, w | {square: w[square].T}), reference) > 0.01
    epsilon = "layer_norm_epsilon" if family == "gpt2" else "rms_norm_eps"
    assert difference(written(tmp_path / "epsilon", config | {epsilon: 1e-5}, w), reference) > 0.001
    if family == "llama":
        q = "model.layers.0.self_attn.q_proj.weight"
        mixed = w[q].reshape(N, 2, D // N // 2, D).swapaxes(1, 2).reshape(D, D)
        assert difference(written(tmp_path / "rotary", config, w | {q: mixed}), reference) > 0.01
        plain = {name: value for name, value in config.items() if name != "rope_scaling"}
        assert difference(written(tmp_path / "scaling", plain, w), reference) > 0.01


def test_files_in_half_precision_and_in_shards(tmp_path):
    import ml_dtypes

    w = llama_tensors()
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in w.items()}
    whole = find(written(tmp_path / "half", LLAMA_CONFIG, half)).arrays()
    assert all(x.dtype == np.float32 for x in whole.values())
    assert np.array_equal(whole["wte/embedding"], half["model.embed_tokens.weight"].astype(np.float32))

    folder = tmp_path / "shards"
    written(folder, LLAMA_CONFIG, w)
    (folder / "model.safetensors").unlink()
    names = sorted(w)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: w[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert np.array_equal(find(str(folder)).arrays()["head"], w["lm_head.weight"].T)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match="lacks 1 of 2 shards.*model-2"):
        find(str(folder))


def gguf_file(path, tensors: dict[str, np.ndarray], quantised: bool = False, permuted: bool = True,
              factors: np.ndarray | None = None) -> str:
    """The Llama of `llama_tensors` without rotary scaling, as llama.cpp's converter writes it."""
    gguf = pytest.importorskip("gguf", reason="LAB_EXTRAS=gguf")
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "lm_head.weight": "output.weight"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    names |= {f"model.layers.{i}.{hf}.weight": f"blk.{i}.{own}.weight" for i in range(DEPTH)
              for hf, own in parts.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(DEPTH), writer.add_embedding_length(D), writer.add_context_length(L)
    writer.add_head_count(N), writer.add_head_count_kv(G), writer.add_feed_forward_length(F)
    writer.add_layer_norm_rms_eps(1e-3), writer.add_rope_freq_base(500_000.0), writer.add_rope_dimension_count(D // N)
    writer.add_token_list([str(n) for n in range(V)])
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, x in tensors.items():
        for part, heads in (("q_proj", N), ("k_proj", G)):
            if part in name and permuted:
                x = x.reshape(heads, 2, -1, D).swapaxes(1, 2).reshape(x.shape)
        kind = gguf.GGMLQuantizationType.Q8_0
        if quantised and x.ndim == 2:
            writer.add_tensor(names[name], gguf.quants.quantize(x, kind), raw_dtype=kind)
        else:
            writer.add_tensor(names[name], np.ascontiguousarray(x))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return str(path)


def test_gguf(tmp_path, monkeypatch):
    w = llama_tensors()
    plain = {name: value for name, value in LLAMA_CONFIG.items() if name != "rope_scaling"}
    same, params, _ = read(written(tmp_path / "hf", plain, w))
    model, ours, _ = read(gguf_file(tmp_path / "w.gguf", w))
    assert model == same.clone(hidden_multiple=model.hidden_multiple)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, ours, params)))
    q = ("block_0", "attn", "query", "kernel")
    _, wrong, _ = read(gguf_file(tmp_path / "rows.gguf", w, permuted=False))  # negative control
    assert not np.array_equal(wrong["params"][q[0]][q[1]][q[2]][q[3]],
                              params["params"][q[0]][q[1]][q[2]][q[3]])
    _, rough, _ = read(gguf_file(tmp_path / "q8.gguf", w, quantised=True))
    error = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), rough, params)
    assert 0 < max(jax.tree.leaves(error)) < 0.02
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "w.gguf").read_bytes()[:-2000])
    (tmp_path / "none.gguf").write_bytes(b"PK")
    for bad in ("cut.gguf", "none.gguf"):
        with pytest.raises(UserError, match=f"{bad} is not a complete GGUF file"):
            find(str(tmp_path / bad))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match="LAB_EXTRAS=gguf"):
        find(str(tmp_path / "w.gguf"))


def test_the_scaling_of_rotary_positions_in_gguf(tmp_path):
    """Of the width 8 and base 500,000: wavelengths of 6.3, 167, 4,443 and 118,148; Llama 3.1 keeps those below 2,048,
    makes those above 8,192 longer by the factor, and interpolates the frequencies between."""
    length = 2 * math.pi * 500_000**0.5
    smooth = (8192 / length - 1) / (4 - 1)
    factors = np.array([1, 1, 1 / ((1 - smooth) / 32 + smooth), 32], np.float32)
    model = find(gguf_file(tmp_path / "w.gguf", llama_tensors(), factors=factors)).model
    assert model.rope_scaling == RopeScaling(factor=32.0)
    with pytest.raises(UserError, match="rope_freqs.weight, are not those of Llama"):
        find(gguf_file(tmp_path / "other.gguf", llama_tensors(), factors=factors + np.float32(0.1)))


def spoiled(folder, kind: str) -> str:
    """A folder of weights with one fault."""
    w, config = llama_tensors(), dict(LLAMA_CONFIG)
    match kind:
        case "a tensor too many":
            w["model.layers.0.self_attn.extra.weight"] = random(2, seed=0)
        case "a tensor too few":
            del w["model.layers.1.mlp.up_proj.weight"]
        case "a shape":
            w["model.norm.weight"] = random(D + 1, seed=0)
        case "a type":
            w["model.norm.weight"] = np.arange(D)
        case "architecture":
            config["model_type"] = "mamba"
        case "field":
            config["new_trick"] = True
        case "value":
            config["hidden_act"] = "relu"
        case "scaling":
            config["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0}
    written(folder, config, w)
    file = folder / "model.safetensors"
    match kind:
        case "truncated":
            file.write_bytes(file.read_bytes()[:-100])
        case "no weights":
            file.unlink()
        case "pickled":
            file.rename(folder / "pytorch_model.bin")
        case "no config":
            (folder / "config.json").unlink()
        case "not JSON":
            (folder / "config.json").write_text("{")
        case "outside":
            file.unlink()
            index = {"weight_map": {"x": "../secret.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder)


@pytest.mark.parametrize("kind, said", {
    "a tensor too many": "1 tensors without a place .*self_attn.extra", "a tensor too few": "without a tensor .*ffn/up",
    "a shape": r"model.norm.weight .*\(33,\).*\(32,\)", "a type": "model.norm.weight is I64", "architecture": "'mamba'",
    "field": "'new_trick'", "value": "hidden_act is 'relu'", "scaling": "'yarn'", "truncated": "model.safetensors",
    "no weights": "no model.safetensors", "pickled": "pickle.*save", "no config": "no config.json",
    "not JSON": "config.json is not JSON", "outside": "outside its folder"}.items())
def test_bad_files_are_a_sentence(kind, said, tmp_path):
    with pytest.raises(UserError, match=said):
        find(spoiled(tmp_path / "w", kind))


def test_a_copy_that_is_none_is_noticed(tmp_path):
    w = llama_tensors()
    config = LLAMA_CONFIG | {"tie_word_embeddings": True}
    good = find(written(tmp_path / "good", config, w | {"lm_head.weight": w["model.embed_tokens.weight"]}))
    assert good.model.tied and good.arrays() and "lm_head.weight" in good.report()["unused"]
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens"):
        find(written(tmp_path / "bad", config, w)).arrays()


def test_locations(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "marked").mkdir()
    (tmp_path / "marked" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "marked" / "x.gguf").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert locate("package:marked/x.gguf") == tmp_path / "marked" / "x.gguf"  # without importing it
    for bad, said in (("nowhere", "There is no .*nowhere"), ("package:marked/../x", "is not package:NAME/PATH"),
                      ("package:no_such_package/x", "not installed"), ("hf:gpt2", "is not hf:ORG/NAME"),
                      ("package:marked/y.gguf", "There is no")):
        with pytest.raises(UserError, match=said):
            locate(bad)


def experiment(location: str, corpus: str) -> Experiment:
    return Experiment(data=Text(TextFiles(corpus), Bytes(), length=16), model=model_of(location), task=LanguageModel(),
                      optim=AdamW(lr=1e-3), steps=2, batch=8, init_from=Weights(location))


def test_a_run_starts_from_weights(tmp_path):
    from lab.train.program import Program
    from lab.train.restore import initial_arrays

    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    location = written(tmp_path / "w", GPT2_CONFIG, gpt2_tensors())
    value = experiment(location, str(tmp_path / "a.txt"))
    value.validate()
    assert from_json(to_json(value)) == value
    data = value.data.load()
    program = Program(replace(value, mesh=replace(value.mesh, data=2, fsdp=4)))
    given, report = initial_arrays(value.init_from, program.abstract, data)
    state = program.init(given)
    _, params, _ = read(location)
    same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), b), state.params, params["params"])
    assert all(jax.tree.leaves(same)) and not report["random"] and "model.safetensors" in report["files"]
    assert len(state.params["wte"]["embedding"].sharding.device_set) == 8
    value.init_from.check(value.model.clone(kv_heads=N, head_width=D // N, qkv_bias=True, hidden_multiple=4.000001))
    with pytest.raises(UserError, match="norm_epsilon=1e-05.*0.001.*model_of"):
        replace(value, model=GPT(depth=DEPTH, width=D, heads=N, vocab=V, context=L)).validate()
    other = replace(value, model=value.model.clone(vocab=V + 4), init_from=Weights(location, random=("wte",)))
    with pytest.raises(UserError, match="vocab"):
        other.validate()


WRITTEN = {
    "gpt2": {}, "gpt_neox": {"position": "rotary"}, "gpt_neox untied": {"position": "rotary", "tied": False},
    "llama": {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "kv_heads": 2,
              "rope_scaling": RopeScaling(context=16), "tied": False},
    "qwen2": {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "qkv_bias": True},
    "qwen3": {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "qk_norm": True,
              "head_width": 24},
    "llama wide": {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "head_width": 24}}


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_is_written_reads_back_bit_by_bit(kind, tmp_path):
    model = GPT(depth=2, width=64, heads=4, vocab=V, context=L, **WRITTEN[kind])
    params = {path: random(*shape, seed=i) for i, (path, shape) in enumerate(parameter_shapes(model).items())}
    config = write(model, params, tmp_path / "out")
    found = find(str(tmp_path / "out"))
    assert config["model_type"] == kind.partition(" ")[0]
    back = found.arrays()
    assert back.keys() == params.keys() and all(np.array_equal(back[path], params[path]) for path in params)
    ids = jnp.asarray(IDS[None])
    assert np.array_equal(found.model.apply(variables_of(back), ids, train=False),
                          model.apply(variables_of(params), ids, train=False))
    if "LAB_TRANSFORMERS" in os.environ:
        torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
        theirs, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True,
                                                               dtype=torch.float32)
        assert not any(info.values())
        reference = theirs(torch.tensor(IDS[None])).logits[0].detach().numpy()
        assert difference(str(tmp_path / "out"), reference) < 1e-4


def test_a_model_that_no_format_holds_is_a_sentence():
    for fields, said in (({"softcap": 30.0}, "softcap=None"), ({"qk_norm": True}, "qk_norm=False"),
                         ({"position": "rotary", "norm": "rmsnorm"}, "norm='layernorm'"), ({"mlp": "relu2"}, "gelu")):
        with pytest.raises(UserError, match=said):
            architecture_of(GPT(vocab=V, **fields))


def test_a_run_is_exported(tmp_path, monkeypatch, capsys):
    from lab.__main__ import main
    from tests.test_cli import furnished

    monkeypatch.chdir(furnished(tmp_path))
    assert main(["small.py", "--run-dir", "run", "--model.bias"]) == 0
    assert main(["export", "run", "--to", "out"]) == 0
    assert {"config.json", "model.safetensors", "generation_config.json", "README.md"} <= {
        p.name for p in (tmp_path / "out").iterdir()}
    assert "| loss |" in (tmp_path / "out" / "README.md").read_text()
    model, params, _ = read("out")
    run = open_run("run")
    there, here = flatten_dict(run.params, sep="/"), flatten_dict(params["params"], sep="/")
    assert here.keys() == there.keys() and all(np.array_equal(here[path], there[path]) for path in here)
    capsys.readouterr()
    assert main(["export", "run", "--to", "out"]) == 2
    assert "out is there already" in capsys.readouterr().err
    with monkeypatch.context() as full:  # a disk that is full behind the weights: no half of a model stays
        def replace_file(path, content):
            if path.name == "README.md":
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)

        full.setattr("lab.files.replace_file", replace_file)
        assert main(["export", "run", "--to", "half"]) == 2
    assert "No space left" in capsys.readouterr().err and not (tmp_path / "half").exists()


def test_an_image_classifier_is_exported(tmp_path, monkeypatch):
    from lab.__main__ import main

    monkeypatch.chdir(tmp_path)
    small = ("--model.depth", "1", "--model.width", "16", "--model.heads", "2", "--steps", "1",
             "--optim.lr.warmup", "0", "--batch", "8", "--evaluate.every", "0", "--evaluate.records", "8",
             "--checkpoint.every", "0")
    assert main([str(ROOT / "experiments/vit_transfer.py"), "--local", "--run-dir", "run", *small]) == 0
    assert main(["export", "run", "--to", "out"]) == 0
    written = {name: json.loads((tmp_path / "out" / name).read_text())
               for name in ("config.json", "preprocessor_config.json")}
    assert written["config.json"]["id2label"] == {str(i): str(i) for i in range(10)}
    assert written["preprocessor_config.json"]["image_mean"] == [0.5]
    assert "pipeline_tag: image-classification" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "generation_config.json").exists()
    assert find("out").model.classes == 10


@pytest.mark.skipif("LAB_TRANSFORMERS" not in os.environ, reason="needs torch and transformers: LAB_TRANSFORMERS=1")
def test_logits_equal_those_of_transformers(tmp_path):
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    base = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 160, "vocab_size": V, "max_position_embeddings": L}
    scaling = LLAMA_CONFIG["rope_scaling"]
    models = {
        "gpt2": hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=V, n_positions=L)),
        "smollm": hf.LlamaForCausalLM(hf.LlamaConfig(**base, tie_word_embeddings=True)),
        "llama": hf.LlamaForCausalLM(hf.LlamaConfig(**base, rope_theta=5e5, rope_scaling=scaling)),
        "biases": hf.LlamaForCausalLM(hf.LlamaConfig(**base, attention_bias=True, mlp_bias=True)),
        "mistral": hf.MistralForCausalLM(hf.MistralConfig(**base, sliding_window=None)),
        "qwen2": hf.Qwen2ForCausalLM(hf.Qwen2Config(**base)),
        "qwen3": hf.Qwen3ForCausalLM(hf.Qwen3Config(**base, head_dim=24)),
    }
    for name, theirs in models.items():
        theirs.eval()
        with torch.no_grad():
            for p in theirs.parameters():
                p.add_(torch.randn_like(p) * 0.05)
            theirs.save_pretrained(tmp_path / name)
            reference = theirs(torch.tensor(IDS[None])).logits[0].numpy()
        assert difference(str(tmp_path / name), reference) < 1e-4, name
