"""A real browser that looks at pages.

`python -m tests.browser PAGE PICTURE` takes a picture of the top of a page, as the documentation shows it.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

__all__ = ["faint", "needs_chromium", "open_page", "undrawn"]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_skip = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)")


def needs_chromium(test: Any) -> Any:
    """Marks a test that looks at a page."""
    return pytest.mark.browser(_skip(test))


CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = (rgb) => {
    const linear = (part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = rgb.map((part) => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data.trim()).join("");
    if (!text || !element.checkVisibility() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const ink = parse(element instanceof SVGElement ? style.fill : style.color);
    const [high, low] = [light(ink.slice(0, 3)), light(paper(element))].sort((a, b) => b - a);
    found.push([(high + 0.05) / (low + 0.05), text.slice(0, 40)]);
  }
  return found.filter(([contrast]) => contrast < 4.5).map(([contrast, text]) => `${text}: ${contrast}`);
}"""
"""Texts whose contrast to what they stand on is lower than WCAG asks for text of this size."""
DRAWN_WITHIN_S = 60
UNDRAWN = """() => [...document.querySelectorAll(".chart")].filter((chart) => {
  const room = chart.getBoundingClientRect(), svg = chart.querySelector(".main-svg");
  const marks = chart.querySelectorAll(".js-line[d], .point path[d], path.point[d], .parcoords, .bars path[d]");
  return chart.checkVisibility() && (!svg || Math.abs(svg.getBoundingClientRect().width - room.width) > 2 || !marks.length);
}).map((chart) => chart.textContent.slice(0, 60))"""


def faint(page: Any) -> list[str]:
    """Texts that are hard to read, also after a while, each with its contrast."""
    return _after_a_while(page, CONTRAST)


def undrawn(page: Any) -> list[str]:
    """Charts that are seen and aren't drawn in all of their room, also after a while."""
    return _after_a_while(page, UNDRAWN)


def _after_a_while(page: Any, script: str) -> list[str]:
    """What a script still finds wrong when a page has had time to draw."""
    deadline = time.monotonic() + DRAWN_WITHIN_S
    while (left := page.evaluate(script)) and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    return left


@contextmanager
def open_page(file: Path, width: int, scheme: str) -> Iterator[tuple[Any, list[str]]]:
    """A page in a window of a width, in light or dark, and what went wrong in it: errors, and requests to elsewhere."""
    said: list[str] = []

    def ask(url: str) -> None:
        if not url.startswith(("file://", "data:", "blob:")):
            said.append(f"asks for {url}")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()  # type: ignore[arg-type]
        page.set_default_timeout(300_000)
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: ask(request.url))
        page.goto(f"file://{file}")
        page.wait_for_load_state("networkidle")
        yield page, said
        browser.close()


def main(file: str, picture: str) -> None:
    """Take a picture of the first 1280 x 1000 points of a page, in light."""
    with open_page(Path(file).absolute(), 1280, "light") as (page, said):
        assert said == [], said
        page.screenshot(path=picture, full_page=True, clip={"x": 0, "y": 0, "width": 1280, "height": 1000})


if __name__ == "__main__":
    main(*sys.argv[1:])
