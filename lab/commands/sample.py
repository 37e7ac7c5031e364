"""`./launch.sh sample RUN`: continue a text with a trained language model, or with pretrained weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from lab.commands.arguments import call
from lab.commands.sample_weights import check_flags, sample_weights
from lab.errors import UserError
from lab.models.generate import check_numbers, sample_texts
from lab.train.fitted import data_of
from lab.train.restore import open_run
from lab.weights.location import is_location


def main(args: Sequence[str]) -> int:
    """RUN or LOCATION, --prompt TEXT"""
    return call("sample", sample, args)


def sample(
    run: Annotated[str, tyro.conf.Positional],
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
    chat: bool = False,
    system: str | None = None,
) -> None:
    """Continues texts with a trained language model, or with pretrained weights.

    Args:
      run: the run folder; or weights: hf:ORG/NAME, package:NAME/PATH, a .gguf file, a folder with config.json.
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
      chat: pretrained weights only: the prompt is a question, put as the model's chat template says.
      system: with --chat: how the model should answer.
    """
    check_numbers(new_tokens, temperature, top_k, top_p)
    if system is not None and not chat:
        raise UserError("--system needs --chat.")
    prompt, numbers = prompt or ("",), {"temperature": 0.0 if greedy else temperature, "top_k": top_k, "top_p": top_p}
    if is_location(run):
        check_flags(run, step, best, experiment)
        texts = sample_weights(run, prompt, chat=chat, system=system, new_tokens=new_tokens, seed=seed, **numbers)
    elif chat:
        raise UserError(f"--chat needs pretrained weights with a chat template; {run} is none.")
    else:
        texts = _of_run(Path(run), prompt, step, best, experiment, seed=seed, new_tokens=new_tokens, **numbers)
    for text, continuation in zip(prompt, texts, strict=True):
        print(continuation if chat else text + continuation)
        if len(prompt) > 1:
            print("---")


def _of_run(run: Path, prompt: tuple[str, ...], step: int | None, best: bool, experiment: Path | None,
            **how: Any) -> list[str]:
    found, program, state = open_run(run, step, best, file=experiment)
    data = data_of(run, found)
    if not hasattr(data, "decode"):
        raise UserError(f"The data of {run} cannot decode tokens to text: there is nothing to sample.")
    return sample_texts(functools.partial(program.compute, state), found.model.context, data, list(prompt), **how)
