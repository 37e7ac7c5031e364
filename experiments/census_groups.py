"""Who earns above 50,000 dollars? A classifier's metrics by group (UCI Adult, 1994 census); the local config: diabetes.

    ./launch.sh experiments/census_groups.py
    ./launch.sh experiments/census_groups.py --full --data.source.path adult.csv --data.source.test adult_test.csv
    ... --task.groups race          # another column; --task.reweigh: group and class made independent in training

Any CSV with a header, classes and a column of groups will do (--data.source.target, --data.source.drop).

Measured (busy 2-core Intel Xeon VM with AMX, 2026-11-28, seed 0): 16,281 test records, accuracy 85.7 % (logistic
regression 85.1 %), women 93.0 %, men 82.1 %; predicted to earn more: 8.1 and 25.9 % (true: 10.9 and 30.0 %), a
demographic parity difference of 0.178 (95 % interval 0.167 to 0.189); equalized odds difference 0.085 (0.042 to 0.129).
Local config: 177 test records, 90 and 87 of a sex, accuracy 71.8 %; no gap is distinguishable from 0.
"""

from dataclasses import dataclass, replace

import numpy as np

from lab.data.dataset import Data, Dataset
from lab.data.pipeline import Arrays
from lab.data.tables import Csv, Sklearn, Table
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.linear import MLP
from lab.optim import Adam, Cosine
from lab.tasks.supervised import Classify


@dataclass(frozen=True)
class Diabetes(Data):
    """442 patients (Efron et al. 2004): is the progression of the disease after a year above the median?"""

    sex_is_input: bool = True
    """Whether the model sees the sex, by which its metrics are reported."""

    def load(self) -> Dataset:
        """Records with the fields sex=1 and sex=2."""
        table = Table(Sklearn("diabetes"), test=0.4, groups=("sex",)).load()
        inputs = [i for i, name in enumerate(table.feature_names) if self.sex_is_input or name != "sex"]
        middle = np.median(table.train.arrays["targets"])
        parts = [Arrays({name: x for name, x in part.arrays.items() if "=" in name}
                        | {"inputs": part.arrays["inputs"][:, inputs],
                           "targets": (part.arrays["targets"] > middle).astype(np.int32)})
                 for part in (table.train, table.validation, table.test)]
        return Dataset(*parts, classes=("low", "high"), metadata={"features": len(inputs)})


experiment = Experiment(
    data=Table(Csv("adult.csv", target="income", test="adult_test.csv", drop=("fnlwgt",)), unseen="zeros"),
    model=MLP(classes=2, depth=1, width=64),
    task=Classify(groups="sex"),
    optim=Adam(lr=Cosine(1e-3, warmup=100, end=0.01)),
    steps=3000, batch=256, steps_per_call=50, evaluate=Evaluate(every=500, metric="loss"),
    checkpoint=Checkpoint(every=500),
)

local = replace(
    experiment, data=Diabetes(), model=MLP(classes=2, depth=1, width=16),
    optim=Adam(lr=Cosine(3e-3, warmup=20, end=0.01)),
    steps=500, batch=32, evaluate=Evaluate(every=100), checkpoint=Checkpoint(every=100),
)
