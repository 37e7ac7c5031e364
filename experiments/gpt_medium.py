"""GPT-2 medium (355M parameters); its twin is gpt_small's.

    LAB_EXTRAS=tiktoken ./launch.sh experiments/gpt_medium.py --full     # first: ./launch.sh prepare lm1b

Not trained here (no accelerator), only planned (``--full --dry-run``) and run as the twin: 10.5G tokens, about 18 hours
on one H100 at 40 % of its peak, by its FLOPs.
"""

from dataclasses import replace

from experiments import gpt_small
from lab.models.gpt import GPT
from lab.optim import AdamW, Cosine

experiment = replace(
    gpt_small.experiment,
    # Not scanned, which compiles four times as fast (7 instead of 26 s for an H200) but moves 1.3 times as many bytes.
    model=GPT(depth=24, width=1024, heads=16, vocab=50304),
    optim=AdamW(lr=Cosine(3e-4, warmup=700, end=0.1), b1=0.9, b2=0.95, decay=0.1, clip=1.0),
    microbatches=32,
)

local = gpt_small.local
