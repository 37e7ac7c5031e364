"""Portuguese to English: an encoder-decoder Transformer on talks; locally, documentation of Python's functions.

    ./launch.sh prepare ted_hrlr_translate/pt_to_en
    LAB_EXTRAS=sacrebleu,rouge ./launch.sh experiments/translate_ted.py --full
    LAB_EXTRAS=sacrebleu,rouge ./launch.sh experiments/translate_ted.py
    ./launch.sh predict RUN --input signatures.txt --output -
"""

from dataclasses import replace

from lab.data.tokenizers import BPE
from lab.data.translations import PythonSignatures, TfdsPairs, Translations
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.seq2seq import Seq2Seq
from lab.optim import Adam, AdamW, Cosine, InverseSqrt
from lab.tasks.translate import Translate

experiment = Experiment(
    data=Translations(TfdsPairs("ted_hrlr_translate/pt_to_en"), BPE(8192), source_length=128, target_length=128),
    model=Seq2Seq(depth=4, width=128, heads=8, hidden_multiple=4, vocab=8192, context=128, norm_place="post",
                  mlp="relu", dropout=0.1, embeddings="separate", tied=False),
    task=Translate(),
    # width^-0.5 min(step^-0.5, step warmup^-1.5), whose peak is (width warmup)^-0.5.
    optim=Adam(lr=InverseSqrt((128 * 4000) ** -0.5, warmup=4000), b2=0.98, eps=1e-9),
    steps=16_200, batch=64,
    evaluate=Evaluate(every=810), checkpoint=Checkpoint(every=810),
)

local = replace(
    experiment,
    data=Translations(PythonSignatures(), BPE(2048), source_length=48, target_length=40),
    model=Seq2Seq(depth=2, width=128, heads=4, vocab=2048, context=48, dropout=0.2),
    task=Translate(label_smoothing=0.1),
    optim=AdamW(lr=Cosine(2e-3, warmup=50, end=0.05), b2=0.98, weight_decay=0.1, grad_clip_norm=1.0),
    steps=800, batch=32,
    evaluate=Evaluate(every=200), checkpoint=Checkpoint(every=200),
)
