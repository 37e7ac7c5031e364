"""Portuguese to English: an encoder-decoder Transformer on talks; locally, documentation of Python's functions.

    ./launch.sh prepare ted_hrlr_translate/pt_to_en
    LAB_EXTRAS=sacrebleu,rouge ./launch.sh experiments/translate_ted.py --full
    LAB_EXTRAS=sacrebleu,rouge ./launch.sh experiments/translate_ted.py
    ./launch.sh predict RUN --input signatures.txt --output -

Pairs of your own: a file like this one with `Translations(PairsFile("pairs.csv", source="en", target="de"), ...)`.

Measured, local config (busy 2-core Intel Xeon VM with AMX, 2026-11-28, seeds 0, 1, 2, 6 to 19 minutes), 609 held-out
functions: ROUGE-L 30.5, 29.8, 30.6, chrF 29.8, 29.6, 29.8, BLEU 13.1, 12.4, 12.6; the signature copied 17.4, 22.0, 1.3;
the most frequent line 6.6, 5.6, 0.1; the line of the nearest signature in training, a retrieval baseline that is better
than the model, 35.9, 37.6, 21.3. The talks were not run: no network here.
"""

from dataclasses import replace

from lab.data.tokenizers import BPE
from lab.data.translations import PythonSignatures, TfdsPairs, Translations
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.seq2seq import Seq2Seq
from lab.optim import Adam, Cosine, InverseSqrt, Muon
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
    data=Translations(PythonSignatures(), BPE(2048), source_length=40, target_length=32),
    model=Seq2Seq(depth=2, width=128, heads=4, vocab=2048, context=40, position="rotary"),
    task=Translate(label_smoothing=0.1, length_penalty=2.0),
    optim=Muon(lr=Cosine(6e-3, warmup=20, end=0.05), weight_decay=0.1, grad_clip_norm=1.0),
    steps=2000, batch=32,
    evaluate=Evaluate(every=400), checkpoint=Checkpoint(every=400),
)
