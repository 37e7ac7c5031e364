"""Which optimizer trains a small GPT best, each at its tuned rate? Seed 0 tuned them, and is left out of the tests.

    ./launch.sh experiments/ablate_optimizers.py --full     # first: ./launch.sh prepare tiny_shakespeare
    ./launch.sh experiments/ablate_optimizers.py            # no accelerator: the twin, on source text

Not measured yet.
"""

from dataclasses import replace

from experiments import ablate_gpt_norm
from lab.optim import SGD, Adam, Constant, Cosine, Lion, Muon, Optimizer, ScheduleFreeAdamW
from lab.study.design import Study


def optimizers(warmup: int, sgd: float, adam: float, lion: float, muon: float, free: float) -> dict[str, Optimizer]:
    """All but the base's AdamW, with their peak rates."""
    def cosine(peak: float) -> Cosine:
        return Cosine(peak, warmup=warmup, end=0.1)

    return {"sgd": SGD(cosine(sgd), momentum=0.9, nesterov=True, clip=1.0),
            "adam": Adam(cosine(adam), b2=0.99, clip=1.0), "lion": Lion(cosine(lion), clip=1.0),
            "muon": Muon(cosine(muon), b2=0.99, clip=1.0),
            "schedule_free": ScheduleFreeAdamW(Constant(free, warmup=warmup), clip=1.0)}


def study_of(base: Study, adamw: float, found: dict[str, Optimizer]) -> Study:
    """Those of `found` against AdamW with this peak."""
    optim = replace(base.base.optim, lr=replace(base.base.optim.lr, peak=adamw))
    return Study(replace(base.base, optim=optim), {name: {"optim": value} for name, value in found.items()},
                 seeds=4, tuning_seeds=(0,))


# Rates for the real one are guesses from the twin's: tune them first (see README, "Ablation studies").
study = study_of(ablate_gpt_norm.study, 1e-3, optimizers(100, 0.1, 1e-3, 3e-4, 1e-2, 3e-3))
local = study_of(ablate_gpt_norm.local, 3e-3, optimizers(30, 0.1, 3e-3, 1e-3, 3e-2, 1e-2))
