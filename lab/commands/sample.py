"""`./launch.sh sample RUN`: continue a text with a trained language model, or with pretrained weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from lab.commands.arguments import call
from lab.commands.evaluate_text import open_language
from lab.commands.location import name_of
from lab.commands.sample_weights import check_flags, sample_weights
from lab.errors import UserError
from lab.files import make_folder
from lab.harness.perplexity import exp
from lab.harness.scoring import score
from lab.models.generate import check_numbers, sample_texts
from lab.tasks.text_quality import quality_table, text_quality
from lab.tasks.translate import Translate
from lab.train.fitted import data_of
from lab.train.json_files import write_json
from lab.train.restore import open_run
from lab.weights.location import is_location


def main(args: Sequence[str]) -> int:
    """RUN or LOCATION, --prompt TEXT"""
    return call("sample", sample, args)


def sample(
    run: Annotated[str, tyro.conf.Positional],
    prompt: tuple[str, ...] = ("",),
    n: int = 1,
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
    report: bool = False,
    output: Path | None = None,
    judge: Path | None = None,
) -> None:
    """Continues texts with a trained language model, or with pretrained weights.

    Args:
      run: the run folder; or weights: hf:ORG/NAME, package:NAME/PATH, a .gguf file, a folder with config.json.
      prompt: one or more texts to continue; an empty text starts from scratch.
      n: number of continuations of each prompt; number i is that of --n 1 with --seed SEED + i.
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
      report: print statistics of all continuations instead of these (length, distinct-1 and -2, repetition of 4-grams,
        self-BLEU), and write both to a JSON file.
      output: with --report: the file; by default samples.json in the run folder, or samples-<name>.json in this one.
      judge: with --report: a run or a location of another language model, for the perplexity of the continuations.
    """
    check_numbers(new_tokens, temperature, top_k, top_p)
    needs = {"--system needs --chat.": (system, chat), "--output needs --report.": (output, report),
             "--judge needs --report.": (judge, report), f"--n {n} is out of range.": (n, n > 0),
             f"--chat needs pretrained weights with a chat template; {run} is none.": (chat, is_location(run))}
    if wrong := [why for why, (flag, needed) in needs.items() if flag is not None and flag is not False and not needed]:
        raise UserError(wrong[0])
    prompts = [text for text in prompt or ("",) for _ in range(n)]
    how = {"temperature": 0.0 if greedy else temperature, "top_k": top_k, "top_p": top_p, "new_tokens": new_tokens,
           "seed": [seed + i for _ in prompt or ("",) for i in range(n)]}
    if is_location(run):
        check_flags(run, step, best, experiment)
        texts = sample_weights(run, prompts, chat=chat, system=system, **how)
    else:
        texts = _of_run(Path(run), prompts, step, best, experiment, **how)
    if report:
        of = {"model": run, "step": step, "best": best, "chat": chat, "system": system}
        return _report(texts, prompts, of | how, output or _place(run), judge)
    for text, continuation in zip(prompts, texts, strict=True):
        print((continuation if chat else text + continuation) + "\n---" * (len(prompts) > 1))


def _place(run: str) -> Path:
    """Where the report goes by default."""
    return Path(f"samples-{name_of(Path(run))}.json") if is_location(run) else Path(run) / "samples.json"


def _report(texts: Sequence[str], prompts: Sequence[str], how: dict[str, Any], path: Path, judge: Path | None) -> None:
    found = [{"prompt": prompt, "seed": seed, "text": text}
             for prompt, seed, text in zip(prompts, how.pop("seed"), texts, strict=True)]
    values = text_quality(texts)
    report = {"statistics": values, "settings": how, "judge": judge and str(judge), "samples": found}
    make_folder(path.parent)
    write_json(path, report)  # first, so that no mistake about the judge loses the texts
    if judge:
        values |= _judged(judge, prompts, texts)
        write_json(path, report)
    print("\n".join(quality_table({"samples": values})))
    print(f"Written to {path}")


def _judged(judge: Path, prompts: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
    """Perplexity and bits per byte of texts after their prompts, under another language model. A text longer than its
    context is cut at the beginning; the first token of a text without a prompt is not counted, if nothing stands for
    the beginning of a text."""
    language = open_language(judge)[0]
    encode, start = language.text.encode, [] if language.text.eot is None else [language.text.eot]
    plain = getattr(language.text, "encode_plain", encode)  # a text goes on: nothing marks its beginning
    rows = [([*encode(prompt)] or start, [*plain(text)]) for prompt, text in zip(prompts, texts, strict=True)]
    rows = [(before + own, len(own)) for before, own in rows if own and len(before + own) > 1]
    if not rows:
        return {}
    scored = score(language, [ids[-language.context - 1:] for ids, _ in rows])
    logs = np.concatenate([log[-count:] for (log, _), (_, count) in zip(scored, rows, strict=True)])
    size = sum(int(language.text.byte_counts[ids[-len(log[-count:]):]].sum())
               for (log, _), (ids, count) in zip(scored, rows, strict=True))
    loss = float(-logs.sum(dtype=np.float64))
    return {"judge_perplexity": exp(loss / len(logs)), "judge_bits_per_byte": loss / math.log(2) / size}


def _of_run(run: Path, prompts: list[str], step: int | None, best: bool, experiment: Path | None,
            **how: Any) -> list[str]:
    found, program, state = open_run(run, step, best, file=experiment)
    data = data_of(run, found)
    if isinstance(found.task, Translate):
        raise UserError(f"{run} writes a target for a source and continues no text: put the sources into a file "
                        f"sources.txt, one a line, and run ./launch.sh predict {run} --input sources.txt --output -")
    if not hasattr(data, "decode"):
        raise UserError(f"The data of {run} cannot decode tokens to text: there is nothing to sample.")
    return sample_texts(functools.partial(program.compute, state), found.model.context, data, prompts, **how)
