"""GPT-2 XL (1.56B parameters), with scan and remat; the local config is gpt_small's, with scan and remat.

    ./launch.sh experiments/gpt_xl.py --full     # first: ./launch.sh prepare lm1b
    LAB_EXTRAS=plan ./launch.sh plan experiments/gpt_xl.py --on v5e-16
    LAB_EXTRAS=plan ./launch.sh plan experiments/gpt_xl.py --on v5e-256 --mesh.data 4 --grad-accum-steps 2

Not trained here (no accelerator), only planned (``--full --dry-run``); the local config has been run. By FLOPs, 10.5G
tokens take about 76 hours on one H100 at 40 % of its peak. Parameters and optimizer state are sharded over all devices;
the width of 1,600 is divisible by 64 but not by 256.
"""

from dataclasses import replace

from experiments import gpt_small
from lab.experiment import Mesh
from lab.models.gpt import GPT
from lab.optim import AdamW, Cosine
from lab.tasks.language import LanguageModel

experiment = replace(
    gpt_small.experiment,
    model=GPT(depth=48, width=1600, heads=25, vocab=50304, scan=True, remat="blocks"),
    task=LanguageModel(),  # a device has few rows, and along "fsdp" every chunk would send the embedding's gradient
    optim=AdamW(lr=Cosine(2e-4, warmup=700, end=0.1), b1=0.9, b2=0.95, weight_decay=0.1, grad_clip_norm=1.0),
    grad_accum_steps=32, mesh=Mesh(data=1, fsdp=-1),
)

local = replace(gpt_small.local, model=gpt_small.local.model.clone(scan=True, remat="blocks"))
