"""`make notebooks`: execute the notebooks, and store them with their outputs.

Charts are stored as pictures, which every viewer of notebooks shows, and paths of this machine are left out. Each notebook
keeps a hash of its code: `is_stale` says whether its outputs are those of another.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import plotly.io
from nbclient import NotebookClient
from nbformat import NotebookNode
from playwright.sync_api import Browser, sync_playwright

__all__ = ["NOTEBOOKS", "execute", "is_stale"]

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"
CHART = {"width": 800, "height": 420}
"""Pixels of a stored chart."""
LIMIT_S = 1100
HASH = "code_sha256"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""None: the one that `playwright install chromium` installs."""


def code_hash(notebook: NotebookNode) -> str:
    """Return the SHA-256 of a notebook's code cells."""
    return hashlib.sha256(json.dumps([cell.source for cell in notebook.cells if cell.cell_type == "code"]).encode()).hexdigest()


def is_stale(notebook: NotebookNode) -> bool:
    """Return whether a stored notebook has outputs of other code, or none."""
    return notebook.metadata.get(HASH) != code_hash(notebook)


def execute(path: Path, folder: Path, browser: Browser) -> NotebookNode:
    """Execute a notebook in a folder; return it with outputs that can be stored."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=LIMIT_S, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when each cell ran
        if cell.cell_type == "code":
            # Warnings of libraries about the machine, with its paths.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                _clean(output, folder, browser)
    notebook.metadata[HASH] = code_hash(notebook)
    # Which Python ran it is of no interest, and would change with every machine.
    notebook.metadata.pop("language_info", None)
    return notebook


def _clean(output: NotebookNode, folder: Path, browser: Browser) -> None:
    """Store a chart as a picture, and texts without the path of the folder."""
    data = output.get("data", {})
    if PLOTLY in data:
        output.data = {"image/png": _picture(data[PLOTLY], browser), "text/plain": "a chart"}
    for fields, name in ((output, "text"), *((data, name) for name in data if name.startswith("text/"))):
        if name in fields:
            fields[name] = fields[name].replace(f"{folder}/", "").replace(str(folder), ".").replace(str(Path.home()), "~")


def _picture(figure: dict[str, Any], browser: Browser) -> str:
    """Draw a figure of plotly; returns a PNG in base64."""
    page = browser.new_page(viewport=CHART)
    page.set_content(
        plotly.io.to_html(figure, full_html=True, default_width="100%", default_height=f"{CHART['height'] - 16}px")
    )
    page.wait_for_selector(".main-svg")
    png = page.screenshot()
    page.close()
    return base64.b64encode(png).decode()


def main(names: list[str]) -> None:
    """Execute the notebooks with these names, such as 01_quickstart, or all of them."""
    with sync_playwright() as play, play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
        for path in NOTEBOOKS:
            if names and path.stem not in names:
                continue
            print(f"executing {path.name} ...", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                nbformat.write(execute(path, Path(folder), browser), path)


if __name__ == "__main__":
    main(sys.argv[1:])
