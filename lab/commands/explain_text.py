"""Questions about texts: their class, the next token of a language model, the similarity of two texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lab.data.reading import read_text
from lab.data.word_tokenizer import FittedWords
from lab.errors import UserError
from lab.explain.asked import Asked, baseline_of, text_or_none
from lab.explain.attention import attention_maps
from lab.explain.embeddings import Run, embedding_table, with_embeddings
from lab.explain.explanation import Subject
from lab.explain.question import Question, each_unit
from lab.explain.sanity import top_modules
from lab.models.gpt import GPT
from lab.tasks.base import apply
from lab.weights.read import Found, variables_of
from lab.weights.tokenizer import tokenizer_of

BASELINES = {"pad": "every token with the embedding of padding", "mean": "every token with the mean of all embeddings",
             "zero": "every token with an embedding of zeros"}


def text_subject(run: Run, of: Callable[[Any], Any], variables: Any, tokens: np.ndarray, count: int, fitted: Any,
                 baseline: str | None, usual: str, **more: Any) -> Subject:
    """The question about a text, without the words that describe it.

    Args:
      run: (variables, tokens (B, L)) -> the model's output.
      of: the model's output -> the number that is explained (B,).
      tokens: int (L,), the first `count` are real.
      usual: the default of `baseline`.
      more: further fields of the subject.
    """
    name = baseline_of(baseline, (usual, *(name for name in BASELINES if name != usual)))
    table_VD = embedding_table(run, variables, tokens)
    real, width = tokens[:count], table_VD.shape[1]
    row = {"pad": table_VD[fitted.pad], "mean": table_VD.mean(0), "zero": np.zeros(width, np.float32)}[name]
    kept = fitted.byte_counts[np.minimum(real, fitted.size - 1)] == 0  # [CLS] and the like
    x_LD = table_VD[real]
    base_LD = np.where(kept[:, None], x_LD, row) if not kept.all() else np.tile(row, (count, 1))
    rest, embedded = table_VD[tokens[count:]], with_embeddings(run, tokens)

    def score(variables: Any, x_BLD: Any) -> Any:
        padding = jnp.broadcast_to(rest, (len(x_BLD), *rest.shape))
        return of(embedded(variables, jnp.concatenate([x_BLD, padding], axis=1)))

    question = Question(score, variables, x_LD, base_LD, np.repeat(np.arange(count)[:, None], width, axis=1),
                        each_unit(count, ~kept if not kept.all() else None))
    special = ", special tokens kept" if kept.any() and not kept.all() else ""
    subject = Subject(question, "text", "", "", "", BASELINES[name] + special, "one token", token_names(fitted, real),
                      top_modules(lambda v: run(v, jnp.asarray(tokens[None])), variables))
    return replace(subject, **more)


def token_names(fitted: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it."""
    ids = [int(i) for i in ids]
    if isinstance(fitted, FittedWords):
        return [f"{fitted.decode([i])} " for i in ids]
    return [fitted.continuation(ids[:at], [token]) for at, token in enumerate(ids)]


def next_token(title: str, model: GPT, variables: Any, fitted: Any, asked: Asked) -> Subject:
    """The logit of the token after a text, by default of the likeliest one.

    Raises:
      UserError: a text that is empty or longer than the model, or a target that is not one token.
    """
    text = _text(asked)
    ids = fitted.encode(text)
    if len(ids) > model.context:
        raise UserError(f"The text has {len(ids):,} tokens and the model reads {model.context:,}: shorten it.")
    if not len(ids):
        raise UserError("The text has no token: give a longer one.")
    target, other = (None if word is None else _one_token(fitted, word, flag)
                     for flag, word in (("--target", asked.target), ("--against", asked.against)))

    def run(variables: Any, tokens_BL: Any) -> Any:
        x_BLD, kernel_DV = apply(model, variables, tokens_BL, rngs={}, train=False, head=False)[0]
        return model.logits(x_BLD[:, -1:], kernel_DV)[:, 0, :fitted.size]

    logits_V = np.asarray(jax.jit(run)(variables, ids[None])[0])
    shares_V = np.exp(logits_V - logits_V.max()) / np.exp(logits_V - logits_V.max()).sum(dtype=np.float64)
    first = int(logits_V.argmax())
    target = first if target is None else target
    if target == other:
        raise UserError("--target and --against are the same token: name another one.")
    shown = {i: repr(fitted.continuation(ids, [i])) for i in (first, target, other) if i is not None}
    what = (f"the logit of {shown[target]} as the next token (probability {shares_V[target]:.4g})" if other is None else
            f"log-odds of {shown[target]} against {shown[other]} as the next token")

    def of(logits_BV: Any) -> Any:
        return logits_BV[:, target] - (0.0 if other is None else logits_BV[:, other])

    return text_subject(run, of, variables, ids, len(ids), fitted, asked.baseline, "mean", title=title, asked=what,
                        answers=f"{shown[first]} (probability {shares_V[first]:.4f})", reader=len(ids) - 1,
                        attention=attention_maps(model, variables, ids[None]))


def similarity(location: str, weights: Found, asked: Asked) -> Subject:
    """The cosine similarity of two texts by an encoder: of --input, explained, and --target.

    Raises:
      UserError: no --target, or a text that is empty or longer than the model.
    """
    if asked.target is None or asked.against is not None:
        raise UserError(f"{location} is an encoder without classes: explain compares --input TEXT with --target TEXT"
                        f"{', and has no --against' if asked.against is not None else ''}. For a classifier's weights, "
                        f"name an experiment: --experiment FILE.")
    model, fitted = weights.model.clone(output="embedding"), tokenizer_of(location, weights.model)
    variables = jax.tree.map(lambda x: x.astype(jnp.float32), variables_of(weights.arrays(lambda _, x: jnp.asarray(x))))

    def run(variables: Any, tokens_BL: Any) -> Any:
        return apply(model, variables, tokens_BL, rngs={}, train=False)[0]

    ids, other = (fitted.encode(text) for text in (_text(asked), asked.target))
    if (longest := max(len(ids), len(other))) > model.context:
        raise UserError(f"A text has {longest:,} tokens and the model reads {model.context:,}: shorten it.")
    other_D = jax.jit(run)(variables, other[None])[0]
    found = float(jax.jit(run)(variables, ids[None])[0] @ other_D)
    return text_subject(run, lambda x_BD: x_BD @ other_D, variables, ids, len(ids), fitted, asked.baseline, "pad",
                        title=f"BERT of {location}", asked=f"the cosine similarity to {asked.target!r}",
                        answers=f"similarity {found:.4f}", reader=None if model.pool == "mean" else 0,
                        attention=attention_maps(model, variables, ids[None]))


def _text(asked: Asked) -> str:
    """The text itself, or the whole content of a file without its last line break."""
    if asked.record is not None:
        raise UserError("--record is for files with several records; here a file is one text.")
    text = text_or_none(asked.input)
    if text is None:
        if not Path(asked.input).exists():
            raise UserError(f"--input {asked.input} does not exist.")
        text = "".join(read_text(Path(asked.input), "UTF-8")).removesuffix("\n")
        if not text.strip():
            raise UserError(f"{asked.input} is empty: there is nothing to explain.")
    return text


def _one_token(fitted: Any, text: str, flag: str) -> int:
    """The id of a text that is one token. Raises UserError with its tokens if it is none."""
    ids = getattr(fitted, "encode_plain", fitted.encode)(text)
    if len(ids) != 1:
        parts = ", ".join(repr(name) for name in token_names(fitted, ids)[:6])
        raise UserError(f"{flag} {text!r} must be one token of the model's tokenizer, not {len(ids)}"
                        f"{f' ({parts})' if len(ids) else ''}; spaces count.")
    return int(ids[0])
