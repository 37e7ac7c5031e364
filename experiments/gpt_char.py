"""nanoGPT's published CPU recipe: a character model of tiny Shakespeare (0.8M parameters, 2,000 steps).

    ./launch.sh experiments/gpt_char.py --full     # first: ./launch.sh prepare tiny_shakespeare
    ./launch.sh experiments/gpt_char.py            # no accelerator: the local config, bytes of the standard library

Expected: validation loss 1.88 nats per character (nanoGPT's README; nanoGPT run here: 1.92 on 200 random batches).
Measured on all of the last 10 % (2-core CPU, 2026-11-23): 1.888 with seed 0, also with --precision bfloat16; 1.890
with seed 1 (2026-11-22). Speed: tests/benchmarks/README.md.

Differences from nanoGPT: no weight decay on embeddings, biases on, and non-overlapping windows within an epoch, whose
offset changes after the first epoch.
"""

from dataclasses import replace

from lab.data.text import PythonStdlib, Text, TfdsText
from lab.data.tokenizers import Bytes, Chars
from lab.experiment import Evaluate, Experiment
from lab.models.gpt import GPT
from lab.optim import AdamW, Cosine
from lab.tasks.language import LanguageModel

experiment = Experiment(
    # nanoGPT validates on the last 10 % of the text, which TFDS splits into validation and test.
    data=Text(TfdsText("tiny_shakespeare", validation="validation+test"), Chars(), length=64),
    model=GPT(depth=4, width=128, heads=4, vocab=65, context=64),
    task=LanguageModel(),
    optim=AdamW(lr=Cosine(1e-3, warmup=100, end=0.1), b1=0.9, b2=0.99, weight_decay=0.1, grad_clip_norm=1.0),
    steps=2000, batch=12, evaluate=Evaluate(every=250),
)

local = replace(experiment, data=Text(PythonStdlib(), Bytes(), length=64),
                model=experiment.model.clone(vocab=256), evaluate=Evaluate(every=250, records=2048))
