"""A page of facts, charts and tables as one HTML file, which looks right in light and dark, on wide and narrow screens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = [
    "DASHES",
    "SYMBOLS",
    "Chart",
    "Column",
    "Fact",
    "Page",
    "Row",
    "Said",
    "Sample",
    "Section",
    "Table",
    "chart",
    "render",
]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
"""Distinct to colour-blind eyes (Okabe and Ito)."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
"""Characters of data that no page may hold."""
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "hexagon")


@dataclass(frozen=True)
class Fact:
    """A number that a page begins with, or a line of a list."""

    label: str
    value: str


@dataclass(frozen=True)
class Chart:
    """A chart as HTML."""

    html: str
    wide: bool = False


@dataclass(frozen=True)
class Column:
    """Of a table."""

    name: str
    is_text: bool = False


@dataclass(frozen=True)
class Row:
    """Of a table."""

    cells: Sequence[str]
    is_best: bool = False


@dataclass(frozen=True)
class Table:
    """A table of text."""

    columns: Sequence[Column]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Said:
    """A text of a model or of data, and whose it is."""

    label: str
    text: str


@dataclass(frozen=True)
class Sample:
    """A prompt and answers to it, side by side where there is room."""

    prompt: Said
    answers: Sequence[Said]


@dataclass(frozen=True)
class Section:
    """A part of a page; `name` is its anchor. Of a folded one only the title is seen at first."""

    name: str
    title: str
    words: str = ""
    charts: Sequence[Chart] = ()
    table: Table | None = None
    text: str = ""
    facts: Sequence[Fact] = ()
    samples: Sequence[Sample] = ()
    is_folded: bool = False


@dataclass(frozen=True)
class Page:
    """All of it."""

    title: str
    subtitle: str
    facts: Sequence[Fact] = field(default_factory=list)
    sections: Sequence[Section] = field(default_factory=list)


def chart(figure: go.Figure, title: str, *, wide: bool = False, height: int = 380, top: int = 44) -> Chart:
    """A plotly figure in the look of the page."""
    figure.update_layout(
        title={"text": title, "font": {"size": 15}, "x": 0, "xref": "container", "y": 1, "yanchor": "top", "pad": {"t": 8}},
        height=height,
        margin={"l": 48, "r": 12, "t": top, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        colorway=COLOURS,
        font={"family": "system-ui, sans-serif", "size": 12},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
    )
    options: dict[str, Any] = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    return Chart(figure.to_html(full_html=False, include_plotlyjs=False, config=options), wide)


def render(page: Page) -> str:
    """The page as HTML; nothing in it is loaded from elsewhere."""
    from plotly.offline import get_plotlyjs

    template = files("pipeline.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, finalize=_printable)
    return environment.from_string(template).render(**vars(page), plotly=get_plotlyjs())


def _printable(value: Any) -> Any:
    """Text without what no page may hold; what is marked as safe is made here."""
    return CONTROL.sub("\ufffd", value) if type(value) is str else value
