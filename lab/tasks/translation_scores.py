"""Scores of generated texts against references: BLEU and chrF by sacrebleu, ROUGE by rouge-score."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

log = logging.getLogger(__name__)
RANKED = ("chrf", "bleu", "rouge_l")


def translation_scores(references: Sequence[str], columns: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """Column -> name -> value, of outputs with one reference each: `bleu` and `chrf` of the whole corpus (0 to 100;
    sacrebleu's defaults: 13a tokens, up to 4-grams; chrF2, Popovic 2015); `rouge_1`, `rouge_2` and `rouge_l`, mean F1
    over the outputs (0 to 100, without stemming; Lin 2004); `exact`, the share of equal texts; and `words` per output.
    Without a package its scores are left out, with one line that says so."""
    values: dict[str, dict[str, float]] = {name: {} for name in columns}
    for what, score in (("BLEU and chrF need sacrebleu", _sacrebleu), ("ROUGE needs rouge-score", _rouge)):
        try:
            for name, outputs in columns.items():
                values[name] |= score(references, outputs)
        except ImportError:
            log.info("%s, which is not installed: LAB_EXTRAS=sacrebleu,rouge ./launch.sh ... has it", what)
    for name, outputs in columns.items():
        exact = [a == b for a, b in zip(references, outputs, strict=True)]
        values[name] |= {"exact": float(np.mean(exact)), "words": float(np.mean([len(x.split()) for x in outputs]))}
    return values


def _sacrebleu(references: Sequence[str], outputs: Sequence[str]) -> dict[str, float]:
    from sacrebleu.metrics import BLEU, CHRF

    return {"bleu": BLEU().corpus_score(outputs, [references]).score,
            "chrf": CHRF().corpus_score(outputs, [references]).score}


def _rouge(references: Sequence[str], outputs: Sequence[str]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    names = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
    scorer = RougeScorer(list(names))
    found = [scorer.score(reference, output) for reference, output in zip(references, outputs, strict=True)]
    return {name: 100 * float(np.mean([one[theirs].fmeasure for one in found])) for theirs, name in names.items()}


def margins(columns: Mapping[str, Mapping[str, float]], model: str) -> list[str]:
    """Lines that say by how much a column differs from each of the others, in the scores of `RANKED`."""
    return [f"{name} {own:.2f}: " + ", ".join(f"{own - values[name]:+.2f} over {other}"
                                             for other, values in columns.items() if other != model)
            for name in RANKED if (own := columns[model].get(name)) is not None]
