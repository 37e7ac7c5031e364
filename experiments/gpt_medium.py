"""GPT-2 medium (355M parameters); its local config is gpt_small's.

    ./launch.sh experiments/gpt_medium.py --full     # first: ./launch.sh prepare lm1b

Not trained yet, only planned (``--full --dry-run``); the local config has been run. 10.5G tokens take 16 hours at the
180,000 tokens/s of one H100 with 32 rows at once (2026-11-26). By ``plan`` (2026-11-23): one H200 needs 19.8 GiB and at
least 1,285 ms/step; v5e-8 with ``--grad-accum-steps 16`` needs 11.6 GiB per chip and at least 806 ms/step.
"""

from dataclasses import replace

from experiments import gpt_small
from lab.models.gpt import GPT
from lab.optim import AdamW, Cosine

experiment = replace(
    gpt_small.experiment,
    # Scanned it would compile faster (7 s instead of 26 for an H200), and move 1.3 times as many bytes a step.
    model=GPT(depth=24, width=1024, heads=16, vocab=50304),
    optim=AdamW(lr=Cosine(3e-4, warmup=700, end=0.1), b1=0.9, b2=0.95, weight_decay=0.1, grad_clip_norm=1.0),
    grad_accum_steps=32,
)

local = gpt_small.local
