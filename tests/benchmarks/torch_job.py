"""An experiment of lab as a folder from which PyTorch can train it without lab: `job.json` and `arrays.npz`.

Everything that decides the run is in it: fields of model, task and optimizer, the learning rate of every update, which
parameters decay, the initial parameters, and the batches in their order, augmented and normalised as in lab's step. So
nothing is written twice, and the process that PyTorch is timed in holds no JAX.

    arrays: parameters/<path of lab>, batches/{inputs,targets[,mask]} (updates, B, ...), validation/... (records, ...),
    rate (updates,)
"""

from __future__ import annotations

import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lab.commands.arguments import find_experiment, parse
from lab.configuration.values import to_json
from lab.data.pipeline import eval_batches, train_batch
from lab.errors import UserError
from lab.experiment import Experiment
from lab.optim.matrices import matrices
from lab.train import metrics
from lab.train.cost import cost_of
from lab.train.restore import leaves
from lab.train.shapes import batch_spec, one_record
from lab.train.step import init_state, prepare


@dataclass(frozen=True)
class Twin:
    """Which of the two experiments of a file."""

    full: bool = False
    """The real experiment."""
    local: bool = False
    """The small local twin."""


def write(experiment: Experiment, folder: Path, updates: int, validation: bool = False) -> None:
    """Writes the job of `updates` updates, with the validation records if `validation`.

    Raises:
      UserError: the experiment has something that torch_models.py and torch_train.py do not do.
    """
    check(experiment)
    data = experiment.data.load()
    experiment.model.check(data.metadata)
    transform = jax.jit(functools.partial(prepare, experiment), static_argnums=1)
    batches = [arrays_of(transform(train_batch(data.train, step, experiment.batch, experiment.seed), True, step))
               for step in range(updates)]
    state = jax.jit(functools.partial(init_state, experiment))(one_record(batch_spec(experiment)))
    parameters = {path: np.asarray(x) for path, x in leaves(state.params).items()}
    arrays = {f"parameters/{path}": x for path, x in parameters.items()}
    arrays |= {f"batches/{name}": np.stack([b[name] for b in batches]) for name in batches[0]}
    arrays["rate"] = np.asarray(experiment.optim.rate(experiment.steps)(np.arange(updates)), np.float64)
    if validation:
        parts = [{name: x[batch["weight"] > 0] for name, x in arrays_of(transform(batch, False)).items()}
                 for batch in eval_batches(data.validation, experiment.batch, experiment.evaluate.records)]
        arrays |= {f"validation/{name}": np.concatenate([p[name] for p in parts]) for name in parts[0]}
    spec = {
        "model": to_json(experiment.model),
        "task": to_json(experiment.task),
        "optim": to_json(experiment.optim),
        "decays": leaves(experiment.optim.decays(state.params, matrices(experiment, batch_spec(experiment)))),
        "precision": experiment.precision,
        "batch": experiment.batch,
        "grad_accum_steps": experiment.grad_accum_steps,
        "chunk": experiment.steps_per_call,
        "seed": experiment.seed,
        "steps": updates,
        "evaluate_every": experiment.evaluate.every,
        "parameters": sum(x.size for x in parameters.values()),
        "unit": data.unit,
        "units": experiment.batch * data.units_per_record,
        "flops": cost_of(experiment).flops,
        "peak_flops": metrics.PEAK_FLOPS,
    }
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "arrays.npz", **arrays)
    (folder / "job.json").write_text(json.dumps(spec))


def arrays_of(batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """inputs, targets and mask of a batch in the types that PyTorch wants: integers are int64."""
    if "tokens" in batch:
        batch = {"inputs": batch["tokens"][:, :-1], "targets": batch["tokens"][:, 1:]}
    arrays = {name: np.asarray(batch[name]) for name in ("inputs", "targets", "mask") if name in batch}
    return {name: x.astype(np.int64) if np.issubdtype(x.dtype, np.integer) else x for name, x in arrays.items()}


def check(experiment: Experiment) -> None:
    """Raises UserError for an experiment whose mathematics is not written in PyTorch here."""
    model, task, optim = experiment.model, experiment.task, experiment.optim
    kinds = tuple(type(part).__name__ for part in (model, task, optim))
    known = {"GPT": "LanguageModel", "ConvNet": "Classify", "LSTM": "Classify",
             "Linear": "Regress" if getattr(model, "classes", 0) is None else "Classify"}
    plain = {"norm": "layernorm", "position": "learned", "mlp": "gelu", "qk_norm": False, "kv_heads": None,
             "softcap": None, "scan": False, "batch_norm": True, "label_smoothing": 0.0, "z_loss": 0.0,
             "class_weights": (), "criterion": "mse", "l1": 0.0}
    odd = [f"{name} {getattr(part, name)}" for part in (model, task, optim) for name, value in plain.items()
           if getattr(part, name, value) != value]
    odd += [] if known.get(kinds[0]) == kinds[1] else [f"{kinds[1]} of {kinds[0]}"]
    odd += [] if kinds[2] in ("SGD", "Adam", "AdamW") else [kinds[2]]
    odd += ["l2 with clip or decay"] if optim.l2 and (optim.grad_clip_norm or optim.weight_decay) else []
    odd += ["SGD with decay"] if kinds[2] == "SGD" and optim.weight_decay else []
    odd += [name for name in ("lr_multipliers", "ema_from") if getattr(optim, name)]
    odd += ["pretrained parameters"] if experiment.init_from.run or experiment.init_from.freeze else []
    if odd:
        raise UserError(f"The PyTorch comparison has no {', no '.join(odd)}: compare another experiment, or add it to "
                        f"tests/benchmarks.")


def main(folder: str, warm: str, updates: str, file: str, *flags: str) -> None:
    """Writes the job of the experiment in `file` with `flags`: `updates` to measure after `warm` calls of
    `steps_per_call` updates, or, if "all", the whole run with its evaluations."""
    experiment, _, _ = parse(find_experiment(file), flags, Twin)
    n, whole = experiment.steps_per_call, updates == "all"
    total = experiment.steps if whole else (int(warm) + math.ceil(int(updates) / n)) * n
    write(experiment, Path(folder), total, validation=whole)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
