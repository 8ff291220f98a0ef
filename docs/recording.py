"""`make recording`: record commands in a terminal as an animated SVG, docs/images/terminal.svg.

The commands are run as a reader types them. Waiting is shown faster than it was, and what a command leaves stays for a while.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

import pexpect
import pyte

from pipeline.demo.preferences import write_preferences

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "images" / "terminal.svg"
COMMANDS = (
    "prefray prepare quickstart",
    "prefray train quickstart --set max_steps=6 --set eval_steps=3 --set datasets.0.split=train[:48]",
)
COLUMNS, LINES = 110, 28
FRAME_S = 0.5
"""Seconds between frames, at least."""
LONGEST_S = 1.0
"""Longest time that a frame is shown while a command runs."""
WAITING_S = 0.08
"""Time that a frame is shown in which a single line moves, such as one with a spinner."""
READ_S = 3.0
"""Seconds that the end of a command is shown."""
END_S = 5.0
"""Seconds that the last frame is shown before the recording begins again."""
WIDTH, HEIGHT, FONT = 8.4, 19, 14
"""Pixels of a character, of a line, and of the font."""
COLOURS = {
    "default": "#d4d7dd",
    "black": "#6b7280",
    "red": "#f28b82",
    "green": "#8fd19e",
    "brown": "#e8c47c",
    "blue": "#8ab4f8",
    "magenta": "#d7aefb",
    "cyan": "#78d9ec",
    "white": "#ffffff",
}
PAPER = "#16181d"


@dataclass(frozen=True)
class Frame:
    """What the terminal shows from `at` on, in seconds since the start."""

    at: float
    rows: tuple[str, ...]
    """SVG of each line."""


def record(commands: tuple[str, ...], folder: Path) -> list[Frame]:
    """Run commands in a terminal, one after the other; return its frames, with long pauses shortened."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream, frames = pyte.Stream(screen), [Frame(0.0, _rows(screen))]
    for command in commands:
        stream.feed(f"$ {command}\r\n")
        frames.append(Frame(frames[-1].at + READ_S * (len(frames) > 1), _rows(screen)))
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
        arguments = ["-m", "pipeline", *command.split()[1:]]
        child = pexpect.spawn(
            sys.executable, arguments, env=environment, cwd=folder, dimensions=(LINES, COLUMNS), encoding="utf-8", timeout=900
        )
        began = time.monotonic()
        for text in _chunks(child):
            # Paths of this machine say nothing to a reader.
            stream.feed(text.replace(f"{folder}/", ""))
            rows, passed = _rows(screen), min(time.monotonic() - began, LONGEST_S)
            moved = sum(new != old for new, old in zip(rows, frames[-1].rows, strict=True))
            frames.append(Frame(frames[-1].at + min(passed, WAITING_S if moved <= 1 else LONGEST_S), rows))
            began = time.monotonic()
        child.close()
        if child.exitstatus:
            raise SystemExit(f"{command} failed:\n" + "\n".join(screen.display))
        stream.feed("\r\n")
    return _changes(frames)


def _chunks(child: pexpect.spawn) -> Iterator[str]:
    """Yield what a command prints, at most every `FRAME_S`."""
    while True:
        text, until = "", time.monotonic() + FRAME_S
        while time.monotonic() < until:
            try:
                text += child.read_nonblocking(65_536, timeout=max(0.01, until - time.monotonic()))
            except pexpect.TIMEOUT:
                break
            except pexpect.EOF:
                yield text
                return
        if text:
            yield text


def _changes(frames: list[Frame]) -> list[Frame]:
    """Return the frames that differ from the one before."""
    return [next(same) for _, same in groupby(frames, key=lambda frame: frame.rows)]


def _rows(screen: pyte.Screen) -> tuple[str, ...]:
    """Return the SVG of every line of a screen, runs of one style in one element."""
    rows = []
    for line in range(screen.lines):
        cells = [screen.buffer[line][column] for column in range(screen.columns)]
        spans, start = [], 0
        for (colour, is_bold), group in groupby(cells, key=lambda cell: (cell.fg, cell.bold)):
            text = "".join(cell.data for cell in group)
            if text.strip():
                style = ' font-weight="bold"' if is_bold else ""
                left = f"{start * WIDTH:.1f}"
                spans.append(f'<tspan x="{left}" fill="{_colour(colour)}"{style}>{escape(text.rstrip())}</tspan>')
            start += len(text)
        rows.append("".join(spans))
    return tuple(rows)


def _colour(name: str) -> str:
    # Of 256 colours, pyte gives six hexadecimal digits.
    return COLOURS.get(name.removeprefix("bright"), COLOURS["default"] if len(name) != 6 else f"#{name}")


def to_svg(frames: list[Frame]) -> str:
    """Draw frames as an SVG that shows one after the other, for ever."""
    total = frames[-1].at + END_S
    # Each distinct line stands once, in `defs`; a frame refers to its lines.
    lines = {
        row: f"r{number}" for number, row in enumerate(dict.fromkeys(row for frame in frames for row in frame.rows if row))
    }
    defs = "".join(f'<text id="{name}">{row}</text>' for row, name in lines.items())
    ends = [frame.at for frame in frames[1:]] + [total]
    body, style = [], []
    for number, (frame, end) in enumerate(zip(frames, ends, strict=True)):
        uses = (f'<use href="#{lines[row]}" y="{HEIGHT * (index + 1)}"/>' for index, row in enumerate(frame.rows) if row)
        body.append(f'<g class="f" id="f{number}">{"".join(uses)}</g>')
        start, stop = 100 * frame.at / total, 100 * end / total
        hidden, visible = "{visibility:hidden}", "{visibility:visible}"
        style.append(f"@keyframes k{number}{{0%,100%{hidden}{start:.3f}%{visible}{stop:.3f}%{hidden}}}")
        style.append(f"#f{number}{{animation-name:k{number}}}")
    width, height = COLUMNS * WIDTH + 24, LINES * HEIGHT + 28
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}" '
        f'font-family="ui-monospace,Menlo,Consolas,DejaVu Sans Mono,monospace" font-size="{FONT}">'
        f"<title>{escape(' and '.join(COMMANDS))}</title>"
        "<style>text{white-space:pre}"
        f".f{{visibility:hidden;animation:{total:.2f}s step-end infinite}}{''.join(style)}</style>"
        f'<rect width="100%" height="100%" rx="8" fill="{PAPER}"/><defs>{defs}</defs>'
        f'<g transform="translate(12 8)">{"".join(body)}</g></svg>'
    )


def main() -> None:
    """Record `COMMANDS` into `TARGET`."""
    with tempfile.TemporaryDirectory() as folder:
        write_preferences(Path(folder, "prefray-demo", "data"))
        frames = record(COMMANDS, Path(folder))
    TARGET.write_text(to_svg(frames))
    print(f"{TARGET}: {len(frames)} frames, {TARGET.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
