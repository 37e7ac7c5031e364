"""A small BERT reads the 11,314 messages of 20 Newsgroups as bytes, without labels; bert_classify.py begins from it.

    ./launch.sh experiments/bert_newsgroups.py --full --run-dir runs/bert_newsgroups
"""

from dataclasses import replace

from experiments import bert_base
from lab.data.bundled import Sklearn
from lab.data.messages import Messages
from lab.data.tokenizers import Bytes
from lab.experiment import Checkpoint, Evaluate
from lab.models.bert import BERT
from lab.optim import AdamW, Linear
from lab.tasks.masked import MaskedLM

experiment = replace(
    bert_base.local,
    data=Messages(Sklearn("20newsgroups"), Bytes(), length=192),
    model=BERT(depth=2, width=64, heads=2, context=192, vocab=258, segments=0, dropout=0.0, position="rotary"),
    task=MaskedLM(rate=0.25),
    optim=AdamW(lr=Linear(4e-3, warmup=100, end=0.0), b1=0.9, b2=0.98, decay=0.01, clip=1.0),
    steps=1500, batch=64, evaluate=Evaluate(every=300, records=512), checkpoint=Checkpoint(every=300),
)

local = bert_base.local
