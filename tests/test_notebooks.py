"""Every notebook runs from top to bottom, and is stored without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LEAVES = {
    "01_quickstart": "prefray-demo/notebook/model/adapter_model.safetensors",
    "04_extend": "prefray-demo/extend/run/model/adapter_model.safetensors",
}
"""Notebook -> a file that it leaves."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for name in ("pipeline", "strategies", "cluster"):
        (tmp_path / name).symlink_to(ROOT / name)
    NotebookClient(notebook, timeout=1100, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / LEAVES[path.stem]).is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    assert not any(cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells)
