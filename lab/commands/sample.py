"""`./launch.sh sample RUN`: continue a text with a trained language model, or with pretrained weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from lab.commands.arguments import call
from lab.commands.evaluate_text import open_language
from lab.commands.location import name_of
from lab.commands.sample_weights import check_flags, questions, sample_weights
from lab.errors import UserError
from lab.files import make_folder
from lab.harness.perplexity import exp
from lab.harness.scoring import Language, score
from lab.models.generate import check_numbers, sample_texts
from lab.tasks.text_quality import quality_table, text_quality
from lab.tasks.translate import Translate
from lab.train.fitted import data_of
from lab.train.json_files import write_json
from lab.train.restore import open_run
from lab.weights.location import is_location

Encode = Callable[[str], Sequence[int]]
Sample = dict[str, Any]
"""prompt, seed and text."""


@dataclass(frozen=True)
class Choice:
    """Which continuations to keep, and how to show them."""

    best_of: int | None = None
    """Sample so many continuations of each prompt, and keep the n of them whose tokens the model finds most likely on
    average (Adiwardana et al. 2020), the best first."""
    json: bool = False
    """Print JSON lines, one object a continuation: prompt, seed, text and, with --best-of, log_prob (mean of the
    text's tokens)."""
    report: bool = False
    """Print statistics of all continuations instead of these (length, distinct-1 and -2, repetition of 4-grams,
    self-BLEU), and write both to a JSON file."""
    output: Path | None = None
    """With --report: the file; by default samples.json in the run folder, or samples-<name>.json in this one."""
    judge: Path | None = None
    """With --report: a run or a location of another language model, for the perplexity of the continuations."""


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
    more: Annotated[Choice, tyro.conf.arg(name="")] = Choice(),
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
    """
    check_numbers(new_tokens, temperature, top_k, top_p)
    _check(run, n, seed, greedy, chat, system, more)
    found = [{"prompt": text, "seed": seed + i} for text in prompt or ("",) for i in range(more.best_of or n)]
    prompts, seeds = [each["prompt"] for each in found], [each["seed"] for each in found]
    how = {"temperature": 0.0 if greedy else temperature, "top_k": top_k, "top_p": top_p, "new_tokens": new_tokens}
    if is_location(run):
        check_flags(run, step, best, experiment)
        texts = sample_weights(run, prompts, chat=chat, system=system, seed=seeds, **how)
    else:
        texts = _of_run(Path(run), prompts, step, best, experiment, seed=seeds, **how)
    found = [{**each, "text": text} for each, text in zip(found, texts, strict=True)]
    if more.best_of:
        language = open_language(Path(run), step, best, experiment)[0]
        encode = questions(language.text, run, system) if chat else language.text.encode
        found = _best(language, found, more.best_of, n, encode)
    if more.report:
        of = {"model": run, "step": step, "best": best, "chat": chat, "system": system, "best_of": more.best_of}
        return _report(found, of | how, more.output or _place(run), more.judge)
    for each in found:
        text = ("" if chat else each["prompt"]) + each["text"] + "\n---" * (len(found) > 1)
        print(dumps(each) if more.json else text)


def _check(run: str, n: int, seed: int, greedy: bool, chat: bool, system: str | None, more: Choice) -> None:
    last = seed + (more.best_of or n) - 1
    needs = {"--system needs --chat.": (system, chat), "--output needs --report.": (more.output, more.report),
             f"--seed {seed}: the samples' seeds, {seed} to {last}, must be in [0, 2^32).": (
                 True, seed >= 0 and last < 2**32),
             "--judge needs --report.": (more.judge, more.report), f"--n {n} is out of range.": (n, n > 0),
             "--best-of needs different samples: leave out --greedy.": (more.best_of, not greedy),
             f"--best-of {more.best_of} must be at least --n {n}.": (more.best_of, (more.best_of or 0) >= n),
             "--json does not go with --report, which writes a JSON file.": (more.json, not more.report),
             f"--chat needs pretrained weights with a chat template; {run} is none.": (chat, is_location(run))}
    if wrong := [why for why, (flag, needed) in needs.items() if flag is not None and flag is not False and not needed]:
        raise UserError(wrong[0])


def _best(language: Language, found: Sequence[Sample], best_of: int, n: int, encode: Encode) -> list[Sample]:
    """The n likeliest samples of each prompt, which has `best_of` in a row. A text without tokens comes last."""
    logs = [log for log, _ in _scored(language, found, encode)]
    found = [{**each, "log_prob": float(log.mean()) if len(log) else None}
             for each, log in zip(found, logs, strict=True)]
    return [each for i in range(0, len(found), best_of)
            for each in sorted(found[i:i + best_of], key=_unlikely)[:n]]


def _unlikely(sample: Sample) -> float:
    return math.inf if sample["log_prob"] is None else -sample["log_prob"]


def _place(run: str) -> Path:
    """Where the report goes by default."""
    return Path(f"samples-{name_of(Path(run))}.json") if is_location(run) else Path(run) / "samples.json"


def _report(found: list[Sample], how: dict[str, Any], path: Path, judge: Path | None) -> None:
    values = text_quality([each["text"] for each in found])
    report = {"statistics": values, "settings": how, "judge": judge and str(judge), "samples": found}
    make_folder(path.parent)
    write_json(path, report)  # first, so that no mistake about the judge loses the texts
    if judge:
        values |= _judged(judge, found)
        write_json(path, report)
    print("\n".join(quality_table({"samples": values})))
    print(f"Written to {path}")


def _judged(judge: Path, found: Sequence[Sample]) -> dict[str, float]:
    """Perplexity and bits per byte of texts after their prompts, under another language model."""
    language = open_language(judge)[0]
    scored = [each for each in _scored(language, found, language.text.encode) if len(each[0])]
    if not scored:
        return {}
    loss = -float(sum(log.sum(dtype=np.float64) for log, _ in scored))
    size = sum(int(language.text.byte_counts[ids].sum()) for _, ids in scored)
    return {"judge_perplexity": exp(loss / sum(len(log) for log, _ in scored)),
            "judge_bits_per_byte": loss / math.log(2) / size}


def _scored(language: Language, found: Sequence[Sample], encode: Encode) -> list[tuple[np.ndarray, Sequence[int]]]:
    """The log-probabilities of a text's tokens after its prompt, and these tokens.

    A text longer than the context is cut at the beginning; the first token of a text without a prompt is not counted,
    if nothing stands for the beginning of a text.
    """
    start = [] if language.text.eot is None else [language.text.eot]
    plain = getattr(language.text, "encode_plain", language.text.encode)  # a text goes on: nothing marks its beginning
    own = [[*plain(each["text"])] for each in found]
    rows = [([*encode(each["prompt"])] or start) + ids for each, ids in zip(found, own, strict=True)]
    used = [i for i, ids in enumerate(own) if ids and len(rows[i]) > 1]
    scored = [(np.zeros(0), [])] * len(found)
    for i, (log, _) in zip(used, score(language, [rows[i][-language.context - 1:] for i in used]), strict=True):
        log = log[-len(own[i]):]
        scored[i] = log, own[i][-len(log):]
    return scored


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
