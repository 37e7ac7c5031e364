"""Which norm, and which positions, for a small GPT? A 2 x 2 factorial study of gpt_char, 5 seeds.

    ./launch.sh experiments/ablate_gpt_norm.py --full     # first: ./launch.sh prepare tiny_shakespeare
    ./launch.sh experiments/ablate_gpt_norm.py            # no accelerator: the local config, on source text

Local config, 5 seeds (2-core CPU, 2026-11-22): validation loss 2.289 (sd 0.012). Differences, paired by seed, with 95 %
intervals: rotary -0.220 (-0.237, -0.204), rmsnorm -0.004 (-0.024, 0.017), both -0.219 (-0.241, -0.197); interaction
(half the difference of the two effects) 0.002 (-0.013, 0.018). 20 cells, one per core, and the report: 3 min 23 s. The
real study has not been run.
"""

from dataclasses import replace

from experiments import gpt_char
from lab.experiment import Checkpoint, Evaluate
from lab.study.design import Study, factorial

study = Study(
    base=replace(gpt_char.experiment, checkpoint=Checkpoint(every=1000, keep=1, best=False)),
    arms=factorial({"rmsnorm": {"model.norm": "rmsnorm"}, "rotary": {"model.position": "rotary"}}),
    seeds=5,
)

local = replace(
    study,
    base=replace(gpt_char.local, model=gpt_char.local.model.clone(depth=2, width=64), steps=300, batch=16,
                 optim=replace(gpt_char.local.optim, lr=replace(gpt_char.local.optim.lr, peak=3e-3, warmup=30)),
                 evaluate=Evaluate(every=100, records=1024), checkpoint=Checkpoint(every=0, keep=1, best=False)),
)
