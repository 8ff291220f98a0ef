"""Every notebook runs from top to bottom, and is stored without outputs."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.small_gguf import shorten

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LEAVES = {
    "01_quickstart": "prefray-demo/notebook/model/adapter_model.safetensors",
    "02_sweep": "prefray-demo/sweep/best.yaml",
    "03_cluster": "prefray-demo/cluster/shared/run/model/adapter_model.safetensors",
    "04_extend": "prefray-demo/extend/run/model/adapter_model.safetensors",
    "05_vision": "prefray-demo/vision/run/model/model.safetensors",
}
"""Notebook -> a file that it leaves."""
SHOWN = {"01_quickstart": 8, "02_sweep": 4, "03_cluster": 3, "04_extend": 1, "05_vision": 6}
"""Notebook -> outputs that are tables, pictures or progress, at least."""


@pytest.fixture(scope="module")
def shortened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose package stands in for that of the model, which the demo's test runs whole."""
    return shorten(tmp_path_factory.mktemp("shortened"))


@pytest.mark.realmodel
@pytest.mark.driver
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, shortened: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, [shortened, ROOT])))
    monkeypatch.delenv("RAY_AUTH_MODE")  # Ray is started as a person starts it
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1100, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / LEAVES[path.stem]).is_file()
    assert _shown(notebook) >= SHOWN[path.stem]


def _shown(notebook: nbformat.NotebookNode) -> int:
    """Outputs that are more than text."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum(bool({"text/html", "application/vnd.plotly.v1+json"} & set(output.get("data", {}))) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    assert not any(cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells)
