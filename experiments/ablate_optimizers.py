"""Which optimizer trains a small GPT best, at its tuned learning rate? Excludes seed 0, used for tuning, from tests.

    ./launch.sh experiments/ablate_optimizers.py --full     # first: ./launch.sh prepare tiny_shakespeare
    ./launch.sh experiments/ablate_optimizers.py            # no accelerator: the local config, on source text

Local config, seeds 1-3 (2-core CPU, 2026-11-22): AdamW at 3e-3 has a validation loss of 2.286. Differences, paired by
seed, with 95 % intervals: Muon (3e-2, the highest of three rates tried) -0.388 (-0.435, -0.340), Adam (3e-3) 0.002
(-0.008, 0.012), SGD (0.1) 0.144 (0.098, 0.190), schedule-free (1e-2) 0.198 (-0.003, 0.399), Lion (1e-3) 0.351 (-0.210,
0.912); Lion's rate is best for seed 0 only. 24 cells in 3 minutes. The real study has not been run.
"""

from dataclasses import replace

from experiments import ablate_gpt_norm
from lab.optim import SGD, Adam, Constant, Cosine, Lion, Muon, Optimizer, ScheduleFreeAdamW
from lab.study.design import Study


def optimizers(warmup: int, sgd: float, adam: float, lion: float, muon: float, free: float) -> dict[str, Optimizer]:
    """The optimizers to compare with the base's AdamW; arguments are peak learning rates."""
    def cosine(peak: float) -> Cosine:
        return Cosine(peak, warmup=warmup, end=0.1)

    return {"sgd": SGD(cosine(sgd), momentum=0.9, nesterov=True, grad_clip_norm=1.0),
            "adam": Adam(cosine(adam), b2=0.99, grad_clip_norm=1.0), "lion": Lion(cosine(lion), grad_clip_norm=1.0),
            "muon": Muon(cosine(muon), b2=0.99, grad_clip_norm=1.0),
            "schedule_free": ScheduleFreeAdamW(Constant(free, warmup=warmup), grad_clip_norm=1.0)}


def study_of(base: Study, adamw: float, found: dict[str, Optimizer]) -> Study:
    """Compares the optimizers `found` with AdamW at peak `adamw`."""
    optim = replace(base.base.optim, lr=replace(base.base.optim.lr, peak=adamw))
    return Study(replace(base.base, optim=optim), {name: {"optim": value} for name, value in found.items()},
                 seeds=4, tuning_seeds=(0,))


# The full experiment's rates are guesses from the local config: tune them first, with a study of rates and seeds=1.
study = study_of(ablate_gpt_norm.study, 1e-3, optimizers(100, 0.1, 1e-3, 3e-4, 1e-2, 3e-3))
local = study_of(ablate_gpt_norm.local, 3e-3, optimizers(30, 0.1, 3e-3, 1e-3, 3e-2, 1e-2))
