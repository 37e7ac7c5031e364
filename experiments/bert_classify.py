"""Transfer learning: a classifier that begins with the parameters of a masked language model and few labels.

    ./launch.sh experiments/bert_reviews.py --full --run-dir runs/bert_reviews
    ./launch.sh experiments/bert_classify.py --full                          # 2,250 labelled reviews
    ./launch.sh experiments/bert_classify.py --full --init-from.run None     # the same from scratch

The twin begins at random unless told `--init-from.run RUN`, RUN being a run of bert_base.py's twin.

Measured (2-core CPU, 2026-11-22, seed 0): 75.1 % of 5,000 test reviews from the first run, 77.1 % from scratch. Nine
minutes of pretraining (perplexity 112) do not help here yet; with frozen embeddings it was 62.8 % of validation.
"""

from dataclasses import replace

from experiments import bert_base, bert_reviews
from lab.data.message_sources import Tfds
from lab.data.messages import Messages
from lab.data.saved import Saved
from lab.experiment import Evaluate
from lab.optim import AdamW, Linear
from lab.pretrained import Pretrained
from lab.tasks.supervised import Classify

experiment = replace(
    bert_reviews.experiment,
    # The tokenizer of the first run: the same word must have the same id.
    data=Messages(Tfds("imdb_reviews/plain_text", train="train[:10%]"), Saved("runs/bert_reviews"), length=192),
    model=bert_reviews.experiment.model.clone(classes=2, pool="mean", dropout=0.3, context=192),
    task=Classify(),
    optim=AdamW(lr=Linear(2e-3, warmup=40, end=0.0), decay=0.01, clip=1.0),
    steps=200, batch=32, init_from=Pretrained("runs/bert_reviews"),
    evaluate=Evaluate(every=50, metric="accuracy", mode="max"),
)

local = replace(experiment, data=bert_base.local.data, init_from=Pretrained(),
                model=bert_base.local.model.clone(classes=8, pool="mean", dropout=0.1))
