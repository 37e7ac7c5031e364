"""An explanation as the blocks of a report: a page with its pictures inside, and a few lines for the screen."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from html import escape

import numpy as np

from lab.explain.explanation import Explanation, Subject
from lab.explain.methods import GAP
from lab.explain.pictures import AGAINST, FOR, attention_grid, bars, overlays, strength
from lab.explain.sanity import ALIKE, DRAWS
from lab.study.report.pictures import png
from lab.study.report.render import Block, Heading, Markup, Picture, Table, Text

LINES, TOP = 12, 10  # layers with a line of coloured tokens; rows of a table of tokens
METHODS = {
    "integrated gradients": "the difference to the baseline, times the mean gradient on the straight line from the "
                            "baseline to the input (Sundararajan et al. 2017). "
                            "They add up to the difference of the scores.",
    "gradient x input": "the gradient at the input, times the input as the model gets it (Shrikumar et al. 2017).",
    "occlusion": "how much the score falls if a part has the baseline's values (Zeiler & Fergus 2014).",
}


def blocks(found: Explanation) -> list[Block]:
    """The whole page."""
    subject = found.subject
    return [Heading(f"Explanation: {subject.answers}", 1), *summary(found), *_maps(found), *_attention(subject),
            Heading("Do the maps depend on the weights?", 2), *checked(found), Heading("How to read this", 2),
            Text(f"Orange speaks for what is explained, blue against it; deep colours are the largest values of a map. "
                 f"Occlusion "
                 f"hides {subject.hides}.", terminal=False),
            *(Text(f"{name}: {what}", terminal=False) for name, what in METHODS.items())]


def summary(found: Explanation) -> list[Block]:
    """What was asked, against what, and whether the integral is good."""
    subject, integrated = found.subject, found.integrated
    first, second = (f"{score:.5g}" for score in found.scores)
    warnings = [f"WARNING: {note}" for note in subject.notes]
    if not integrated.gap < GAP:
        warnings.append(f"WARNING: with {integrated.steps:,} steps the attributions of integrated gradients do not add "
                        f"up to the difference of the scores: the gap is {share(integrated.gap)} of it. Their sizes "
                        f"are not reliable; take another baseline.")
    return [Text(f"Model: {subject.title}."),
            Text(f"Explained: {subject.asked}, {first}; for the baseline it is {second}. "
                 f"Baseline: {subject.baseline}."),
            Text(f"Completeness of integrated gradients: the attributions add up to {integrated.values.sum():.5g}, the "
                 f"difference is {integrated.difference:.5g}; gap {share(integrated.gap)}, with {integrated.steps:,} "
                 f"steps."), *map(Text, warnings)]


def share(x: float) -> str:
    """A share as a percentage with two digits, without powers of ten."""
    return f"{100 * x:.2g} %" if math.isfinite(x) and 1e-6 <= x < 1 else f"{100 * x:.0f} %"


def checked(found: Explanation) -> list[Block]:
    """The table of rank correlations with randomised models, and a warning if the maps stay alike."""
    names = list(found.stages[0].signed) if found.stages else []
    rows = [[_span(stage.modules, i + 1 == len(found.stages)), *(f"{stage.signed[name]:.2f}" for name in names),
             *(f"{stage.absolute[name]:.2f}" for name in names)] for i, stage in enumerate(found.stages)]
    count = int(found.subject.question.moved.sum())
    chance = f"unrelated maps stay within +-{1.96 / math.sqrt(count - 1):.2f} in 95 % of cases" if count > 2 else ""
    what = (f"Spearman's rank correlation of each map with that of a model whose weights are random (Adebayo et al. "
            f"2018), mean of {DRAWS} draws, over the {count:,} units that differ from the baseline; {chance}. "
            f"Absolute values, |...|, stay more alike, because these maps are multiplied by the input.")
    alike = [name for name in names if found.stages[-1].signed[name] > ALIKE]
    more = [Text(f"WARNING: with all weights random, the map of {name} is much the same: it shows the input, "
                 f"not what the model learned.") for name in alike]
    return [Text(what, terminal=False),
            Table("Rank correlation with randomised models", ["random weights", *names, *(f"|{n}|" for n in names)],
                  rows, wide=[f"|{n}|" for n in names]), *more]


def _span(modules: Sequence[str], everything: bool) -> str:
    if everything:
        return "all"
    return modules[0] if len(modules) == 1 else f"{modules[0]} down to {modules[-1]}"


# -------------------------------------------------------------------------------------------------------- maps


def _maps(found: Explanation) -> list[Block]:
    subject = found.subject
    if subject.kind == "image":
        shape = subject.image.shape[:2]
        maps = {name: values.reshape(shape) for name, values in found.maps.items()}
        return [Picture("maps", lambda: png(overlays(subject.image, maps)), "Attributions of the pixels, all channels "
                        "together, over the image; each map has its own scale.")]
    if subject.kind == "table":
        labels = [f"{name} = {cell}" if len(cell) <= 24 else name
                  for name, cell in zip(subject.names, subject.cells, strict=True)]
        return [Picture("maps", lambda: png(bars(labels, found.maps)), "Attributions of the columns, the categories of "
                        "a column together."), strongest(found, len(subject.names))]
    return [*(Markup(coloured(name, subject.names, values), "") for name, values in found.maps.items()),
            strongest(found, TOP)]


def strongest(found: Explanation, most: int) -> Table:
    """The units with the largest integrated gradients."""
    subject, order = found.subject, np.argsort(-np.abs(found.maps["integrated gradients"]), kind="stable")
    order = [int(i) for i in order if found.subject.question.moved[i]][:most]
    cells = [[subject.cells[i] for i in order]] if subject.cells else []
    names = [subject.names[i] if subject.kind == "table" else f"{visible(subject.names[i])} ({i + 1})" for i in order]
    head = ["column", "value"] if subject.cells else ["token (position)"]
    rows = zip(names, *cells, *([f"{values[i]:+.4g}" for i in order] for values in found.maps.values()), strict=True)
    title = "Columns" if subject.kind == "table" else "Strongest tokens"
    return Table(f"{title}, by integrated gradients", [*head, *found.maps], list(rows))


def visible(token: str) -> str:
    """A token with its white space shown."""
    return token.strip() or token.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "\u2423")


def coloured(title: str, tokens: Sequence[str], values: np.ndarray) -> str:
    """Tokens on backgrounds by their values, as HTML."""
    most = strength(values)
    spans = []
    for token, value in zip(tokens, values, strict=True):
        colour, alpha = FOR if value > 0 else AGAINST, min(abs(float(value)) / most, 1) * 0.65
        shade = ", ".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
        spans.append(f'<span title="{value:+.4g}" style="background: rgba({shade}, {alpha:.2f}); border-radius: 3px">'
                     f"{escape(token)}</span>")
    return (f"<h3>{escape(title)}</h3>"
            f'<p style="white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9">{"".join(spans)}</p>')


# --------------------------------------------------------------------------------------------------- attention


def _attention(subject: Subject) -> list[Block]:
    maps = subject.attention
    if maps is None:
        return []
    layers, heads, length = maps.shape[:3]
    of = "all positions" if subject.reader is None else f"position {subject.reader + 1}"
    drawn = functools.partial(attention_grid, maps, subject.grid, subject.reader)
    if subject.grid is not None:
        caption = f"Attention from {of} to each patch; each map from its lowest to its highest value."
        return [Heading("Attention", 2), Picture("attention", lambda: png(drawn()), caption), _caveat()]
    lines = []
    for layer in sorted({round(i) for i in np.linspace(0, layers - 1, min(layers, LINES))}):
        row = maps[layer].mean(0)
        row = row.mean(0) if subject.reader is None else row[subject.reader]
        lines.append(Markup(coloured(f"Layer {layer + 1}, mean over {heads} heads, from {of}", subject.names, row), ""))
    caption = f"Attention of {length} tokens (down) to all of them (across); each map from 0 to its highest value."
    return [Heading("Attention", 2), Picture("attention", lambda: png(drawn()), caption), _caveat(), *lines]


def _caveat() -> Text:
    return Text("Attention says where a layer reads, not what the answer depends on (Jain & Wallace 2019).",
                terminal=False)
