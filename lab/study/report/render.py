"""The blocks of a report (headings, texts, tables, pictures), rendered as Markdown, HTML and terminal output."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from html import escape

from rich import box
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table as RichTable

from lab.errors import forgiving

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .6em 0 .3em; }
th, td { padding: .25em .5em; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top; }
th:first-child, td:first-child, td.words { text-align: left; overflow-wrap: break-word; }
td:first-child { min-width: 7em; } td.words { min-width: 11em; } td span { white-space: nowrap; }
.wide { overflow-x: auto; margin: 1em 0; }
figure { margin: 1.5em 0; } img { max-width: 100%; } figcaption { font-size: 13px; color: #555; }
p.warning { background: #fff3e6; border-left: 4px solid #c8501e; padding: .5em 1em; }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818; } th, td { border-color: #444; } figcaption { color: #aaa; }
  p.warning { background: #3a2618; } img { background: #fff; border-radius: 6px; }
}
"""


@dataclass(frozen=True)
class Heading:
    """A heading of depth 1, 2 or 3."""

    text: str
    depth: int


@dataclass(frozen=True)
class Text:
    """A paragraph; highlighted if it begins with WARNING."""

    text: str
    terminal: bool = True


@dataclass(frozen=True)
class Table:
    """Formatted cells. The first column holds names; terminal output omits the `wide` columns."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    terminal: bool = True
    wide: Sequence[str] = ()


@dataclass(frozen=True)
class Picture:
    """A PNG file, see `drawn`. Markdown refers to pictures/<name>.png."""

    name: str
    draw: Callable[[], bytes] = field(repr=False)
    caption: str
    png: bytes = b""


@dataclass(frozen=True)
class Markup:
    """HTML of the caller's own, escaped where it must be; Markdown and the terminal have `text` instead."""

    html: str
    text: str


Block = Heading | Text | Table | Picture | Markup


def drawn(blocks: Sequence[Block]) -> list[Block]:
    """The blocks with their pictures drawn. A picture that fails is left out, with a warning: see `forgiving`."""
    found = []
    for b in blocks:
        if isinstance(b, Picture):
            with forgiving(f"The picture {b.name}"):
                found.append(replace(b, png=b.draw()))
        else:
            found.append(b)
    return found


def without_pictures(blocks: Sequence[Block]) -> list[Block]:
    """The blocks that need no drawing."""
    return [b for b in blocks if not isinstance(b, Picture)]


def _plain(text: object) -> str:
    """Escapes text for Markdown: no HTML, code, links, link definitions or line breaks, since names are arbitrary."""
    text = escape(str(text), quote=False).replace("`", "&#96;").replace("](", "&#93;(").replace("]:", "&#93;:")
    return " ".join(text.splitlines())


def markdown(blocks: Sequence[Block]) -> str:
    """The report as a Markdown file."""
    parts = []
    for b in blocks:
        if isinstance(b, Heading):
            parts.append(f"{'#' * b.depth} {_plain(b.text)}")
        elif isinstance(b, Text):
            parts.append(f"**{_plain(b.text)}**" if b.text.startswith("WARNING") else _plain(b.text))
        elif isinstance(b, Markup):
            parts.append(_plain(b.text))
        elif isinstance(b, Picture):
            parts.append(f"![{_plain(b.caption)}](pictures/{b.name}.png)\n\n*{_plain(b.caption)}*")
        else:
            rows = [b.headers, ["---"] * len(b.headers), *b.rows]
            lines = [f"| {' | '.join(_plain(c).replace('|', '&#124;') for c in row)} |" for row in rows]
            parts.append("\n".join([f"{_plain(b.title)}:", "", *lines]))
    return "\n\n".join(parts) + "\n"


def html(blocks: Sequence[Block]) -> str:
    """The report as one self-contained HTML file."""
    title = next((b.text for b in blocks if isinstance(b, Heading)), "Report")
    parts = [f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
             f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
             f"<style>{STYLE}</style></head><body>"]
    for b in blocks:
        if isinstance(b, Heading):
            parts.append(f"<h{b.depth}>{escape(b.text)}</h{b.depth}>")
        elif isinstance(b, Text):
            kind = ' class="warning"' if b.text.startswith("WARNING") else ""
            parts.append(f"<p{kind}>{escape(b.text)}</p>")
        elif isinstance(b, Markup):
            parts.append(b.html)
        elif isinstance(b, Picture):
            data = base64.b64encode(b.png).decode()
            parts.append(f'<figure><img alt="{escape(b.caption)}" src="data:image/png;base64,{data}">'
                         f"<figcaption>{escape(b.caption)}</figcaption></figure>")
        else:
            parts.append(_html_table(b))
    return "\n".join([*parts, "</body></html>\n"])


def _html_table(table: Table) -> str:
    wordy = {i for i, name in enumerate(table.headers) if name in ("change", "is", "environment")}
    head = "".join(f"<th>{escape(name)}</th>" for name in table.headers)

    def cell(i: int, text: str) -> str:
        if i in wordy or i == 0:
            shown = escape(text).replace(",", ",<wbr>").replace("+", "+<wbr>")
            return f'<td{" class=words" if i in wordy else ""}>{shown}</td>'
        # Intervals may wrap, numbers must not: browsers would break them after the minus sign.
        return f"<td>{' '.join(f'<span>{escape(word)}</span>' for word in text.split())}</td>"

    rows = ["".join(cell(i, str(c)) for i, c in enumerate(row)) for row in table.rows]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table><caption>{escape(table.title)}</caption><tr>{head}</tr>\n{body}</table></div>'


def terminal(blocks: Sequence[Block], console: Console | None = None) -> None:
    """Prints the blocks meant for the terminal."""
    console = console or Console(highlight=False)
    for b in blocks:
        if isinstance(b, Heading) and b.text != "How to read this":
            console.print(f"\n{b.text}", style="bold", markup=False)
        elif isinstance(b, Text) and b.terminal:
            console.print(b.text, markup=False, style="yellow" if b.text.startswith("WARNING") else None)
        elif isinstance(b, Table) and b.terminal:
            shown = RichTable(title=b.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
            kept = [i for i, name in enumerate(b.headers) if name not in b.wide]
            for i in kept:
                shown.add_column(b.headers[i], justify="right" if i else "left", overflow="fold", no_wrap=i > 0)
            for row in b.rows:
                shown.add_row(*(escape_markup(str(row[i])) for i in kept))
            console.print(shown)
