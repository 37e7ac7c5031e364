"""Does the best learning rate move with the width of a GPT? A grid of 4 peaks x 3 widths of gpt_char, 3 seeds.

    ./launch.sh experiments/sweep_lr_width.py --full     # first: ./launch.sh prepare tiny_shakespeare
    ./launch.sh experiments/sweep_lr_width.py            # no accelerator: the local config, on source text

Local config, 3 seeds (2-core CPU, 2026-11-22; `--execution cores`): yes. At width 64 the best of 1e-3, 3e-3 and 1e-2 is
3e-3 for 3 of 3 seeds (loss 2.542, 2.384, 2.596; fitted optimum 2.9e-3). At width 32 it is 1e-2, the edge of the sweep,
for 2 of 3 (2.888, 2.590, 2.530). 18 cells in 71 s. The real study has not been run.
"""

from dataclasses import replace

from experiments import ablate_gpt_norm
from lab.study.design import Study, grid

study = Study(base=ablate_gpt_norm.study.base, seeds=3, arms=grid({
    "optim.lr.peak": (3e-4, 1e-3, 3e-3, 1e-2), "model.width": (64, 128, 256)}))

local = Study(base=replace(ablate_gpt_norm.local.base, steps=200), seeds=3, arms=grid({
    "optim.lr.peak": (1e-3, 3e-3, 1e-2), "model.width": (32, 64)}))
