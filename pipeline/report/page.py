"""A page of facts, charts and tables as one HTML file, which looks right in light and dark, on wide and narrow screens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["DASHES", "SYMBOLS", "Chart", "Column", "Fact", "Row", "Section", "Table", "chart", "render"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
"""Distinct to colour-blind eyes (Okabe and Ito)."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "hexagon")


@dataclass(frozen=True)
class Fact:
    """A number that a page begins with."""

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
class Section:
    """A part of a page; `name` is its anchor."""

    name: str
    title: str
    words: str = ""
    charts: Sequence[Chart] = ()
    table: Table | None = None
    text: str = ""


@dataclass(frozen=True)
class Page:
    """All of it."""

    title: str
    subtitle: str
    facts: Sequence[Fact] = field(default_factory=list)
    sections: Sequence[Section] = field(default_factory=list)


def chart(figure: go.Figure, title: str, *, wide: bool = False, height: int = 380, top: int = 56) -> Chart:
    """A plotly figure in the look of the page."""
    figure.update_layout(
        title={"text": title, "font": {"size": 15}, "x": 0, "xref": "container", "y": 1, "yanchor": "top", "pad": {"t": 8}},
        height=height,
        margin={"l": 56, "r": 24, "t": top, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        colorway=COLOURS,
        font={"family": "system-ui, sans-serif", "size": 12},
        legend={"orientation": "h", "y": -0.2},
    )
    options: dict[str, Any] = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    return Chart(figure.to_html(full_html=False, include_plotlyjs=False, config=options), wide)


def render(page: Page) -> str:
    """The page as HTML; nothing in it is loaded from elsewhere."""
    from plotly.offline import get_plotlyjs

    template = files("pipeline.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    return environment.from_string(template).render(**vars(page), plotly=get_plotlyjs())
