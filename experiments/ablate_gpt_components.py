"""How much does each part of a modern GPT help? Six changes to gpt_char together, then each left out; 5 seeds.

    ./launch.sh experiments/ablate_gpt_components.py --full     # first: ./launch.sh prepare tiny_shakespeare
    ./launch.sh experiments/ablate_gpt_components.py            # no accelerator: the local config, on source text

Local config, 3 seeds (2-core CPU, 2026-11-22; `--execution cores`): loss 2.287 as in GPT-2, 2.028 with all six. Loss
increase when one is left out, paired by seed, 95 % intervals: rotary 0.327 (0.243, 0.410); not significant at this n
are SwiGLU 0.056 (-0.029, 0.142), untying 0.047 (-0.029, 0.123), QK norm -0.003 (-0.068, 0.061), RMSNorm -0.016
(-0.064, 0.031) and no biases -0.039 (-0.158, 0.081). 24 cells in 3 min 2 s. The real study has not been run.
"""

from experiments import ablate_gpt_norm
from lab.study.design import Study, leave_one_out

EDITS = {
    "rotary": {"model.position": "rotary"}, "rmsnorm": {"model.norm": "rmsnorm"}, "qk_norm": {"model.qk_norm": True},
    "swiglu": {"model.mlp": "swiglu", "model.hidden_multiple": 8 / 3},    # the parameters of gelu at 4
    "untied": {"model.tied": False}, "no_bias": {"model.bias": False},
}

study = Study(base=ablate_gpt_norm.study.base, arms=leave_one_out(EDITS), seeds=5)
local = Study(base=ablate_gpt_norm.local.base, arms=leave_one_out(EDITS), seeds=3)
