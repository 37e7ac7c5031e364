"""Which optimizer trains a small GPT best, each at its tuned rate? Seed 0 tuned them, and is left out of the tests.

    ./launch.sh experiments/ablate_optimizers.py --full     # first: ./launch.sh prepare tiny_shakespeare
    ./launch.sh experiments/ablate_optimizers.py            # no accelerator: the twin, on source text

Not measured yet.
"""

from dataclasses import replace

from experiments import ablate_gpt_norm
from lab.optim import SGD, Adam, AdamW, Constant, Cosine, Lion, Muon, ScheduleFreeAdamW
from lab.study.design import Study


def optimizers(warmup: int, sgd: float, adam: float, adamw: float, lion: float, muon: float, free: float) -> dict:
    """The arms besides the base (AdamW as in nanoGPT), with their peak rates."""
    def cosine(peak: float) -> Cosine:
        return Cosine(peak, warmup=warmup, end=0.1)

    found = {
        "sgd": SGD(cosine(sgd), momentum=0.9, nesterov=True, clip=1.0), "adam": Adam(cosine(adam), b2=0.99, clip=1.0),
        "adamw": AdamW(cosine(adamw), b2=0.99, clip=1.0), "lion": Lion(cosine(lion), clip=1.0),
        "muon": Muon(cosine(muon), b2=0.99, clip=1.0),
        "schedule_free": ScheduleFreeAdamW(Constant(free, warmup=warmup), clip=1.0),
    }
    return {name: {"optim": optimizer} for name, optimizer in found.items()}


