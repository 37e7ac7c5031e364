"""The end of a run. Finished: select the state to report, evaluate it, write result and plots. Stopped. Diverged."""

from __future__ import annotations

import signal
from typing import Any

import jax

from lab.data.pipeline import train_indices
from lab.errors import UserError, forgiving
from lab.signals import EXIT
from lab.tasks.base import EvalResult
from lab.train import plots
from lab.train.evaluation import evaluate, own_variables
from lab.train.out_of_bag import bags, out_of_bag
from lab.train.progress import describe_result
from lab.train.restore import with_base
from lab.train.run_folder import write_diverged, write_result
from lab.train.step import State


class Diverged(Exception):
    """The loss, or the norm of the gradient, updates or parameters, is not finite."""


def diverged(run: Any, step: int, means: dict[str, float]) -> Diverged:
    """Writes a report for debugging, and returns the exception to raise."""
    indices = train_indices(step - 1, run.experiment.batch, len(run.data.train), run.experiment.seed)
    report = write_diverged(run.folder, step, indices, means, run.rows.rows)
    run.checkpoints.wait()
    kept = run.checkpoints.steps()
    last_good = f"the checkpoint after step {kept[-1]} is kept" if kept else "nothing was saved"
    return Diverged(f"Step {step}: the loss is {means['loss']}, the gradient norm {means['gradient_norm']} and the "
                    f"parameter norm {means['parameter_norm']}. Stopped; {last_good}. The batch and the norms are in "
                    f"{report}. A lower learning rate, a longer warm-up or --optim.grad-clip-norm may help.")


def interrupted(run: Any) -> int:
    """Saves the state of a run that a signal stopped; returns the exit status."""
    run.save()
    run.checkpoints.wait()
    name = signal.Signals(run.stop.signal).name
    run.screen.info(f"{name}: saved after step {run.step} of {run.experiment.steps}. Run the same command to "
                    f"resume.")
    return EXIT[run.stop.signal]


def finish(run: Any) -> int:
    """Reports and writes the result of a run (`TrainingRun` in loop.py) after its last step; returns the exit status.
    """
    run.flush()
    run.screen.progress("")
    run.checkpoints.wait()
    result = {"steps": run.step, "stopped_early": run.step < run.experiment.steps,
              "final": run.evaluations[-1], "best": run.best,
              **run.clock.totals(run.step, run.program, run.batches)}
    state = _state_to_report(run)
    split = "validation" if run.data.test is None else "test"
    if split == "validation" and state is run.state and run.evaluated is not None:
        outcome = run.evaluated
    else:
        limit = run.experiment.evaluate.records if split == "validation" else None
        outcome = evaluate(run.program, state, run.data, split, run.folder, limit, run.stop)
    if outcome is None or run.stop():
        return interrupted(run)
    if bags(run.experiment):
        found = out_of_bag(run.program, state, run.data.train, run.stop)
        if found is None:
            return interrupted(run)
        result["out_of_bag"] = found
    if run.experiment.evaluate.harness is not None:
        result["harness"] = _benchmarks(run, state)
    if run.experiment.private is not None:
        result["privacy"] = run.experiment.private.spent(run.step)
    if split == "test":
        result["test"] = {"step": outcome.step, "split": "test", **outcome.means}
        if run.rows.rows[-1]["split"] != "test":
            run.write(result["test"])
    write_result(run.folder, result, run.rows.mark())  # first, so that no later failure loses the result
    whole = not run.pictures or _show(run, outcome)
    run.screen.info(describe_result(result))
    pictures = sorted((run.folder / "plots").glob("*.png"))
    run.screen.info(f"Pictures: {', '.join(str(p.relative_to(run.folder)) for p in pictures)}")
    run.screen.info(f"Everything is in {run.folder}")
    if run.stop():
        rest = "" if whole else f"; ./launch.sh evaluate {run.folder} writes the report that was left out"
        run.screen.info(f"{signal.Signals(run.stop.signal).name}: the run is finished{rest}.")
        return EXIT[run.stop.signal]
    return 0


def _benchmarks(run: Any, state: State) -> dict[str, float]:
    """The numbers of `Evaluate.harness` for a state. The devices of all processes share the work."""
    variables = run.program.compute(state, own_variables)
    found = run.experiment.evaluate.harness.evaluate(run.experiment.model, variables, run.data, run.folder,
                                                     jax.process_index() == 0)
    run.screen.info("  ".join(f"{name} {value:.4f}" for name, value in found.items()))
    return found


def _show(run: Any, outcome: EvalResult) -> bool:
    """Writes pictures, samples and comparisons; returns False if a signal left the report out.

    If one process fails, all end, because the rest would block in a collective.
    """
    task, complete = run.experiment.task, False
    with forgiving("The pictures of the run"):
        plots.curves(run.rows.rows, run.folder / "plots", task.curves)
    if run.stop():
        return False
    with forgiving(f"The report of the run (./launch.sh evaluate {run.folder} writes it again)"):
        for line in task.artifacts(outcome):
            run.screen.info(line)
        complete = True
    if not complete:
        run.stop.processes.leave(0)
    return True


def _state_to_report(run: Any) -> State:
    """The final state, or with early stopping the best one."""
    best = run.best_step
    if run.experiment.evaluate.patience is None or best in (None, 0, run.step):
        return run.state
    try:
        state = run.checkpoints.restore(run.program.abstract, best)
    except UserError as e:  # not saved (--checkpoint.best), or damaged
        run.screen.info(f"The checkpoint of the best step, {best}, cannot be loaded: reporting the last state. {e}")
        return run.state
    run.screen.info(f"Reporting the best state, of step {best}.")
    return with_base(run.experiment, run.program, state, run.data)
