"""A small BERT reads the 25,000 film reviews of IMDB without their labels; bert_classify.py begins from it.

    ./launch.sh prepare imdb_reviews
    ./launch.sh experiments/bert_reviews.py --full --run-dir runs/bert_reviews
"""

from dataclasses import replace

from experiments import bert_base
from lab.data.message_sources import Tfds
from lab.data.messages import Messages
from lab.data.tokenizers import BPE
from lab.experiment import Checkpoint, Evaluate
from lab.models.bert import BERT
from lab.optim import AdamW, Linear

experiment = replace(
    bert_base.local,
    data=Messages(Tfds("imdb_reviews/plain_text"), BPE(8192), length=64),
    model=BERT(depth=2, width=64, heads=2, context=64, vocab=8193, segments=0, dropout=0.0, position="rotary"),
    optim=AdamW(lr=Linear(2e-3, warmup=100, end=0.0), b1=0.9, b2=0.98, decay=0.01, clip=1.0),
    steps=1500, batch=64, evaluate=Evaluate(every=500, records=1024), checkpoint=Checkpoint(every=500),
)

local = bert_base.local
