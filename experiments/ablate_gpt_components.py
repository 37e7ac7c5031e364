"""What does each part of a modern GPT give? All six changes of gpt_char together, then each one left out; 5 seeds.

    ./launch.sh experiments/ablate_gpt_components.py --full     # first: ./launch.sh prepare tiny_shakespeare
    ./launch.sh experiments/ablate_gpt_components.py            # no accelerator: the twin, on source text

Not measured yet. The base is GPT-2's form; compare each arm "all-x" with the arm "all".
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
