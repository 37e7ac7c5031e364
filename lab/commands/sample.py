"""`./launch.sh sample RUN`: continue a text with a trained language model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from lab.commands.arguments import call
from lab.errors import UserError
from lab.models.generate import sample_texts
from lab.train.fitted import data_of
from lab.train.restore import open_run


def main(args: Sequence[str]) -> int:
    """RUN --prompt TEXT"""
    return call("sample", sample, args)


def sample(
    run: Annotated[Path, tyro.conf.Positional],
    prompt: tuple[str, ...] = ("",),
    new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
    step: int | None = None,
    best: bool = False,
    experiment: Path | None = None,
) -> None:
    """Continues texts with a trained language model.

    Args:
      run: the run folder.
      prompt: one or more texts to continue; an empty text starts from scratch.
      new_tokens: maximum number of tokens to add. Longer texts use a sliding window of the model's context length.
      temperature: divides the logits. 1 samples from the model's distribution; lower is more deterministic.
      top_k: sample from the k most likely tokens only.
      top_p: sample from the smallest set of tokens with this total probability only.
      greedy: always take the most likely token.
      seed: random seed of the sampling.
      step: use the checkpoint of this step; by default the latest.
      best: use the checkpoint with the best validation metric.
      experiment: the run's experiment file, needed if it defines classes and was not run on this machine.
    """
    for name, value, good in (("new-tokens", new_tokens, new_tokens >= 1),
                              ("top-k", top_k, top_k is None or top_k >= 1),
                              ("temperature", temperature, temperature >= 0), ("top-p", top_p, 0 < top_p <= 1)):
        if not good:
            raise UserError(f"--{name} {value} is out of range.")
    found, program, state = open_run(run, step, best, file=experiment)
    data = data_of(run, found)
    if not hasattr(data, "decode"):
        raise UserError(f"The data of {run} cannot decode tokens to text: there is nothing to sample.")
    prompt = prompt or ("",)
    compute = functools.partial(program.compute, state)
    texts = sample_texts(compute, found.model.context, data, list(prompt), seed=seed, new_tokens=new_tokens,
                         temperature=0.0 if greedy else temperature, top_k=top_k, top_p=top_p)
    for text, continuation in zip(prompt, texts, strict=True):
        print(text + continuation)
        if len(prompt) > 1:
            print("---")
