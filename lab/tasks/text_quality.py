"""Statistics of generated texts: diversity, repetition, and the slots that an answer should name."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

log = logging.getLogger(__name__)
_SLOTS = re.compile(r"\[([^\[\]]*)\]\s*$")


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngrams(tokens: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """All runs of n tokens."""
    return zip(*(tokens[i:] for i in range(n)), strict=False)


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of all texts, divided by their number (Li et al. 2016). NaN if no text has n words."""
    found = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(found)) / len(found) if found else float("nan")


def repetition(texts: Sequence[str], n: int = 4) -> float:
    """Share of a text's n-grams that occurred in it before, mean over the texts that have one (seq-rep-n of Welleck et
    al. 2020)."""
    found = [list(ngrams(words(text), n)) for text in texts]
    return float(np.mean([1 - len(set(grams)) / len(grams) for grams in found if grams] or [np.nan]))


def self_bleu(texts: Sequence[str]) -> float | None:
    """Mean BLEU (0 to 100, up to 4-grams) of each text with all others as references (Zhu et al. 2018): 100 if all are
    equal. Texts without words are left out. None with fewer than two, or without the package sacrebleu."""
    texts = [text for text in texts if words(text)]
    if len(texts) < 2:
        return None
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        log.info("self-BLEU needs the package sacrebleu: LAB_EXTRAS=sacrebleu ./launch.sh ...")
        return None
    bleu = BLEU(effective_order=True)  # texts may have fewer than four words
    return float(np.mean([bleu.sentence_score(text, [*texts[:i], *texts[i + 1:]]).score
                          for i, text in enumerate(texts)]))


def text_quality(texts: Sequence[str]) -> dict[str, float]:
    """Name -> value: number of texts, their mean length in words, distinct-1 and -2, repetition and self-BLEU."""
    values = {"texts": len(texts), "words": float(np.mean([len(words(text)) for text in texts])),
              "distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2), "repetition": repetition(texts),
              "self_bleu": self_bleu(texts)}
    return {name: value for name, value in values.items() if value is not None and value == value}  # not NaN


def slots(text: str) -> frozenset[str]:
    """What a text lists at its end, in square brackets and separated by semicolons: "Ready. [mocha; oat milk]" has two.
    """
    found = (" ".join(slot.lower().split()) for part in _SLOTS.findall(text) for slot in part.split(";"))
    return frozenset(slot for slot in found if slot)


def slot_scores(references: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Slots of the answers beside those of their references, counted over all pairs whose reference has slots: exact
    precision, recall and F1; `slots_exact`, the share of answers with exactly the reference's; and `slots_mentioned`,
    the share of the references' slots whose text stands anywhere in the answer. Empty if no reference has slots."""
    pairs = [(slots(reference), slots(answer), answer) for reference, answer in zip(references, answers, strict=True)
             if slots(reference)]
    if not pairs:
        return {}
    right = sum(len(wanted & given) for wanted, given, _ in pairs)
    wanted, given = (sum(len(pair[i]) for pair in pairs) for i in (0, 1))
    mentioned = sum(slot in " ".join(answer.lower().split()) for slots_, _, answer in pairs for slot in slots_)
    recall, precision = right / wanted, right / given if given else 0.0
    return {"slots": wanted, "slot_precision": precision, "slot_recall": recall,
            "slot_f1": 2 * right / (wanted + given), "slots_exact": float(np.mean([a == b for a, b, _ in pairs])),
            "slots_mentioned": mentioned / wanted}


def quality_table(columns: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Lines of a table with a row per measure and a column per model."""
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    width, wide = max(map(len, names)), max(10, *map(len, columns))
    row = lambda name, cells: f"{name:<{width}}" + "".join(f"  {cell:>{wide}}" for cell in cells)
    return [row("", columns)] + [
        row(name, [_number(values[name]) if name in values else "-" for values in columns.values()]) for name in names]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
