"""Translation, summarisation: an encoder-decoder learns to write a target text for a source text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np
from jax import Array

from lab.errors import UserError, forgiving
from lab.files import make_folder, replace_file
from lab.models.beam import beam_search
from lab.tasks.base import EvalResult, Loss, Task, apply
from lab.tasks.cross_entropy import token_weights
from lab.tasks.language import token_sums
from lab.tasks.text_quality import quality_table
from lab.tasks.translation_scores import margins, translation_scores
from lab.train import plots


@dataclass(frozen=True)
class Translate(Task):
    """Targets given sources: cross-entropy in nats per target token, with the real tokens before it (teacher forcing).

    Metrics: loss (plain cross-entropy), accuracy (of the most likely token), objective (the optimised loss, with label
    smoothing) and perplexity. A run's end and `evaluate` write the outputs for the whole split, found by beam search:
    outputs/outputs.json with BLEU, chrF and ROUGE (`lab.tasks.translation_scores`) beside those of three baselines:
    the source itself, the most frequent target of training, and the target of the nearest source of training;
    outputs/outputs.md shows some side by side; plots/cross_attention.png shows what the decoder attends to.
    """

    label_smoothing: float = 0.0
    """Mix the target with the uniform distribution (Szegedy et al. 2016): (1-e) nll + e mean over tokens of nll."""
    beams: int = 4
    """Hypotheses that beam search keeps; 1: greedy decoding."""
    length_penalty: float = 0.6
    """Hypotheses are ordered by log P / ((5 + tokens) / 6)^length_penalty (Wu et al. 2016); 0: by probability."""
    shown: int = 10
    """Number of outputs to show side by side."""
    pictures: int = 3
    """Number of outputs whose cross-attention is drawn; 0: none."""

    curves: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    fields: ClassVar[tuple[str, ...]] = ("learn",)

    def validate(self) -> None:
        """Raises UserError for a value out of range."""
        if isinstance(self.label_smoothing, int | float) and not 0 <= self.label_smoothing < 1:
            raise UserError(f"--task.label-smoothing must be in [0, 1), not {self.label_smoothing}.")
        for name, least in (("beams", 1), ("length_penalty", 0), ("shown", 0), ("pictures", 0)):
            if not getattr(self, name) >= least:
                raise UserError(f"--task.{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}.")

    def init(self, model: nn.Module, key: Array, batch: Mapping[str, Array]) -> dict[str, Any]:
        """Variables for `batch`. Raises UserError if records are no pairs."""
        if not {"inputs", "mask", "tokens"} <= batch.keys():
            raise UserError("Translate needs the pairs of data=Translations(...).")
        return model.init(key, batch["inputs"][:1], batch["tokens"][:1, :-1], train=False, mask=batch["mask"][:1])

    def check(self, output: Any, data: Any) -> None:
        """Raises UserError for more beams than the tokenizer has ids."""
        vocab = data.metadata.get("vocab", self.beams)
        if self.beams > vocab:
            raise UserError(f"--task.beams {self.beams} is wider than the vocabulary of {vocab} tokens: a beam holds "
                            f"at most as many hypotheses after the first token.")

    def loss(self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array],
             rngs: Mapping[str, Array], train: bool) -> Loss:
        """`batch`: "inputs" and "mask" (B, S), "tokens" (B, L+1), "learn" (B, L), 1 where a target counts, "weight"
        (B,), and optionally "vocab" (B,), the tokenizer's number of ids: see `lab.data.translations`."""
        logits_BLV, model_state = apply(model, variables, batch["inputs"], batch["tokens"][:, :-1], rngs=rngs,
                                        train=train, mask=batch["mask"])
        weight_BL = token_weights(batch)
        plain = isinstance(self.label_smoothing, int | float) and self.label_smoothing == 0
        numbers = None if plain else (self.label_smoothing, 0.0, batch.get("vocab", [None])[0])
        objective, (nll, right) = token_sums(logits_BLV, (batch["tokens"][:, 1:], weight_BL), numbers)
        weight = weight_BL.sum()
        metrics = {"loss": (nll, weight), "accuracy": (right, weight)}
        return objective, weight, metrics | ({"objective": (objective, weight)} if numbers else {}), model_state

    def summary(self, means: Mapping[str, float], counts: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Perplexity: exp of the mean cross-entropy."""
        return {"perplexity": float(np.exp(means["loss"]))}

    def predict(self, model: nn.Module, variables: Mapping[str, Any], batch: Mapping[str, Array]) -> dict[str, Array]:
        """The best hypothesis of beam search: "tokens" int32 (B, context), filled up with id 0, and its "score" (B,).
        """
        vocab = batch["vocab"][0] if "vocab" in batch else None
        tokens_BKL, score_BK = beam_search(model, variables["params"], batch["inputs"], batch["mask"],
                                           beams=self.beams, length=model.context, penalty=self.length_penalty,
                                           vocab=vocab)
        return {"tokens": tokens_BKL[:, 0], "score": score_BK[:, 0]}

    def columns(self, predictions: Mapping[str, np.ndarray], data: Any) -> dict[str, list[Any]]:
        """The outputs as text, with their scores (see `length_penalty`)."""
        return {"prediction": [data.text(ids) for ids in predictions["tokens"]],
                "score": predictions["score"].tolist()}

    def artifacts(self, outcome: EvalResult) -> list[str]:
        """Writes the outputs with their scores, and the picture of cross-attention; returns lines to print."""
        tokens = outcome.predict()["tokens"]
        with forgiving("The picture of cross-attention"):
            _attention_picture(outcome, tokens, self.pictures)
        return _report(outcome, self.columns(outcome.predict(), outcome.data)["prediction"], self.shown)


def _report(outcome: EvalResult, outputs: list[str], shown: int) -> list[str]:
    pairs = outcome.data.pairs[outcome.split]
    texts = {"model": outputs, **baselines(outcome.data, [pair.source for pair in pairs])}
    references = [pair.target for pair in pairs]
    values = translation_scores(references, texts)
    found = [{"source": pair.source, "target": pair.target, **{name: each[i] for name, each in texts.items()}}
             for i, pair in enumerate(pairs)]
    folder = make_folder(outcome.folder / "outputs")
    replace_file(folder / "outputs.json", json.dumps({"statistics": values, "outputs": found}, indent=1,
                                                     ensure_ascii=False) + "\n")
    spread = np.unique(np.linspace(0, len(found) - 1, min(shown, len(found))).astype(int))
    replace_file(folder / "outputs.md", _side_by_side([found[i] for i in spread]))
    return [f"Outputs for {len(found)} {outcome.split} sources ({folder / 'outputs.md'} shows {len(spread)}):",
            *quality_table(values), *margins(values, "model")]


def baselines(data: Any, sources: Sequence[str]) -> dict[str, list[str]]:
    """Name -> the output for each source, of three ways that learn nothing: copy the source, as the model reads it;
    write the most frequent target of training; write the target of the training source with the nearest TF-IDF of
    character n-grams."""
    found = {"copy": [data.prepare(source) for source in sources],
             "most frequent": [data.most_frequent()] * len(sources)}
    with forgiving("The baseline of the nearest source"):
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, dtype=np.float32)
        known = vectors.fit_transform([pair.source for pair in data.pairs["train"]])
        nearest: list[int] = []
        for start in range(0, len(sources), 1024):
            nearest += (vectors.transform(sources[start : start + 1024]) @ known.T).argmax(1).A1.tolist()
        found["nearest source"] = [data.pairs["train"][i].target for i in nearest]
    return found


def _side_by_side(found: Sequence[Mapping[str, str]]) -> str:
    """Markdown: a table of every source with what was written for it."""
    lines = ["# Outputs", ""]
    for i, row in enumerate(found, 1):
        lines += [f"## {i}", "", "| | |", "|---|---|"]
        lines += [*(f"| {name} | {_cell(text)} |" for name, text in row.items()), ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _attention_picture(outcome: EvalResult, tokens_RL: np.ndarray, number: int) -> None:
    """Draws the cross-attention of evenly spaced records with their outputs, mean over heads and blocks."""
    if not number:
        return
    chosen = np.unique(np.linspace(0, len(tokens_RL) - 1, min(number, len(tokens_RL))).astype(int))
    records, data = outcome.records[chosen], outcome.data
    own = tokens_RL[chosen]
    inputs = np.concatenate([np.zeros_like(own[:, :1]), own[:, :-1]], axis=1)
    maps = outcome.compute(cross_attention, records["inputs"], records["mask"], inputs)
    found = []
    for map_LS, ids, source, mask in zip(maps, own, records["inputs"], records["mask"], strict=True):
        ends = np.flatnonzero(ids == 0)
        L, S = (ends[0] + 1 if len(ends) else len(ids)), int(mask.sum())
        found.append((map_LS[:L, :S], data.pieces(ids[:L]), data.pieces(source[:S])))
    plots.alignments(found, outcome.folder / "plots" / "cross_attention.png", "source", "output")


def cross_attention(model: nn.Module, variables: Mapping[str, Any], source_BS: Array, mask_BS: Array,
                    target_BL: Array) -> Array:
    """Cross-attention probabilities (B, L, S), mean over heads and blocks; each row sums to 1."""
    _, found = model.apply(variables, source_BS, target_BL, train=False, mask=mask_BS, mutable=["memory"])
    each = [x.reshape(-1, *x.shape[-4:]).mean((0, 2)) for x in jax.tree.leaves(found)]  # scanned blocks are stacked
    return sum(each) / len(each)
