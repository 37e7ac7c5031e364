"""Commands on a finished or unfinished run folder: sample from it, evaluate it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from lab.checkpoint import Checkpoints
from lab.errors import UserError
from lab.experiment import Experiment, Mesh
from lab.loop import best_row
from lab.metrics import read_rows
from lab.program import Program
from lab.run_folder import check_same, read_folder, write_json
from lab.step import State, eval_params

Run = Annotated[Path, tyro.conf.Positional]


def _open(run: Path, step: int | None, best: bool) -> tuple[Experiment, Program, State]:
    """The program of a run and the state of its checkpoint: the latest, the best, or that of `step`."""
    experiment = read_folder(run)
    experiment.validate()
    if best and step is not None:
        raise UserError("--best and --step exclude each other.")
    if best:
        rows = [r for r in read_rows(run / "metrics.jsonl") if r["split"] == "validation" and r["step"]]
        step = best_row(rows, experiment.evaluate)["step"]
        if step is None:
            raise UserError(f"{run} has no evaluation after an update yet, so no checkpoint is its best.")
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{run} has no checkpoint yet.")
    # A run may be looked at on another number of devices than it was trained on.
    devices = math.gcd(experiment.batch // experiment.microbatches, jax.device_count())
    program = Program(replace(experiment, mesh=Mesh(devices)))
    checkpoints = Checkpoints(run / "checkpoints")
    state = checkpoints.restore(program.abstract, step)
    checkpoints.close()
    if state is None:
        raise UserError(f"{run} has no checkpoint yet.")
    return experiment, program, state


def sample(run: Run, prompt: tuple[str, ...] = ("",), new_tokens: int = 200, temperature: float = 0.8,
           top_k: int | None = None, top_p: float = 1.0, greedy: bool = False, seed: int = 0, step: int | None = None,
           best: bool = False) -> None:
    """Continues texts with a trained language model.

    Args:
      run: the run folder.
      prompt: one text or several to continue; empty starts a new text.
      new_tokens: how many tokens to add at most; prompt and new tokens together fit the model's context.
      temperature: divides the logits; small is safe, 1 is the model's own distribution.
      top_k: choose among the k most likely tokens only.
      top_p: choose among the smallest set of tokens with this probability only.
      greedy: always take the most likely token.
      seed: another seed, another text.
      step: sample from the checkpoint after this many updates; by default the latest.
      best: sample from the checkpoint with the best validation metric.
    """
    from lab.generate import sample_texts

    for name, value, good in (("new-tokens", new_tokens, new_tokens >= 1),
                              ("top-k", top_k, top_k is None or top_k >= 1),
                              ("temperature", temperature, temperature >= 0), ("top-p", top_p, 0 < top_p <= 1)):
        if not good:
            raise UserError(f"--{name} {value} is out of range.")
    experiment, _, state = _open(run, step, best)
    data = experiment.data.load()
    check_same(run, experiment, data.fingerprint)
    if not hasattr(data, "decode"):
        raise UserError(f"{run} is not a language model: there is no text to sample.")
    texts = sample_texts(experiment.model, eval_params(experiment, state), data, list(prompt), seed=seed,
                         new_tokens=new_tokens, temperature=0.0 if greedy else temperature, top_k=top_k, top_p=top_p)
    for text, continuation in zip(prompt, texts, strict=True):
        print(text + continuation)
        if len(prompt) > 1:
            print("---")


def evaluate(run: Run, step: int | None = None, best: bool = False, records: int | None = None) -> None:
    """Evaluates a checkpoint of a run on its validation split, and writes evaluation-<step>.json.

    Args:
      run: the run folder.
      step: the checkpoint after this many updates; by default the latest.
      best: the checkpoint with the best validation metric.
      records: use that many evenly spaced records; by default all.
    """
    from lab.data.pipeline import eval_batches

    experiment, program, state = _open(run, step, best)
    data = experiment.data.load()
    check_same(run, experiment, data.fingerprint)
    means: dict[str, Any] = program.evaluate(
        state, eval_batches(data.validation, program.eval_batch, limit=records, rows=program.eval_rows))
    size = len(data.validation)
    print(f"{min(records or size, size):,} of {size:,} validation records")
    row = {"step": int(jax.device_get(state.step)), "split": "validation", **means}
    for name, value in row.items():
        print(f"{name:>16}  {value if isinstance(value, str | int) else format(value, '.6f')}")
    write_json(run / f"evaluation-{row['step']}.json", row)
    print(f"Written to {run / 'evaluation'}-{row['step']}.json")


