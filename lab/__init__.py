"""A functional JAX research codebase: models are pure functions, experiments are values, ablations are first-class.

For notebooks and scripts: `lab.fit(experiment)` and `lab.open_run(folder)`, both in lab/api.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lab.api import Run, fit, open_run

__all__ = ["Run", "fit", "open_run"]


def __getattr__(name: str) -> Any:
    """Imports the API lazily, to keep `import lab` fast."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lab import api

    return getattr(api, name)
