"""How results are drawn: by rich, in a terminal as in a notebook."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.text import Text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Printable", "html_of", "lines_of", "open_console", "table_of"]

NOTEBOOK_WIDTH = 110


class Printable:
    """Drawn by `rich.print`, by any console's `print`, and in a notebook."""

    def __rich__(self) -> RenderableType:
        """Return what is drawn. Values are in `Text`: a plain string's brackets and colons are markup to most consoles."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return html_of(self)


def open_console(least: int = 0, **options: Any) -> Console:
    """Return a console that prints text without interpreting markup, and leaves the wrapping of long lines to the terminal.

    Args:
        least: minimum width in columns, where it isn't a terminal.
        options: of rich.
    """
    console = Console(**{"markup": False, "emoji": False, "highlight": False, "soft_wrap": True, **options})
    if not console.is_terminal:
        # rich assumes 80 columns for a pipe or a file, where tables would be cut.
        console.width = max(console.width, least)
    return console


def html_of(renderable: RenderableType) -> str:
    """Return what rich prints, as HTML."""
    # force_jupyter=False: rich would display the output itself within a notebook, a second time.
    console = open_console(record=True, file=io.StringIO(), width=NOTEBOOK_WIDTH, force_jupyter=False)
    console.print(renderable)
    code = console.export_html(inline_styles=True, code_format="{code}").strip("\n")
    return f"<pre style='line-height:1.2;overflow-x:auto'>{code}</pre>"


def table_of(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    title: str = "",
    caption: str = "",
    left: Collection[str] | None = None,
    whole: Collection[str] = (),
    **options: Any,
) -> Table:
    """Return a table of values, shown as they are.

    Args:
        columns: their names.
        rows: values by column; a `Text` brings its style.
        title: above the table.
        caption: below it.
        left: left-aligned columns; the first one when None.
        whole: columns that other ones make room for.
        options: of rich.
    """
    from rich.table import Table

    left = columns[:1] if left is None else left
    table = Table(title=_heading(title, "table.title"), caption=_heading(caption, "table.caption"), **options)
    for name in columns:
        table.add_column(
            Text(name),
            justify="left" if name in left else "right",
            no_wrap=name in whole,
            overflow="ellipsis" if name in whole else "fold",
        )
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return table


def _heading(text: str, style: str) -> Text | None:
    return Text(text, style, no_wrap=False, overflow="fold") if text else None


def lines_of(values: Mapping[str, object], gap: int = 2) -> Text:
    """Return a line for each value behind its label, or several, below each other; an empty value has none."""
    shown = {label: str(value) for label, value in values.items() if value not in (None, "")}
    width = max(map(len, shown), default=0) + gap
    return Text("\n".join(label.ljust(width) + value.replace("\n", "\n" + " " * width) for label, value in shown.items()))
