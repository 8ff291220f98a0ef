"""A real browser that looks at pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

__all__ = ["needs_chromium", "open_page"]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)")


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
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: ask(request.url))
        page.goto(f"file://{file}")
        page.wait_for_load_state("networkidle")
        yield page, said
        browser.close()
