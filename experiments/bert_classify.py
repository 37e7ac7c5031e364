"""Transfer learning: a classifier of customer messages, initialized from a masked language model.

    ./launch.sh experiments/bert_messages.py --full --run-dir runs/bert_messages --data.source.path train.csv
    ./launch.sh experiments/bert_classify.py --full --data.source.path train.csv --data.source.test test.csv
    ... --vary init_from.run=None --seeds 3 --split test      # a study: compares with training from scratch

The local config starts from random weights, or with `--init-from.run RUN` from a run of bert_base.py's local config.

Measured by that study (2-core CPU busy with other work, 2026-11-22; BANKING77, 77 intents, 3,080 test messages, 600
steps, 3 seeds): 64.6 % (sd 0.6) pretrained, 39.4 % (sd 1.8) from scratch; difference 25.1 points, 95 % interval 21.0 to
29.3. With words instead of bytes (intents_words.py), pretraining does not help: random embeddings already make a
strong bag of words.
"""

from dataclasses import replace

from experiments import bert_base, bert_messages
from lab.data.saved import Saved
from lab.data.tables import Csv
from lab.experiment import Checkpoint, Evaluate
from lab.optim import AdamW, LinearDecay
from lab.pretrained import Pretrained
from lab.tasks.supervised import Classify

experiment = replace(
    bert_messages.experiment,
    # The tokenizer of the first run: the same byte must have the same id.
    data=replace(bert_messages.experiment.data, tokenizer=Saved("runs/bert_messages"),
                 source=Csv("banking77/train.csv", target="category", text="text", test="banking77/test.csv")),
    model=bert_messages.experiment.model.clone(classes=77, pool="mean", dropout=0.1),
    task=Classify(),
    optim=AdamW(lr=LinearDecay(1e-3, warmup=50, end=0.0), weight_decay=0.01, grad_clip_norm=1.0),
    steps=600, batch=64, init_from=Pretrained("runs/bert_messages"),
    evaluate=Evaluate(every=200, metric="accuracy", mode="max"), checkpoint=Checkpoint(every=200),
)

local = replace(experiment, data=bert_base.local.data, init_from=Pretrained(),
                model=bert_base.local.model.clone(classes=8, pool="mean", dropout=0.1))
