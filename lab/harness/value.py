"""The harness as part of an experiment: Evaluate(harness=Harness(tasks=("blimp",), data="blimp/", limit=50))."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.errors import UserError
from lab.files import user_path
from lab.harness import FOLDER
from lab.harness.run import check_limit, numbers_of, run_tasks, write
from lab.harness.scoring import Language
from lab.harness.tasks import check_package, load_tasks, metric_names


@dataclass(frozen=True)
class Harness:
    """lm-eval's tasks, evaluated on the reported state when a run ends. The numbers go to `harness` in result.json, by
    names such as blimp_causative.acc, which a study may have as its metric; the items to evaluations/.
    """

    tasks: tuple[str, ...]
    """Tasks, groups or tags of lm-eval."""
    data: str | None = field(default=None, metadata={"fingerprint": False})
    """A folder with the tasks' data; None: lm-eval downloads it."""
    limit: int | None = None
    """Items per task; None: all."""
    batch: int | None = field(default=None, metadata={"fingerprint": False})
    """Rows per call; None: one microbatch per device (scoring.py). Does not change the result."""

    def validate(self) -> None:
        """Raises UserError for no tasks or numbers below 1."""
        if not self.tasks:
            raise UserError("Harness(tasks=()) evaluates nothing: name tasks of lm-eval.")
        check_limit(self.limit, self.batch)

    def metrics(self) -> list[str]:
        """Names of the results. UserError if lm-eval is not installed or has no such task."""
        check_package()
        return metric_names(self.tasks)

    def check(self, model: Any, data: Any) -> None:
        """Raises UserError, before a run trains, for what would fail when it ends: the package, the tasks, their data,
        or a model that continues no text."""
        text_of(model, data)
        check_package()
        load_tasks(self.tasks, self._folder)

    @property
    def _folder(self) -> Path | None:
        return None if self.data is None else user_path(self.data)

    def evaluate(self, model: Any, variables: Any, data: Any, run: Path, write_files: bool = True) -> dict[str, float]:
        """The numbers of a model on the tasks. `data`: the run's, for its tokenizer; `run`: its folder.

        Raises:
          UserError: as `run_tasks`; or the model continues no text.
        """
        language = Language(model, variables, text_of(model, data), self.batch)
        results = run_tasks(lambda: language, self.tasks, self._folder, self.limit)
        if write_files:
            write(results, run / FOLDER, "+".join(self.tasks))
        return numbers_of(results)


def text_of(model: Any, data: Any) -> Any:
    """The fitted tokenizer of a run's data. UserError if the model is no causal language model."""
    fitted = getattr(data, "fitted", None)
    if not hasattr(model, "logits") or not hasattr(fitted, "byte_counts"):
        raise UserError(f"A {type(model).__name__} continues no text: lm-eval and --text are for language models.")
    return fitted
