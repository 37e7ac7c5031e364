"""Customer-service intents (BANKING77: 77 intents, 10,003 messages): a Transformer, from scratch or pretrained.

    ./launch.sh experiments/intents_pretrain.py --full --run-dir runs/intents --data.source.path train.csv
    ./launch.sh experiments/intents_words.py --full --data.source.path train.csv --data.source.test test.csv
    ... --init-from.run runs/intents        # starts from the first run's parameters

Accepts any CSV with a text column and a class column. The local config classifies Python code by package.

Measured (2-core CPU, 2026-11-22, seed 0): macro F1 0.842 from scratch and 0.829 pretrained, so this small amount of
pretraining does not help; TF-IDF and logistic regression 0.897.
"""

from dataclasses import replace

from experiments import bert_classify, intents_pretrain
from lab.data.tables import Csv
from lab.experiment import Evaluate
from lab.optim import AdamW, LinearDecay
from lab.pretrained import Pretrained
from lab.tasks.supervised import Classify

experiment = replace(
    intents_pretrain.experiment,
    data=replace(intents_pretrain.experiment.data,
                 source=Csv("banking77/train.csv", target="category", text="text", test="banking77/test.csv")),
    model=intents_pretrain.experiment.model.clone(classes=77, pool="mean", dropout=0.2),
    task=Classify(),
    optim=AdamW(lr=LinearDecay(1e-3, warmup=50, end=0.0), weight_decay=0.05, grad_clip_norm=1.0),
    steps=600, batch=64, evaluate=Evaluate(every=200, metric="f1", mode="max"), init_from=Pretrained(),
)

local = bert_classify.local
