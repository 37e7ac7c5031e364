"""BERT base, masked language modelling on Wikipedia; the local config trains on Python's standard library.

    ./launch.sh experiments/bert_base.py            # no accelerator: the local config
    ./launch.sh prepare wikipedia/20230601.en
    ./launch.sh experiments/bert_base.py --full

The real experiment uses GPT-2's tokenizer (124.7M parameters) and no next-sentence prediction, which does not help
(RoBERTa, Liu et al. 2019). It has not been trained here, only planned (``--full --dry-run``: 15.8E FLOPs). The local
config has been run; bert_classify.py can start from it.
"""

from dataclasses import replace

from lab.data.messages import Messages, PythonPackages
from lab.data.text import Text, TfdsText
from lab.data.tokenizers import BPE, GPT2
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.bert import BERT
from lab.optim import AdamW, LinearDecay
from lab.tasks.masked import MaskedLM

experiment = Experiment(
    data=Text(TfdsText("wikipedia/20230601.en"), GPT2(), length=512),
    model=BERT(vocab=50_258, context=512, segments=0),    # the last id is [MASK]
    task=MaskedLM(),
    optim=AdamW(lr=LinearDecay(4e-4, warmup=10_000, end=0.0), b1=0.9, b2=0.98, weight_decay=0.01, grad_clip_norm=1.0),
    steps=100_000, batch=512, grad_accum_steps=16, precision="bfloat16",
    evaluate=Evaluate(every=5000, records=2048), checkpoint=Checkpoint(every=1000),
)

local = replace(
    experiment,
    data=Messages(PythonPackages(), BPE(2048), length=64),
    # In so few steps a masked language model with learned positions only learns token frequencies (measured).
    model=BERT(depth=2, width=128, heads=2, context=64, vocab=2049, segments=0, dropout=0.0,
               position="rotary"),
    optim=AdamW(lr=LinearDecay(2e-3, warmup=60, end=0.0), b1=0.9, b2=0.98, weight_decay=0.01, grad_clip_norm=1.0),
    steps=800, batch=32, grad_accum_steps=1, precision="float32",
    evaluate=Evaluate(every=200, records=512), checkpoint=Checkpoint(every=200),
)
