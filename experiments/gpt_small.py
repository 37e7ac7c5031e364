"""GPT-2 small (124M parameters) on text; the local config trains on the source of Python's standard library.

    ./launch.sh experiments/gpt_small.py            # no accelerator: the local config
    ./launch.sh experiments/gpt_small.py --full     # first: ./launch.sh prepare lm1b

Local config, 2-core CPU, 2026-11-23: 1 min 31 s including compilation, 1.585 bits per byte on the validation files
(untrained 3.45; gzip -9 2.024, xz -9 1.718). The real experiment has not been run: 10.5G tokens (9.0E FLOPs) take
5.9 hours at the 497,000 tokens/s of one H100 with 64 rows at once (2026-11-26). By ``plan`` (2026-11-23): v5e-8 with
``--grad-accum-steps 8`` needs 5.93 GiB per chip and at least 284 ms/step; one H200 14.0 GiB and 453 ms/step.
"""

from dataclasses import replace

from lab.data.text import PythonStdlib, Text, TfdsText
from lab.data.tokenizers import BPE, GPT2
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.gpt import GPT
from lab.optim import AdamW, Cosine, Muon
from lab.tasks.language import LanguageModel

experiment = Experiment(
    data=Text(TfdsText("lm1b"), GPT2(), length=1024),
    # 50,257 tokens, padded to a multiple of 128, which fills whole tiles of a matrix unit (as nanoGPT does).
    model=GPT(depth=12, width=768, heads=12, vocab=50304, context=1024),
    task=LanguageModel(chunk=256),
    optim=AdamW(lr=Cosine(6e-4, warmup=700, end=0.1), b1=0.9, b2=0.95, weight_decay=0.1, grad_clip_norm=1.0),
    steps=20_000, batch=512, grad_accum_steps=16, precision="bfloat16",
    evaluate=Evaluate(every=1000, records=2048), checkpoint=Checkpoint(every=1000),
)

local = replace(
    experiment,
    data=Text(PythonStdlib(), BPE(vocab=2048), length=128),
    # Three minutes are short, so the local config departs from GPT-2 in two things: rotary positions and Muon. Bits per
    # byte measured after 500 steps: 1.64; with AdamW instead 1.88.
    model=GPT(depth=4, width=128, heads=2, vocab=2048, context=128, position="rotary"),
    task=LanguageModel(),  # its logits are small
    optim=Muon(lr=Cosine(4e-3, warmup=10, end=0.1), weight_decay=0.1, grad_clip_norm=1.0),
    steps=600, batch=16, grad_accum_steps=1,
    evaluate=Evaluate(every=150, records=512), checkpoint=Checkpoint(every=100),
)
