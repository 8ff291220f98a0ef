"""Page of facts, charts and tables as one HTML file, for light and dark mode, wide and narrow screens."""

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
    "Comparison",
    "Fact",
    "Message",
    "Notice",
    "Page",
    "Picture",
    "Row",
    "Section",
    "Table",
    "chart",
    "render",
]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
"""Distinct to colour-blind eyes (Okabe and Ito)."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
"""Characters that are invalid in HTML."""
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "hexagon")


@dataclass(frozen=True)
class Fact:
    """A labelled value at the top of a page or in a list."""

    label: str
    value: str


@dataclass(frozen=True)
class Chart:
    """A chart as HTML."""

    html: str
    wide: bool = False


@dataclass(frozen=True)
class Column:
    """Column of a table."""

    name: str
    is_text: bool = False


@dataclass(frozen=True)
class Row:
    """Row of a table."""

    cells: Sequence[str]
    is_best: bool = False


@dataclass(frozen=True)
class Table:
    """A table of text."""

    columns: Sequence[Column]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Message:
    """A text of a model or of the data, with its origin as a label."""

    label: str
    text: str


@dataclass(frozen=True)
class Picture:
    """A picture as a data URL; without one, only its label is shown."""

    label: str
    url: str = ""


@dataclass(frozen=True)
class Comparison:
    """A prompt and its answers, side by side if there is room."""

    prompt: Message
    answers: Sequence[Message]
    pictures: Sequence[Picture] = ()
    """Pictures of the prompt."""


@dataclass(frozen=True)
class Notice:
    """A sentence with its weight, and labelled lines below it."""

    kind: str
    """error, warning, info, or healthy."""
    text: str
    facts: Sequence[Fact] = ()


@dataclass(frozen=True)
class Section:
    """A section of a page; `name` is its anchor. A folded one shows only its title until it is opened."""

    name: str
    title: str
    words: str = ""
    charts: Sequence[Chart] = ()
    table: Table | None = None
    text: str = ""
    facts: Sequence[Fact] = ()
    notices: Sequence[Notice] = ()
    comparisons: Sequence[Comparison] = ()
    is_folded: bool = False


@dataclass(frozen=True)
class Page:
    """A whole page."""

    title: str
    subtitle: str
    facts: Sequence[Fact] = field(default_factory=list)
    sections: Sequence[Section] = field(default_factory=list)


def chart(figure: go.Figure, title: str, *, wide: bool = False, height: int = 380, top: int = 44) -> Chart:
    """Render a plotly figure in the page's style."""
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
    # Without plotly's script, several MB, which the page has once.
    return Chart(figure.to_html(full_html=False, include_plotlyjs=False, config=options), wide)


def render(page: Page) -> str:
    """Render a page as self-contained HTML."""
    from plotly.offline import get_plotlyjs

    template = files("pipeline.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    # Prompts and answers are untrusted text.
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, finalize=_printable)
    return environment.from_string(template).render(**vars(page), plotly=get_plotlyjs())


def _printable(value: Any) -> Any:
    """Replace invalid characters in text. Markup marked as safe, which isn't `str` itself, is kept."""
    return CONTROL.sub("\ufffd", value) if type(value) is str else value
