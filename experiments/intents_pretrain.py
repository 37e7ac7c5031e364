"""Masked language modelling on the messages of BANKING77, without labels; pretraining for intents_words.py.

    ./launch.sh experiments/intents_pretrain.py --full --run-dir runs/intents --data.source.path train.csv
"""

from dataclasses import replace

from experiments import bert_base
from lab.data.messages import Messages
from lab.data.tables import Csv
from lab.data.word_tokenizer import Words
from lab.experiment import Checkpoint, Evaluate
from lab.models.bert import BERT
from lab.optim import AdamW, LinearDecay

experiment = replace(
    bert_base.local,
    data=Messages(Csv("banking77/train.csv", target="category", text="text"), Words(2500), length=32),
    model=BERT(depth=2, width=128, heads=2, context=32, vocab=2501, segments=0, dropout=0.1,
               position="rotary"),
    optim=AdamW(lr=LinearDecay(1e-3, warmup=100, end=0.0), b1=0.9, b2=0.98, weight_decay=0.01, grad_clip_norm=1.0),
    steps=1200, batch=64, evaluate=Evaluate(every=400), checkpoint=Checkpoint(every=400),
)

local = bert_base.local
