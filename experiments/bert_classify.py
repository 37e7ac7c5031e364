"""Transfer learning: a classifier that begins with the parameters of a masked language model.

    ./launch.sh experiments/bert_newsgroups.py --full --run-dir runs/bert_newsgroups
    ./launch.sh experiments/bert_classify.py --full
    ./launch.sh experiments/bert_classify.py --full --init-from.run None     # the same from scratch

The twin begins at random unless told `--init-from.run RUN`, RUN being a run of bert_base.py's twin.

Measured (2-core CPU, 2026-11-22, seeds 0 and 1): 21.7 and 19.3 % of the 7,532 test messages (loss 2.58 and 2.66) after
400 updates from the first run, 18.0 and 19.0 % (2.72 and 2.72) from scratch. Both are far from converged: bytes are a
hard beginning. On whole words random embeddings are a strong bag of words, which minutes of pretraining do not beat.
"""

from dataclasses import replace

from experiments import bert_base, bert_newsgroups
from lab.data.saved import Saved
from lab.experiment import Evaluate
from lab.optim import AdamW, Linear
from lab.pretrained import Pretrained
from lab.tasks.supervised import Classify

experiment = replace(
    bert_newsgroups.experiment,
    # The tokenizer of the first run: the same byte must have the same id.
    data=replace(bert_newsgroups.experiment.data, tokenizer=Saved("runs/bert_newsgroups")),
    model=bert_newsgroups.experiment.model.clone(classes=20, pool="mean", dropout=0.1),
    task=Classify(),
    optim=AdamW(lr=Linear(3e-3, warmup=40, end=0.0), decay=0.01, clip=1.0),
    steps=400, batch=64, init_from=Pretrained("runs/bert_newsgroups"),
    evaluate=Evaluate(every=200, metric="accuracy", mode="max"),
)

local = replace(experiment, data=bert_base.local.data, init_from=Pretrained(),
                model=bert_base.local.model.clone(classes=8, pool="mean", dropout=0.1))
