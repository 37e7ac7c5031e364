"""Every picture that a run shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {"train": "#9ab8d9", "smooth": "#1f5a96", "validation": "#c8501e"}


def curves(rows: Sequence[dict[str, Any]], folder: Path, metric: str = "loss") -> list[Path]:
    """Draws `folder`/<metric>.png, learning_rate.png and norms.png from the rows of metrics.jsonl."""
    from matplotlib.figure import Figure  # the object interface: no global figure, no display

    train = [r for r in rows if r["split"] == "train"]
    validation = [r for r in rows if r["split"] == "validation" and metric in r]
    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def picture(name: str, draw: Any, ylabel: str, log: bool = False) -> None:
        figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set(xlabel="update", ylabel=ylabel, **({"yscale": "log"} if log else {}))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        figure.savefig(folder / f"{name}.png")
        written.append(folder / f"{name}.png")

    def loss(axes: Any) -> None:
        steps, values = [r["step"] for r in train], [r[metric] for r in train]
        axes.plot(steps, values, color=COLOURS["train"], lw=0.8, label="train, each update")
        if len(values) > 20:
            smooth = _smooth(values, span=max(5, len(values) // 50))
            axes.plot(steps, smooth, color=COLOURS["smooth"], lw=1.5, label="train, smoothed")
        axes.plot([r["step"] for r in validation], [r[metric] for r in validation], "o-", ms=4,
                  color=COLOURS["validation"], label="validation")

    def lines(*names: str) -> Any:
        return lambda axes: [axes.plot([r["step"] for r in train], [r[n] for r in train], lw=1,
                                       label=n.replace("_", " ")) for n in names]

    if train or validation:
        picture(metric, loss, metric.replace("_", " "))
    if train:
        picture("learning_rate", lines("learning_rate"), "learning rate")
        picture("norms", lines("gradient_norm", "update_norm", "parameter_norm"), "global norm", log=True)
    return written


def _smooth(values: Sequence[float], span: int) -> list[float]:
    """Exponential moving average, corrected for its start (Kingma & Ba 2015, section 3)."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = mean + (value - mean) / span, weight + (1 - weight) / span
        out.append(mean / weight)
    return out
