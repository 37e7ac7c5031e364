"""The command line: ``./launch.sh COMMAND ...`` runs this in the environment built by lab/bootstrap.py."""

from __future__ import annotations

from lab import signals

if __name__ == "__main__":
    signals.listen()  # before anything slow is imported

import difflib
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lab.commands.arguments import experiments
from lab.errors import UserError, check_words, explain
from lab.files import expand_home

if TYPE_CHECKING:  # imports of JAX (3 s) stay in the commands that need it
    from lab.parallel.processes import Processes


def overview() -> str:
    """The help text: commands and experiments."""
    rows = [("EXPERIMENT.py [--flags]", "train or resume it; --help lists all flags, --dry-run prints size and cost"),
            ("EXPERIMENT.py --vary FIELD=a,b", "a study: arms x seeds, then a report; so are ablate_* and sweep_*"),
            *[(f"{name} ...", summary) for name, (_, summary) in COMMANDS.items()],
            ("--processes N EXPERIMENT.py ...", "train with N processes on this machine (2x4: with 4 devices each)"),
            ("tests [--all] [pytest arguments]", "run the quick tests, or all of them"),
            ("prepare NAME [--data-dir D]", "download and prepare a TensorFlow Dataset"),
            ("env", "print the environment's folder, accelerator and versions"),
            ("ruff check .", "run the linter"),
            ("--slurm|--hosts|--tpu|--sky ...", "start any of this elsewhere; ./launch.sh --slurm --help lists all")]
    width = max(len(name) for name, _ in rows + list(experiments().items())) + 2
    lines = ["lab: a functional research codebase in JAX", "", "usage: ./launch.sh ..."]
    lines += [f"  {name:<{width}}{what}" for name, what in rows]
    lines += ["", "experiments (with no accelerator their small local config runs; --full forces the real one):"]
    return "\n".join(lines + [f"  {name:<{width}}{what}" for name, what in experiments().items()])


# Command -> its module in lab/commands, and a line for the overview.
COMMANDS = {
    "sample": ("sample", "RUN --prompt TEXT: continue a text with a trained model; --chat: ask pretrained weights"),
    "chat": ("chat", "RUN|LOCATION: talk with a language model in the terminal"),
    "serve": ("serve", "RUN|LOCATION: text by OpenAI's API, predictions or embeddings, over HTTP"),
    "evaluate": ("evaluate", "RUN: evaluate a checkpoint, or pretrained weights, and write the task's full report"),
    "predict": ("predict", "RUN --input FILE: predictions for new records, as CSV"),
    "promote": ("promote", "CANDIDATE --over INCUMBENT --metric accuracy: move the served link to a better run"),
    "export": ("export", "RUN --to FOLDER|FILE: for transformers, llama.cpp, jax.export (--to stablehlo FILE), ONNX"),
    "audit": ("audit", "RUN: how well the losses of a model give its training records away"),
    "explain": ("explain", "RUN|LOCATION --input FILE|TEXT: why the model answers so, as a page and as numbers"),
    "quantize": ("quantize", "RUN|LOCATION --weights int8|int4: integer weights, and a table of what it costs"),
    "parity": ("parity", "LOCATION: our outputs beside those of transformers, for the same weights"),
    "report": ("report", "STUDY_FOLDER...: statistics and pictures of studies again, or of several together"),
    "plan": ("plan", "EXPERIMENT.py --on v5e-256: compile for another machine: memory and a bound on the time"),
    "bench": ("bench", "EXPERIMENT.py: measure compilation, a step, its parts, throughput, memory"),
}


def run(args: Sequence[str], processes: Processes) -> int:
    """Runs a command; returns the exit status."""
    check_words(args)
    args = expand_home(args)
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if args[0].endswith(".py"):
        from lab.commands.train import train

        return train(args, processes)
    if args[0] in COMMANDS:
        return importlib.import_module(f"lab.commands.{COMMANDS[args[0]][0]}").main(args[1:])
    names = [*COMMANDS, "tests", "prepare", "env", *experiments()]
    near = difflib.get_close_matches(args[0], names, n=1) or [n for n in names if args[0] in n][:1]
    raise UserError(f"There is no command {args[0]!r}." + (f" Perhaps you meant {near[0]}." if near else
                                                           " ./launch.sh --help lists them."))


def main(args: Sequence[str]) -> int:
    """Runs a command; returns the exit status: 2, with a message, for an error that the user can fix.

    If one of several processes fails, all exit with its status, and process 0 prints the reason.
    """
    from lab.parallel.processes import ALONE, start

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax and TFDS log verbosely, and raise real errors
    processes = ALONE
    try:
        if "--processes" in args:
            from lab.parallel.local_processes import start_processes

            return start_processes(args)
        if args and (args[0].endswith(".py") or args[0] == "bench"):
            processes = start()
        status = run(args, processes)
        processes.close()
        return status
    except BaseException as e:
        explained = explain(e)
        if explained is None:
            processes.leave_by(e)
            raise
        status, sentence = explained
    if sentence and processes.first:  # process 0 prints errors of all processes
        print(f"error: {sentence}", file=sys.stderr)
    processes.leave(status, sentence)
    return status


if __name__ == "__main__":
    from lab.study.run.workers import pin

    if pin():
        signals.install(quiet=True)  # the study that started this process speaks for it
    sys.exit(signals.done(main(sys.argv[1:])))
